"""controls.py against the definitions: other directions, other step sizes, other cuts, other answers."""
import argparse

import pytest
import torch
from conftest import ROWS, TOKENS, tiny_model
from test_revise import SIZES, TEMPLATE_IDS, failures, revision_args

import controls
import packed
import revise

W = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(3))


def prefix_in_use() -> revise.Failure:
    f = revise.Failure("p", 0, [1], [3, 4, 5], [2], [9])
    for v, gamma in (([7, 8, 9], 0.4), ([10, 3, 5], 0.3), ([6, 6, 6], 0.5)):
        f.move(torch.tensor(v), gamma)
    f.weights = [0.0, *f.weights[1:-1], f.weights[-1] + f.weights[0]]  # the first atom is out of use
    return f


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["frank-wolfe", "pairwise", "away"])
def test_a_move_is_the_direction_of_its_reference_and_stays_in_the_hull(rule, seed):
    f, g = prefix_in_use(), torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    E = revise.soft_prefix(W, f.atoms, f.weights)
    v = revise.oracle(g, W, torch.arange(TOKENS))
    move = controls.direction(f, g, E, v, W, rule)
    # the same from the points: Lacoste-Julien & Jaggi 2015, Alg. 1 and 2
    points = [W[torch.as_tensor(a)] for a in f.atoms]
    used = [p for p, w in zip(points, f.weights) if w > 0]
    worst = max(used, key=lambda p: float((g * p).sum()))
    forward, backward = W[v] - E, E - worst
    d = {"frank-wolfe": forward, "pairwise": W[v] - worst,
         "away": forward if -(g * forward).sum() >= -(g * backward).sum() else backward}[rule]
    assert move.slope == pytest.approx(float(-(g * d).sum()), rel=1e-4)
    assert move.norm2 == pytest.approx(float(d.square().sum()), rel=1e-4)
    for gamma in (0.0, 0.3 * move.limit, move.limit):
        atoms, weights = controls.moved(f, move, gamma)
        assert min(weights) >= 0 and sum(weights) == pytest.approx(1)
        torch.testing.assert_close(revise.soft_prefix(W, atoms, weights), E + gamma * d, atol=1e-5, rtol=1e-4)
    if move.limit < 1 or rule != "frank-wolfe":  # at the limit some weight is used up: no step can be longer
        assert min(controls.moved(f, move, move.limit)[1]) == pytest.approx(0, abs=1e-12)
    assert f.weights == prefix_in_use().weights  # nothing of the failure has changed


def test_away_steps_happen_and_the_first_step_is_frank_wolfes():
    f, E = prefix_in_use(), revise.soft_prefix(W, prefix_in_use().atoms, prefix_in_use().weights)
    g = torch.zeros(3, 8)
    worst = W[f.atoms[3]]
    g += worst - E  # uphill toward the last atom: the best is to leave it
    v = revise.oracle(1e-3 * g, W[:1], torch.arange(1))  # and nothing worth going to
    assert controls.direction(f, g, E, v, W, "away").vertex is None
    fresh = revise.Failure("p", 0, [1], [3, 4, 5], [2], [9])
    for rule in ("pairwise", "away"):
        assert controls.direction(fresh, g, W[fresh.r], v, W, rule).away is None


@pytest.mark.parametrize("limit", [1.0, 0.05])
def test_short_step_is_exact_on_a_quadratic(limit):
    g = torch.Generator().manual_seed(0)
    target, curvature = torch.randn(3, 8, generator=g), 2.5
    gradient = lambda E: curvature * (E - target)
    before, now = torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)
    d = torch.randn(3, 8, generator=g)
    slope = float(-(gradient(now) * d).sum())
    move = controls.Move(None, None, slope, limit, float(d.square().sum()))
    gamma = controls.short_step(move, 0.1, (before, gradient(before)), (now, gradient(now)))
    best = max(0.0, min(limit, slope / (curvature * float(d.square().sum()))))
    assert gamma == pytest.approx(best, rel=1e-4)
    assert controls.short_step(move, 0.1, None, (now, gradient(now))) == min(0.1, limit)


def literal_total(model, f, args, E):
    with packed.frozen(model):
        tensors = packed.pack([f], TEMPLATE_IDS, (args.explore_weight, args.alpha_guide, args.beta_nll),
                              args.reduction == "mean", E.device)
        losses, _ = packed.losses_and_gradient(model, tensors, E)
    count = [len(f.c), len(f.gold), len(f.r)] if args.reduction == "mean" else [1, 1, 1]
    return sum(float(x) * w / n
               for x, w, n in zip(losses[0], (args.explore_weight, args.alpha_guide, args.beta_nll), count))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["frank-wolfe", "pairwise", "away"])
