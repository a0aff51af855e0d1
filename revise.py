"""Revise failed rollouts of zero-hit prompts in embedding space and keep what the verifier accepts
(paper Sec. 3, Alg. 1).

    python revise.py --model toy/sums_model --rollouts out/rollouts --out out/revised
    torchrun --nproc-per-node 8 revise.py --model Qwen/Qwen2.5-1.5B-Instruct \\
        --rollouts out/rollouts --out out/revised
    python -m experiments.show out/revised/revised.jsonl --id X     what happened to one prefix

A failed rollout [r; c] is cut after a share rho of its tokens. With the model frozen, K Frank-Wolfe
steps move the input embeddings E_r of the prefix inside conv(W), the hull of the vocabulary
embeddings: away from the failed continuation c, toward the gold answer. New continuations c^ are
decoded from [q; E_r*]; where one is right, E_r* is projected to tokens r^ and [r^; c^] is verified
again: that is a recovered trajectory.

Reads   rollouts.jsonl of rollout.py (prompts whose rollouts all failed).
Writes  revised.jsonl, one record per failed rollout tried: `id`, `sample`, `answer`, `prefix_len`,
        `recovered`, `losses` (explore, guide, nll per step), `gaps`, `gammas`, `vertices` (per
        step; `replay` makes the soft prefix of them again, but that of --adam), `passes` (forward),
        `kept` (share of prefix tokens that the projection gives back), `prompt_ids`, `prefix_ids`,
        `projected_ids`, `continuations` (`logprob`: see --min-logprob), `curve`;
        recovered.jsonl, a hard trajectory per right continuation, in the fields of rollouts.jsonl.

Differs from the paper: nothing in the losses, the step and the projection. What the paper leaves
open, beside the flags: the cut is floor(rho * tokens) with end-of-sequence counted in c; a prefix
that did not move is its own projection, and one that holds an end-of-sequence is no trajectory; all
failed rollouts of a prompt are tried in turn until one is recovered.
"""
import argparse
import contextlib
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface

import rollout
from helpers import common, sampling, training, verifying
from helpers.common import COUNT, POSITIVE, Policy, UserError, checked
from helpers.sampling import row_key

# Dimension key: B rollouts, Q prompt, R prefix, C continuation, A branch (template, gold answer),
# T trunk = Q + R + C, S = T + A, N = sum of R over the batch, M scored tokens, V vocabulary rows,
# D model width

TEMPLATE = "Based on my current reasoning process, the final answer is "
EXPLORE, GUIDE, NLL = range(3)  # the three losses, in the order of Eqs. (2)-(4)
ORACLE_ROWS = 4096  # vocabulary rows scored at a time: more fall out of a CPU's cache
HEAD_ROWS = 256  # positions whose logits exist at a time: 256 x 152k floats are 155 MB
STAYS = -1  # in place of a vertex: this position was not moved, though others of its rollout were


class Failure(NamedTuple):
    """A failed rollout [r; c] of the prompt q, as token ids, and what it is steered toward."""
    id: str
    sample: int
    q: list[int]
    r: list[int]
    c: list[int]
    template: list[int]  # c_tmpl
    gold: list[int]  # y_GT, as the template continues


# --- the three losses and their gradient ----------------------------------------------------------
def token_losses(ce: Tensor, term: Tensor) -> Tensor:
    """What each scored token adds to its loss, Eqs. (2)-(4), (M,), from its cross-entropy -log p.
    All three losses are minimised. term (M,): EXPLORE, GUIDE or NLL."""
    losses, c = ce.clone(), term == EXPLORE
    losses[c] = -ce[c]  # Eq. (2): +log p of the failed continuation
    return losses


class Packed(NamedTuple):
    """A batch for the packed pass. Places are pairs of index tensors, (rollout, slot)."""
    ids: Tensor  # (B, S)
    positions: Tensor  # (B, S)
    mask: Tensor  # (B, 1, A, S) what the branch sees
    prefix: tuple[Tensor, Tensor]  # (N,) each: where E_r goes
    source: tuple[Tensor, Tensor]  # (M,) each: the hidden state that predicts a scored token
    target: Tensor  # (M,) the scored token
    term: Tensor  # (M,) whose loss it belongs to
    weight: Tensor  # (M,) its weight in L_total, Eq. (5)


