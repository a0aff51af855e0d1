"""train_grpo.py against hand computations and plain loops: the objective, dynamic sampling, rescue, what a run reports,
for any micro-batch, process count and restart."""
import copy
import json
import statistics
import sys
import types

import pytest
import torch
from conftest import here, read, stage, tiny_model, tiny_tokenizer, without_seconds, write_problems, write_verifier
from safetensors.torch import load_file
from test_train import (
    SELECTIVE,
    SIZES,
    assert_same_gradients,
    assert_same_runs,
    gradients,
    literal_logprobs,
    make_rows,
    sft_args,
    weights_of,
    write_rows,
)

import train_grpo
import train_sft
from helpers import common, training


def grpo_args(*extra):
    return train_grpo.get_args(["--model", "m", "--data", "d", "--out", "o", *map(str, extra)])


def train(model_dir, data, out, verifier, *extra, start=stage, **how):
    """In processes of its own, or with start=here in this one."""
    start("train_grpo" if start is here else "train_grpo.py", "--model", model_dir, "--data", data, "--out", out,
          "--verifier", verifier, "--max-new-tokens", 12, "--group-size", 4, "--batch-size", 4, *extra, **how)


@pytest.fixture
def world(tmp_path):
    """Problems and a verifier with which some groups are zero-hit."""
    return write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py", SELECTIVE)


def test_table7_is_what_the_trainers_do_by_default():
    args = grpo_args()
    assert (args.algo, args.group_size, args.batch_size, args.kl_coef, args.lr) == ("grpo", 8, 512, 0.001, 1e-5)
    assert (args.grad_clip, args.max_new_tokens, args.temperature, args.updates) == (1.0, 8192, 1.0, 1)
    assert (args.revision_steps, args.rho, args.gamma0, args.alpha_guide, args.beta_nll) == (10, 0.8, 0.1, 1.0, 0.1)
    assert (args.eps_stop, args.revise, args.injected_ratio) == (1e-3, False, "current")
    dapo = grpo_args("--algo", "dapo")
    assert (dapo.group_size, dapo.kl_coef, dapo.clip_low, dapo.clip_high) == (8, 0.0, 0.2, 0.28)  # DAPO's Eq. (10)
    assert grpo_args("--algo", "dapo", "--kl-coef", 0.1).kl_coef == 0.1


# --- Sec. 3.1: the objective of GRPO ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rewards", [[1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0.5, -1, 0, 1], [1, 0]])
def test_sec31_advantages_equal_a_hand_computation(rewards):
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert train_grpo.advantages(rewards) == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=1e-9)


@pytest.mark.parametrize("rewards", [[0] * 8, [1] * 8, [0.1] * 3, [1], [0]])
def test_sec31_groups_without_a_difference_have_no_advantage(rewards):
    assert train_grpo.advantages(rewards) == [0.0] * len(rewards)


def literal_loss(p, old, ref, advantage, low, high, kl_coef):
    """The formula of Sec. 3.1 for one token, from its log-probabilities: the loss and the KL."""
    ratio, kl = (p - old).exp(), (ref - p).exp() - (ref - p) - 1
    inside = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, inside * advantage) + kl_coef * kl, kl


@pytest.mark.parametrize("low,high", [(0.2, 0.2), (0.2, 0.28)], ids=["ppo", "dapo"])
def test_dapo_eq8_policy_loss_equals_a_loop_over_tokens(low, high):
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.0]).repeat(3)
    logp = torch.linspace(-3, -0.1, 9).repeat(3)
    old, ref = logp - ratios.log(), logp + torch.linspace(-1, 1, 27)
    advantage = torch.tensor([1.5, -0.7, 0.0]).repeat_interleave(9)
    loss, kl, clipped = train_grpo.policy_loss(logp, old, ref, advantage, low, high, 0.05)
    expected = [literal_loss(*token, low, high, 0.05) for token in zip(logp, old, ref, advantage)]
    for ours, theirs in zip((loss, kl), zip(*expected)):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)
    # the clip binds where the ratio has left the interval in the direction that the advantage rewards
    assert clipped.tolist() == [(a > 0 and x > 1 + high) or (a < 0 and x < 1 - low) for x, a in zip(ratios, advantage)]
    assert 0 < clipped.sum() < 27