def test_backtracking_takes_the_first_step_that_keeps_armijos_promise(rule, reduction):
    model, batch = tiny_model("qwen2"), failures(SIZES[1])
    args = revision_args(step_rule="backtracking", direction=rule, gamma0=0.9, revision_steps=4, reduction=reduction)
    weights = model.get_input_embeddings().weight.detach()
    trace = revise.revise_prefixes(model, batch, TEMPLATE_IDS, torch.arange(TOKENS), args, set(range(5)))
    alone = failures(SIZES[1])
    for f, one, prefixes in zip(batch, alone, trace):
        revise.revise_prefixes(model, [one], TEMPLATE_IDS, torch.arange(TOKENS), args)
        assert one.gammas == pytest.approx(f.gammas) and one.passes == f.passes  # neighbours change nothing
        values = [literal_total(model, f, args, prefixes[i]) for i in range(5)]
        assert all(b < a for a, b, gamma in zip(values, values[1:], f.gammas) if gamma)
        assert torch.equal(revise.soft_prefix(weights, f.atoms, f.weights), prefixes[4])
        # a pass for each gradient, and one for each trial: step sizes are halves of where the search began
        start, trials = 0.9, 0
        for gamma in f.gammas:
            trials += (4 if gamma == 0
                       else 1 + round(torch.tensor(start / gamma).log2().item()) if rule == "frank-wolfe" else 0)
            start = min(1.0, 2 * gamma or 0.9)
        assert rule != "frank-wolfe" or f.passes == 4 + trials
    assert len({g for f in batch for g in f.gammas}) > 2


def test_backtracking_gives_up_where_no_trial_keeps_the_promise():
    f = prefix_in_use()
    move = controls.Move(torch.tensor([1, 1, 1]), None, 1.0, 1.0, 1.0)
    seen = []
    gammas = controls.backtrack([f], {0: move}, 0.5, {0: 0.0}, lambda trial: seen.append(trial[0][1][-1]) or {0: 1.0})
    assert gammas == {0: 0.0} and f.passes == len(seen) == controls.TRIALS
    assert seen == [min(1.0, 2 * f.gammas[-1]) / 2**k for k in range(controls.TRIALS)]


@pytest.mark.parametrize("step_rule", ["diminishing", "short", "backtracking"])
@pytest.mark.parametrize("rule", ["frank-wolfe", "pairwise", "away"])
def test_every_variant_lowers_the_loss_inside_the_hull_whatever_the_batch(rule, step_rule):
    model, batch, alone = tiny_model("qwen3", tied=False), failures(SIZES[1]), failures(SIZES[1])
    args = revision_args(step_rule=step_rule, direction=rule, revision_steps=6)
    trace = revise.revise_prefixes(model, batch, TEMPLATE_IDS, torch.arange(TOKENS), args, {0, 6})
    for f, one, prefixes in zip(batch, alone, trace):
        revise.revise_prefixes(model, [one], TEMPLATE_IDS, torch.arange(TOKENS), args)
        assert [a.tolist() for a in one.atoms] == [a.tolist() for a in f.atoms]
        assert len(f.gammas) == 6 and min(f.weights) >= 0 and sum(f.weights) == pytest.approx(1)
        assert literal_total(model, f, args, prefixes[6]) < literal_total(model, f, args, prefixes[0])


def test_surprise_cuts_before_the_least_likely_token_of_the_range():
    model, g = tiny_model("qwen2"), torch.Generator().manual_seed(5)
    rollouts = [{"prompt_ids": torch.randint(2, TOKENS, (q,), generator=g).tolist(),
                 "response_ids": torch.randint(2, TOKENS, (n,), generator=g).tolist()}
                for q, n in [(3, 20), (7, 9), (2, 2)]]
    for r, cut in zip(rollouts, controls.surprise_cuts(model, rollouts)):
        ids, q, n = r["prompt_ids"] + r["response_ids"], len(r["prompt_ids"]), len(r["response_ids"])
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(max(1, int(0.5 * n)), max(2, int(0.95 * n)))
        assert cut == min(places, key=lambda t: float(logp[q + t - 1, ids[q + t]])) and 0 < cut < n


def test_permuted_answers_are_always_anothers():
    answers = {f"p{i}": str(i % 3) for i in range(20)}
    permuted = controls.permuted_answers(answers, seed=0)
    assert permuted.keys() == answers.keys() and all(permuted[i] != answers[i] for i in answers)
    assert permuted == controls.permuted_answers(dict(reversed(answers.items())), seed=0)


@pytest.mark.parametrize("flags", [
    ["--optimizer", "adam", "--direction", "away"], ["--optimizer", "adam", "--step-rule", "short"],
    ["--optimizer", "adam", "--vertices", "random"]])
def test_adam_has_no_frank_wolfe_steps_to_vary(flags):
    args = revise.get_args(["--model", "m", "--rollouts", "r", "--out", "o", *flags])
    assert isinstance(args, argparse.Namespace)
    with pytest.raises(revise.UserError, match="--optimizer adam"):
        revise.check_revision_args(args)


def test_the_latest_cut_by_surprise_has_to_leave_room_for_a_continuation():
    model, ids = tiny_model("qwen2"), list(range(2, 42))
    r = {"id": "p", "sample": 0, "prompt_ids": [5, 6], "response_ids": ids}
    for rule, room in (("fixed", 21), ("surprise", 39)):  # 0.5 and 0.95 of 40 tokens, and one
        revise.check_rollout(r, model, TOKENS, revision_args(rho=0.5, rho_rule=rule, max_new_tokens=room))
        with pytest.raises(revise.UserError, match="no room for a continuation"):
            revise.check_rollout(r, model, TOKENS, revision_args(rho=0.5, rho_rule=rule, max_new_tokens=room - 1))
