"""Revise failed rollouts of zero-hit prompts in embedding space and keep what the verifier accepts (paper Sec. 3, Alg. 1).

    python revise.py --model toy_model --rollouts out/rollouts --out out/revised
    torchrun --nproc-per-node 8 revise.py --model Qwen/Qwen2.5-1.5B-Instruct --rollouts out/rollouts --out out/revised
    python revise.py show out/revised/revised.jsonl --id X     what happened to one prefix (show.py)

A failed rollout [r; c] is cut after a share rho of its tokens. With the model frozen, K Frank-Wolfe steps move the input
embeddings E_r of the prefix inside conv(W), the hull of the vocabulary embeddings: away from the failed continuation c,
toward the gold answer. New continuations c^ are decoded from [q; E_r*]; where one is right, E_r* is projected to tokens
r^ and [r^; c^] is verified again: that is a recovered trajectory.

Reads   rollouts.jsonl of rollout.py (prompts whose rollouts all failed).
Writes  revised.jsonl, one record per failed rollout tried: `id`, `sample`, `prefix_len`, `recovered`, `losses` (explore,
        guide, nll per step), `gaps`, `gammas`, `atoms`, `kept` (share of prefix tokens the projection gives back),
        `continuations`; recovered.jsonl, one hard trajectory per right continuation, in the fields of rollouts.jsonl.

Differs from the paper: nothing in the losses, the step and the projection. What the paper leaves open: the cut is
floor(rho * tokens) with end-of-sequence counted in c; only ids that the tokenizer can decode are vertices; eight
continuations per prefix; all failed rollouts of a prompt are tried in turn until one is recovered.
"""
import argparse
import contextlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface

import common
import rollout
from common import UserError

# Dimension key: B rollouts, Q prompt, R prefix, C continuation, A branch (template and gold answer), T trunk = Q + R + C,
# S = T + A, N = sum of R over the batch, M targets, V vocabulary rows, D model width

TEMPLATE = "Based on my current reasoning process, the final answer is "
HEAD_ROWS = 256  # rows whose logits exist at a time: 256 x 152k floats are 155 MB
ORACLE_ROWS = 16384  # vocabulary rows scored at a time


@dataclass
class Failure:
    """One failed rollout on its way through Algorithm 1. Token ids throughout."""
    id: str
    sample: int
    q: list[int]
    r: list[int]
    c: list[int]
    gold: list[int]  # y_GT, as the template continues
    atoms: list[Tensor] = field(default_factory=list)  # v*_i of each step, (R,)
    gammas: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # L_explore, L_guide, L_NLL before each step
    gaps: list[float] = field(default_factory=list)  # Frank-Wolfe duality gap before each step


# --- the packed pass: Eqs. (2)-(5) and their gradient in one forward and one backward ---------------------------------
def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
                     scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """Attention over [trunk; branch]: the trunk [q; E_r; c] is causal, the branch [c_tmpl; y_GT] sees q, E_r and itself.

    query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim), attention_mask (B, 1, A, S) bool, rows of
    the branch only: no S x S mask ever exists. Returns (B, S, heads, head_dim).
    """
    B, heads, S, width = query.shape
    T, groups = S - attention_mask.shape[2], heads // key.shape[1]
    trunk = F.scaled_dot_product_attention(query[:, :, :T], key[:, :, :T], value[:, :, :T], is_causal=True, scale=scaling,
                                           enable_gqa=groups > 1)
    # The heads of a group become rows of one head: with a mask, enable_gqa would fall back to the slow kernel on a GPU
    rows = query[:, :, T:].reshape(B, -1, groups * (S - T), width)
    branch = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), scale=scaling)
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


