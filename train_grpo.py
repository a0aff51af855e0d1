"""GRPO on verifiable rewards, with zero-hit groups rescued by LatentRevise: --revise (Sec. 3.6, Tables 1 and 2).

    python train_grpo.py --model toy/sums_model --data hard.jsonl --out out/grpo --revise --steps 60
    torchrun --nproc-per-node 8 train_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --data dapo.jsonl --out out/a --revise

Each step: sample a group of N responses per prompt, verify, revise a failed response of every group without a hit and
put the recovered trajectory in its place, compute advantages, update. Without --revise this is the plain baseline, and
a batch in which every group has a hit is the same with and without it, bit for bit.

Reads   problems as rollout.py does.
Writes  metrics.jsonl and samples.jsonl, eval.jsonl and OUT/eval with --eval-data, checkpoints to resume from (the same
        command continues), and OUT/model.

What each --algo is, silent variants included. L: loss; A: advantage; d = log ref - log p; `-`: does not apply.

                  grpo                           dapo                           opsd
    reference     arXiv 2402.03300, Eq. (3)      arXiv 2503.14476, Eq. (8)      arXiv 2601.18734 v1, Eq. (6)
    L per token   -min(ratio A, clip(ratio) A)   the same                       JSD_beta(teacher || student) over the
                  + kl_coef KL                                                  whole vocabulary (GKD, arXiv 2306.13649)
    group size    8 (Table 7)                    8                              1 (its Sec. 4.1)
    advantage     (R - mean) / (std + 1e-6)      the same                       - (the reward is logged only)
    std           ddof 1, over the group         the same                       -
    all rewards   kept, A = 0                    dropped; others sampled,       kept
      equal                                      at most --resample rounds,
                                                 then a smaller batch
    reward        0 or 1                         - overlong penalty, Eq. (13),  -
                                                 with --overlong-buffer
    ratio         per token, p / p_old           the same                       -
    p_old         p before the step's first update: with --updates 1 the ratio is 1 and clipping idle
    clip          0.2 / 0.2                      0.2 / 0.28 (its Eq. (10))      --opsd-clip: off (0.05 in its v3, of
                                                                                each vocabulary entry's term)
    dual clip     none (VERL: 3.0)               none                           -
    KL            k3, exp(d) - d - 1, in L,      none                           none
                  reference: the initial model
    mean          over all response tokens of the step, not per response first: VERL's token-mean, DAPO's Eq. (12).
                  GRPO's Eq. (3) and OPSD's Eq. (6) average each response first; OPSD's code averages over tokens
    exp           of log-differences clamped to +-20, in the ratio and in k3, as VERL does; VERL also clamps k3 to 10
    teacher       -                              -                              the initial model, fixed (Sec. 4.1), the
                                                                                same prompt and --opsd-hint with the
                                                                                gold answer (the paper: a solution)
    beta          -                              -                              0.5, as v1 (v3: 0, forward KL)
    optimizer     AdamW, constant lr 1e-5, all weights (Table 7); OPSD's paper: LoRA, warm-up and cosine

Injected trajectories (--revise): log-probabilities are those of the hard tokens. --injected-ratio current: p_old is the
current policy's, as for any response. luffy (arXiv 2504.14945, policy shaping): off-policy tokens have L = -f(p) A,
f(x) = x / (x + 0.1), denominator of the ratio 1, no clipping; the rest of the row (A, KL, mean) is as above, while
LUFFY itself also drops std, the KL and the clip of the other tokens.
Differs from the paper: it does not say which of these variants it used.
"""
import argparse
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import revise
import rollout
from helpers import checkpoints, common, training
from helpers.common import UserError

# Dimension key: G group, M response tokens of a micro-batch

LOG_BOUND = 20.0  # of log-differences before exp: e^20 is far beyond any clip and far from overflow


# --- the objective ---------------------------------------------------------------------------------------------------
def advantages(rewards: list[float]) -> list[float]:
    """A_i = (R_i - mean) / (std + 1e-6) over one group, std with ddof 1: Sec. 3.1.
    All zero where all rewards are equal."""
    r = torch.tensor(rewards, dtype=torch.float64)
    if len(r) < 2 or bool((r == r[0]).all()):
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.std() + 1e-6)).tolist()