def test_dapo_eq8_no_gradient_flows_where_the_clip_binds():
    logp = torch.zeros(4, requires_grad=True)
    old = -torch.tensor([1.5, 1.5, 0.5, 0.5]).log()  # ratios 1.5 and 0.5
    loss, _, clipped = train_grpo.policy_loss(logp, old, None, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2, 0.0)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False, True]
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))  # -ratio * A elsewhere


def test_k3_estimates_the_kl_without_bias_and_is_never_negative():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, generator=g).log_softmax(-1)
    _, kl, _ = train_grpo.policy_loss(p, p, q, torch.zeros(50), 0.2, 0.2, 1.0)
    assert kl.min() >= 0
    expected = (p.exp() * (p - q)).sum()  # KL(p || q); the mean over x ~ p of k3 is a sum over all 50 outcomes
    torch.testing.assert_close((p.exp() * kl).sum(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length,expected", [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1)])
def test_dapo_eq13_overlong_penalty(length, expected):
    assert train_grpo.overlong_penalty(length, limit=100, buffer=20) == pytest.approx(expected)
    assert train_grpo.overlong_penalty(length, limit=100, buffer=0) == 0


def test_k3_and_ratio_are_finite_for_differences_beyond_exp():
    logp = torch.tensor([-200.0, -0.1, -200.0, -0.1], requires_grad=True)
    other = torch.tensor([-0.1, -200.0, -0.1, -200.0])
    loss, kl, _ = train_grpo.policy_loss(logp, other, other, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.2, 0.01)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(kl).all() and torch.isfinite(logp.grad).all()
    inside = torch.tensor([19.9, -19.9])  # the bound changes nothing within it
    _, kl, _ = train_grpo.policy_loss(torch.zeros(2), torch.zeros(2), inside, torch.zeros(2), 0.2, 0.2, 1.0)
    torch.testing.assert_close(kl, inside.exp() - inside - 1)


def two_groups():
    rows = make_rows([(4, 5), (4, 8), (4, 2), (7, 3), (7, 6), (7, 6)])
    rewards = [1, 0, 0, 0, 1, 1]
    advantage = train_grpo.advantages(rewards[:3]) + train_grpo.advantages(rewards[3:])
    return [r | {"advantage": a} for r, a in zip(rows, advantage)]


def literal_grpo_loss(model, reference, old, rows, args):
    """The mean over all response tokens; old: log-probabilities of each row."""
    terms = []
    for r, o in zip(rows, old):
        tokens = zip(literal_logprobs(model, r)[0], o, literal_logprobs(reference, r)[0].detach())
        terms += [literal_loss(*token, r["advantage"], args.clip_low, args.clip_high, args.kl_coef)[0]
                  for token in tokens]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("budget", [1, 30, 10000])
def test_sec31_grpo_gradient_equals_the_formula_differentiated(monkeypatch, budget):
    args, rows = grpo_args("--kl-coef", 0.3, "--train-tokens", budget), two_groups()
    model, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=5)
    loss = literal_grpo_loss(model, reference, [literal_logprobs(model, r)[0].detach() for r in rows], rows, args)
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    stats = train_grpo.update(model, reference, None, rows, args)
    assert_same_gradients(seen[0], expected)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert stats["tokens"] == 30 and stats["clipped"] == 0
    entropy = torch.cat([literal_logprobs(model, r)[1] for r in rows]).mean()
    assert stats["entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_sec31_two_updates_equal_a_literal_ppo_loop():
    args = grpo_args("--kl-coef", 0.01, "--updates", 2, "--lr", 0.003, "--train-tokens", 30)
    rows = two_groups()
    model, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=5)
    literal = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(literal.parameters(), lr=0.003, weight_decay=0.01)
    old = [literal_logprobs(literal, r)[0].detach() for r in rows]
    for _ in range(2):
        ratios = torch.cat([literal_logprobs(literal, r)[0].detach() - o for r, o in zip(rows, old)]).exp()
        loss = literal_grpo_loss(literal, reference, old, rows, args)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(literal.parameters(), 1.0)
        optimizer.step()
    assert (ratios - 1).abs().max() > 0.2  # the second pass is off-policy, and clips
    stats = train_grpo.update(model, reference, training.make_optimizer(model, args), rows, args)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert stats["clipped"] > 0
    for (name, ours), expected in zip(model.named_parameters(), literal.parameters()):
        # Adam divides by the gradient's size: where it is all but 0 the rounding decides, hence no tighter bound
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4, msg=name)
        assert (ours - expected).abs().mean() < 1e-6


