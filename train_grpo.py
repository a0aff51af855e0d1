"""GRPO on verifiable rewards; --revise rescues zero-hit groups by LatentRevise (paper Sec. 4.1,
Tables 1 and 2).

    python train_grpo.py --model toy/sums_model --data hard.jsonl --out out/grpo --revise --steps 60
    torchrun --nproc-per-node 8 train_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --revise \\
        --data dapo.jsonl --out out/ours

Each step: sample a group of N responses per prompt, verify, revise a failed response of every group
without a hit, compute advantages, update. Without --revise this is the plain baseline, and a batch
in which every group has a hit is the same with and without it, bit for bit.

Reads   problems as rollout.py does.
Writes  metrics.jsonl and samples.jsonl; checkpoints, from which the same command continues and
        which eval.py takes as --model; OUT/model.

An injected trajectory [r^; c^] (--revise) is a row of its group like any other:
    place      that of the failed rollout it was revised from; --inject append: one more row
    advantage  computed after it is in, with reward 1: alone right among N = 8 it gets 2.47, each of
               the others -0.35
    ratio      p / p_old of its hard tokens, p_old being the current policy's: exactly 1 at one
               update a step. So nothing corrects for tokens that the policy would never write,
               whose gradients are the largest. --injected-ratio luffy (arXiv 2504.14945, policy
               shaping) has L = -f(p) A with f(x) = x / (x + 0.1) there, not clipped; LUFFY itself
               also drops std, the KL, and the clip of the other tokens
The paper does not say which of these it used.

What --algo is, silent variants included. L: loss of a token; A: advantage; d = log ref - log p.
    L          -min(ratio A, clip(ratio) A) + kl_coef KL; ratio: p / p_old of the token, with p_old
               from before the step's first update. Mean over all response tokens of the step:
               VERL's token-mean, DAPO's Eq. (12); GRPO's Eq. (3) averages each response first
    A          (R - mean) / (std + 1e-6) over the group, std with ddof 1
    exp        of log-differences clamped to +-20, as in VERL, which also clamps k3 to 10
               --algo grpo, arXiv 2402.03300, Eq. (3)    --algo dapo, arXiv 2503.14476, Eq. (8)
    R          0 or 1                                    - overlong penalty, Eq. (13), if asked for
    all R      kept, A = 0                               dropped and others sampled, for at most
      equal                                              --resample rounds, then a smaller batch
    clip       0.2 / 0.2; dual clip: none (VERL: 3.0)    0.2 / 0.28, Eq. (10)
    KL         k3, exp(d) - d - 1, to the initial model  none
"""
import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import revise
import rollout
from helpers import common, sampling, training, verifying
from helpers.common import COUNT, NOT_NEGATIVE, POSITIVE, Policy, UserError
from helpers.sampling import row_key

# Dimension key: G group, M response tokens of a micro-batch

LOG_BOUND = 20.0  # of log-differences before exp: far beyond any clip and far from overflow
LUFFY_GAMMA = 0.1
WARN_AFTER = 20  # steps without signal
ALGO = {"grpo": {"kl_coef": 0.001, "clip_high": 0.2}, "dapo": {"kl_coef": 0.0, "clip_high": 0.28}}


# --- the objective --------------------------------------------------------------------------------
def advantages(rewards: list[float]) -> list[float]:
    """A_i = (R_i - mean) / (std + 1e-6) over one group (G,), std with ddof 1: Sec. 3.1. All zero
    where all rewards are equal."""
    r = torch.tensor(rewards, dtype=torch.float64)
    if len(r) < 2 or bool((r == r[0]).all()):
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.std() + 1e-6)).tolist()


