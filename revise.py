"""Revise failed rollouts of zero-hit prompts in embedding space and keep what the verifier accepts
(paper Sec. 3, Alg. 1).

    python revise.py --model toy/sums_model --rollouts out/rollouts --out out/revised
    torchrun --nproc-per-node 8 revise.py --model Qwen/Qwen2.5-1.5B-Instruct --rollouts out/rollouts --out out/revised
    python -m experiments.show out/revised/revised.jsonl --id X     what happened to one prefix

A failed rollout [r; c] is cut after a share rho of its tokens. With the model frozen, K Frank-Wolfe steps move the
input embeddings E_r of the prefix inside conv(W), the hull of the vocabulary embeddings: away from the failed
continuation c, toward the gold answer. New continuations c^ are decoded from [q; E_r*]; where one is right, E_r* is
projected to tokens r^ and [r^; c^] is verified again: that is a recovered trajectory.

Reads   rollouts.jsonl of rollout.py (prompts whose rollouts all failed).
Writes  revised.jsonl, one record per failed rollout tried: `id`, `sample`, `prefix_len`, `recovered`, `losses`
        (explore, guide, nll per step), `gaps`, `gammas`, `passes` (forward), `kept` (share of prefix tokens the
        projection gives back), `continuations` (with --min-logprob: `logprob` of the right ones), `prefix_file`;
        prefixes-*.safetensors, the atoms and weights that rebuild every soft prefix;
        recovered.jsonl, one hard trajectory per right continuation, in the fields of rollouts.jsonl.

Differs from the paper: nothing in the losses, the step and the projection. What the paper leaves open: the cut is
floor(rho * tokens) with end-of-sequence counted in c; only ids that the tokenizer can decode are vertices; eight
continuations per prefix; all failed rollouts of a prompt are tried in turn until one is recovered.
"""
import argparse
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import rollout
from helpers import common, controls, packed, sampling
from helpers.common import UserError

# Dimension key: B rollouts, Q prompt, R prefix, N = sum of R over the batch, V vocabulary rows, D model width

TEMPLATE = "Based on my current reasoning process, the final answer is "
ORACLE_ROWS = 4096  # vocabulary rows scored at a time: more fall out of a CPU's cache
SHELF_BYTES = 2**28  # of atoms and weights in one prefixes-*.safetensors


@dataclass
class Failure:
    """One failed rollout on its way through Algorithm 1. Token ids throughout."""
    id: str
    sample: int
    q: list[int]
    r: list[int]
    c: list[int]
    gold: list[int]  # y_GT, as the template continues
    atoms: list[Tensor] = field(default_factory=list)  # token ids, (R,) each: r, then v*_i of each step
    weights: list[float] = field(default_factory=lambda: [1.0])  # of the atoms in E_r, summing to 1
    gammas: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # L_explore, L_guide, L_NLL before each step
    gaps: list[float] = field(default_factory=list)  # Frank-Wolfe duality gap before each step
    passes: int = 0  # forward passes that its revision took

    def __post_init__(self):
        self.atoms = self.atoms or [torch.tensor(self.r, dtype=torch.long)]

    def move(self, v: Tensor, gamma: float) -> None:
        """Eq. (7) on the weights: all that there were shrink by 1 - gamma, and the vertices v (R,) enter with gamma."""
        self.atoms, self.weights = [*self.atoms, v], [*((1 - gamma) * w for w in self.weights), gamma]
        self.gammas.append(gamma)