def pack(batch: list[Failure], template: list[int], weights: tuple[float, float, float], mean: bool,
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
        for source, s, term in explore + guide + nll:
            count = {0: len(explore), 1: len(guide), 2: len(nll)}[term] if mean else 1  # denominator: the term's tokens
            # L_explore is +log p, minus a cross-entropy: Eq. (2)
            targets.append((b * S + source, int(ids[b, s]), b, term, (-1, 1, 1)[term] * weights[term] / count))
    source, target, owner, term, coef = zip(*targets)
    packed = {"ids": ids, "positions": positions, "mask": mask, "prefix": torch.tensor(prefix),
              "source": torch.tensor(source), "target": torch.tensor(target), "owner": torch.tensor(owner),
              "term": torch.tensor(term), "coef": torch.tensor(coef)}
    return {k: v.to(device) for k, v in packed.items()}


def losses_and_gradient(model, packed: dict[str, Tensor], E: Tensor, head_rows: int = HEAD_ROWS) -> tuple[Tensor, Tensor]:
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
    losses = torch.zeros(B, 3, device=h.device).index_put_((packed["owner"], packed["term"]), ce, accumulate=True) * sign
    dhidden = torch.zeros_like(hidden).index_add_(0, packed["source"], dh)
    G, = torch.autograd.grad(hidden, E, dhidden)
    return losses, G


# --- Frank-Wolfe -----------------------------------------------------------------------------------------------------
def best_rows(X: Tensor, W: Tensor, allowed: Tensor, metric: str = "inner", chunk: int = ORACLE_ROWS) -> Tensor:
    """For every row of X (N, D) the id in `allowed` whose row of W (V, D) scores highest: ids (N,).

    metric: inner <x, v>, cosine <x, v>/|v|, or l2 -|x - v|^2. Scores are float32 (bfloat16 scores change vertices) and
    exist for `chunk` vocabulary rows at a time. Ties go to the id that comes first.
    """
    best = torch.full((len(X),), -torch.inf, device=X.device)
    ids = torch.zeros(len(X), dtype=torch.long, device=X.device)
    for s in range(0, len(allowed), chunk):
        rows = W[allowed[s:s + chunk]].float()  # (chunk, D)
        scores = X.float() @ rows.T  # (N, chunk)
        if metric == "cosine":
            # denominator |v|: |x| is the same for every v. A row of zeros (padding often is one) scores 0, not nan
            scores = scores / rows.norm(dim=-1).clamp(min=1e-12)
        elif metric == "l2":
            scores = 2 * scores - rows.square().sum(-1)  # |x|^2 is the same for every v
        value, index = scores.max(-1)
        better = value > best
        best = torch.where(better, value, best)
        ids = torch.where(better, allowed[s:s + chunk][index], ids)
    return ids


def oracle(G: Tensor, W: Tensor, allowed: Tensor) -> Tensor:
    """Eq. (6), the vertex that lowers the linearised loss most: argmin_v <G_j, v> at every position, ids (N,)."""
    return best_rows(-G, W, allowed)


def soft_prefix(W: Tensor, r: list[int], atoms: list[Tensor], gammas: list[float]) -> Tensor:
    """E_r after len(atoms) steps of Eq. (7), (R, D) float32: (1 - gamma) E + gamma W[v], from Embed(r).

    An iterate is a convex combination of (K+1) tokens per position with the same weights everywhere, so ids and step
    sizes are all there is to store: this rebuilds it bit for bit.
    """
    E = W[torch.as_tensor(r, dtype=torch.long, device=W.device)].float()
    for v, gamma in zip(atoms, gammas):
        E = (1 - gamma) * E + gamma * W[torch.as_tensor(v, device=W.device)].float()
    return E


def random_vertices(f: Failure, step: int, allowed: Tensor, seed: int) -> Tensor:
    """Control: one allowed id per position, (R,), that no gradient has chosen."""
    generator = torch.Generator().manual_seed(rollout.row_key(seed, f.id, f.sample, "vertex", step))
    return allowed[torch.randint(len(allowed), (len(f.r),), generator=generator).to(allowed.device)]


def adam_step(E: Tensor, g: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float) -> Tensor:
    """Ablation "no Frank-Wolfe": one step of Adam (Kingma & Ba 2015) on the free prefix, which may leave the hull."""
    m, v = moments
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    return E - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)  # denominators: bias corrections


