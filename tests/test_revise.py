"""revise.py against Algorithm 1 written literally: three separate teacher-forced passes with full logits."""
import argparse

import pytest
import torch
from conftest import ROWS, TOKENS, tiny_model

import revise
from helpers import packed
from helpers.common import UserError

TEMPLATE_IDS = [5, 6, 7, 8]


def literal_losses(model, E, f, template):
    """Eqs. (2), (3), (4) for one rollout, a pass each, token by token; E (R, D) with gradient."""
    embed = model.get_input_embeddings()

    def logp(context, targets):  # sum_t log p(targets_t | context, targets_<t)
        x = torch.cat([context, embed(torch.tensor(targets))])[None]
        logits = model(inputs_embeds=x, use_cache=False).logits[0].log_softmax(-1)
        return sum(logits[len(context) + t - 1, y] for t, y in enumerate(targets))

    q = embed(torch.tensor(f.q))
    explore = logp(torch.cat([q, E]), f.c)
    guide = -logp(torch.cat([q, E, embed(torch.tensor(template, dtype=torch.long))]), f.gold)
    x = torch.cat([q, E])[None]
    logits = model(inputs_embeds=x, use_cache=False).logits[0].log_softmax(-1)
    nll = -sum(logits[len(f.q) + t - 1, y] for t, y in enumerate(f.r))
    return explore, guide, nll