# --- Frank-Wolfe -----------------------------------------------------------------------------------------------------
def best_rows(X: Tensor, W: Tensor, allowed: Tensor, metric: str = "inner", chunk: int = ORACLE_ROWS) -> Tensor:
    """For every row of X (N, D) the id in `allowed` whose row of W (V, D) scores highest: ids (N,).

    metric: inner <x, v>, cosine <x, v>/|v|, or l2 -|x - v|^2. Scores are float32 (bfloat16 scores change vertices) and
    exist for `chunk` vocabulary rows at a time. Ties go to the id that comes first.
    """
    X, best = X.float(), torch.full((len(X),), -torch.inf, device=X.device)
    ids = torch.zeros(len(X), dtype=torch.long, device=X.device)
    # Indexing by a list of ids copies every row; most tokenizers allow ids without a gap, which a slice views
    gapless = len(allowed) > 0 and int(allowed[-1] - allowed[0]) == len(allowed) - 1
    for s in range(0, len(allowed), chunk):
        some = allowed[s:s + chunk]
        rows = (W[int(some[0]):int(some[0]) + len(some)] if gapless else W[some]).float()  # (chunk, D)
        scores = X @ rows.T  # (N, chunk)
        if metric == "cosine":
            # denominator |v|: |x| is the same for every v. A row of zeros (padding often is one) scores 0, not nan
            scores = scores / rows.norm(dim=-1).clamp(min=1e-12)
        elif metric == "l2":
            scores = 2 * scores - rows.square().sum(-1)  # |x|^2 is the same for every v
        value, index = scores.max(-1)
        better = value > best
        best = torch.where(better, value, best)
        ids = torch.where(better, some[index], ids)
    return ids


def oracle(G: Tensor, W: Tensor, allowed: Tensor) -> Tensor:
    """Eq. (6), the vertex that lowers the linearised loss most: argmin_v <G_j, v> at every position, ids (N,)."""
    return best_rows(-G, W, allowed)


def soft_prefix(W: Tensor, atoms: list[Tensor], weights: list[float]) -> Tensor:
    """E_r (R, D) float32 as sum_i weights_i W[atoms_i]: what Eq. (7) gives when it is multiplied out.

    Every iterate is a convex combination of at most K+1 tokens per position, with the same weights at every position.
    So ids and weights are all there is to a soft prefix: stored, they rebuild it bit for bit.
    """
    E = torch.zeros(len(atoms[0]), W.shape[1], device=W.device)
    for ids, weight in zip(atoms, weights):
        E = E + weight * W[torch.as_tensor(ids, dtype=torch.long, device=W.device)].float()
    return E