def policy_loss(logp: Tensor, old: Tensor, ref: Tensor | None, advantage: Tensor, clip_low: float, clip_high: float,
                kl_coef: float, shaped: Tensor | None = None, gamma: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Per token (M,): the clipped surrogate plus kl_coef * KL; the KL estimate; whether the ratio was clipped.

    Surrogate: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), PPO's, with the bounds apart as in DAPO
    Eq. (8). shaped: bool, tokens with LUFFY's -p / (p + gamma) A instead.
    """
    ratio = (logp - old).clamp(-LOG_BOUND, LOG_BOUND).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.min(ratio * advantage, bounded * advantage)
    clipped = bounded * advantage < ratio * advantage
    if shaped is not None:
        p = logp.exp()
        surrogate = torch.where(shaped, p / (p + gamma) * advantage, surrogate)
        clipped = clipped & ~shaped
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = (ref - logp).clamp(-LOG_BOUND, LOG_BOUND)
        kl = d.exp() - d - 1  # k3 (Schulman 2020): unbiased and never negative
    return -surrogate + kl_coef * kl, kl, clipped


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO Eq. (13): 0 up to limit - buffer, then linear down to -1 at the limit. buffer 0 is off."""
    return -max(0.0, (length - (limit - buffer)) / buffer) if buffer else 0.0


# --- one step's data -------------------------------------------------------------------------------------------------
def sample_groups(policy: common.Policy, problems: list[dict], key: tuple, args, verify) -> list[list[dict]]:
    """N rollout records for each problem. key: seed, step and round, so that a prompt seen again is sampled anew."""
    groups = {p["id"]: [] for p in problems}
    rows = ((p, s) for p in problems for s in range(args.group_size))
    for records in rollout.sample_records(policy, rows, verify, args, key, args.decode_rows):
        for r in records:
            groups[r["id"]].append(r)
    return [sorted(group, key=lambda r: r["sample"]) for group in groups.values()]  # they finish in any order


def add_teacher_prompts(policy: common.Policy, problems: list[dict], args: argparse.Namespace) -> None:
    """opsd: give each problem its `teacher_ids`, the prompt of the teacher that sees the gold answer;
    it must leave room."""
    context = policy.context
    for p in problems:
        hinted = rollout.add_text(p["problem"], after=args.opsd_hint.replace("{answer}", p["answer"]))
        p["teacher_ids"] = rollout.prompt_ids(policy.tokenizer, hinted, args)
        if len(p["teacher_ids"]) >= context:
            raise UserError(f"--opsd-hint: with it problem {p['id']!r} is {len(p['teacher_ids'])} tokens long, and the "
                            f"context of --model holds {context}")
        p["limit"] = int(min(p["limit"], context - len(p["teacher_ids"])))


def rescue(policy: common.Policy, groups: list[list[dict]], key: tuple, args,
           verify) -> tuple[list[list[dict]], int]:
    """Revise one failed rollout of every zero-hit group; a recovered trajectory takes its place (or is appended).

    Returns new groups (the old are not changed) and the number rescued. Groups with a hit cost nothing.
    """
    failed = {}  # group -> the rollout to revise: its first that is long enough to cut
    for k, group in enumerate(groups):
        long_enough = [r for r in group if revise.cut(r["response_ids"], args.rho) > 0]
        if long_enough and not any(r["reward"] for r in group):
            failed[k] = long_enough[0]
    args = argparse.Namespace(**vars(args) | {"seed": rollout.row_key(*key)})  # new numbers each step
    groups, rescued, keys = list(groups), 0, list(failed)
    for batch in training.micro_batches([failed[k] for k in keys], args.revise_tokens):
        chunk = [keys[i] for i in batch]
        records = revise.revise_batch(policy, [failed[k] for k in chunk], args, verify)
        for k, record in zip(chunk, records):
            for t in revise.trajectories(record)[:1]:
                t |= {"injected": True}
                groups[k] = groups[k] + [t] if args.inject == "append" else [
                    t if r["sample"] == t["sample"] else r for r in groups[k]]
                rescued += 1
    return groups, rescued