def revise_prefixes(model, batch: list[Failure], template: list[int], allowed: Tensor, args: argparse.Namespace,
                    keep: set[int] = frozenset()) -> list[dict[int, Tensor]]:
    """Algorithm 1 on a batch, the model frozen: every rollout's revised prefix, (R, D) float32, after the steps in `keep`
    and after the last, {step: prefix}.

    Fills losses and gaps of every Failure, and atoms and gammas, which are all that `soft_prefix` needs to rebuild these
    prefixes. A rollout whose L_guide is below --eps-stop leaves the batch before it is moved, and stays as it is.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(len(f.q) + len(f.r) + len(f.c) for f in batch) > window:
        raise UserError(f"--model: its attention slides over {window} tokens, and a rollout is longer; the packed pass is full "
                        "attention")
    W = model.get_input_embeddings().weight.detach()
    weights = (args.explore_weight, args.alpha_guide, args.beta_nll)
    soft = [soft_prefix(W, f.r, [], []) for f in batch]
    moments = [(torch.zeros_like(E), torch.zeros_like(E)) for E in soft] if args.optimizer == "adam" else None
    kept = [{0: E} if 0 in keep else {} for E in soft]
    active, packed = list(range(len(batch))), None
    with frozen(model, args.checkpoint_activations):
        for i in range(1, args.revision_steps + 1):  # Alg. 1, for i = 1..K
            if packed is None:
                packed = pack([batch[b] for b in active], template, weights, args.reduction == "mean", W.device)
            losses, G = losses_and_gradient(model, packed, torch.cat([soft[b] for b in active]))
            gamma = args.gamma0 * 2 / (i + 1)  # Eq. (7); 2/(i+1) is the classical step of Frank-Wolfe
            vertices = oracle(G, W, allowed)
            sizes = [len(batch[b].r) for b in active]
            moving = []
            for b, loss, g, v in zip(active, losses.tolist(), G.split(sizes), vertices.split(sizes)):
                f, E = batch[b], soft[b]
                f.losses.append(loss)
                if loss[1] < args.eps_stop:  # Alg. 1: stop if L_guide < eps, before the step
                    continue
                moving.append(b)
                f.gaps.append(float((g * (E - W[v].float())).sum()))  # <G, E - V*>; in the hull >= 0, 0 where stationary
                if moments is not None:
                    soft[b] = adam_step(E, g, moments[b], i, args.adam_lr)
                else:
                    v = random_vertices(f, i, allowed, args.seed) if args.vertices == "random" else v
                    f.atoms.append(v)
                    f.gammas.append(gamma)
                    soft[b] = (1 - gamma) * E + gamma * W[v].float()  # Eq. (7)
                if i in keep:
                    kept[b][i] = soft[b]
            if moving != active:
                active, packed = moving, None
            if not active:
                break
    # A rollout that stopped early is after every later step what it was when it stopped
    return [k | {step: E for step in {*keep, args.revision_steps} - k.keys()} for k, E in zip(kept, soft)]


# --- one batch of failed rollouts, from cut to verified trajectory ----------------------------------------------------
def answer_ids(tokenizer, template: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of c_tmpl and of y_GT. Raises UserError for an answer without tokens."""
    gold = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not gold:
        raise UserError(f"answer {answer!r} has no tokens under the tokenizer of --model")
    return tokenizer(template, add_special_tokens=False)["input_ids"], gold


def cut(response_ids: list[int], rho: float) -> int:
    """|r| = floor(rho * tokens), end-of-sequence included in the count. 0 means that the rollout is too short to cut."""
    return math.floor(rho * len(response_ids) + 1e-9)  # 0.29 * 100 is 28.999999999999996


