"""GRPO on verifiable rewards, with zero-hit groups rescued by LatentRevise: `--revise` (paper Sec. 3.6, Tables 1 and 2).

    python train_grpo.py --model toy_model --data hard.jsonl --out out/grpo --revise --steps 60
    torchrun --nproc-per-node 8 train_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --data dapo.jsonl --out out/grpo --revise

Each step: sample a group of N responses per prompt, verify, revise a failed response of every group without a hit and
put the recovered trajectory in its place, compute advantages, update. Without --revise this is the plain baseline, and a
batch in which every group has a hit is the same with and without it, bit for bit.

Reads   problems as rollout.py does.
Writes  metrics.jsonl and samples.jsonl, checkpoints to resume from (the same command continues), and OUT/model.

Which of the silent variants is used:
    advantage       (R - mean) / (std + 1e-6), std with ddof 1 over the group (VERL; TRL has 1e-4)
    loss            mean over all response tokens of the step (VERL's token-mean, DAPO's Eq. 8), not per response
    ratio           against the sampling policy; one update per batch, so it is 1 and its clipping idle unless --updates > 1
    injected        old log-probabilities are those of its hard tokens under the current policy, as for any response
    KL              k3 estimator exp(d) - d - 1, d = log ref - log p, in the loss (--kl-coef); reference: the initial model
    dual clip       none
    --algo dapo     (arXiv 2503.14476) clip 0.2/0.28, no KL, groups of all 0 or all 1 dropped and others sampled in their
                    place at most --resample times, then a smaller batch and a warning; --overlong-buffer penalises length
Differs from the paper: nothing known; it does not say which variants it used.
"""
import argparse
import time

import torch
from torch import Tensor
from tqdm import tqdm

import common
import revise
import rollout
import training
from common import UserError

# Dimension key: G group, M response tokens of a micro-batch


# --- the objective ---------------------------------------------------------------------------------------------------
def advantages(rewards: list[float]) -> list[float]:
    """A_i = (R_i - mean) / (std + 1e-6) over one group, std with ddof 1: Sec. 3.1. All zero where all rewards are equal."""
    r = torch.tensor(rewards, dtype=torch.float64)
    if len(r) < 2 or bool((r == r[0]).all()):
        return [0.0] * len(r)
    return ((r - r.mean()) / (r.std() + 1e-6)).tolist()


def policy_loss(logp: Tensor, old: Tensor, ref: Tensor | None, advantage: Tensor, clip_low: float, clip_high: float,
                kl_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per token (M,): the clipped surrogate plus kl_coef * KL; the KL estimate; whether the ratio was clipped.

    Surrogate: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), PPO's, with the bounds apart as in DAPO Eq. (8).
    """
    ratio = (logp - old).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.min(ratio * advantage, bounded * advantage)
    kl = torch.zeros_like(logp)
    if ref is not None:
        d = ref - logp
        kl = d.exp() - d - 1  # k3 (Schulman 2020): unbiased and never negative
    return -surrogate + kl_coef * kl, kl, bounded * advantage < ratio * advantage


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO Eq. (13): 0 up to limit - buffer, then linear down to -1 at the limit. buffer 0 is off."""
    return -max(0.0, (length - (limit - buffer)) / buffer) if buffer else 0.0


# --- one step's data -------------------------------------------------------------------------------------------------
def sample_groups(model, tokenizer, vocab: int, problems: list[dict], key: tuple, args, verify) -> list[list[dict]]:
    """N rollout records for each problem. key: seed, step and round, so that a prompt seen again is sampled anew."""
    groups = {p["id"]: [] for p in problems}
    for batch in rollout.make_batches(problems, args.group_size, args.batch_size):
        for r in rollout.sample_batch(model, tokenizer, vocab, batch, verify, args, key):
            groups[r["id"]].append(r)
    return list(groups.values())


def rescue(model, tokenizer, vocab: int, groups: list[list[dict]], key: tuple, args, verify) -> tuple[list[list[dict]], int]:
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
    for batch in training.micro_batches([failed[k] for k in keys], args.batch_tokens):
        chunk = [keys[i] for i in batch]
        records = revise.revise_batch(model, tokenizer, vocab, [failed[k] for k in chunk], args, verify)
        for k, record in zip(chunk, records):
            for t in revise.trajectories(record)[:1]:
                t |= {"injected": True}
                groups[k] = groups[k] + [t] if args.inject == "append" else [
                    t if r["sample"] == t["sample"] else r for r in groups[k]]
                rescued += 1
    return groups, rescued


