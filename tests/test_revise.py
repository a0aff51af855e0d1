"""revise.py against Algorithm 1 written literally: three separate teacher-forced passes with full logits."""
import argparse

import pytest
import torch
from conftest import ROWS, TOKENS, Shapes, tiny_model

import revise
from experiments import literal
from helpers.common import Policy, UserError

TEMPLATE_IDS = [5, 6, 7, 8]
ALLOWED = torch.arange(TOKENS)


def failures(sizes, seed=0, template=TEMPLATE_IDS):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(2, TOKENS, (n,), generator=g).tolist()
    return [revise.Failure(f"p{i}", 0, ids(q), ids(r), ids(c), template, ids(a))
            for i, (q, r, c, a) in enumerate(sizes)]


SIZES = [[(3, 5, 4, 2)], [(3, 5, 4, 2), (7, 2, 1, 1), (1, 9, 6, 5)],
         [(2 + i, 3 + (5 * i) % 7, 1 + (3 * i) % 5, 1 + i % 3) for i in range(8)]]


def revision_args(*flags, **changes):
    args = revise.get_args(["--model", "m", "--rollouts", "r", "--out", "o", *flags])
    return argparse.Namespace(**vars(args) | changes)


def run(model, batch, args, keep=frozenset()):
    """revise(): {step: prefixes of the rollouts}, records that replay() reads."""
    prefixes, history = revise.revise(Policy(model, None, TOKENS, [1]), batch, ALLOWED, args, 0, keep)
    return ({i: E.split([len(f.r) for f in batch]) for i, E in prefixes.items()},
            [{"id": f.id, "prefix_ids": f.r} | h for f, h in zip(batch, history)])


@pytest.mark.parametrize("family,tied", [
    ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("llama", False)])
@pytest.mark.parametrize("sizes", SIZES, ids=["batch1", "batch3", "batch8"])
@pytest.mark.parametrize("template", [TEMPLATE_IDS, []], ids=["template", "no-template"])
def test_eq2_eq3_eq4_eq5_losses_and_gradient_equal_three_literal_passes(family, tied, sizes, template):
    model, batch = tiny_model(family, tied), failures(sizes, template=template)
    W = model.get_input_embeddings().weight.detach()
    for mean in (False, True):
        soft = [revise.toward(W[f.r], W[f.r[::-1]], 0.3) for f in batch]
        with revise.frozen(model):
            p = revise.pack(batch, (1.0, 0.7, 0.1), mean, W.device)
            losses, G = revise.losses_and_gradient(model, p, torch.cat(soft), head_rows=3)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert model.config._attn_implementation == "sdpa"
        for f, E, ours, g in zip(batch, soft, losses, G.split([len(f.r) for f in batch])):
            E = E.clone().requires_grad_()
            three = literal.losses(model, f, E)
            lengths = [len(f.c), len(f.gold), len(f.r)] if mean else [1, 1, 1]
            total = sum(w * x / n for w, x, n in zip((1.0, 0.7, 0.1), three, lengths))
            expected, = torch.autograd.grad(total, E)
            torch.testing.assert_close(ours, torch.stack(three).detach(), rtol=1e-5, atol=1e-5)
            assert (g - expected).norm() <= 1e-5 * expected.norm()


def test_eq6_oracle_equals_brute_force_over_allowed_rows():
    g = torch.Generator().manual_seed(1)
    G, W = torch.randn(11, 8, generator=g), torch.randn(ROWS, 8, generator=g)
    allowed = torch.tensor([i for i in range(TOKENS) if i % 7])
    brute = [min(allowed.tolist(), key=lambda v: float(G[j] @ W[v])) for j in range(len(G))]
    for chunk in (1, 5, 64, 1000):
        assert revise.best_rows(-G, W, allowed, chunk=chunk).tolist() == brute


@pytest.mark.parametrize("metric,score", [
    ("inner", lambda x, v: x @ v), ("cosine", lambda x, v: x @ v / x.norm() / v.norm()),
    ("l2", lambda x, v: -(x - v).norm())])
def test_eq8_projection_equals_brute_force(metric, score):
    g = torch.Generator().manual_seed(2)
    X, W = torch.randn(9, 8, generator=g), torch.randn(ROWS, 8, generator=g) * torch.rand(ROWS, 1, generator=g)
    brute = [max(ALLOWED.tolist(), key=lambda v: float(score(X[j], W[v]))) for j in range(len(X))]
    assert revise.best_rows(X, W, ALLOWED, metric, chunk=17).tolist() == brute


@pytest.mark.parametrize("changes", [{}, {"alpha_guide": 0.0}, {"explore_weight": 0.0}, {"beta_nll": 0.0},
                                     {"gamma0": 0.5}], ids=lambda c: "-".join(c) or "paper")
