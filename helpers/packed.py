"""The three losses of the paper and their gradient in E_r, in one forward and one backward pass: Eqs. (2)-(6).

Written as the paper has them, L_explore, L_guide and L_NLL are three teacher-forced passes with full logits. Here they
share one: the trunk [q; E_r; c] is followed by the branch [c_tmpl; y_GT], which takes the positions after r and attends
to q, E_r and itself but not to c. The parameters are frozen, and the head runs on the scored rows alone,
a chunk at a time.

    trunk    q1 q2 r1 r2 r3 c1 c2      causal               predicts r (L_NLL) and c (L_explore)
    branch         t1 t2 y1 y2         sees q, r, itself    predicts y (L_guide)

tests/test_revise.py holds the literal version; experiments/bench.py compares the two.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from helpers import common

# Dimension key: B rollouts, Q prompt, R prefix, C continuation, A branch (template and gold answer),
# T trunk = Q + R + C, S = T + A, N = sum of R over the batch, M targets, V vocabulary rows, D model width

HEAD_ROWS = 256  # rows whose logits exist at a time: 256 x 152k floats are 155 MB


def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
                     scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """Attention over [trunk; branch]: the trunk [q; E_r; c] is causal,
    the branch [c_tmpl; y_GT] sees q, E_r and itself.

    query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim), attention_mask (B, 1, A, S) bool, rows of
    the branch only: no S x S mask ever exists. Returns (B, S, heads, head_dim).
    """
    B, heads, S, width = query.shape
    T, groups = S - attention_mask.shape[2], heads // key.shape[1]
    trunk = F.scaled_dot_product_attention(query[:, :, :T], key[:, :, :T], value[:, :, :T], is_causal=True,
                                           scale=scaling, enable_gqa=groups > 1)
    # The heads of a group become rows of one head: with a mask, enable_gqa would fall back to the slow kernel on a GPU
    rows = query[:, :, T:].reshape(B, -1, groups * (S - T), width)
    branch = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1),
                                            scale=scaling)
    return torch.cat([trunk, branch.reshape(B, heads, S - T, -1)], 2).transpose(1, 2), None


AttentionInterface.register("latentrevise_packed", packed_attention)


@contextlib.contextmanager
def frozen(model, checkpoint: bool = False):
    """The model as Algorithm 1 wants it: no parameter gradients, no dropout, packed attention; all restored after."""
    training, attention = model.training, model.config._attn_implementation
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    model.set_attn_implementation("latentrevise_packed")
    for p in trainable:
        p.requires_grad_(False)
    try:
        with common.checkpointed(model, checkpoint):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        model.set_attn_implementation(attention)
        model.train(training)


def pack(batch: list, template: list[int], weights: tuple[float, float, float], mean: bool,
         device: torch.device) -> dict[str, Tensor]:
    """Index tensors of the packed pass. weights: those of L_explore, L_guide, L_NLL in Eq. (5).

    ids, positions (B, S); mask (B, 1, A, S); prefix (N,) flat slots of the E_r rows in B*S; and per target: source (M,)
    flat slot of the hidden state that predicts it, target (M,), owner (M,) rollout, term (M,) 0 explore 1 guide 2 nll,
    coef (M,) its weight in the total loss of cross-entropies.
    """
    T = max(len(f.q) + len(f.r) + len(f.c) for f in batch)
    A = max(len(template) + len(f.gold) for f in batch)
    S = T + A
    ids = torch.zeros(len(batch), S, dtype=torch.long)
    positions = torch.zeros(len(batch), S, dtype=torch.long)
    mask = torch.zeros(len(batch), 1, A, S, dtype=torch.bool)
    mask[..., T:] = torch.ones(A, A, dtype=torch.bool).tril()  # padded branch rows see themselves: no empty softmax
    prefix, targets = [], []
    for b, f in enumerate(batch):
        cut, end = len(f.q) + len(f.r), len(f.q) + len(f.r) + len(f.c)
        branch = template + f.gold
        ids[b, :end] = torch.tensor(f.q + f.r + f.c)
        ids[b, T:T + len(branch)] = torch.tensor(branch)
        positions[b] = torch.cat([torch.arange(T), cut + torch.arange(A)])  # the branch takes the place of c
        mask[b, :, :, :cut] = True
        prefix += range(b * S + len(f.q), b * S + cut)
        # The next-token shift, written once: the token in slot s is predicted from slot s-1, and the first token of the
        # branch from the last of the prefix.
        nll = [(s - 1, s, 2) for s in range(len(f.q), cut)]
        explore = [(s - 1, s, 0) for s in range(cut, end)]
        guide = [(s - 1 if s > T else cut - 1, s, 1) for s in range(T + len(template), T + len(branch))]
        # denominator with --reduction mean: the term's tokens
        scale = [w / (len(tokens) if mean else 1) for w, tokens in zip(weights, (explore, guide, nll))]
        for source, s, term in explore + guide + nll:
            # L_explore is +log p, minus a cross-entropy: Eq. (2)
            targets.append((b * S + source, int(ids[b, s]), b, term, (-1, 1, 1)[term] * scale[term]))
    source, target, owner, term, coef = zip(*targets)
    packed = {"ids": ids, "positions": positions, "mask": mask, "prefix": torch.tensor(prefix),
              "source": torch.tensor(source), "target": torch.tensor(target), "owner": torch.tensor(owner),
              "term": torch.tensor(term), "coef": torch.tensor(coef)}
    return {k: v.to(device) for k, v in packed.items()}


def losses_and_gradient(model, packed: dict[str, Tensor], E: Tensor, head_rows: int = HEAD_ROWS
                        ) -> tuple[Tensor, Tensor]:
    """L_explore, L_guide, L_NLL of every rollout (B, 3), Eqs. (2)-(4), and G = grad_E L_total (N, D), Eqs. (5)-(6).

    E (N, D) float32: the soft prefixes of the batch, one after the other. Call inside `frozen(model)`. The head runs in
    chunks of rows, each turned into the gradient of its hidden states at once, so rows x V logits never exist.
    """
    E = E.detach().requires_grad_()
    x = model.get_input_embeddings()(packed["ids"])  # (B, S, D)
    B, S, D = x.shape
    x = x.reshape(B * S, D).index_copy(0, packed["prefix"], E.to(x.dtype)).reshape(B, S, D)
    hidden = model.base_model(inputs_embeds=x, attention_mask=packed["mask"], position_ids=packed["positions"],
                              use_cache=False).last_hidden_state.reshape(B * S, D)
    h = hidden.detach()[packed["source"]]  # (M, D)
    dh, ce = torch.empty_like(h), torch.empty(len(h), device=h.device)
    for s in range(0, len(h), head_rows):
        rows = slice(s, s + head_rows)
        chunk = h[rows].requires_grad_()
        logits = model.get_output_embeddings()(chunk).float()  # (rows, V)
        ce_rows = F.cross_entropy(logits, packed["target"][rows], reduction="none")
        dh[rows], = torch.autograd.grad((packed["coef"][rows] * ce_rows).sum(), chunk)
        ce[rows] = ce_rows.detach()
    sign = torch.tensor([-1.0, 1.0, 1.0], device=h.device)
    losses = torch.zeros(B, 3, device=h.device).index_put_(
        (packed["owner"], packed["term"]), ce, accumulate=True) * sign
    dhidden = torch.zeros_like(hidden).index_add_(0, packed["source"], dh)
    G, = torch.autograd.grad(hidden, E, dhidden)
    return losses, G