def pack(batch: list[Failure], weights: tuple[float, float, float], mean: bool,
         device: torch.device) -> Packed:
    """The three teacher-forced passes of Eqs. (2)-(4) as one. weights: those of Eq. (5), by term.

        trunk    q1 q2 r1 r2 r3 c1 c2      causal               predicts r (NLL) and c (EXPLORE)
        branch         t1 t2 y1 y2         sees q, r, itself    predicts y (GUIDE)

    The branch [c_tmpl; y_GT] has the positions that follow r.
    """
    T = max(len(f.q) + len(f.r) + len(f.c) for f in batch)
    A = max(len(f.template) + len(f.gold) for f in batch)
    ids, positions = torch.zeros(2, len(batch), T + A, dtype=torch.long)
    mask = torch.zeros(len(batch), 1, A, T + A, dtype=torch.bool)
    mask[..., T:] = torch.ones(A, A, dtype=torch.bool).tril()  # padding too: no empty softmax
    prefix, scored, token_weights = [], [], []
    for b, f in enumerate(batch):
        branch = f.template + f.gold
        start, middle = len(f.q), len(f.q) + len(f.r)  # r is in between
        end = middle + len(f.c)
        ids[b, :end] = torch.tensor(f.q + f.r + f.c)
        ids[b, T:T + len(branch)] = torch.tensor(branch)
        positions[b] = torch.cat([torch.arange(T), middle + torch.arange(A)])
        mask[b, :, :, :middle] = True
        prefix += [(b, slot) for slot in range(start, middle)]
        spans = {EXPLORE: range(middle, end), NLL: range(start, middle),
                 GUIDE: range(T + len(f.template), T + len(branch))}
        for term, span in spans.items():
            # The next-token shift, written once: a token is predicted from the slot before it, the
            # first one of the branch from the last of the prefix
            scored += [(b, slot - 1 if slot != T else middle - 1, slot, term) for slot in span]
            # denominator with --reduction mean: the term's tokens
            token_weights += [weights[term] / (len(span) if mean else 1)] * len(span)
    rows, source, slots, terms = torch.tensor(scored, device=device).T
    ids = ids.to(device)
    return Packed(
        ids, positions.to(device), mask.to(device), tuple(torch.tensor(prefix, device=device).T),
        (rows, source), ids[rows, slots], terms, torch.tensor(token_weights, device=device))


def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
                     scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """Attention over [trunk; branch] as `pack` draws it, (B, S, heads, head_dim).

    query (B, heads, S, head_dim), key and value (B, kv_heads, S, head_dim), attention_mask
    (B, 1, A, S) bool, rows of the branch only: no S x S mask ever exists.
    """
    B, heads, S, width = query.shape
    T, groups = S - attention_mask.shape[2], heads // key.shape[1]
    trunk = F.scaled_dot_product_attention(query[:, :, :T], key[:, :, :T], value[:, :, :T],
                                           is_causal=True, scale=scaling, enable_gqa=groups > 1)
    # The heads of a group become rows of one head: with a mask, enable_gqa would fall back to the
    # slow kernel on a GPU
    rows = query[:, :, T:].reshape(B, -1, groups * (S - T), width)
    branch = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), scale=scaling)
    return torch.cat([trunk, branch.reshape(B, heads, S - T, -1)], 2).transpose(1, 2), None


AttentionInterface.register("latentrevise_packed", packed_attention)


@contextlib.contextmanager
def frozen(model, checkpoint: bool = False):
    """The model as Algorithm 1 wants it: no parameter gradients, no dropout, packed attention; all
    restored after."""
    was_training, attention = model.training, model.config._attn_implementation
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
        model.train(was_training)


def losses_and_gradient(model, p: Packed, E: Tensor,
                        head_rows: int = HEAD_ROWS) -> tuple[Tensor, Tensor]:
    """The three losses of every rollout (B, 3), Eqs. (2)-(4), and G = grad_E L_total (N, D),
    Eq. (5), in one forward and one backward pass.

    E (N, D) float32: the soft prefixes of the batch, one after the other. Call inside
    `frozen(model)`. The head runs on the scored positions alone, in chunks that are each turned
    into the gradient of their hidden states at once: positions x V logits never exist.
    """
    E = E.detach().requires_grad_()
    x = model.get_input_embeddings()(p.ids)  # (B, S, D)
    x = x.index_put(p.prefix, E.to(x.dtype))
    hidden = model.base_model(inputs_embeds=x, attention_mask=p.mask, position_ids=p.positions,
                              use_cache=False).last_hidden_state  # (B, S, D)
    h = hidden.detach()[p.source]  # (M, D)
    dh, losses = torch.empty_like(h), torch.zeros(len(x), 3, device=h.device)
    for s in range(0, len(h), head_rows):
        rows = slice(s, s + head_rows)
        chunk = h[rows].requires_grad_()
        logits = model.get_output_embeddings()(chunk).float()  # (head_rows, V)
        ce = F.cross_entropy(logits, p.target[rows], reduction="none")
        each = token_losses(ce, p.term[rows])  # (head_rows,)
        dh[rows], = torch.autograd.grad((p.weight[rows] * each).sum(), chunk)
        losses.index_put_((p.source[0][rows], p.term[rows]), each.detach(), accumulate=True)
    dhidden = torch.zeros_like(hidden).index_put_(p.source, dh, accumulate=True)
    G, = torch.autograd.grad(hidden, E, dhidden)
    return losses, G