def test_alg1_eq7_trace_equals_the_literal_algorithm_and_replays_bit_for_bit(changes):
    model, batch, args = tiny_model("qwen2"), failures(SIZES[1]), revision_args(**changes)
    W = model.get_input_embeddings().weight.detach()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prefixes, records = run(model, batch, args, {0, 4})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and [*prefixes] == [0, 4, 10]
    for b, (f, r) in enumerate(zip(batch, records)):
        weights = args.explore_weight, args.alpha_guide, args.beta_nll
        trace = literal.algorithm1(model, f, 10, args.gamma0, weights, args.eps_stop, ALLOWED)
        losses, vertices, after, gaps = zip(*((s["losses"], s["vertices"].tolist(), s["E"], s["gap"]) for s in trace))
        assert r["vertices"] == [*vertices] and r["gammas"] == [args.gamma0 * 2 / (i + 1) for i in range(1, 11)]
        torch.testing.assert_close(torch.tensor(r["losses"]), torch.tensor(losses), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(r["gaps"]), torch.tensor(gaps), rtol=1e-4, atol=1e-4)
        assert min(r["gaps"]) >= 0 and torch.equal(prefixes[0][b], W[f.r])
        torch.testing.assert_close(prefixes[4][b], after[3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prefixes[10][b], after[9], rtol=1e-5, atol=1e-6)
        assert torch.equal(revise.replay(W, r), prefixes[10][b])
        part = r | {"vertices": r["vertices"][:4], "gammas": r["gammas"][:4]}
        assert torch.equal(revise.replay(W, part), prefixes[4][b])


def test_replay_leaves_positions_where_they_are_that_a_step_did_not_move():
    W = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(3))
    E = revise.replay(W, {"prefix_ids": [3, 4], "gaps": [], "gammas": [0.5, 0.25],
                          "vertices": [[7, revise.STAYS], [revise.STAYS, 9]]})
    torch.testing.assert_close(E, torch.stack([0.5 * W[3] + 0.5 * W[7], 0.75 * W[4] + 0.25 * W[9]]))


def test_alg1_stops_a_rollout_below_eps_and_goes_on_with_the_others():
    model, batch = tiny_model("qwen2"), failures(SIZES[1])
    W = model.get_input_embeddings().weight.detach()
    alone = [run(model, [f], revision_args())[1][0] for f in batch]
    guides = sorted(step[1] for r in alone for step in r["losses"])
    args = revision_args(eps_stop=guides[len(guides) // 2])  # some rollouts stop, at different steps
    prefixes, records = run(model, batch, args)
    assert len({len(r["gammas"]) for r in records}) > 1
    for E, r, full in zip(prefixes[10], records, alone):
        stop = next((i for i, x in enumerate(full["losses"]) if x[1] < args.eps_stop), 10)
        assert len(r["gammas"]) == len(r["gaps"]) == stop and len(r["losses"]) == min(stop + 1, 10)
        assert r["vertices"] == full["vertices"][:stop] and torch.equal(revise.replay(W, r), E)


def test_table3_adam_equals_adam_on_one_literal_prefix_and_has_no_vertices():
    with pytest.raises(SystemExit):
        revision_args("--adam", "0.1", "--vertices", "random")
    model, batch, args = tiny_model("qwen2"), failures(SIZES[1]), revision_args("--adam", "0.05", revision_steps=4)
    W = model.get_input_embeddings().weight.detach()
    prefixes, records = run(model, batch, args, set(range(5)))
    for b, (f, r) in enumerate(zip(batch, records)):
        E = torch.nn.Parameter(prefixes[0][b].clone())
        adam = torch.optim.Adam([E], lr=0.05)
        for step in range(4):
            explore, guide, nll = literal.losses(model, f, E)
            E.grad, = torch.autograd.grad(explore + guide + 0.1 * nll, E)
            adam.step()
            torch.testing.assert_close(prefixes[step + 1][b], E.detach(), rtol=1e-4, atol=1e-5)
        assert r["gammas"] == r["vertices"] == [] and len(r["gaps"]) == 4
        with pytest.raises(UserError, match="moved by --adam"):
            revise.replay(W, r)


def test_checkpointed_activations_give_the_same_gradient():
    model, batch = tiny_model("qwen3"), failures(SIZES[1])
    p = revise.pack(batch, (1.0, 1.0, 0.1), False, torch.device("cpu"))
    soft, results = model.get_input_embeddings().weight.detach()[p.ids[p.prefix]], []
    model.model.layers[0].self_attn.attention_dropout = 0.5  # nothing may be dropped
    for checkpoint in (False, True):
        with revise.frozen(model, checkpoint):
            assert model.is_activation_checkpointing == checkpoint
            results.append(revise.losses_and_gradient(model, p, soft))
    assert not model.is_activation_checkpointing and not model.training
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_tensor_of_rows_times_vocabulary_exists():
    """Neither in the head nor in the oracle, once the rows exceed a chunk."""
    model, batch = tiny_model("qwen2"), failures([(5, 90, 30, 3)])
    W = model.get_input_embeddings().weight.detach()
    with revise.frozen(model):
        p = revise.pack(batch, (1.0, 1.0, 0.1), False, W.device)
        with Shapes() as shapes:
            _, G = revise.losses_and_gradient(model, p, W[batch[0].r], head_rows=8)
            revise.best_rows(-G, W, ALLOWED, chunk=16)
    assert 0 < max(s.numel() for s in shapes.seen) < 90 * TOKENS


def test_rollouts_longer_than_a_sliding_window_are_refused():
    model, batch = tiny_model("qwen2"), failures(SIZES[0])
    model.config.sliding_window = 14  # q, r, template and answer: no key is out of sight
    run(model, batch, revision_args(revision_steps=1))
    model.config.sliding_window = 13
    with pytest.raises(UserError, match="slides over 13 tokens"):
        run(model, batch, revision_args(revision_steps=1))


@pytest.mark.parametrize("n,rho,expected", [
    (10, 0.8, 8), (9, 0.8, 7), (1, 0.8, 0), (5, 0.2, 1), (4, 0.2, 0), (2, 0.5, 1), (200, 1e-9, 0),
    (200, 1 - 1e-12, 199)])
def test_sec3_cut_is_the_floor_of_rho_times_tokens_and_leaves_a_continuation(n, rho, expected):
    assert revise.cut([0] * n, rho) == expected


def test_permuted_answers_are_always_anothers():
    answers = {f"p{i}": str(i % 3) for i in range(20)}
    permuted = revise.permuted_answers(answers, seed=0)
    assert permuted.keys() == answers.keys() and all(permuted[i] != answers[i] for i in answers)
    assert permuted == revise.permuted_answers(dict(reversed(answers.items())), seed=0)