# --- injected trajectories: LUFFY -------------------------------------------------------------------------------------
def test_luffy_shaping_of_injected_tokens_equals_a_hand_computation():
    p, old = torch.tensor([0.9, 0.1, 0.01, 0.5, 0.5]), torch.tensor([0.1, 0.9, 0.5, 0.25, 0.5])
    logp = p.log().requires_grad_()
    advantage = torch.tensor([1.5, 1.5, -2.0, 1.0, -0.5])
    shaped = torch.tensor([True, True, True, False, False])
    loss, _, clipped = train_grpo.policy_loss(logp, old.log(), None, advantage, 0.2, 0.2, 0.0, shaped)
    # f(p) A with f(x) = x / (x + 0.1), whatever the old probability; others as ever: ratio 2 clipped at 1.2, ratio 1
    expected = [-1.5 * 0.9 / 1.0, -1.5 * 0.1 / 0.2, 2.0 * 0.01 / 0.11, -1.2, 0.5]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert clipped.tolist() == [False, False, False, True, False]
    loss.sum().backward()
    # d/dlogp of -A p / (p + g) is -A g p / (p + g)^2: largest at p = g, so unlikely tokens are not drowned out
    expected = [-1.5 * 0.1 * 0.9 / 1.0**2, -1.5 * 0.1 * 0.1 / 0.2**2, 2.0 * 0.1 * 0.01 / 0.11**2, 0.0, 0.5]
    assert logp.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ratio", ["current", "luffy"])
@pytest.mark.parametrize("updates", [1, 2])
def test_injected_ratio_in_the_update_equals_the_formula_differentiated(monkeypatch, ratio, updates):
    args = grpo_args("--injected-ratio", ratio, "--kl-coef", 0, "--train-tokens", 30, "--updates", updates)
    model, terms = tiny_model("qwen2"), []
    rows = [r | {"advantage": a, "injected": a > 0} for r, a in zip(make_rows(SIZES), (1.5, -0.5, -0.5, -0.5, 1.0))]
    for r in rows:
        p = literal_logprobs(model, r)[0].exp()
        off = ratio == "luffy" and r["injected"]
        terms.append(-r["advantage"] * (p / (p + 0.1) if off else p / p.detach()))  # on policy the ratio is 1
    torch.cat(terms).mean().backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    train_grpo.update(model, None, None, rows, args)
    assert len(seen) == updates  # the weights stay, so that every update is the first one
    for found in seen:
        assert_same_gradients(found, expected)


# --- batches: dynamic sampling ----------------------------------------------------------------------------------------
def collect(args, rewards, monkeypatch, cursor=0):
    """What collect() returns, and what was sampled: (key, ids) of every round. rewards: {id: those of its group}."""
    calls = []

    def sample_groups(policy, problems, key, args, verify):
        calls.append((key, [p["id"] for p in problems]))
        return [[{"id": p["id"], "sample": s, "reward": r, "response_ids": [5] * (4 + s),
                  "finish": "eos" if r else "length"} for s, r in enumerate(rewards[p["id"]])] for p in problems]

    monkeypatch.setattr(train_grpo, "sample_groups", sample_groups)
    return *train_grpo.collect(None, [{"id": i} for i in rewards], 1, cursor, args, None), calls