def collect(policy: common.Policy, problems: list[dict], step: int, cursor: int, args, verify) -> tuple:
    """This rank's groups for one step, the next data cursor, and counts over all ranks of what was sampled and rescued.

    Prompt j of a round belongs to rank j mod world. With --algo dapo, groups without signal are dropped and further
    prompts sampled, in one global order, so that the batch does not depend on the number of processes
    (its draws up to rounding).
    """
    counts = Counter(dict.fromkeys(
        ("groups", "zero_hit", "rescued", "signal", "sampled", "hits", "tokens", "truncated"), 0))
    kept, longest, seconds, mine = 0, 0, {"seconds_sample": 0.0, "seconds_revise": 0.0}, []
    for turn in range(1 + (args.resample if args.algo == "dapo" else 0)):
        key = (args.seed, "grpo", step, turn)
        order = training.draw_rows(len(problems), cursor, min(args.batch_size, len(problems)), args.seed)
        cursor += len(order)
        order = list(dict.fromkeys(order))  # a round across the end of an epoch can draw a prompt twice
        own = [problems[i] for i in order[common.rank()::common.world_size()]]
        start = time.time()
        groups = sample_groups(policy, own, key, args, verify)
        middle = time.time()
        hits = [sum(r["reward"] for r in g) for g in groups]
        responses = [r for g in groups for r in g]  # of the policy alone, before any rescue
        lengths = [len(r["response_ids"]) for r in responses]
        longest = max([longest, *lengths])
        if args.revise:
            groups, rescued = rescue(policy, groups, key, args, verify)
            counts["rescued"] += rescued
        seconds["seconds_sample"] += middle - start
        seconds["seconds_revise"] += time.time() - middle
        signal = [0 < sum(r["reward"] for r in g) < len(g) for g in groups]
        counts.update(groups=len(groups), zero_hit=hits.count(0), signal=sum(signal), sampled=len(responses),  # adds
                      hits=sum(hits), tokens=sum(lengths), truncated=sum(r["finish"] == "length" for r in responses))
        places = sorted((common.rank() + j * common.world_size(), s or args.algo != "dapo")
                        for j, s in enumerate(signal))
        everyone = sorted(place for ranks in common.gather(places) for place in ranks)
        wanted = {place for place, _ in [x for x in everyone if x[1]][:args.batch_size - kept]}
        mine += [g for j, g in enumerate(groups) if common.rank() + j * common.world_size() in wanted]
        kept += len(wanted)
        if kept == args.batch_size:
            break
    counts = {k: training.total(v) for k, v in counts.items()}
    return mine, cursor, counts | seconds | {"kept": kept, "longest": max(common.gather(longest))}


# --- one step's update -----------------------------------------------------------------------------------------------
def token_losses(model, reference, rows: list[dict], old: Tensor | None, ref: Tensor | None, args) -> dict[str, Tensor]:
    """The loss of every response token of the rows and what is logged beside it, (M,) each.
    Table in the docstring above."""
    if args.algo == "opsd":
        loss, entropy = training.response_divergence(model, reference, rows, args.opsd_beta, args.opsd_clip)
        return {"loss": loss, "entropy": entropy}
    logp, entropy, owner = training.response_logprobs(model, rows)
    advantage = torch.tensor([r["advantage"] for r in rows], device=model.device)[owner]
    shaped = None
    if args.injected_ratio == "luffy":
        shaped = torch.tensor([r.get("injected", False) for r in rows], dtype=torch.bool, device=model.device)[owner]
    loss, kl, clipped = policy_loss(logp, logp.detach() if old is None else old, ref, advantage, args.clip_low,
                                    args.clip_high, args.kl_coef, shaped, args.luffy_gamma)
    return {"loss": loss, "entropy": entropy, "kl": kl, "clipped": clipped}


def update(model, reference, optimizer, rows: list[dict], args: argparse.Namespace) -> dict[str, float]:
    """--updates passes over the rows (with `advantage`), one optimizer step each.
    Returns means over response tokens."""
    tokens = training.total(sum(len(r["response_ids"]) for r in rows))  # all ranks, before the first forward
    if tokens == 0:
        return {}
    plan = [[rows[i] for i in indices] for indices in training.plan(rows, args.train_tokens)]
    old, refs = {}, {}
    with torch.no_grad():
        for k, batch in enumerate(plan):
            if args.updates > 1 and args.algo != "opsd":  # with one update they are the new ones, detached
                old[k] = training.response_logprobs(model, batch, entropy=False)[0]
            if args.kl_coef:
                refs[k] = training.response_logprobs(reference, batch, entropy=False)[0]
    for _ in range(args.updates):
        sums = dict.fromkeys(("loss", "entropy") if args.algo == "opsd" else ("loss", "entropy", "kl", "clipped"), 0.0)
        for k, batch in enumerate(plan):
            with common.checkpointed(model, args.checkpoint_activations):
                values = token_losses(model, reference, batch, old.get(k), refs.get(k), args)
                (values["loss"].sum() / tokens).backward()  # denominator: response tokens of the step, over all ranks
            for name, value in values.items():
                sums[name] += float(value.detach().sum())
        norm = training.apply_gradients(model, optimizer, args.grad_clip)
    return {k: training.total(v) / tokens for k, v in sums.items()} | {"grad_norm": norm, "tokens": tokens}