def revise_batch(model, tokenizer, vocab: int, rollouts: list[dict], args: argparse.Namespace, verify) -> list[dict]:
    """Algorithm 1, decoding, verification and projection for failed rollouts (records of rollout.py).

    A rollout may carry `guide_answer`, the answer to steer toward when it is not the gold one. Returns one record per
    rollout, in order; nothing in it depends on the batch in float32.
    """
    W = model.get_input_embeddings().weight.detach()
    allowed = allowed_rows(tokenizer, vocab, len(W), args.vertex_rows).to(W.device)
    batch = []
    for r in rollouts:
        template, gold = answer_ids(tokenizer, args.template, r.get("guide_answer", r["answer"]))
        n = 0 if args.start == "scratch" else cut(r["response_ids"], args.rho)
        batch.append(Failure(r["id"], r["sample"], r["prompt_ids"], r["response_ids"][:n], r["response_ids"][n:], gold))
    # Decode from the soft prefix; with --record-every also after fewer steps, for the curves of Fig. 3
    steps = {args.revision_steps, *(range(0, args.revision_steps, args.record_every) if args.record_every else ())}
    if args.start == "soft":
        prefixes = revise_prefixes(model, batch, template, allowed, args, steps)
    else:
        prefixes = [dict.fromkeys(steps, soft_prefix(W, f.r, [], [])) for f in batch]  # controls: hard prefix, or none
    results = [{} for _ in batch]
    eos = common.eos_ids(model, tokenizer)
    questions = [W[torch.tensor(f.q, device=W.device)] for f in batch]  # Embed(q), each (Q, D)
    keys = [[rollout.row_key(args.seed, f.id, f.sample, "revised", m) for m in range(args.continuations)] for f in batch]
    context = common.context_length(model)
    limits = [int(min(args.max_new_tokens - len(f.r), context - len(f.q) - len(f.r))) for f in batch]
    for step in sorted(steps):
        prompts = [torch.cat([q, E[step].to(q.dtype)]) for q, E in zip(questions, prefixes)]
        samples = rollout.sample(model, prompts, keys, limits, eos=eos, vocab=vocab, temperature=args.temperature,
                                 top_k=args.top_k, top_p=args.top_p)
        for result, s in zip(results, samples):
            result[step] = s

    records = []
    for f, r, E, result in zip(batch, rollouts, prefixes, results):
        # Eq. (8); a prefix that did not move is its own tokens
        projected = best_rows(E[args.revision_steps], W, allowed, args.projection).tolist() if f.gaps else f.r
        ends = bool(set(projected) & set(eos))  # the policy would have stopped there: no trajectory of its own
        curve = {}
        for step, samples in result.items():
            soft_text = [tokenizer.decode(f.r + s.ids, skip_special_tokens=True) for s in samples]
            rewards = [int(bool(verify(text, r["answer"]))) for text in soft_text]
            curve[step] = {"rewards": rewards, "lengths": [len(s.ids) for s in samples]}
        continuations = []
        for s, soft_reward in zip(result[args.revision_steps], curve[args.revision_steps]["rewards"]):
            text = tokenizer.decode(projected + s.ids, skip_special_tokens=True)
            c = {"ids": s.ids, "finish": s.finish, "response": text, "soft_reward": soft_reward,
                 "reward": int(bool(soft_reward and not ends and verify(text, r["answer"])))}  # Sec. 3.5, on the hard trajectory too
            if "guide_answer" in r:
                c["guide_reward"] = int(bool(verify(text, r["guide_answer"])))
            continuations.append(c)
        same = sum(a == b for a, b in zip(f.r, projected))
        records.append({
            "id": f.id, "sample": f.sample, "answer": r["answer"], "prefix_len": len(f.r),
            "recovered": any(c["reward"] for c in continuations), "losses": f.losses, "gaps": f.gaps, "gammas": f.gammas,
            "kept": same / len(f.r) if f.r else 1.0,  # denominator: prefix tokens
            "prompt_ids": f.q, "prefix_ids": f.r, "projected_ids": projected, "atoms": [v.tolist() for v in f.atoms],
            "continuations": continuations, "curve": curve} | {k: r[k] for k in ("guide_answer",) if k in r})
    return records


def allowed_rows(tokenizer, vocab: int, rows: int, which: str) -> Tensor:
    """Ids of the rows of W that may be vertices and projections: the tokenizer's, those without special tokens, or all
    `rows` (some of which no tokenizer can decode)."""
    if which == "all":
        return torch.arange(rows)
    special = set(tokenizer.all_special_ids) if which == "text" else set()
    return torch.tensor([i for i in sorted(set(tokenizer.get_vocab().values())) if i < vocab and i not in special])


def trajectories(record: dict) -> list[dict]:
    """The recovered hard trajectories [r^; c^] of a revision record, in the fields of rollouts.jsonl."""
    return [{"id": record["id"], "sample": record["sample"], "continuation": m, "prompt_ids": record["prompt_ids"],
             "response_ids": record["projected_ids"] + c["ids"], "response": c["response"], "finish": c["finish"],
             "reward": 1, "answer": record["answer"], "prefix_len": record["prefix_len"]}
            for m, c in enumerate(record["continuations"]) if c["reward"]]


def permuted_answers(answers: dict[str, str], seed: int) -> dict[str, str]:
    """Control: each prompt gets the answer of another prompt, a different one. Raises UserError if all are equal."""
    if len(set(answers.values())) < 2:
        raise UserError("--gold permuted needs prompts with at least two different answers")
    order = sorted(answers, key=lambda i: rollout.row_key(seed, i, "permuted"))
    cycle = order + order
    return {i: next(answers[j] for j in cycle[k + 1:] if answers[j] != answers[i]) for k, i in enumerate(order)}


@dataclass
class Entry:
    """Where a failed rollout is in rollouts.jsonl: the file may be larger than memory."""
    sample: int
    offset: int
    bytes: int
    tokens: int  # of prompt and response
    answer: str