def failures(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(2, TOKENS, (n,), generator=g).tolist()
    return [revise.Failure(f"p{i}", 0, ids(q), ids(r), ids(c), ids(a)) for i, (q, r, c, a) in enumerate(sizes)]


SIZES = [[(3, 5, 4, 2)], [(3, 5, 4, 2), (7, 2, 1, 1), (1, 9, 6, 5)],
         [(2 + i, 3 + (5 * i) % 7, 1 + (3 * i) % 5, 1 + i % 3) for i in range(8)]]


@pytest.mark.parametrize("family,tied", [
    ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("llama", False)])
@pytest.mark.parametrize("sizes", SIZES, ids=["batch1", "batch3", "batch8"])
@pytest.mark.parametrize("template", [TEMPLATE_IDS, []], ids=["template", "no-template"])
def test_eq2_eq3_eq4_eq5_losses_and_gradient_equal_three_literal_passes(family, tied, sizes, template):
    model, batch = tiny_model(family, tied), failures(sizes)
    W = model.get_input_embeddings().weight.detach()
    weights = (1.0, 0.7, 0.1)
    soft = [revise.soft_prefix(W, [f.r, f.r[::-1]], [0.7, 0.3]) for f in batch]
    with packed.frozen(model):
        tensors = packed.pack(batch, template, weights, False, W.device)
        losses, G = packed.losses_and_gradient(model, tensors, torch.cat(soft), head_rows=3)
    assert all(p.grad is None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    for f, E, ours, g in zip(batch, soft, losses, G.split([len(f.r) for f in batch])):
        E = E.clone().requires_grad_()
        literal = literal_losses(model, E, f, template)
        expected, = torch.autograd.grad(sum(w * x for w, x in zip(weights, literal)), E)
        torch.testing.assert_close(ours, torch.stack(literal).detach(), rtol=1e-5, atol=1e-5)
        assert (g - expected).norm() <= 1e-5 * expected.norm()


def test_eq6_oracle_equals_brute_force_over_allowed_rows():
    g = torch.Generator().manual_seed(1)
    G, W = torch.randn(11, 8, generator=g), torch.randn(ROWS, 8, generator=g)
    allowed = torch.tensor([i for i in range(TOKENS) if i % 7])
    brute = [min(allowed.tolist(), key=lambda v: float(G[j] @ W[v])) for j in range(len(G))]
    for chunk in (1, 5, 64, 1000):
        assert revise.best_rows(-G, W, allowed, chunk=chunk).tolist() == brute
    assert revise.oracle(G, W, allowed).tolist() == brute


@pytest.mark.parametrize("metric,score", [
    ("inner", lambda x, v: x @ v), ("cosine", lambda x, v: x @ v / x.norm() / v.norm()),
    ("l2", lambda x, v: -(x - v).norm())])
def test_eq8_projection_equals_brute_force(metric, score):
    g = torch.Generator().manual_seed(2)
    X, W = torch.randn(9, 8, generator=g), torch.randn(ROWS, 8, generator=g) * torch.rand(ROWS, 1, generator=g)
    allowed = torch.arange(TOKENS)
    brute = [max(allowed.tolist(), key=lambda v: float(score(X[j], W[v]))) for j in range(len(X))]
    assert revise.best_rows(X, W, allowed, metric, chunk=17).tolist() == brute


def revision_args(**changes):
    args = revise.get_args(["--model", "m", "--rollouts", "r", "--out", "o"])
    return argparse.Namespace(**vars(args) | changes)


def literal_algorithm1(model, f, template, allowed, args):
    """Alg. 1 for one rollout, line by line: list of (losses, vertices, E after the step)."""
    W = model.get_input_embeddings().weight.detach()
    E, trace = W[torch.tensor(f.r)].clone(), []
    for i in range(1, args.revision_steps + 1):
        E = E.detach().requires_grad_()
        explore, guide, nll = literal_losses(model, E, f, template)
        if guide < args.eps_stop:
            break
        G, = torch.autograd.grad(args.explore_weight * explore + args.alpha_guide * guide + args.beta_nll * nll, E)
        V = [min(allowed.tolist(), key=lambda v: float(G[j] @ W[v])) for j in range(len(f.r))]
        gamma = args.gamma0 * 2 / (i + 1)
        gap = float((G * (E.detach() - W[V])).sum())
        E = (1 - gamma) * E + gamma * W[V]
        trace.append(([float(x.detach()) for x in (explore, guide, nll)], V, E.detach(), gap))
    return trace


@pytest.mark.parametrize("changes", [{}, {"alpha_guide": 0.0}, {"explore_weight": 0.0}, {"beta_nll": 0.0},
                                     {"gamma0": 0.5}], ids=lambda c: "-".join(c) or "paper")
def test_alg1_eq7_trace_equals_the_literal_algorithm(changes):
    model, batch, args = tiny_model("qwen2"), failures(SIZES[1]), revision_args(**changes)
    W, allowed = model.get_input_embeddings().weight.detach(), torch.arange(TOKENS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prefixes = revise.revise_prefixes(model, batch, TEMPLATE_IDS, allowed, args, set(range(11)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for f, ours in zip(batch, prefixes):
        trace = literal_algorithm1(model, f, TEMPLATE_IDS, allowed, args)
        assert len(trace) == len(f.gammas) == 10 and sum(f.weights) == pytest.approx(1)
        assert [v.tolist() for v in f.atoms] == [f.r] + [V for _, V, _, _ in trace]
        torch.testing.assert_close(torch.tensor(f.losses), torch.tensor([x for x, *_ in trace]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(f.gaps), torch.tensor([x[3] for x in trace]), rtol=1e-4, atol=1e-4)
        assert min(f.gaps) >= 0
        torch.testing.assert_close(ours[10], trace[-1][2], rtol=1e-5, atol=1e-6)
        assert torch.equal(revise.soft_prefix(W, [v.tolist() for v in f.atoms], f.weights), ours[10])  # bit for bit


def test_alg1_stops_a_rollout_below_eps_and_goes_on_with_the_others():
    model, batch = tiny_model("qwen2"), failures(SIZES[1])
    alone = failures(SIZES[1])
    for f in alone:
        revise.revise_prefixes(model, [f], TEMPLATE_IDS, torch.arange(TOKENS), revision_args())
    guides = sorted(step[1] for f in alone for step in f.losses)
    args = revision_args(eps_stop=guides[len(guides) // 2])  # some rollouts stop, at different steps
    revise.revise_prefixes(model, batch, TEMPLATE_IDS, torch.arange(TOKENS), args)
    assert len({len(f.gammas) for f in batch}) > 1
    for f, full in zip(batch, alone):
        stop = next((i for i, x in enumerate(full.losses) if x[1] < args.eps_stop), 10)
        assert len(f.atoms) - 1 == len(f.gammas) == len(f.gaps) == stop
        assert [v.tolist() for v in f.atoms] == [v.tolist() for v in full.atoms[:stop + 1]]


def test_table3_adam_equals_torch_adam_and_leaves_the_hull():
    model, (f,) = tiny_model("qwen2"), failures(SIZES[0])
    args = revision_args(optimizer="adam", adam_lr=0.05, revision_steps=4)
    trace, = revise.revise_prefixes(model, [f], TEMPLATE_IDS, torch.arange(TOKENS), args, set(range(5)))
    E = torch.nn.Parameter(trace[0].clone())
    adam = torch.optim.Adam([E], lr=0.05)
    for step in range(4):
        explore, guide, nll = literal_losses(model, E, f, TEMPLATE_IDS)
        E.grad, = torch.autograd.grad(explore + guide + 0.1 * nll, E)
        adam.step()
        torch.testing.assert_close(trace[step + 1], E.detach(), rtol=1e-4, atol=1e-5)
    assert f.gammas == [] and f.weights == [1.0]


def test_checkpointed_activations_give_the_same_gradient():
    model, batch = tiny_model("qwen3"), failures(SIZES[1])
    soft = torch.cat([revise.soft_prefix(model.get_input_embeddings().weight.detach(), f.atoms, f.weights)
                      for f in batch])
    tensors = packed.pack(batch, TEMPLATE_IDS, (1.0, 1.0, 0.1), False, soft.device)
    results = []
    for checkpoint in (False, True):
        with packed.frozen(model, checkpoint):
            assert (model.is_activation_checkpointing, model.training) == (checkpoint, checkpoint)
            results.append(packed.losses_and_gradient(model, tensors, soft))
    assert not model.is_activation_checkpointing and not model.training
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_tensor_of_rows_times_vocabulary_exists():
    """Neither in the head nor in the oracle, once the rows exceed a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out)
                                      if isinstance(t, torch.Tensor))])
            return out

    model, batch = tiny_model("qwen2"), failures([(5, 90, 30, 3)])
    W = model.get_input_embeddings().weight.detach()
    with packed.frozen(model):
        tensors = packed.pack(batch, TEMPLATE_IDS, (1.0, 1.0, 0.1), False, W.device)
        with Watch():
            _, G = packed.losses_and_gradient(model, tensors, revise.soft_prefix(W, [batch[0].r], [1.0]), head_rows=8)
            revise.best_rows(-G, W, torch.arange(TOKENS), chunk=16)
    assert 0 < largest < 90 * TOKENS


def test_rollouts_longer_than_a_sliding_window_are_refused():
    model, batch = tiny_model("qwen2"), failures(SIZES[0])
    model.config.sliding_window = 12  # as long as the rollout: no key is out of sight
    revise.revise_prefixes(model, batch, TEMPLATE_IDS, torch.arange(TOKENS), revision_args(revision_steps=1))
    model.config.sliding_window = 11
    with pytest.raises(UserError, match="slides over 11 tokens"):
        revise.revise_prefixes(model, batch, TEMPLATE_IDS, torch.arange(TOKENS), revision_args(revision_steps=1))


def test_eq7_weights_multiply_the_steps_out():
    W = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(3))
    f = revise.Failure("p", 0, [1], [3, 4, 5], [2], [9])
    E = W[f.r]
    for v, gamma in (([7, 8, 9], 0.1), ([10, 3, 5], 0.1 * 2 / 3), ([3, 3, 3], 0.05)):
        f.move(torch.tensor(v), gamma)
        E = (1 - gamma) * E + gamma * W[v]
    assert sum(f.weights) == pytest.approx(1) and min(f.weights) >= 0
    torch.testing.assert_close(revise.soft_prefix(W, f.atoms, f.weights), E)


@pytest.mark.parametrize("n,rho,expected", [
    (10, 0.8, 8), (9, 0.8, 7), (1, 0.8, 0), (5, 0.2, 1), (4, 0.2, 0), (2, 0.5, 1)])
def test_sec3_cut_is_the_floor_of_rho_times_tokens(n, rho, expected):
    assert revise.cut([0] * n, rho) == expected