# --- Frank-Wolfe ----------------------------------------------------------------------------------
def best_rows(X: Tensor, W: Tensor, allowed: Tensor, metric: str = "inner",
              chunk: int = ORACLE_ROWS) -> Tensor:
    """For every row of X (N, D) the id in `allowed` whose row of W (V, D) scores highest, the first
    of equal ones: ids (N,).

    metric: inner <x, v>, cosine <x, v>/|v|, or l2 -|x - v|^2. Scores are float32 (bfloat16 scores
    change vertices) and exist for `chunk` vocabulary rows at a time.
    """
    X, best = X.float(), torch.full((len(X),), -torch.inf, device=X.device)
    ids = torch.zeros(len(X), dtype=torch.long, device=X.device)
    # A slice copies no row, as a list of ids does; most tokenizers allow ids without a gap
    gapless = len(allowed) > 0 and int(allowed[-1] - allowed[0]) == len(allowed) - 1
    for s in range(0, len(allowed), chunk):
        some = allowed[s:s + chunk]
        rows = W[int(some[0]):int(some[0]) + len(some)] if gapless else W[some]
        rows = rows.float()  # (chunk, D)
        scores = X @ rows.T  # (N, chunk)
        if metric == "cosine":
            # denominator |v|: |x| is the same for every v. A row of zeros (padding often is one)
            # scores 0, not nan
            scores = scores / rows.norm(dim=-1).clamp(min=1e-12)
        elif metric == "l2":
            scores = 2 * scores - rows.square().sum(-1)  # |x|^2 is the same for every v
        value, index = scores.max(-1)
        better = value > best
        best = torch.where(better, value, best)
        ids = torch.where(better, some[index], ids)
    return ids


def toward(E: Tensor, V: Tensor, gamma: float) -> Tensor:
    """The step of Eq. (7) from E (N, D) to the vertices V (N, D): a convex combination of both."""
    return (1 - gamma) * E + gamma * V


def random_vertices(batch: list[Failure], step: int, allowed: Tensor, seed: int) -> Tensor:
    """One allowed id per position of the batch, (N,), that no gradient has chosen: a control."""
    index = []
    for f in batch:
        generator = torch.Generator().manual_seed(row_key(seed, f.id, f.sample, "vertex", step))
        index.append(torch.randint(len(allowed), (len(f.r),), generator=generator))
    return allowed[torch.cat(index).to(allowed.device)]


def record_of(history: list[dict], moving: Tensor, **values: list) -> None:
    """Append every rollout's own value to its history, but not of those that have stopped."""
    for b in moving.nonzero()[:, 0].tolist():
        for name, of in values.items():
            history[b][name].append(of[b])