def read_failures(file: Path, rho: float) -> tuple[dict[str, list[Entry]], int]:
    """The failed rollouts of every zero-hit prompt, {id: entries in sample order}, and how many were too short to cut."""
    def keep(r: dict) -> tuple:
        return r["reward"], cut(r["response_ids"], rho), len(r["prompt_ids"]) + len(r["response_ids"]), r["answer"]

    found = common.scan([file], keep)
    if not found:
        raise UserError(f"--rollouts {file}: holds no rollouts")
    hit = {i for (i, _), (*_, kept) in found.items() if kept[0]}
    failures, skipped = {i: [] for i, _ in found if i not in hit}, 0
    for (i, sample), (_, offset, size, (_, prefix, tokens, answer)) in sorted(found.items(), key=lambda x: x[0][1]):
        if i not in hit:
            skipped += prefix < 1
            failures[i] += [Entry(sample, offset, size, tokens, answer)] if prefix else []
    return {i: entries for i, entries in failures.items() if entries}, skipped


def read_rollout(file: Path, entry: Entry) -> dict:
    with open(file, "rb") as f:
        f.seek(entry.offset)
        return json.loads(f.read(entry.bytes))


def check_rollout(r: dict, model, vocab: int, args: argparse.Namespace) -> None:
    """Raises UserError for a rollout of another tokenizer, or one that leaves no token for a continuation."""
    context = common.context_length(model)
    where = f"--rollouts: sample {r['sample']} of {r['id']!r}"
    rollout.check_ids(r, vocab, where)
    n = cut(r["response_ids"], args.rho)
    if n >= args.max_new_tokens or len(r["prompt_ids"]) + n >= context:
        raise UserError(f"{where}: its prefix has {n} tokens, which leaves no room for a continuation within "
                        f"--max-new-tokens {args.max_new_tokens} and the context of --model, {context} tokens")


def add_revision_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the method, shared with train_grpo.py --revise."""
    parser.add_argument("--rho", type=float, default=0.8, help="[Table 7] share of the failed rollout that is revised")
    parser.add_argument("--revision-steps", type=int, default=10, help="[Table 7] K, Frank-Wolfe steps")
    parser.add_argument("--gamma0", type=float, default=0.1, help="[Table 7] scale of the step sizes gamma0 * 2/(i+1)")
    parser.add_argument("--alpha-guide", type=float, default=1.0, help="[Table 7] alpha, weight of L_guide; 0: Table 3")
    parser.add_argument("--beta-nll", type=float, default=0.1, help="[Table 7] beta, weight of L_NLL; 0: Table 3")
    parser.add_argument("--explore-weight", type=float, default=1.0, help="[Eq. 5] weight of L_explore; 0: Table 3")
    parser.add_argument("--eps-stop", type=float, default=1e-3, help="[Table 7] stop a rollout when L_guide is below")
    parser.add_argument("--template", default=TEMPLATE, help="[Sec. 3.3] c_tmpl, the sentence that the gold answer ends")
    parser.add_argument("--reduction", default="sum", choices=["sum", "mean"], help="[Eqs. 2-4] sum; mean is [ours]")
    parser.add_argument("--projection", default="inner", choices=["inner", "cosine", "l2"], help="[Eq. 8] inner product")
    parser.add_argument("--vertex-rows", default="tokens", choices=["tokens", "text", "all"],
                        help="[ours] vertices: every id of the tokenizer, all but the special ones, or all rows of W")
    parser.add_argument("--continuations", type=int, default=8, help="[Fig. 3] continuations per revised prefix")
    parser.add_argument("--vertices", default="oracle", choices=["oracle", "random"], help="[ours] control: random")
    parser.add_argument("--from", dest="start", default="soft", choices=["soft", "hard-prefix", "scratch"],
                        help="[ours] controls: continue the unrevised prefix, or sample anew from the prompt")
    parser.add_argument("--optimizer", default="frank-wolfe", choices=["frank-wolfe", "adam"],
                        help="[Table 3] adam is the unconstrained ablation; its prefixes are not stored")
    parser.add_argument("--adam-lr", type=float, default=1e-2, help="[ours] step size of --optimizer adam")
    parser.add_argument("--batch-tokens", type=int, default=16384,
                        help="[ours] padded tokens of the failed rollouts revised together: the memory flag of the revision")
    parser.add_argument("--record-every", type=int, default=0, help="[Fig. 3] also decode after every so many steps")


def check_revision_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range."""
    for flag, good in {"rho": 0 < args.rho < 1, "revision_steps": args.revision_steps >= 0, "gamma0": 0 < args.gamma0 <= 1,
                       "continuations": args.continuations > 0, "record_every": args.record_every >= 0, "batch_tokens": args.batch_tokens > 0,
                       **{k: abs(getattr(args, k)) < float("inf") for k in (
                           "alpha_guide", "beta_nll", "explore_weight", "eps_stop")}}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--rollouts", required=True, help="[ours] output folder of rollout.py, or its rollouts.jsonl")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="[ours] recompute activations in the backward: less memory for long rollouts, a third slower")
    parser.add_argument("--attempts", type=int, default=0,
                        help="[ours] failed rollouts tried per prompt until one is recovered; 0 for all")
    parser.add_argument("--gold", default="true", choices=["true", "permuted"],
                        help="[ours] control: steer toward another prompt's answer")
    add_revision_args(parser)
    rollout.add_sampling_args(parser)
    return parser.parse_args(argv)