def policy_loss(logp: Tensor, old: Tensor, ref: Tensor | None, advantage: Tensor, clip_low: float,
                clip_high: float, kl_coef: float,
                shaped: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Per token (M,): PPO's surrogate, with the bounds apart as in DAPO's Eq. (8), plus
    kl_coef * KL; the KL estimate; whether the clip binds. shaped: tokens with LUFFY's surrogate."""
    ratio = (logp - old).clamp(-LOG_BOUND, LOG_BOUND).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.min(ratio * advantage, bounded * advantage)
    clipped = bounded * advantage < ratio * advantage
    if shaped is not None:
        p = logp.exp()
        surrogate = torch.where(shaped, p / (p + LUFFY_GAMMA) * advantage, surrogate)
        clipped = clipped & ~shaped
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = (ref - logp).clamp(-LOG_BOUND, LOG_BOUND)
        kl = d.exp() - d - 1  # k3 (Schulman 2020): unbiased and never negative
    return -surrogate + kl_coef * kl, kl, clipped


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's Eq. (13): 0 up to limit - buffer, then linear down to -1 at the limit. 0 is off."""
    return -max(0.0, (length - (limit - buffer)) / buffer) if buffer else 0.0


# --- one step's data ------------------------------------------------------------------------------
def sample_groups(policy: Policy, problems: list[dict], key: tuple, args,
                  verify) -> list[list[dict]]:
    """N rollout records for each problem, in their order. key: seed, step and round, so that a
    prompt that is seen again is sampled anew."""
    groups = {p["id"]: [] for p in problems}
    rows = ((p, s) for p in problems for s in range(args.group_size))
    for records in rollout.sample_records(policy, rows, verify, args, key, args.decode_rows):
        for r in records:
            groups[r["id"]].append(r)
    return [sorted(group, key=lambda r: r["sample"]) for group in groups.values()]


def count(groups: list[list[dict]]) -> dict[str, int]:
    """What was sampled: of the policy alone, before any rescue."""
    responses = [r for group in groups for r in group]
    return {"groups": len(groups), "responses": len(responses),
            "zero_hit": sum(not any(r["reward"] for r in group) for group in groups),
            "hits": sum(r["reward"] for r in responses),
            "tokens": sum(len(r["response_ids"]) for r in responses),
            "truncated": sum(r["finish"] == "length" for r in responses)}


def recover(policy: Policy, failed: list[dict], key: tuple, args, verify) -> dict[str, dict]:
    """{id: right trajectory} for those of the failed rollouts, one a prompt, that can be recovered.
    Another method of recovery replaces this function."""
    length = lambda r: sum(map(len, revise.failure_of(policy, r, args)[2:]))
    window = getattr(policy.model.config, "sliding_window", None) or float("inf")
    found, failed = {}, [r for r in failed if length(r) <= window]  # revise() takes no longer ones
    for batch in common.batches_by_length(failed, length, args.revise_tokens):
        for record in revise.revise_batch(policy, batch, args, verify, seed=row_key(*key)):
            found |= {t["id"]: t for t in revise.trajectories(record)[:1]}
    return found


def inject(group: list[dict], new: dict, how: str) -> list[dict]:
    """The group with a trajectory in the place of the rollout it came from, or as one more row."""
    new = new | {"injected": True}
    if how == "append":
        return [*group, new]
    return [new if r["sample"] == new["sample"] else r for r in group]


def rescue(policy: Policy, groups: list[list[dict]], key: tuple, args,
           verify) -> tuple[list[list[dict]], int]:
    """The groups, every zero-hit one with a trajectory recovered from its first rollout that is
    long enough to cut, where that succeeds; and how many these are."""
    zero_hit = [group for group in groups if not any(r["reward"] for r in group)]
    failed = [[r for r in group if revise.cut(r["response_ids"], args.rho)] for group in zero_hit]
    found = recover(policy, [rows[0] for rows in failed if rows], key, args, verify)
    return [inject(group, found[group[0]["id"]], args.inject) if group[0]["id"] in found else group
            for group in groups], len(found)


def choose(wanted: list[bool], room: int) -> tuple[list[int], int]:
    """Which of this rank's groups go into the batch, and how many of all ranks do: the first `room`
    wanted ones in the order of the data, so that the batch does not depend on the number of
    processes. Group j of a rank is prompt rank + j * world of the round."""
    places = [common.rank() + j * common.world_size() for j in range(len(wanted))]
    mine = [place for place, w in zip(places, wanted) if w]
    chosen = sorted(place for ranks in common.gather(mine) for place in ranks)[:room]
    return [j for j, place in enumerate(places) if place in chosen], len(chosen)


def collect(policy: Policy, problems: list[dict], step: int, cursor: int, args,
            verify) -> tuple[list[list[dict]], int, dict]:
    """This rank's groups for one step, the next data cursor, and counts over all ranks. With --algo
    dapo, groups whose rewards are all equal are dropped and further prompts sampled."""
    counts, mine, kept, longest = Counter(rescued=0), [], 0, 0
    for turn in range(1 + (args.resample if args.algo == "dapo" else 0)):
        key = (args.seed, "grpo", step, turn)
        order = training.draw_rows(len(problems), cursor, min(args.batch_size, len(problems)),
                                   args.seed)
        cursor += len(order)
        order = list(dict.fromkeys(order))  # a round across two epochs can draw a prompt twice
        own = [problems[i] for i in order[common.rank()::common.world_size()]]
        begun = time.time()
        groups = sample_groups(policy, own, key, args, verify)
        counts.update(count(groups), seconds_sample=time.time() - begun)  # adds
        longest = max([longest, *(len(r["response_ids"]) for group in groups for r in group)])
        if args.revise:
            begun = time.time()
            groups, rescued = rescue(policy, groups, key, args, verify)
            counts.update(rescued=rescued, seconds_revise=time.time() - begun)
        signal = [0 < sum(r["reward"] for r in group) < len(group) for group in groups]
        counts.update(signal=sum(signal))
        wanted = signal if args.algo == "dapo" else [True] * len(groups)
        indices, chosen = choose(wanted, args.batch_size - kept)
        mine += [groups[j] for j in indices]
        kept += chosen
        if kept == args.batch_size:
            break
    seconds = {k: counts.pop(k, 0.0) for k in ("seconds_sample", "seconds_revise")}  # this rank's
    counts = {k: training.total(v) for k, v in counts.items()}
    return mine, cursor, counts | seconds | {"kept": kept, "longest": max(common.gather(longest))}


# --- one step's update ----------------------------------------------------------------------------
def token_losses(model, rows: list[dict], old: Tensor | None, ref: Tensor | None,
                 args) -> dict[str, Tensor]:
    """The loss of every response token of the rows and what is logged beside it, (M,) each."""
    logp, entropy, owner = training.response_logprobs(model, rows)
    of_tokens = lambda values: torch.tensor(values, device=model.device)[owner]  # (M,)
    advantage, shaped = of_tokens([r["advantage"] for r in rows]), None
    if args.injected_ratio == "luffy":
        shaped = of_tokens([r.get("injected", False) for r in rows]).bool()
    old = logp.detach() if old is None else old
    loss, kl, clipped = policy_loss(logp, old, ref, advantage, args.clip_low, args.clip_high,
                                    args.kl_coef, shaped)
    return {"loss": loss, "entropy": entropy, "kl": kl, "clipped": clipped}


def update(model, reference, optimizer, rows: list[dict], args: argparse.Namespace) -> dict:
    """--updates passes over the rows (with `advantage`), one optimizer step each. Returns means
    over response tokens, {} where no process has a row."""
    # of all processes, before the first forward
    tokens = training.total(sum(len(r["response_ids"]) for r in rows))
    if tokens == 0:
        return {}
    batches = training.equal_batches(rows, args.train_tokens)
    olds, refs = [None] * len(batches), [None] * len(batches)
    with torch.no_grad():
        if args.updates > 1:  # at one update they are the new ones, detached
            olds = [training.response_logprobs(model, b, entropy=False)[0] for b in batches]
        if args.kl_coef:
            refs = [training.response_logprobs(reference, b, entropy=False)[0] for b in batches]
    for _ in range(args.updates):
        sums = Counter()
        for batch, old, ref in zip(batches, olds, refs):
            with common.checkpointed(model, args.checkpoint_activations):
                values = token_losses(model, batch, old, ref, args)
                # denominator: response tokens of the step, over all ranks
                (values["loss"].sum() / tokens).backward()
            sums.update({name: float(v.detach().sum()) for name, v in values.items()})
        norm = training.apply_gradients(model, optimizer, args.grad_clip)
    means = {name: training.total(v) / tokens for name, v in sums.items()}
    return means | {"grad_norm": norm, "tokens": tokens}


# --- what a step reports --------------------------------------------------------------------------
def step_metrics(step: int, counts: dict, rows: list[dict], stats: dict) -> dict:
    """One line of metrics.jsonl: what was sampled, over all processes, and what update() says."""
    injected = training.total(sum(len(r["response_ids"]) for r in rows if r.get("injected")))
    groups, responses = counts["groups"], counts["responses"]  # denominators
    return {"step": step, "reward": counts["hits"] / responses,
            **{name: counts[name] / groups for name in ("zero_hit", "rescued", "signal")},
            "injected_tokens": injected / max(stats.get("tokens", 0), 1),
            "kept_groups": counts["kept"], **stats,
            "length_mean": counts["tokens"] / responses, "length_max": counts["longest"],
            "truncated": counts["truncated"] / responses,
            "tokens_per_second": round(counts["tokens"] / max(counts["seconds_sample"], 1e-9), 1),
            "seconds_sample": round(counts["seconds_sample"], 3),
            "seconds_revise": round(counts["seconds_revise"], 3)}


def log_samples(out: Path, step: int, rows: list[dict], tokenizer, args) -> None:
    """Some groups of rank 0 to samples.jsonl, rescued ones first, as --samples has it."""
    every, groups = args.samples
    if common.rank() > 0 or not rows or not every or (step - 1) % every:
        return
    rescued = {r["id"] for r in rows if r.get("injected")}
    ids = sorted(dict.fromkeys(r["id"] for r in rows), key=lambda i: i not in rescued)
    common.append_jsonl(out / "samples.jsonl", [
        {"step": step, "id": r["id"], "prompt": tokenizer.decode(r["prompt_ids"]),
         "response": r["response"], "reward": r["reward"], "advantage": r.get("advantage"),
         "injected": r.get("injected", False)}
        for i in ids[:groups or None] for r in rows if r["id"] == i])


def report(bar, metrics: dict, silent: int, args: argparse.Namespace) -> None:
    """The bar, and warnings. silent: steps without signal until now."""
    bar.set_postfix_str(f"reward {metrics['reward']:.3f}, zero-hit {metrics['zero_hit']:.2f}, "
                        f"rescued {metrics['rescued']:.2f}", refresh=False)
    if common.rank() > 0:
        return
    if args.algo == "dapo" and metrics["kept_groups"] < args.batch_size:
        bar.write(f"step {metrics['step']}: only {metrics['kept_groups']} of {args.batch_size} "
                  f"groups had signal after {args.resample} further rounds")
    if silent == WARN_AFTER:
        bar.write(f"warning: no group of the last {silent} steps had both right and wrong "
                  "responses, so nothing is learned. Look at samples.jsonl: does the model answer "
                  "in the format that --verifier wants, are responses cut off (truncated; "
                  "--max-new-tokens), is --data too hard or too easy (--revise)?")


# --- the stage ------------------------------------------------------------------------------------
def add_common_args(parser: argparse.ArgumentParser, group_size: int) -> None:
    """Flags that a baseline has as well."""
    common.add_model_args(parser)
    add = parser.add_argument
    add("--data", required=True, help="problems, JSONL; zero_hit.jsonl of rollout.py is dapo-hard")
    add("--out", required=True, help="output folder")
    add("--group-size", type=POSITIVE, default=group_size, help="[Table 7] N, of a prompt")
    add("--batch-size", type=POSITIVE, default=512, help="[Table 7] prompts per step")
    add("--samples", type=COUNT, nargs=2, default=[10, 2], metavar=("STEPS", "GROUPS"),
        help="to samples.jsonl: every so many steps (0: never) so many groups (0: all), rescued "
             "ones first")
    training.add_training_args(parser)
    sampling.add_sampling_args(parser)
    verifying.add_verifier_args(parser)
    rollout.add_problem_args(parser)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, epilog="The flags of the revision are taken as well: "
                           "`python revise.py --help` describes them.")
    add_common_args(parser, group_size=8)
    add = parser.add_argument_group("objective").add_argument
    add("--algo", default="grpo", choices=list(ALGO), help="[Tables 1, 2] dapo is a baseline")
    add("--kl-coef", type=NOT_NEGATIVE, default=argparse.SUPPRESS,
        help="[Table 7] 0.001 for grpo; 0 for dapo")
    add("--clip-low", type=NOT_NEGATIVE, default=0.2, help="PPO's; the paper names none")
    add("--clip-high", type=NOT_NEGATIVE, default=argparse.SUPPRESS,
        help="0.2 for grpo; 0.28 for dapo")
    add("--updates", type=POSITIVE, default=1, help="optimizer steps per batch of rollouts")
    add("--resample", type=COUNT, default=3, help="dapo: further rounds of sampling per step")
    add("--overlong-buffer", type=COUNT, default=0,
        help="dapo: tokens before --max-new-tokens over which a length penalty grows to 1")
    add = parser.add_argument_group("LatentRevise").add_argument
    add("--revise", action="store_true", help="[Sec. 4.1] rescue zero-hit groups: the method")
    add("--inject", default="replace", choices=["replace", "append"],
        help="the recovered trajectory replaces the rollout it came from, or joins the group")
    add("--injected-ratio", default="current", choices=["current", "luffy"],
        help="of injected tokens: that of any response, or LUFFY's policy shaping")
    args, rest = parser.parse_known_args(argv)
    revision = common.Parser("", prog=parser.prog)
    revise.add_revision_args(revision)
    return revision.parse_args(rest, argparse.Namespace(**ALGO[args.algo] | vars(args)))


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    training.check_plain_sampling(args)
    if args.group_size < 2:
        raise UserError(f"--group-size {args.group_size}: an advantage is relative to others")
    if args.overlong_buffer > (args.max_new_tokens if args.algo == "dapo" else 0):
        raise UserError(f"--overlong-buffer {args.overlong_buffer}: goes with --algo dapo alone, "
                        "and up to --max-new-tokens")
    if args.record_every:
        raise UserError(f"--record-every {args.record_every}: training keeps no curve")