# --- evaluation while training ---------------------------------------------------------------------------------------
def evaluate(policy: common.Policy, problems: list[dict], step: int, out: Path, args) -> dict:
    """pass@1 and pass@n of the present policy by the code and the estimator of eval.py; its samples are in OUT/eval."""
    start = time.time()
    folder = out / "eval" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    found = rollout.run_rollouts(policy, problems, args.eval_n, folder, args, f"eval {step}")
    summary = rollout.summarise(problems, args.eval_n, found)
    correct = [sum(found[p["id"], s][0] for s in range(args.eval_n)) for p in problems]
    rates = {f"eval_pass@{k}": sum(evaluation.pass_at_k(args.eval_n, c, k) for c in correct) / len(correct)
             for k in sorted({1, args.eval_n})}  # denominator: problems
    return {"step": step, **rates, "eval_length_mean": summary["mean_tokens"], "eval_truncated": summary["truncated"],
            "seconds_eval": round(time.time() - start, 3)}


def evaluated(out: Path, step: int) -> set[int]:
    """Steps with a row in eval.jsonl.
    Samples of later steps than `step`, the checkpoint's, are of a policy that is gone."""
    if common.rank() == 0:
        for folder in (out / "eval").glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
    common.barrier()
    return {r["step"] for r in common.read_jsonl(out / "eval.jsonl")} if (out / "eval.jsonl").exists() else set()