def revise(policy: Policy, batch: list[Failure], allowed: Tensor, args: argparse.Namespace,
           seed: int, keep: set[int] = frozenset()) -> tuple[dict[int, Tensor], list[dict]]:
    """Algorithm 1 on a batch, the model frozen. allowed: ids of the vertices.

    Returns the soft prefixes of the batch, one after the other, (N, D) float32, {step: after it},
    of the steps in `keep` and the last; and the history of every rollout: `losses` before each
    step and at a stop, Frank-Wolfe `gaps`, and `gammas` and `vertices` of the steps that it took.
    Random vertices take no pass: no losses, no gaps, no stop.
    Raises UserError for a rollout longer than a sliding window, and for losses that are nan.
    """
    model, sizes = policy.model, [len(f.r) for f in batch]
    window = getattr(model.config, "sliding_window", None)
    if window and max(len(f.q) + len(f.r) + max(len(f.c), len(f.template) + len(f.gold))
                      for f in batch) > window:
        raise UserError(f"--model: its attention slides over {window} tokens, and a rollout is "
                        "longer; the packed pass is full attention")
    W = model.get_input_embeddings().weight.detach()
    p = pack(batch, (args.explore_weight, args.alpha_guide, args.beta_nll),
             args.reduction == "mean", W.device)
    owner = p.prefix[0]  # (N,) the rollout of every position
    history = [{"losses": [], "gaps": [], "gammas": [], "vertices": []} for _ in batch]
    moving = torch.ones(len(batch), dtype=torch.bool, device=W.device)
    E = W[p.ids[p.prefix]].float()  # Alg. 1 L1: E_r <- Embed(r)
    free = E.clone()  # what --adam moves in place
    adam = torch.optim.Adam([free], lr=args.adam) if args.adam else None
    prefixes = {0: E}
    with frozen(model, args.checkpoint_activations):
        for i in range(1, args.revision_steps + 1):  # L2
            if args.vertices == "random":
                V = random_vertices(batch, i, allowed, seed)
            else:
                losses, G = losses_and_gradient(model, p, E)  # L3-L6
                if losses.isnan().any():
                    raise UserError("--model: its losses are not numbers")
                record_of(history, moving, losses=losses.tolist())
                moving = moving & (losses[:, GUIDE] >= args.eps_stop)  # L7: each rollout for itself
                if not moving.any():
                    break
                V = best_rows(-G, W, allowed)  # L9, Eq. (6): argmin_v <G_j, v>
                gaps = (G * (E - W[V].float())).sum(-1)  # <G_j, E_j - v*_j>, 0 where stationary
                record_of(history, moving, gaps=[float(x.sum()) for x in gaps.split(sizes)])
            takes = moving[owner]  # (N,) which positions take the step
            if adam:
                free.grad = G
                adam.step()
                new = free
            else:
                gamma = args.gamma0 * 2 / (i + 1)  # L8: Frank-Wolfe's step, scaled
                new = toward(E, W[V].float(), gamma)  # L10, Eq. (7)
                record_of(history, moving, gammas=[gamma] * len(batch), vertices=[
                    v.tolist() for v in V.masked_fill(~takes, STAYS).split(sizes)])
            E = torch.where(takes[:, None], new, E)
            if i in keep:
                prefixes[i] = E
    # If all have stopped, E is what every later step would find
    return {i: prefixes.get(i, E) for i in sorted({*keep, args.revision_steps})}, history


def replay(W: Tensor, record: dict) -> Tensor:
    """The soft prefix of a record of revised.jsonl, (R, D) float32, bit for bit: the steps that it
    took, Eq. (7), from the embeddings of its tokens. W (V, D): the model's embeddings. Raises
    UserError for one that moved without Frank-Wolfe."""
    if record["gaps"] and not record["gammas"]:
        raise UserError(f"the prefix of {record['id']!r} was moved by --adam and is not stored")
    E = W[torch.tensor(record["prefix_ids"], device=W.device)].float()
    for ids, gamma in zip(record["vertices"], record["gammas"], strict=True):
        V = torch.tensor(ids, device=W.device)
        E = torch.where((V != STAYS)[:, None], toward(E, W[V].float(), gamma), E)
    return E


# --- one batch of failed rollouts, from cut to verified trajectory --------------------------------
def guide_of(problem: dict) -> str:
    """y_GT as text: `guide_answer` (--gold permuted), else the problem's `guide`, else its answer.
    Raises UserError for a problem, or its failed rollout, where that is not text."""
    text = problem.get("guide_answer", problem.get("guide", problem["answer"]))
    if not isinstance(text, str):
        raise UserError(f"problem {problem['id']!r}: its answer is not text, and there is no "
                        "'guide', text to steer toward")
    return text