FREE = ("device", "batch_tokens", "checkpoint_activations")  # these do not change a result in float32


def main(args: argparse.Namespace) -> None:
    rollout.check_sampling_args(args)
    check_revision_args(args)
    source = Path(args.rollouts) / "rollouts.jsonl" if Path(args.rollouts).is_dir() else Path(args.rollouts)
    digest = common.file_digest(source)
    failures, skipped = read_failures(source, args.rho)
    failures = {i: failures[i][:args.attempts or None] for i in list(failures)[:args.limit or None]}
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=digest)
    guide = permuted_answers({i: e[0].answer for i, e in failures.items()}, args.seed) if args.gold == "permuted" else {}

    # === revise: batches of prompts, each prompt's failed rollouts in turn until one is recovered ===
    final = out / "revised.jsonl"
    if not final.exists():
        model, tokenizer, vocab = common.load_model(args, device)
        verify = common.load_verifier(args.verifier)
        part, done = common.open_part(out, "revised", keep=lambda record: record["recovered"])

        def finished(i: str) -> bool:
            tried = [done.get((i, entry.sample)) for entry in failures[i]]
            return all(tried) or any(t and t[3] for t in tried)

        names = list(failures)
        longest = [max(entry.tokens for entry in failures[i]) for i in names]
        batches = [[names[k] for k in batch] for batch in common.batches_by_length(longest, args.batch_tokens)]
        mine = [b for b in batches[common.rank()::common.world_size()] if not all(map(finished, b))]
        for entry in (e for batch in mine for i in batch for e in failures[i]):  # before any work, not in the middle of it
            check_rollout(read_rollout(source, entry), model, vocab, args)
        bar = tqdm(total=sum(map(len, mine)), desc="revise", unit="prompt", disable=common.rank() > 0)
        found = seen = 0
        for batch in mine:
            records, unsolved = [], batch
            for attempt in range(max(len(failures[i]) for i in batch)):
                rows = [read_rollout(source, failures[i][attempt]) for i in unsolved if attempt < len(failures[i])]
                rows = [r | ({"guide_answer": guide[r["id"]]} if guide else {}) for r in rows]
                records += revise_batch(model, tokenizer, vocab, rows, args, verify) if rows else []
                solved = {r["id"] for r in records if r["recovered"]}
                unsolved = [i for i in unsolved if i not in solved]
            common.append_jsonl(part, [r for r in records if (r["id"], r["sample"]) not in done])
            found += len(batch) - len(unsolved)
            seen += len(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"recovered {found / seen:.3f}")
        bar.close()
        common.merge_parts(out, "revised", {i: k for k, i in enumerate(failures)})
    common.remove_parts(out, "revised")

    # === recovered trajectories and the summary ===
    if common.rank() == 0:
        records = common.read_jsonl(final)
        recovered = [t for r in records for t in trajectories(r)]
        common.write_atomic(out / "recovered.jsonl", "".join(map(common.to_line, recovered)))
        prompts = {t["id"] for t in recovered}
        summary = {"zero_hit": len(failures), "tried": len(records), "skipped_too_short": skipped,
                   "recovered_prompts": len(prompts), "recovered_trajectories": len(recovered)}
        common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"{len(prompts)} of {len(failures)} zero-hit prompts recovered, {len(recovered)} trajectories, from "
              f"{len(records)} failed rollouts ({skipped} too short to cut)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        import show
        common.run_script(lambda: show.get_args(sys.argv[2:]), show.main)
    else:
        common.run_script(get_args, main)