def revise_prefixes(model, batch: list[Failure], template: list[int], allowed: Tensor, args: argparse.Namespace,
                    keep: set[int] = frozenset()) -> list[dict[int, Tensor]]:
    """Algorithm 1 on a batch, the model frozen: every rollout's revised prefix, (R, D) float32, after the steps in
    `keep` and after the last, {step: prefix}.

    Fills in the rest of every Failure; its atoms and weights are all that `soft_prefix` needs to rebuild the last
    prefix (with --optimizer adam it cannot be rebuilt). A rollout whose L_guide is below --eps-stop leaves the batch
    before it is moved, and stays as it is.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(len(f.q) + len(f.r) + len(f.c) for f in batch) > window:
        raise UserError(f"--model: its attention slides over {window} tokens, and a rollout is longer; the packed "
                        "pass is full attention")
    W = model.get_input_embeddings().weight.detach()
    weights = (args.explore_weight, args.alpha_guide, args.beta_nll)
    soft = [soft_prefix(W, f.atoms, f.weights) for f in batch]
    moments = [(torch.zeros_like(E), torch.zeros_like(E)) for E in soft] if args.optimizer == "adam" else None
    kept = [{0: E} if 0 in keep else {} for E in soft]
    active, tensors = list(range(len(batch))), None

    with packed.frozen(model, args.checkpoint_activations):
        for i in range(1, args.revision_steps + 1):  # Alg. 1, for i = 1..K
            if args.vertices == "random":  # noise needs no gradient, and so no pass: no losses, no gap, no early stop
                moving = {b: (None, controls.random_vertices(batch[b], i, allowed, args.seed)) for b in active}
            else:
                if tensors is None:
                    tensors = packed.pack(
                        [batch[b] for b in active], template, weights, args.reduction == "mean", W.device)
                losses, G = packed.losses_and_gradient(model, tensors, torch.cat([soft[b] for b in active]))
                sizes = [len(batch[b].r) for b in active]
                moving = {}
                for b, loss, g, v in zip(active, losses.tolist(), G.split(sizes), oracle(G, W, allowed).split(sizes)):
                    batch[b].losses.append(loss)
                    batch[b].passes += 1
                    if loss[1] >= args.eps_stop:  # Alg. 1: stop if L_guide < eps, before the step
                        # <G, E - V*>: never negative in the hull, 0 where stationary
                        batch[b].gaps.append(float((g * (soft[b] - W[v].float())).sum()))
                        moving[b] = g, v
            for b, (g, v) in moving.items():
                if moments is not None:
                    soft[b] = controls.adam_step(soft[b], g, moments[b], i, args.adam_lr)
                else:
                    batch[b].move(v, args.gamma0 * 2 / (i + 1))  # Eq. (7); 2/(i+1) is Frank-Wolfe's classical step
                    soft[b] = soft_prefix(W, batch[b].atoms, batch[b].weights)
                if i in keep:
                    kept[b][i] = soft[b]
            if list(moving) != active:
                active, tensors = list(moving), None
            if not active:
                break
    # A rollout that stopped early is after every later step what it was when it stopped
    return [k | {step: E for step in {*keep, args.revision_steps} - k.keys()} for k, E in zip(kept, soft)]


# --- one batch of failed rollouts, from cut to verified trajectory ----------------------------------------------------
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
    """|r| = floor(rho * tokens), end-of-sequence included in the count.
    0 means that the rollout is too short to cut."""
    n = math.floor(rho * len(response_ids) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return max(0, min(n, len(response_ids) - 1))  # c is never empty, however close to 1 rho is


def revise_batch(policy: common.Policy, rollouts: list[dict], args: argparse.Namespace, verify) -> list[dict]:
    """Algorithm 1, decoding, verification and projection for failed rollouts (records of rollout.py).

    A rollout may carry `guide_answer`, the answer to steer toward when it is not the gold one. Returns one record per
    rollout, in order; in float32 nothing in it depends on the batch, up to rounding (see helpers/sampling.py).
    """
    model, tokenizer = policy.model, policy.tokenizer
    W = model.get_input_embeddings().weight.detach()
    allowed = allowed_rows(tokenizer, policy.vocab, len(W), args.vertex_rows).to(W.device)
    batch = []
    cuts = [0 if args.start == "scratch" else cut(r["response_ids"], args.rho) for r in rollouts]
    for r, n in zip(rollouts, cuts):
        template, gold = answer_ids(tokenizer, args.template, r.get("guide_answer", r["answer"]))
        batch.append(Failure(r["id"], r["sample"], r["prompt_ids"], r["response_ids"][:n], r["response_ids"][n:], gold))
    # Decode from the soft prefix; with --record-every also after fewer steps, for the curves of Fig. 3
    steps = {args.revision_steps, *(range(0, args.revision_steps, args.record_every) if args.record_every else ())}
    if args.start == "soft":
        prefixes = revise_prefixes(model, batch, template, allowed, args, steps)
    else:  # controls: hard prefix, or none
        prefixes = [dict.fromkeys(steps, soft_prefix(W, f.atoms, f.weights)) for f in batch]
    results = [{} for _ in batch]
    questions = [W[torch.tensor(f.q, device=W.device)] for f in batch]  # Embed(q), each (Q, D)
    keys = [[sampling.row_key(args.seed, f.id, f.sample, "revised", m) for m in range(args.continuations)]
            for f in batch]
    limits = [int(min(args.max_new_tokens - len(f.r), policy.context - len(f.q) - len(f.r))) for f in batch]
    for step in sorted(steps):
        prompts = [torch.cat([q, E[step].to(q.dtype)]) for q, E in zip(questions, prefixes)]
        samples = sampling.sample(policy, prompts, keys, limits, **sampling.settings(args))
        for result, s in zip(results, samples):
            result[step] = s

    records = []
    for f, r, E, result in zip(batch, rollouts, prefixes, results):
        # Eq. (8); a prefix that did not move is its own tokens
        moved = f.gaps or f.gammas  # Adam has no gammas, noise no gaps
        projected = best_rows(E[args.revision_steps], W, allowed, args.projection).tolist() if moved else f.r
        ends = bool(set(projected) & set(policy.eos))  # the policy would have stopped there: no trajectory of its own
        curve = {}
        for step, samples in result.items():
            soft_text = [tokenizer.decode(f.r + s.ids, skip_special_tokens=True) for s in samples]
            rewards = [int(bool(verify(text, r["answer"]))) for text in soft_text]
            curve[step] = {"rewards": rewards, "ids": [s.ids for s in samples]}
        continuations = []
        for s, soft_reward in zip(result[args.revision_steps], curve[args.revision_steps]["rewards"]):
            text = tokenizer.decode(projected + s.ids, skip_special_tokens=True)
            c = {"ids": s.ids, "finish": s.finish, "response": text, "soft_reward": soft_reward,
                 # Sec. 3.5, on the hard trajectory too
                 "reward": int(bool(soft_reward and not ends and verify(text, r["answer"])))}
            if "guide_answer" in r:
                c["guide_reward"] = int(bool(verify(text, r["guide_answer"])))
            continuations.append(c)
        if args.min_logprob is not None:
            controls.drop_unlikely(model, f.q + projected, continuations, args.min_logprob)
        same = sum(a == b for a, b in zip(f.r, projected))
        records.append({
            "id": f.id, "sample": f.sample, "answer": r["answer"], "prefix_len": len(f.r),
            "recovered": any(c["reward"] for c in continuations), "losses": f.losses, "gaps": f.gaps,
            "gammas": f.gammas, "passes": f.passes,
            "kept": same / len(f.r) if f.r else 1.0,  # denominator: prefix tokens
            "prompt_ids": f.q, "prefix_ids": f.r, "projected_ids": projected,
            "atoms": [v.tolist() for v in f.atoms], "weights": f.weights,
            "continuations": continuations, "curve": curve} | {k: r[k] for k in ("guide_answer",) if k in r})
    return records


@functools.lru_cache(maxsize=2)
def allowed_rows(tokenizer, vocab: int, rows: int, which: str) -> Tensor:
    """Ids of the rows of W that may be vertices and projections: the tokenizer's, those without special tokens, or all
    `rows` (some of which no tokenizer can decode)."""
    if which == "all":
        return torch.arange(rows)
    special = set(tokenizer.all_special_ids) if which == "text" else set()
    return torch.tensor([i for i in sorted(set(tokenizer.get_vocab().values())) if i < vocab and i not in special])


def shelf_key(record: dict) -> str:
    """ID/SAMPLE as the name of a tensor, which has to be Unicode: a lone surrogate in an id becomes its escape."""
    return f"{record['id']}/{record['sample']}".encode("utf-8", "backslashreplace").decode()


def shelve_prefixes(records: Iterator[dict], out: Path) -> Iterator[dict]:
    """Move atoms and weights of every record to OUT/prefixes-00000.safetensors, ... and name the file in `prefix_file`.

    Tensors ID/SAMPLE/atoms int32 (K+1, |r|), the first row r itself, and ID/SAMPLE/weights float64 (K+1,). A new file
    is begun after SHELF_BYTES, so that no more than one is in memory;
    where a record goes depends on those before it alone.
    """
    shelf, size, number = {}, 0, 0

    def close() -> None:
        name = out / f"prefixes-{number:05d}.safetensors"
        save_file(shelf, f"{name}.tmp")
        os.replace(f"{name}.tmp", name)

    for r in records:
        key = shelf_key(r)
        shelf[f"{key}/atoms"] = torch.tensor(r["atoms"], dtype=torch.int32)
        shelf[f"{key}/weights"] = torch.tensor(r["weights"], dtype=torch.float64)
        size += sum(shelf[f"{key}/{x}"].nbytes for x in ("atoms", "weights"))
        rest = {k: v for k, v in r.items() if k not in ("atoms", "weights")}
        yield rest | {"prefix_file": f"prefixes-{number:05d}.safetensors"}
        if size >= SHELF_BYTES:
            close()
            shelf, size, number = {}, 0, number + 1
    close()


def load_prefix(folder: Path, record: dict) -> tuple[Tensor, list[float]]:
    """Atoms (K+1, R) and weights (K+1) of a record of revised.jsonl in `folder`.
    Raises UserError if they are not there."""
    name = str(record.get("prefix_file"))
    try:
        if Path(name).name != name:  # a name from a file must not lead out of the folder
            raise OSError(f"{name!r} is not a file name")
        with safe_open(folder / name, "pt") as f:
            atoms, weights = (f.get_tensor(f"{shelf_key(record)}/{x}") for x in ("atoms", "weights"))
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{folder}: the prefix of {record['id']!r} cannot be read ({e})") from None
    return atoms, weights.tolist()


def trajectories(record: dict) -> list[dict]:
    """The recovered hard trajectories [r^; c^] of a revision record, in the fields of rollouts.jsonl."""
    return [{"id": record["id"], "sample": record["sample"], "continuation": m, "prompt_ids": record["prompt_ids"],
             "response_ids": record["projected_ids"] + c["ids"], "response": c["response"], "finish": c["finish"],
             "reward": 1, "answer": record["answer"], "prefix_len": record["prefix_len"]}
            for m, c in enumerate(record["continuations"]) if c["reward"]]


@dataclass
class Entry:
    """Where a failed rollout is in rollouts.jsonl: the file may be larger than memory."""
    sample: int
    place: tuple[Path, int, int]  # path, offset, bytes
    tokens: int  # of prompt and response
    answer: str


def read_failures(file: Path, rho: float) -> tuple[dict[str, list[Entry]], int]:
    """The failed rollouts of every zero-hit prompt, {id: entries in sample order},
    and how many were too short to cut."""
    def keep(r: dict) -> tuple:
        if type(r["sample"]) is not int or not isinstance(r["answer"], str) or r["reward"] not in (0, 1):
            raise ValueError("sample is not a number, answer not text, or reward not 0 or 1")
        return r["reward"], cut(r["response_ids"], rho), len(r["prompt_ids"]) + len(r["response_ids"]), r["answer"]

    found = common.scan([file], keep)
    if not found:
        raise UserError(f"--rollouts {file}: holds no rollouts")
    hit = {i for (i, _), (*_, kept) in found.items() if kept[0]}
    failures, skipped = {i: [] for i, _ in found if i not in hit}, 0
    for (i, sample), (*place, (_, prefix, tokens, answer)) in sorted(found.items(), key=lambda x: x[0][1]):
        if i not in hit:
            skipped += prefix < 1
            failures[i] += [Entry(sample, tuple(place), tokens, answer)] if prefix else []
    return {i: entries for i, entries in failures.items() if entries}, skipped


def check_rollout(policy: common.Policy, r: dict, args: argparse.Namespace) -> None:
    """Raises UserError for a rollout of another tokenizer, or one that leaves no token for a continuation."""
    context = policy.context
    where = f"--rollouts: sample {r['sample']} of {r['id']!r}"
    rollout.check_ids(r, policy.vocab, where)
    n = cut(r["response_ids"], args.rho)
    most = min(len(r["prompt_ids"]) + args.max_new_tokens, context)
    if 0 < args.decode_tokens < most:
        raise UserError(f"--decode-tokens {args.decode_tokens}: {where[12:]} and its longest continuation "
                        f"take {most}")
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
    parser.add_argument("--template", default=TEMPLATE,
                        help="[Sec. 3.3] c_tmpl, the sentence that the gold answer ends")
    parser.add_argument("--reduction", default="sum", choices=["sum", "mean"], help="[Eqs. 2-4] sum; mean is [ours]")
    parser.add_argument("--projection", default="inner", choices=["inner", "cosine", "l2"],
                        help="[Eq. 8] inner product")
    parser.add_argument("--vertex-rows", default="tokens", choices=["tokens", "text", "all"],
                        help="[ours] vertices: every id of the tokenizer, all but the special ones, or all rows of W")
    parser.add_argument("--continuations", type=int, default=8, help="[Fig. 3] continuations per revised prefix")
    parser.add_argument("--from", dest="start", default="soft", choices=["soft", "hard-prefix", "scratch"],
                        help="[ours] controls: continue the unrevised prefix, or sample anew from the prompt")
    parser.add_argument("--revise-tokens", type=int, default=16384, help="[ours] padded tokens of the failed rollouts "
                        "revised together: the memory flag of the revision")
    parser.add_argument("--record-every", type=int, default=0, help="[Fig. 3] also decode after every so many steps")
    controls.add_control_args(parser)


def check_revision_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range."""
    for flag, good in {"rho": 0 < args.rho < 1, "revision_steps": args.revision_steps >= 0,
                       "gamma0": 0 < args.gamma0 <= 1, "continuations": args.continuations > 0,
                       "record_every": args.record_every >= 0, "revise_tokens": args.revise_tokens > 0,
                       "min_logprob": args.min_logprob is None or abs(args.min_logprob) < float("inf"),
                       **{k: abs(getattr(args, k)) < float("inf") for k in (
                           "alpha_guide", "beta_nll", "explore_weight", "eps_stop")}}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")
    if args.optimizer == "adam" and args.vertices == "random":
        raise UserError("--optimizer adam has no --vertices: those are of Frank-Wolfe")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser)
    parser.add_argument("--rollouts", required=True, help="[ours] output folder of rollout.py, or its rollouts.jsonl")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("--checkpoint-activations", action="store_true", help="[ours] recompute activations in the "
                        "backward: less memory for long rollouts, a third slower")
    parser.add_argument("--attempts", type=int, default=0,
                        help="[ours] failed rollouts tried per prompt until one is recovered; 0 for all")
    parser.add_argument("--gold", default="true", choices=["true", "permuted"],
                        help="[ours] control: steer toward another prompt's answer")
    add_revision_args(parser)
    sampling.add_sampling_args(parser)
    return parser.parse_args(argv)