def answer_ids(tokenizer, template: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of c_tmpl and of y_GT. Raises UserError for an answer without tokens."""
    try:
        gold = tokenizer(answer, add_special_tokens=False)["input_ids"]
    except TypeError:  # a string that is not Unicode
        gold = []
    if not gold:
        raise UserError(f"answer {answer!r} has no tokens under the tokenizer of --model")
    return tokenizer(template, add_special_tokens=False)["input_ids"], gold


def cut(response_ids: list[int], rho: float) -> int:
    """|r| = floor(rho * tokens), end-of-sequence included; 0: the rollout is too short to cut."""
    n = math.floor(rho * len(response_ids) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return max(0, min(n, len(response_ids) - 1))  # c is never empty


def failure_of(policy: Policy, failed: dict, args: argparse.Namespace) -> Failure:
    """A failed rollout of rollout.py, cut and with what it is steered toward."""
    ids, n = failed["response_ids"], cut(failed["response_ids"], args.rho)
    return Failure(failed["id"], failed["sample"], failed["prompt_ids"], ids[:n], ids[n:],
                   *answer_ids(policy.tokenizer, args.template, guide_of(failed)))


def room(policy: Policy, f: Failure, args: argparse.Namespace) -> int:
    """Tokens that are left for a continuation."""
    return int(min(args.max_new_tokens, policy.context - len(f.q))) - len(f.r)


@functools.lru_cache(maxsize=2)
def allowed_rows(tokenizer, vocab: int, rows: int, which: str) -> Tensor:
    """Ids of the rows of W that may be vertices and projections: the tokenizer's, those without
    control tokens (also such as are not `special`, of tools or of code infilling), or all `rows`
    (some of which no tokenizer can decode)."""
    if which == "all":
        return torch.arange(rows)
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = {*tokenizer.get_vocab().values()} - (control if which == "text" else set())
    return torch.tensor(sorted(i for i in ids if i < vocab))


def decode_from(policy: Policy, batch: list[Failure], E: Tensor, args: argparse.Namespace,
                seed: int) -> list[list[sampling.Row]]:
    """Sec. 3.5: continuations c^ of every [q; E_r]. E (N, D): the soft prefixes of the batch."""
    W = policy.model.get_input_embeddings().weight.detach()
    prompts = [torch.cat([W[torch.tensor(f.q, device=W.device)], e.to(W.dtype)])  # (Q + R, D)
               for f, e in zip(batch, E.split([len(f.r) for f in batch]))]
    keys = [[row_key(seed, f.id, f.sample, "revised", m) for m in range(args.continuations)]
            for f in batch]
    limits = [room(policy, f, args) for f in batch]
    return sampling.sample(policy, prompts, keys, limits, **sampling.settings(args))


def texts(policy: Policy, prefix: list[int], drawn: list[sampling.Row]) -> list[str]:
    """The responses that begin with a prefix."""
    return [policy.tokenizer.decode(prefix + row.ids, skip_special_tokens=True) for row in drawn]


def verdicts(responses: list[str], failed: dict, verify) -> list[int]:
    """1 for every response that is right for the problem of `failed`, else 0."""
    problem = failed.get("problem_fields", failed) | {"answer": failed["answer"]}
    asked = [verify.submit(text, failed["answer"], problem) for text in responses]
    return [int(verdict.result()) for verdict in asked]


def judge(policy: Policy, failed: dict, f: Failure, projected: list[int], drawn: list[sampling.Row],
          verify, args: argparse.Namespace) -> list[dict]:
    """Sec. 3.5 verifies twice: a continuation after the soft prefix, whose text is that of r
    (`soft_reward`), and the hard trajectory [r^; c^] (`reward`, which needs both). --min-logprob is
    of the continuation after the projected prefix: what only the soft one led to is unlikely."""
    ends = bool({*projected} & {*policy.eos})  # the policy would have ended there
    soft = verdicts(texts(policy, f.r, drawn), failed, verify)
    responses = texts(policy, projected, drawn)
    hard = iter(verdicts([t for t, right in zip(responses, soft) if right], failed, verify))
    if "guide_answer" in failed:  # --gold permuted
        guided = verdicts(responses, failed | {"answer": failed["guide_answer"]}, verify)
    continuations = []
    for m, (row, right) in enumerate(zip(drawn, soft)):
        c = {"ids": row.ids, "finish": row.finish, "response": responses[m],
             "soft_reward": right, "reward": int(right and next(hard) and not ends)}
        if "guide_answer" in failed:
            c["guide_reward"] = guided[m]
        if c["reward"] and args.min_logprob is not None:
            rows = [{"prompt_ids": f.q + projected, "response_ids": row.ids}]
            with torch.no_grad():
                logp = training.response_logprobs(policy.model, rows, entropy=False)[0]
            c["logprob"] = float(logp.mean())  # denominator: tokens of the continuation
            c["reward"] = int(c["logprob"] >= args.min_logprob)
        continuations.append(c)
    return continuations


def revise_batch(policy: Policy, rollouts: list[dict], args: argparse.Namespace, verify,
                 seed: int | None = None) -> list[dict]:
    """Algorithm 1, decoding, projection and verification of failed rollouts of rollout.py: a record
    each, in order; in float32 nothing in it depends on the batch, up to rounding.

    A rollout may carry `guide_answer`, the answer to steer toward when it is not the gold one.
    seed: of all random numbers, args.seed if not given.
    """
    seed = args.seed if seed is None else seed
    W = policy.model.get_input_embeddings().weight.detach()
    allowed = allowed_rows(policy.tokenizer, policy.vocab, len(W), args.vertex_rows).to(W.device)
    batch = [failure_of(policy, failed, args) for failed in rollouts]

    # With --record-every also after fewer steps, for the curves of Fig. 3
    last, every = args.revision_steps, args.record_every
    prefixes, history = revise(policy, batch, allowed, args, seed,
                               {*range(0, last, every)} if every else set())
    drawn = {i: decode_from(policy, batch, E, args, seed) for i, E in prefixes.items()}
    nearest = (torch.tensor([i for f in batch for i in f.r]) if args.projection == "none"
               else best_rows(prefixes[last], W, allowed, args.projection))  # Eq. (8)

    records = []
    for b, ids in enumerate(nearest.split([len(f.r) for f in batch])):
        failed, f, steps = rollouts[b], batch[b], history[b]
        projected = ids.tolist() if steps["gaps"] or steps["gammas"] else f.r  # unmoved
        continuations = judge(policy, failed, f, projected, drawn[last][b], verify, args)
        curve = {i: verdicts(texts(policy, f.r, rows[b]), failed, verify)
                 for i, rows in drawn.items() if i != last}
        curve[last] = [c["soft_reward"] for c in continuations]
        records.append({
            "id": f.id, "sample": f.sample, "answer": failed["answer"], "prefix_len": len(f.r),
            "recovered": any(c["reward"] for c in continuations),
            **steps, "passes": len(steps["losses"]),
            "kept": sum(map(int.__eq__, f.r, projected)) / len(f.r),  # denominator: prefix tokens
            "prompt_ids": f.q, "prefix_ids": f.r, "projected_ids": projected,
            "continuations": continuations,
            "curve": {i: {"rewards": rewards, "ids": [row.ids for row in drawn[i][b]]}
                      for i, rewards in curve.items()}})
        if "guide_answer" in failed:
            records[-1]["guide_answer"] = failed["guide_answer"]
    return records


def trajectories(record: dict) -> list[dict]:
    """The recovered hard trajectories [r^; c^] of a revision record, in the fields of
    rollouts.jsonl."""
    return [{"id": record["id"], "sample": record["sample"], "continuation": m,
             "prompt_ids": record["prompt_ids"], "response_ids": record["projected_ids"] + c["ids"],
             "response": c["response"], "finish": c["finish"], "reward": 1,
             "answer": record["answer"], "prefix_len": record["prefix_len"]}
            for m, c in enumerate(record["continuations"]) if c["reward"]]


# --- the work: failed rollouts of zero-hit prompts ------------------------------------------------
class Attempt(NamedTuple):
    """What is kept of a rollout while its file, which may be larger than memory, is read."""
    key: tuple[str, int]  # id and sample
    reward: int
    guide: str  # y_GT
    prefix: int  # tokens of r
    tokens: int  # of prompt and response


def read_failures(file: Path, rho: float) -> tuple[dict[str, list[common.Place]], int]:
    """Where the failed rollouts of every zero-hit prompt are, by id and in sample order, each kept
    as an Attempt; and how many were too short to cut. Raises UserError naming the line."""
    def keep(record: dict) -> Attempt:
        sample, reward = record["sample"], record["reward"]
        if type(sample) is not int or reward not in (0, 1):
            raise ValueError("sample is not a number, or reward not 0 or 1")
        return Attempt((record["id"], sample), reward, guide_of(record),
                       cut(record["response_ids"], rho),
                       len(record["prompt_ids"]) + len(record["response_ids"]))

    found = common.scan([file], keep)
    if not found:
        raise UserError(f"--rollouts {file}: holds no rollouts")
    hit = {i for (i, _), place in found.items() if place.kept.reward}
    failures, skipped = {}, 0
    for (i, _), place in found.items():
        if i not in hit and place.kept.prefix:
            failures.setdefault(i, []).append(place)
        skipped += i not in hit and not place.kept.prefix
    return {i: sorted(places, key=lambda x: x.kept.key) for i, places in failures.items()}, skipped


def finished(prompts: list[list[common.Place]], done: dict) -> bool:
    """Whether of each prompt all failed rollouts are tried, or one recovered (`kept` of `done`)."""
    tried = [[done.get(place.kept.key) for place in places] for places in prompts]
    return all(all(found) or any(t and t.kept for t in found) for found in tried)


def permuted_answers(answers: dict[str, str], seed: int) -> dict[str, str]:
    """--gold permuted: each prompt gets the answer of another prompt, a different one. Raises
    UserError if all are equal."""
    if len(set(answers.values())) < 2:
        raise UserError("--gold permuted needs prompts with at least two different answers")
    order = sorted(answers, key=lambda i: row_key(seed, i, "permuted"))
    cycle = order + order
    return {i: next(answers[j] for j in cycle[k + 1:] if answers[j] != answers[i])
            for k, i in enumerate(order)}


def check_rollout(policy: Policy, failed: dict, args: argparse.Namespace, verify) -> None:
    """Raises UserError for a rollout of another tokenizer, one without a guide's tokens or room for
    a continuation, and one that lacks what the verifier or --gold asks for."""
    where = f"sample {failed['sample']} of {failed['id']!r}"
    if verify.takes_problem and "problem_fields" not in failed:
        raise UserError(f"--rollouts: {where}: --verifier {args.verifier} asks for the problem, "
                        "and these rollouts were not made with it")
    if args.gold == "permuted" and "guide" in failed:
        raise UserError(f"--gold permuted: {where} has a guide, which is not another's answer")
    rollout.check_ids(failed, policy.vocab, f"--rollouts: {where}")
    f = failure_of(policy, failed, args)
    most = len(f.q) + len(f.r) + room(policy, f, args)
    if room(policy, f, args) < 1:
        raise UserError(f"--rollouts: {where}: its prefix has {len(f.r)} tokens, which leaves no "
                        f"room for a continuation within --max-new-tokens {args.max_new_tokens} "
                        f"and the context of --model, {policy.context} tokens")
    if 0 < args.decode_tokens < most:
        raise UserError(f"--decode-tokens {args.decode_tokens}: {where} and its longest "
                        f"continuation take {most}")


def revise_in_turn(policy: Policy, prompts: list[list[common.Place]], load,
                   args: argparse.Namespace, verify) -> list[dict]:
    """Records of the failed rollouts of some prompts, each prompt's in turn until one is
    recovered."""
    records, unsolved = [], prompts
    for attempt in range(max(map(len, prompts))):
        unsolved = [places for places in unsolved if attempt < len(places)]
        rows = [load(places[attempt]) for places in unsolved]
        new = revise_batch(policy, rows, args, verify) if rows else []
        records += new
        unsolved = [places for places, record in zip(unsolved, new) if not record["recovered"]]
    return records


def add_revision_args(parser: argparse.ArgumentParser) -> None:
    """Flags of the method, shared with train_grpo.py --revise."""
    finite, share = checked(float, math.isfinite), checked(float, lambda x: 0 < x < 1)
    group = parser.add_argument_group("the revision")
    add = group.add_argument
    add("--rho", type=share, default=0.8, help="[Table 7] share of the failed rollout to revise")
    add("--revision-steps", type=COUNT, default=10,
        help="[Table 7] K, Frank-Wolfe steps; 0 is a control, the prefix as it is")
    add("--gamma0", type=checked(float, lambda x: 0 < x <= 1), default=0.1,
        help="[Table 7] scale of the step sizes gamma0 * 2/(i+1)")
    add("--alpha-guide", type=finite, default=1.0, help="[Table 7] alpha, weight of L_guide")
    add("--beta-nll", type=finite, default=0.1, help="[Table 7] beta, weight of L_NLL")
    add("--explore-weight", type=finite, default=1.0, help="[Eq. 5] weight of L_explore")
    add("--eps-stop", type=finite, default=1e-3, help="[Table 7] stop when L_guide is below")
    add("--template", default=TEMPLATE, help="[Sec. 3.3] c_tmpl, the words before the gold answer")
    add("--continuations", type=POSITIVE, default=8, help="[Fig. 3] per revised prefix")
    add("--projection", default="inner", choices=["inner", "cosine", "l2", "none"],
        help="[Eq. 8] inner product; none: r as it was")
    add("--reduction", default="sum", choices=["sum", "mean"],
        help="[Eqs. 2-4] of each loss over its tokens, in L_total; what is logged and the stop are "
             "of sums")
    add("--vertex-rows", default="tokens", choices=["tokens", "text", "all"],
        help="vertices and projections: every id of the tokenizer, all but control tokens, or all "
             "rows of W")
    add("--min-logprob", type=finite,
        help="least mean log-probability (nats a token) of a right continuation after the "
             "projected prefix; not given: any, as in the paper")
    add("--record-every", type=COUNT, default=0, help="[Fig. 3] decode after every so many steps")
    add("--revise-tokens", type=POSITIVE, default=16384,
        help="padded tokens of rollouts revised together: the memory flag of the revision")
    add = group.add_mutually_exclusive_group().add_argument
    add("--vertices", default="oracle", choices=["oracle", "random"], help="random is a control")
    add("--adam", type=checked(float, lambda x: 0 < x < math.inf), metavar="LR",
        help="[Table 3] Adam with this step size in place of Frank-Wolfe, unconstrained")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser)
    add = parser.add_argument
    add("--rollouts", required=True, help="output folder of rollout.py, or its rollouts.jsonl")
    add("--out", required=True, help="output folder")
    add("--attempts", type=COUNT, default=0,
        help="failed rollouts tried per prompt until one is recovered; 0 for all")
    add("--gold", default="true", choices=["true", "permuted"],
        help="permuted is a control: steer toward another prompt's answer")
    add("--checkpoint-activations", action="store_true",
        help="recompute activations in the backward: less memory, a third slower")
    add_revision_args(parser)
    sampling.add_sampling_args(parser)
    verifying.add_verifier_args(parser)
    return parser.parse_args(argv)


def run(out: Path, failures: dict[str, list[common.Place]], guide: dict[str, str],
        device: torch.device, args: argparse.Namespace) -> None:
    """Revise all prompts into OUT/revised.jsonl, a batch at a time. Safe to kill at any moment:
    what is left of a batch is revised with the rest of it, so that the records are the same.
    guide: answers to steer toward, by id, if not the gold ones."""
    policy = common.load_model(args, device)
    verify = verifying.from_args(args)
    part, done = common.open_part(out, "revised", keep=lambda record: record["recovered"])

    def load(place: common.Place) -> dict:
        failed = place.read()
        return failed | {"guide_answer": guide[failed["id"]]} if guide else failed

    branch = lambda guide: sum(map(len, answer_ids(policy.tokenizer, args.template, guide)))
    longest = lambda places: max(x.kept.tokens for x in places) + branch(places[0].kept.guide)
    batches = common.batches_by_length(list(failures.values()), longest, args.revise_tokens)
    mine = [b for b in batches[common.rank()::common.world_size()] if not finished(b, done)]
    for place in (place for batch in mine for places in batch for place in places):
        check_rollout(policy, load(place), args, verify)  # before any work, not in its middle

    recovered = seen = 0
    with tqdm(total=sum(map(len, mine)), desc="revise", unit="prompt",
              disable=common.rank() > 0) as bar:
        for batch in mine:
            records = revise_in_turn(policy, batch, load, args, verify)
            common.append_jsonl(part, [r for r in records if (r["id"], r["sample"]) not in done])
            recovered += sum(r["recovered"] for r in records)
            seen += len(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"recovered {recovered / seen:.3f}")
    common.merge_parts(out, "revised", {i: k for k, i in enumerate(failures)})


def main(args: argparse.Namespace) -> None:
    # === find the work ===
    source = Path(args.rollouts)
    source = source / "rollouts.jsonl" if source.is_dir() else source
    digest = common.file_digest(source)
    failures, skipped = read_failures(source, args.rho)
    failures = {i: failures[i][:args.attempts or None] for i in list(failures)[:args.limit or None]}
    answers = {i: places[0].kept.guide for i, places in failures.items()}
    guide = permuted_answers(answers, args.seed) if args.gold == "permuted" else {}
    device = common.pick_device(args)
    out = common.start_run(args.out, args, data_digest=digest)

    # === revise ===
    final = out / "revised.jsonl"
    if not final.exists():
        run(out, failures, guide, device, args)
    common.remove_parts(out, "revised")

    # === recovered trajectories and the summary ===
    if common.rank() == 0:
        records = common.scan([final], trajectories)
        if not finished(list(failures.values()), records):  # cut or edited
            raise UserError(f"{final}: lacks records; remove it, and they are made again")
        recovered = [t for place in records.values() for t in place.kept]
        common.write_atomic(out / "recovered.jsonl", map(common.to_line, recovered))
        prompts = len({t["id"] for t in recovered})
        summary = {"zero_hit": len(failures), "tried": len(records), "skipped_too_short": skipped,
                   "recovered_prompts": prompts, "recovered_trajectories": len(recovered)}
        common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"{prompts} of {len(failures)} zero-hit prompts recovered, {len(recovered)} "
              f"trajectories, from {len(records)} failed rollouts ({skipped} too short to cut)")


if __name__ == "__main__":
    common.run_script(get_args, main)