REWARDS = {f"p{i}": [[0, 0], [1, 1], [0, 1]][i % 3] for i in range(12)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_dapo_dynamic_sampling_drops_groups_without_signal_and_fills_the_batch(monkeypatch, size):
    args = grpo_args("--algo", "dapo", "--batch-size", size, "--resample", 9)
    groups, cursor, counts, calls = collect(args, REWARDS, monkeypatch, cursor=7)
    assert len(groups) == counts["kept"] == size
    assert all([r["reward"] for r in g] == [0, 1] for g in groups)
    assert len(calls) > 1 and cursor == 7 + size * len(calls)
    order = [training.draw_rows(12, i, 1, 0)[0] for i in range(7, cursor)]
    with_signal = [f"p{i}" for i in order if i % 3 == 2]
    assert [g[0]["id"] for g in groups] == with_signal[:size]  # in the order of the data, the first that have signal
    sampled = [r for i in order for r in REWARDS[f"p{i}"]]  # over all rounds
    assert counts | {"seconds_sample": 0, "seconds_revise": 0} == {
        "groups": len(order), "zero_hit": sum(i % 3 == 0 for i in order), "signal": len(with_signal),
        "responses": len(sampled), "hits": sum(sampled), "truncated": sampled.count(0), "tokens": 9 * len(order),
        "longest": 5, "kept": size, "rescued": 0, "seconds_sample": 0, "seconds_revise": 0}


@pytest.mark.parametrize("rewards,resample,kept,rounds", [
    ({"a": [0, 0]} | {i: [0, 1] for i in "bcd"}, 3, 4, 2),  # three of a round of four have signal
    ({i: [0, 0] for i in "abcdefghijk"} | {"z": [0, 1]}, 2, 1, 3)], ids=["no more than needed", "bounded"])
def test_dapo_rounds_end(monkeypatch, rewards, resample, kept, rounds):
    args = grpo_args("--algo", "dapo", "--batch-size", 4, "--resample", resample)
    groups, cursor, counts, calls = collect(args, rewards, monkeypatch)
    assert len(groups) == counts["kept"] == kept and len(calls) == rounds and cursor == 4 * rounds


def test_dapo_samples_a_prompt_anew_when_a_further_round_meets_it_again(monkeypatch):
    args = grpo_args("--algo", "dapo", "--batch-size", 2, "--resample", 1)
    groups, _, _, calls = collect(args, {"a": [0, 0], "b": [0, 1]}, monkeypatch)
    assert [sorted(ids) for _, ids in calls] == [["a", "b"]] * 2 and len(groups) == 2
    assert len({key for key, _ in calls}) == 2  # the same random numbers would give the very same responses


def test_grpo_keeps_every_group_and_samples_once(monkeypatch):
    groups, cursor, counts, calls = collect(grpo_args("--batch-size", 5), REWARDS, monkeypatch)
    assert len(groups) == counts["kept"] == cursor == 5 and len(calls) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 9])
def test_the_batch_is_the_first_wanted_groups_whoever_has_sampled_them(monkeypatch, world_size, room):
    wanted = [True, False, True, True, False, False, True]  # in the order of the data
    found = []
    monkeypatch.setattr(common, "world_size", lambda: world_size)
    monkeypatch.setattr(common, "gather", lambda _: [
        [i for i in range(r, 7, world_size) if wanted[i]] for r in range(world_size)])
    for rank in range(world_size):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        indices, chosen = train_grpo.choose(wanted[rank::world_size], room)
        assert chosen == min(room, 4)
        found += [rank + j * world_size for j in indices]
    assert sorted(found) == [0, 2, 3, 6][:room]


def test_steps_without_any_signal_are_warned_of_and_change_nothing(tmp_path, model_dir, world, monkeypatch, capsys):
    monkeypatch.setattr(train_grpo, "WARN_AFTER", 3)
    never = write_verifier(tmp_path / "never.py", "def verify(response, gold):\n    return False\n")
    train(model_dir, world[0], tmp_path / "o", never, "--algo", "dapo", "--steps", 5, "--resample", 1,
          "--save-every", 2, start=here)
    metrics, said = read(tmp_path / "o" / "metrics.jsonl"), "".join(capsys.readouterr())
    assert {(m["kept_groups"], m["zero_hit"], m["signal"]) for m in metrics} == {(0, 1, 0)}
    assert "only 0 of 4 groups had signal" in said
    assert said.count("warning: no group of the last 3 steps had both") == 1
    start = load_file(model_dir / "model.safetensors")
    assert all(torch.equal(v, start[k]) for k, v in weights_of(tmp_path / "o").items())  # nothing to learn from
    state = json.loads((tmp_path / "o/checkpoint-000002/state.json").read_text())
    assert state == {"cursor": 16, "silent": 2, "step": 2}  # a restart goes on counting


# --- Sec. 4.1: rescue -------------------------------------------------------------------------------------------------
def test_sec41_revise_is_bit_identical_to_grpo_where_every_group_has_a_hit(tmp_path, model_dir):
    data, verifier = write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py")
    plain, revised = tmp_path / "plain", tmp_path / "revised"
    train(model_dir, data, plain, verifier, "--steps", 3, "--group-size", 8)
    train(model_dir, data, revised, verifier, "--steps", 3, "--group-size", 8, "--revise")
    metrics = without_seconds(read(plain / "metrics.jsonl"))
    assert all(m["zero_hit"] == 0 and 0 < m["reward"] < 1 and m["grad_norm"] > 0 for m in metrics)
    assert metrics == without_seconds(read(revised / "metrics.jsonl"))
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (plain / name).read_bytes() == (revised / name).read_bytes()