def collect(model, tokenizer, vocab: int, problems: list[dict], step: int, cursor: int, args, verify) -> tuple:
    """This rank's groups for one step, the next data cursor and counts over all ranks.

    Prompt j of a round belongs to rank j mod world. With --algo dapo, groups without signal are dropped and further
    prompts sampled, in one global order, so that the batch does not depend on the number of processes.
    """
    counts = {"groups": 0, "zero_hit": 0, "rescued": 0, "sampled": 0, "hits": 0, "seconds_sample": 0.0, "seconds_revise": 0.0}
    kept, mine = 0, []
    for turn in range(1 + (args.resample if args.algo == "dapo" else 0)):
        key = (args.seed, "grpo", step, turn)
        order = training.draw_rows(len(problems), cursor, min(args.batch_prompts, len(problems)), args.seed)
        cursor += len(order)
        order = list(dict.fromkeys(order))  # a round across the end of an epoch can draw a prompt twice
        own = [problems[i] for i in order[common.rank()::common.world_size()]]
        start = time.time()
        groups = sample_groups(model, tokenizer, vocab, own, key, args, verify)
        middle = time.time()
        hits = [sum(r["reward"] for r in g) for g in groups]
        counts["groups"] += len(groups)
        counts["zero_hit"] += hits.count(0)
        counts["hits"] += sum(hits)
        counts["sampled"] += sum(map(len, groups))
        if args.revise:
            groups, rescued = rescue(model, tokenizer, vocab, groups, key, args, verify)
            counts["rescued"] += rescued
        counts["seconds_sample"] += middle - start
        counts["seconds_revise"] += time.time() - middle
        signal = [args.algo != "dapo" or 0 < sum(r["reward"] for r in g) < len(g) for g in groups]
        places = sorted((common.rank() + j * common.world_size(), s) for j, s in enumerate(signal))
        everyone = sorted(place for ranks in common.gather(places) for place in ranks)
        wanted = {place for place, _ in [x for x in everyone if x[1]][:args.batch_prompts - kept]}
        mine += [g for j, g in enumerate(groups) if common.rank() + j * common.world_size() in wanted]
        kept += len(wanted)
        if kept == args.batch_prompts:
            break
    seconds = {k: v for k, v in counts.items() if k.startswith("seconds")}
    counts = {k: training.total(v) for k, v in counts.items() if k not in seconds} | seconds | {"kept": kept}
    return mine, cursor, counts


# --- one step's update -----------------------------------------------------------------------------------------------
def update(model, reference, optimizer, rows: list[dict], args: argparse.Namespace) -> dict[str, float]:
    """--updates passes over the rows (with `advantage`), one optimizer step each. Returns means over response tokens."""
    tokens = training.total(sum(len(r["response_ids"]) for r in rows))  # all ranks, before the first forward
    if tokens == 0:
        return {}
    plan = training.micro_batches(rows, args.micro_batch_tokens)
    device = model.device
    old, refs = {}, {}
    with torch.no_grad(), training.autocast(args, device):
        for k, indices in enumerate(plan):
            if args.updates > 1:  # with one update the old log-probabilities are the new ones, detached
                old[k] = training.response_logprobs(model, [rows[i] for i in indices])[0]
            if reference is not None:
                refs[k] = training.response_logprobs(reference, [rows[i] for i in indices])[0]
    for _ in range(args.updates):
        sums = dict.fromkeys(("loss", "kl", "clipped", "entropy"), 0.0)
        for k, indices in enumerate(plan):
            batch = [rows[i] for i in indices]
            with common.checkpointed(model, args.checkpoint_activations):
                with training.autocast(args, device):
                    logp, entropy, owner = training.response_logprobs(model, batch)
                advantage = torch.tensor([r["advantage"] for r in batch], device=device)[owner]
                loss, kl, clipped = policy_loss(logp, old.get(k, logp.detach()), refs.get(k), advantage, args.clip_low,
                                                args.clip_high, args.kl_coef)
                (loss.sum() / tokens).backward()  # denominator: response tokens of the step, over all ranks
            for name, value in (("loss", loss), ("kl", kl), ("clipped", clipped), ("entropy", entropy)):
                sums[name] += float(value.detach().sum())
        norm = training.apply_gradients(model, optimizer, args.grad_clip)
    return {k: training.total(v) / tokens for k, v in sums.items()} | {"grad_norm": norm, "tokens": tokens}


# --- the stage -------------------------------------------------------------------------------------------------------
def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, help="[ours] problems, JSONL; zero_hit.jsonl of rollout.py is dapo-hard")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("--algo", default="grpo", choices=["grpo", "dapo"], help="[Table 2] dapo is a baseline there")
    parser.add_argument("--group-size", type=int, default=8, help="[Table 7] N responses per prompt")
    parser.add_argument("--batch-prompts", type=int, default=512, help="[Table 7] prompts per step (train batch)")
    parser.add_argument("--kl-coef", type=float, help="[Table 7] 0.001 for grpo; 0 for dapo")
    parser.add_argument("--clip-low", type=float, default=0.2, help="[ours] PPO's; the paper names none")
    parser.add_argument("--clip-high", type=float, help="[ours] 0.2 for grpo; 0.28 for dapo")
    parser.add_argument("--updates", type=int, default=1, help="[ours] optimizer steps per batch of rollouts")
    parser.add_argument("--resample", type=int, default=3, help="[ours] dapo: further rounds of sampling per step")
    parser.add_argument("--overlong-buffer", type=int, default=0,
                        help="[ours] tokens before --max-new-tokens over which a length penalty grows to 1; 0 is off")
    parser.add_argument("--revise", action="store_true", help="[Sec. 3.6] rescue zero-hit groups: the method")
    parser.add_argument("--inject", default="replace", choices=["replace", "append"],
                        help="[ours] the recovered trajectory replaces the rollout it came from, or joins the group")
    training.add_training_args(parser)
    revise.add_revision_args(parser)
    rollout.add_sampling_args(parser)
    rollout.add_problem_args(parser)
    args = parser.parse_args(argv)
    args.kl_coef = {"grpo": 0.001, "dapo": 0.0}[args.algo] if args.kl_coef is None else args.kl_coef
    args.clip_high = {"grpo": 0.2, "dapo": 0.28}[args.algo] if args.clip_high is None else args.clip_high
    return args