def main(args: argparse.Namespace) -> None:
    check_flags(args)

    # === setup ===
    problems = rollout.read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, data_digest=common.file_digest(args.data))
    if training.is_finished(out, args.steps):
        return
    verify = verifying.from_args(args)
    trained = training.load_model(args, device, train=True)
    model, tokenizer = trained.model, trained.tokenizer
    problems = rollout.add_prompts(trained, problems, args)
    limits = {p["id"]: p["response_limit"] for p in problems}
    for p in problems if args.revise else []:  # before any work, not in the middle of it
        revise.answer_ids(tokenizer, args.template, revise.guide_of(p))
    # the initial model, also after a restart
    reference = training.load_model(args, device).model if args.kl_coef else None
    policy = trained._replace(model=training.load_actor(model, args, device))  # samples, revises
    optimizer = training.make_optimizer(model, args)
    state = {"cursor": 0, "silent": 0} | training.load_checkpoint(out, model, optimizer, args.steps)
    log = training.open_logs(out, args, state["step"])

    bar = training.step_bar(args.algo, state["step"], args.steps)
    for step in bar:
        # === collect: sample, verify, revise ===
        training.refresh_actor(policy.model, model)
        groups, state["cursor"], counts = collect(policy, problems, step, state["cursor"], args,
                                                  verify)

        # === advantages ===
        rows = []
        for group in groups:
            rewards = [r["reward"] + overlong_penalty(len(r["response_ids"]), limits[r["id"]],
                                                      args.overlong_buffer) for r in group]
            rows += [r | {"advantage": a} for r, a in zip(group, advantages(rewards))]

        # === update ===
        begun = time.time()
        stats = update(model, reference, optimizer, rows, args)
        seconds = round(time.time() - begun, 3)

        # === report ===
        metrics = step_metrics(step, counts, rows, stats) | {
            "lr": args.lr, "memory_gb": training.peak_memory(device), "seconds_update": seconds}
        log(metrics)
        log_samples(out, step, rows, tokenizer, args)
        state |= {"step": step, "silent": 0 if counts["signal"] else state["silent"] + 1}
        report(bar, metrics, state["silent"], args)
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            training.save_checkpoint(out, trained, optimizer, state, args.keep)
    training.finish(out, trained, args.steps)


if __name__ == "__main__":
    common.run_script(get_args, main)