def group(name, rewards, lengths=None):
    return [{"id": name, "sample": s, "prompt_ids": [5], "response_ids": [6] * n, "reward": r, "answer": "1"}
            for s, (r, n) in enumerate(zip(rewards, lengths or [10] * len(rewards)))]


@pytest.mark.parametrize("inject", ["replace", "append"])
def test_sec41_the_recovered_trajectory_takes_the_place_of_the_rollout_it_came_from(monkeypatch, inject):
    args = grpo_args("--revise", "--inject", inject, "--revise-tokens", 1, "--group-size", 4)
    groups = [group("hit", [0, 1, 0, 0]), group("saved", [0] * 4, [1, 10, 10, 10]), group("lost", [0] * 4),
              group("short", [0] * 4, [1] * 4), group("beyond the window", [0] * 4, [40] * 4)]
    policy = common.Policy(tiny_model("qwen2"), tiny_tokenizer(), 0, [])
    policy.model.config.sliding_window = 90
    before, asked, seeds = copy.deepcopy(groups), [], set()

    def revise_batch(policy, rollouts, args, verify, seed):
        seeds.add(seed)
        asked.extend((r["id"], r["sample"]) for r in rollouts)
        good = {"ids": [8, 9], "reward": 1, "response": "r", "finish": "eos"}
        found = {"saved": [good | {"reward": 0}, good, good | {"ids": [4]}], "lost": [good | {"reward": 0}]}
        return [{"id": r["id"], "sample": r["sample"], "prompt_ids": r["prompt_ids"], "projected_ids": [7] * 8,
                 "prefix_len": 8, "answer": "1", "continuations": found[r["id"]]} for r in rollouts]

    monkeypatch.setattr(train_grpo.revise, "revise_batch", revise_batch)
    after, rescued = train_grpo.rescue(policy, groups, (0, 1), args, None)
    assert groups == before  # a new list; what was sampled stays as it was
    assert rescued == 1
    assert len(seeds) == 1 and seeds != {args.seed}  # new numbers each step
    assert asked == [("saved", 1), ("lost", 0)]  # one rollout of each zero-hit group: the first that can be cut
    assert after[:1] + after[2:] == before[:1] + before[2:]
    new = next(r for r in after[1] if r.get("injected"))
    assert new["response_ids"] == [7] * 8 + [8, 9] and new["reward"] == 1 and new["sample"] == 1
    kept = [r for r in after[1] if not r.get("injected")]
    advantage = train_grpo.advantages([r["reward"] for r in after[1]])
    if inject == "replace":
        assert kept == [r for r in before[1] if r["sample"] != 1] and after[1].index(new) == 1
        # rewards 0 1 0 0: mean 1/4, standard deviation 1/2
        assert advantage == pytest.approx([-0.5, 1.5, -0.5, -0.5], rel=1e-5)
    else:
        assert kept == before[1] and after[1].index(new) == 4
        # rewards 0 0 0 0 1: mean 1/5, variance (4/25 + 16/25) / 4 = 1/5
        assert advantage == pytest.approx([-(0.2**0.5)] * 4 + [0.8 / 0.2**0.5], rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--updates", 2], ["--algo", "dapo", "--resample", 2, "--batch-size", 3],
                                   ["--batch-size", 1, "--group-size", 2, "--steps", 6, "--checkpoint-activations"]],
                         ids=["grpo", "updates", "dapo", "one-prompt"])
def test_grpo_with_revise_is_the_same_on_one_and_two_processes_and_sharded(tmp_path, model_dir, world, flags):
    for n, shard in ((1, "off"), (2, "off"), (2, "on")):
        out = tmp_path / f"{n}-{shard}"
        train(model_dir, world[0], out, world[1], "--steps", 3, "--revise", "--train-tokens", 60, *flags, "--shard",
              shard, processes=n, draws=out)
        assert_same_runs(tmp_path / "1-off", out, model_dir)
    assert any(m["rescued"] > 0 for m in read(out / "metrics.jsonl"))