FREE = (*training.FREE, "batch_size", "batch_tokens")


def main(args: argparse.Namespace) -> None:
    rollout.check_sampling_args(args)
    revise.check_revision_args(args)
    training.check_training_args(args)
    for flag, low in {"group_size": 2, "batch_prompts": 1, "updates": 1, "resample": 0,
                      "overlong_buffer": 0, "kl_coef": 0, "clip_low": 0, "clip_high": 0}.items():
        if not getattr(args, flag) >= low:  # true of nan as well
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")
    for flag, plain in {"temperature": 1, "top_p": 1, "top_k": 0}.items():
        if getattr(args, flag) != plain:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: training takes {plain} alone, since the ratio is "
                            "that of the plain policies")
    problems = rollout.read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=common.file_digest(args.data))
    if training.trained(out):
        print(f"{out / 'model'} is trained already")
        return
    verify = common.load_verifier(args.verifier)
    model, tokenizer, vocab = common.load_model(args, device, train=True)
    rollout.add_prompts(problems, model, tokenizer, args)
    for p in problems if args.revise else []:  # before any work, not in the middle of it
        revise.answer_ids(tokenizer, args.template, p["answer"])
    reference = common.load_model(args, device)[0] if args.kl_coef else None  # the initial model, also after a restart
    # Sampling and revision in bfloat16 need a copy of the float32 master weights
    actor = common.load_model(args, device)[0] if args.dtype == "bfloat16" else model
    optimizer = training.make_optimizer(model, args)
    state = {"cursor": 0} | training.load_checkpoint(out, model, optimizer)

    bar = tqdm(range(state["step"] + 1, args.steps + 1), desc=args.algo, unit="step", initial=state["step"],
               total=args.steps, disable=common.rank() > 0)
    for step in bar:
        # === sample, verify, revise ===
        if actor is not model:
            with torch.no_grad():
                for ours, master in zip(actor.parameters(), model.parameters()):
                    ours.copy_(master)
        groups, state["cursor"], counts = collect(actor, tokenizer, vocab, problems, step, state["cursor"], args, verify)

        # === advantages ===
        rows = []
        for group in groups:
            rewards = [r["reward"] + overlong_penalty(len(r["response_ids"]), args.max_new_tokens, args.overlong_buffer)
                       for r in group]
            rows += [r | {"advantage": a} for r, a in zip(group, advantages(rewards))]

        # === update ===
        start = time.time()
        stats = update(model, reference, optimizer, rows, args)
        injected = training.total(sum(len(r["response_ids"]) for r in rows if r.get("injected")))
        metrics = {"step": step, "reward": counts["hits"] / counts["sampled"],
                   "zero_hit": counts["zero_hit"] / counts["groups"], "rescued": counts["rescued"] / counts["groups"],
                   "injected_tokens": injected / max(stats.get("tokens", 0), 1), "kept_groups": counts["kept"], **stats,
                   "seconds_sample": round(counts["seconds_sample"], 3),
                   "seconds_revise": round(counts["seconds_revise"], 3), "seconds_update": round(time.time() - start, 3)}
        if common.rank() == 0:
            common.append_jsonl(out / "metrics.jsonl", [metrics])
            if step % 10 == 1 and rows:
                rescued = {r["id"] for r in rows if r.get("injected")}  # shown first
                common.append_jsonl(out / "samples.jsonl", [
                    {"step": step, "id": r["id"], "reward": r["reward"], "advantage": r["advantage"],
                     "injected": r.get("injected", False), "response": r["response"]}
                    for r in sorted(rows, key=lambda r: r["id"] not in rescued)[:2 * args.group_size]])
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, zero-hit {metrics['zero_hit']:.2f}, rescued "
                                f"{metrics['rescued']:.2f}", refresh=False)
            if not stats or counts["kept"] < args.batch_prompts and args.algo == "dapo":
                bar.write(f"step {step}: only {counts['kept']} of {args.batch_prompts} groups had signal after "
                          f"{args.resample} further rounds")
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            training.save_checkpoint(out, step, model, tokenizer, optimizer, {"cursor": state["cursor"]})
    training.finish(out, model, tokenizer)
    if common.rank() == 0:
        print(f"{args.steps} steps; model in {out / 'model'}")


if __name__ == "__main__":
    common.run_script(get_args, main)