# --- the stage -------------------------------------------------------------------------------------------------------
def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True,
                        help="[ours] problems, JSONL; zero_hit.jsonl of rollout.py is dapo-hard")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("--algo", default="grpo", choices=["grpo", "dapo", "opsd"],
                        help="[Tables 1, 2] dapo and opsd are baselines there")
    parser.add_argument("--group-size", type=int, help="[Table 7] N = 8 responses per prompt; opsd: 1, as its paper")
    parser.add_argument("--batch-size", type=int, default=512, help="[Table 7] prompts per step (train batch)")
    parser.add_argument("--kl-coef", type=float, help="[Table 7] 0.001 for grpo; 0 for dapo and opsd")
    parser.add_argument("--clip-low", type=float, default=0.2, help="[ours] PPO's; the paper names none")
    parser.add_argument("--clip-high", type=float, help="[ours] 0.2 for grpo; 0.28 for dapo")
    parser.add_argument("--updates", type=int, default=1, help="[ours] optimizer steps per batch of rollouts")
    parser.add_argument("--resample", type=int, default=3, help="[ours] dapo: further rounds of sampling per step")
    parser.add_argument("--overlong-buffer", type=int, default=0,
                        help="[ours] tokens before --max-new-tokens over which a length penalty grows to 1; 0 is off")
    parser.add_argument("--revise", action="store_true", help="[Sec. 3.6] rescue zero-hit groups: the method")
    parser.add_argument("--inject", default="replace", choices=["replace", "append"],
                        help="[ours] the recovered trajectory replaces the rollout it came from, or joins the group")
    parser.add_argument("--injected-ratio", default="current", choices=["current", "luffy"], help="[ours] importance "
                        "ratio of injected tokens: that of any response, or LUFFY's policy shaping")
    parser.add_argument("--luffy-gamma", type=float, default=0.1,
                        help="[ours] gamma of f(x) = x / (x + gamma): LUFFY's")
    parser.add_argument("--opsd-beta", type=float, default=0.5, help="[ours] JSD_beta; v1 of OPSD has 0.5, v3 has 0")
    parser.add_argument("--opsd-clip", type=float, default=0.0,
                        help="[ours] largest term of a vocabulary entry; 0 is off, as in v1 of OPSD; v3 has 0.05")
    parser.add_argument("--opsd-hint", default=rollout.HINT,
                        help="[ours] what the teacher reads after the problem, with {answer}")
    parser.add_argument("--eval-data", help="[ours] problems to evaluate on while training, JSONL; fields as in --data")
    parser.add_argument("--eval-every", type=int, default=10, help="[ours] steps between evaluations, step 0 included")
    parser.add_argument("--eval-n", type=int, default=8, help="[ours] samples per problem of an evaluation")
    parser.add_argument("--sample-every", type=int, default=10, help="[ours] steps between samples.jsonl's; 0 for none")
    parser.add_argument("--sample-groups", type=int, default=2,
                        help="[ours] groups in each, rescued ones first; 0 for all")
    parser.add_argument("--warn-after", type=int, default=20,
                        help="[ours] warn after so many steps without signal; 0: never")
    training.add_training_args(parser)
    revise.add_revision_args(parser)
    rollout.add_sampling_args(parser)
    rollout.add_problem_args(parser)
    args = parser.parse_args(argv)
    for flag, values in {"kl_coef": {"grpo": 0.001, "dapo": 0.0, "opsd": 0.0},
                         "clip_high": {"grpo": 0.2, "dapo": 0.28, "opsd": 0.2},
                         "group_size": {"grpo": 8, "dapo": 8, "opsd": 1}}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, values[args.algo])
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range or does not go with --algo."""
    rollout.check_sampling_args(args)
    training.check_training_args(args)
    for flag, low in {"group_size": 1 if args.algo == "opsd" else 2, "updates": 1, "resample": 0,
                      "overlong_buffer": 0, "kl_coef": 0, "clip_low": 0, "clip_high": 0, "opsd_beta": 0, "opsd_clip": 0,
                      "eval_every": 1, "eval_n": 1, "sample_every": 0, "sample_groups": 0, "warn_after": 0}.items():
        if not getattr(args, flag) >= low:  # true of nan as well
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")
    if not args.luffy_gamma > 0:
        raise UserError(f"--luffy-gamma {args.luffy_gamma} is out of range")
    for flag, plain in {"temperature": 1, "top_p": 1, "top_k": 0}.items():
        if getattr(args, flag) != plain:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: training takes {plain} alone, "
                            "since the ratio is that of the plain policies")
    if args.overlong_buffer and args.algo != "dapo":
        raise UserError("--overlong-buffer goes with --algo dapo alone")
    if args.overlong_buffer > args.max_new_tokens:
        raise UserError(f"--overlong-buffer {args.overlong_buffer} is beyond --max-new-tokens {args.max_new_tokens}")
    if args.record_every:
        raise UserError("--record-every is of revise.py: training keeps no curve")
    if args.opsd_beta > 1:
        raise UserError(f"--opsd-beta {args.opsd_beta} is out of range")
    if args.algo == "opsd":
        for flag in ("kl_coef", "revise"):
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')} does not go with --algo opsd, "
                                "which has neither KL term nor advantage")
        if "{answer}" not in args.opsd_hint:
            raise UserError(f"--opsd-hint {args.opsd_hint!r} has no {{answer}}")


FREE = (*training.FREE, *revise.FREE, "sample_every", "sample_groups", "warn_after")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    problems = rollout.read_problems(args.data, args)
    test = (rollout.read_problems(args.eval_data, argparse.Namespace(**vars(args) | {"limit": 0}))
            if args.eval_data else [])
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=common.file_digest(args.data),
                           eval_data_digest=common.file_digest(args.eval_data) if args.eval_data else None)
    if checkpoints.trained(out, args.steps):
        if common.rank() == 0:
            print(f"{out / 'model'} is trained already")
        return
    verify = common.load_verifier(args.verifier)
    trained = training.load_model(args, device, train=True)
    model, tokenizer = trained.model, trained.tokenizer
    for some in (problems, test):
        rollout.add_prompts(trained, some, args)
    for p in problems if args.revise else []:  # before any work, not in the middle of it
        revise.answer_ids(tokenizer, args.template, p["answer"])
    if args.algo == "opsd":
        add_teacher_prompts(trained, problems, args)
    teacher_ids = {p["id"]: p.get("teacher_ids") for p in problems}
    # The initial model, also after a restart: reference of the KL, or the teacher of opsd
    reference = training.load_model(args, device).model if args.kl_coef or args.algo == "opsd" else None
    policy = trained._replace(model=training.load_actor(model, args, device))  # that samples and revises
    optimizer = training.make_optimizer(model, args)
    state = {"cursor": 0} | checkpoints.load(out, model, optimizer)
    checkpoints.check_steps(args.steps, state)
    log = training.open_logs(out, args, state["step"])
    done, silent = evaluated(out, state["step"]), 0

    bar = tqdm(range(state["step"] + 1, args.steps + 2), desc=args.algo, unit="step", initial=state["step"],
               total=args.steps, disable=common.rank() > 0)
    for step in bar:
        training.refresh(policy.model, model)

        # === evaluate what the steps before have made ===
        if test and (step - 1) % args.eval_every == 0 and step - 1 not in done:
            log(evaluate(policy, test, step - 1, out, args), "eval.jsonl")
        if step > args.steps:
            break

        # === sample, verify, revise ===
        groups, state["cursor"], counts = collect(
            policy, problems, step, state["cursor"], args, verify)

        # === advantages ===
        rows = []
        for group in groups:
            rewards = [r["reward"] + overlong_penalty(len(r["response_ids"]), args.max_new_tokens, args.overlong_buffer)
                       for r in group]
            rows += [r | {"advantage": a, "teacher_ids": teacher_ids[r["id"]]}
                     for r, a in zip(group, advantages(rewards))]

        # === update ===
        start = time.time()
        stats = update(model, reference, optimizer, rows, args)

        # === report ===
        injected = training.total(sum(len(r["response_ids"]) for r in rows if r.get("injected")))
        silent = 0 if counts["signal"] else silent + 1
        shares = {name: counts[key] / counts["groups"] for name, key in (
            ("zero_hit", "zero_hit"), ("rescued", "rescued"), ("signal", "signal"))}  # denominator: groups sampled
        log({"step": step, "reward": counts["hits"] / counts["sampled"], **shares,  # denominators: responses
             "injected_tokens": injected / max(stats.get("tokens", 0), 1), "kept_groups": counts["kept"], **stats,
             "length_mean": counts["tokens"] / counts["sampled"], "length_max": counts["longest"],
             "truncated": counts["truncated"] / counts["sampled"], "lr": optimizer.param_groups[0]["lr"],
             "tokens_per_second": round(counts["tokens"] / max(counts["seconds_sample"], 1e-9), 1),  # drawn, all ranks
             "memory_gb": training.peak_memory(device), "seconds_sample": round(counts["seconds_sample"], 3),
             "seconds_revise": round(counts["seconds_revise"], 3), "seconds_update": round(time.time() - start, 3)})
        if common.rank() == 0:
            if args.sample_every and (step - 1) % args.sample_every == 0 and rows:
                shown = args.sample_groups * (args.group_size + (args.inject == "append")) or len(rows)
                rescued = {r["id"] for r in rows if r.get("injected")}  # shown first
                common.append_jsonl(out / "samples.jsonl", [
                    {"step": step, "id": r["id"], "prompt": tokenizer.decode(r["prompt_ids"]),
                     "response": r["response"], "reward": r["reward"], "advantage": r["advantage"],
                     "injected": r.get("injected", False)}
                    for r in sorted(rows, key=lambda r: r["id"] not in rescued)[:shown]])
            bar.set_postfix_str(f"reward {counts['hits'] / counts['sampled']:.3f}, zero-hit {shares['zero_hit']:.2f}, "
                                f"rescued {shares['rescued']:.2f}", refresh=False)
            if args.algo == "dapo" and counts["kept"] < args.batch_size:
                bar.write(f"step {step}: only {counts['kept']} of {args.batch_size} groups had signal after "
                          f"{args.resample} further rounds")
            if silent == args.warn_after > 0 and args.algo != "opsd":
                bar.write(f"warning: no group of the last {silent} steps had both right and wrong responses, "
                          "so nothing is learned. Look at samples.jsonl: does the model answer in the format that "
                          "--verifier wants, are responses cut off (truncated; --max-new-tokens), is --data too hard "
                          "or too easy (--revise)?")
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            checkpoints.save(out, step, model, tokenizer, optimizer, {"cursor": state["cursor"]})
    checkpoints.finish(out, model, tokenizer)
    if common.rank() == 0:
        print(f"{args.steps} steps; model in {out / 'model'}")


if __name__ == "__main__":
    common.run_script(get_args, main)