FREE = (*rollout.FREE, "revise_tokens", "checkpoint_activations")  # these change a result by float32 rounding alone


def main(args: argparse.Namespace) -> None:
    check_revision_args(args)
    if args.attempts < 0:
        raise UserError(f"--attempts {args.attempts} is out of range")
    source = Path(args.rollouts) / "rollouts.jsonl" if Path(args.rollouts).is_dir() else Path(args.rollouts)
    digest = common.file_digest(source)
    failures, skipped = read_failures(source, args.rho)
    failures = {i: failures[i][:args.attempts or None] for i in list(failures)[:args.limit or None]}
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=digest)
    golds = {i: entries[0].answer for i, entries in failures.items()}
    guide = controls.permuted_answers(golds, args.seed) if args.gold == "permuted" else {}

    # === revise: batches of prompts, each prompt's failed rollouts in turn until one is recovered ===
    final = out / "revised.jsonl"
    if not final.exists():
        policy = common.load_model(args, device)
        verify = common.load_verifier(args.verifier)
        part, done = common.open_part(out, "revised", keep=lambda record: record["recovered"])

        def finished(i: str) -> bool:
            tried = [done.get((i, entry.sample)) for entry in failures[i]]
            return all(tried) or any(t and t[3] for t in tried)

        names = list(failures)
        longest = [max(entry.tokens for entry in failures[i]) for i in names]
        batches = [[names[k] for k in batch] for batch in common.batches_by_length(longest, args.revise_tokens)]
        mine = [b for b in batches[common.rank()::common.world_size()] if not all(map(finished, b))]
        for i in (i for batch in mine for i in batch):  # before any work, not in the middle of it
            for entry in failures[i]:
                check_rollout(policy, common.read_at(*entry.place), args)
                answer_ids(policy.tokenizer, args.template, guide.get(i, entry.answer))
        bar = tqdm(total=sum(map(len, mine)), desc="revise", unit="prompt", disable=common.rank() > 0)
        found = seen = 0
        for batch in mine:
            records, unsolved = [], batch
            for attempt in range(max(len(failures[i]) for i in batch)):
                rows = [common.read_at(*failures[i][attempt].place) for i in unsolved if attempt < len(failures[i])]
                rows = [r | ({"guide_answer": guide[r["id"]]} if guide else {}) for r in rows]
                records += revise_batch(policy, rows, args, verify) if rows else []
                solved = {r["id"] for r in records if r["recovered"]}
                unsolved = [i for i in unsolved if i not in solved]
            common.append_jsonl(part, [r for r in records if (r["id"], r["sample"]) not in done])
            found += len(batch) - len(unsolved)
            seen += len(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"recovered {found / seen:.3f}")
        bar.close()
        order = {i: k for k, i in enumerate(failures)}
        common.merge_parts(out, "revised", order, lambda records: shelve_prefixes(records, out))
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
    common.run_script(get_args, main)