# --- what a run reports -----------------------------------------------------------------------------------------------
def test_every_metric_equals_a_count_over_what_was_sampled_and_trained(tmp_path, model_dir, world, monkeypatch):
    sampled, trained, sample, learn = [], [], train_grpo.sample_groups, train_grpo.update
    monkeypatch.setattr(train_grpo, "sample_groups", lambda *a: sampled.append(sample(*a)) or sampled[-1])
    monkeypatch.setattr(train_grpo, "update", lambda *a: trained.append(a[3]) or learn(*a))
    train(model_dir, world[0], tmp_path / "o", world[1], "--revise", "--steps", 3, "--samples", 2, 1, start=here)
    metrics = read(tmp_path / "o" / "metrics.jsonl")
    assert len(metrics) == 3 and any(m["rescued"] for m in metrics)
    for m, groups, rows in zip(metrics, sampled, trained):
        responses = [r for g in groups for r in g]
        lengths = [len(r["response_ids"]) for r in responses]
        mean = lambda values: pytest.approx(sum(values) / len(values))
        assert m["reward"] == mean([r["reward"] for r in responses])
        assert m["zero_hit"] == mean([not any(r["reward"] for r in g) for g in groups])
        assert m["length_mean"] == mean(lengths) and m["length_max"] == max(lengths)
        assert m["truncated"] == mean([r["finish"] == "length" for r in responses])
        assert m["rescued"] == pytest.approx(len({r["id"] for r in rows if r.get("injected")}) / len(groups))
        after = [[r["reward"] for r in rows if r["id"] == g[0]["id"]] for g in groups]
        assert m["signal"] == mean([len(set(rewards)) > 1 for rewards in after])
        tokens = [(len(r["response_ids"]), r.get("injected", False)) for r in rows]
        assert m["tokens"] == sum(n for n, _ in tokens)
        assert m["injected_tokens"] == pytest.approx(sum(n for n, i in tokens if i) / m["tokens"])
        assert m["lr"] == 1e-5 and m["tokens_per_second"] > 0 and 0.05 < m["memory_gb"] < 100
        assert all(m[k] >= 0 for k in (
            "kl", "clipped", "entropy", "grad_norm", "seconds_sample", "seconds_revise", "seconds_update"))
    samples = read(tmp_path / "o" / "samples.jsonl")
    assert [s["step"] for s in samples] == [1] * 4 + [3] * 4  # a group of each, rescued ones first
    for step, m in ((1, metrics[0]), (3, metrics[2])):
        shown = [s for s in samples if s["step"] == step]
        assert len({s["id"] for s in shown}) == 1 and any(s["injected"] for s in shown) == (m["rescued"] > 0)
    for s in samples:
        row = next(r for r in trained[s["step"] - 1] if (r["id"], r["response"]) == (s["id"], s["response"]))
        assert s["prompt"] == tiny_tokenizer().decode(row["prompt_ids"]) and s["advantage"] == row["advantage"]
        assert s["injected"] == row.get("injected", False)


def test_tensorboard_and_wandb_get_every_metric_of_every_step(tmp_path, model_dir, monkeypatch):
    """Stand-ins for the two optional packages note what they are told."""
    calls = []
    board = types.SimpleNamespace(add_scalar=lambda *a: calls.append(("board", *a)), flush=lambda: None)
    run = types.SimpleNamespace(log=lambda metrics, step: calls.append(("wandb", step, metrics)))
    for name, module in {"tensorboard": {}, "torch.utils.tensorboard": {
            "SummaryWriter": lambda folder, purge_step: calls.append(("open", folder, purge_step)) or board},
            "wandb": {"init": lambda **how: calls.append(("init", how["name"])) or run}}.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__spec__=True, **module))
    data = write_rows(tmp_path / "rows.jsonl", make_rows(SIZES))
    train_sft.main(sft_args(model_dir, data, tmp_path / "o", "--steps", "2", "--batch-size", "1",
                            "--log-to", "tensorboard", "wandb"))
    metrics = read(tmp_path / "o" / "metrics.jsonl")
    told = lambda name: [c[1:] for c in calls if c[0] == name]
    assert told("open") == [(str(tmp_path / "o" / "tensorboard"), 1)] and told("init") == [("o",)]
    assert told("wandb") == [(m["step"], m) for m in metrics]
    assert sorted(told("board")) == sorted((k, v, m["step"]) for m in metrics for k, v in m.items() if k != "step")


@pytest.mark.parametrize("name", training.LOGGERS)
@pytest.mark.parametrize("get_args", [train_grpo.get_args, train_sft.get_args], ids=["grpo", "sft"])
def test_a_logger_that_is_not_installed_is_one_line_naming_the_flag(monkeypatch, capsys, name, get_args):
    monkeypatch.setitem(sys.modules, name, None)  # as what is not there
    with pytest.raises(SystemExit):
        get_args(["--model", "m", "--data", "d", "--out", "o", "--log-to", name])
    assert capsys.readouterr().err.endswith(f"argument --log-to: {name} is not installed: pip install {name}\n")
