"""Algorithm 1 of the paper, line by line: three teacher-forced passes, full logits, one rollout.

Nothing is shared, packed or chunked, so that it can be read beside the paper. It is the oracle of tests/test_revise.py,
what experiments/bench.py compares revise.py with, and what docs/walkthrough.ipynb explains. `f` is a revise.Failure.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

# Dimension key: Q prompt, R prefix, T tokens before the targets, M targets, V vocabulary rows, D model width


def logp(model, context: Tensor, targets: list[int]) -> Tensor:
    """log p(targets | context), a sum over targets. context (T, D): input embeddings."""
    ids = torch.tensor(targets, device=context.device)
    x = torch.cat([context, model.get_input_embeddings()(ids).to(context.dtype)])[None]  # (1, T + M, D)
    logits = model(inputs_embeds=x, use_cache=False).logits[0].float()  # (T + M, V)
    # the token at T + m is predicted one place earlier
    return -F.cross_entropy(logits[len(context) - 1:-1], ids, reduction="sum")


def losses(model, f, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_explore, L_guide and L_NLL, Eqs. (2)-(4), of a soft prefix E (R, D)."""
    W = model.get_input_embeddings().weight
    embed = lambda ids: W[torch.tensor(ids, dtype=torch.long, device=W.device)]
    q, E = embed(f.q), E.to(W.dtype)
    explore = logp(model, torch.cat([q, E]), f.c)  # (2) the failed continuation becomes less likely
    guide = -logp(model, torch.cat([q, E, embed(f.template)]), f.gold)  # (3) the gold answer more
    logits = model(inputs_embeds=torch.cat([q, E])[None], use_cache=False).logits[0].float()
    r = torch.tensor(f.r, device=W.device)
    nll = F.cross_entropy(logits[len(q) - 1:-1], r, reduction="sum")  # (4) the prefix stays likely
    return explore, guide, nll


def gradient(model, f, E: Tensor, weights: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """The three losses (3,) and G = grad_E L_total (R, D), Eq. (5). weights: those of L_explore, L_guide, L_NLL."""
    E = E.detach().requires_grad_()
    three = losses(model, f, E)
    G, = torch.autograd.grad(sum(w * loss for w, loss in zip(weights, three)), E)
    return torch.stack(three).detach(), G


def algorithm1(model, f, steps: int = 10, gamma0: float = 0.1, weights: tuple[float, float, float] = (1.0, 1.0, 0.1),
               eps: float = 1e-3, allowed: Tensor | None = None) -> list[dict]:
    """Alg. 1: what each step found, {losses, vertices (R,), gap, E after it (R, D)}. allowed: ids of the vertices."""
    W = model.get_input_embeddings().weight.detach()
    allowed = torch.arange(len(W)) if allowed is None else allowed
    E, trace = W[torch.tensor(f.r)].float(), []
    for i in range(1, steps + 1):
        three, G = gradient(model, f, E, weights)
        if three[1] < eps:
            break
        v = allowed[(G @ W[allowed].float().T).argmin(-1)]  # (6) argmin_v <G_j, v>, at every position
        gamma = gamma0 * 2 / (i + 1)
        gap = float((G * (E - W[v].float())).sum())
        E = (1 - gamma) * E + gamma * W[v].float()  # (7)
        trace.append({"losses": three.tolist(), "vertices": v, "gap": gap, "E": E})
    return trace
