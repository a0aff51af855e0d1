"""Supervised fine-tuning on trajectories: SFT+LatentRevise on recovered ones, RFT on any others
(paper Sec. 3.6, Table 1).

    python train_sft.py --model toy/sums_model --data out/revised/recovered.jsonl --out out/sft --steps 60
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-1.5B-Instruct --data recovered.jsonl --out out/sft

Reads   rows with `prompt_ids` and `response_ids` (rollouts.jsonl, recovered.jsonl; rows with `reward` 0 are left out),
        or plain rows with `problem` and `response`, which go through the prompt template of rollout.py.
Writes  metrics.jsonl, checkpoints to resume from (the same command continues), and the trained model in OUT/model.

Loss: cross-entropy on response tokens (end-of-sequence included, prompt masked out), averaged over the response tokens
of the whole optimizer step: all micro-batches and all processes. Neither changes a gradient.
Micro-batches, the optimizer step and checkpoints are in helpers/, shared with train_grpo.py.
Differs from the paper: it gives no number of SFT steps or epochs; --steps is ours.
"""
import argparse
import time

from tqdm import tqdm

import rollout
from helpers import checkpoints, common, training
from helpers.common import UserError


def read_rows(policy: common.Policy, paths: list[str], args: argparse.Namespace) -> list[dict]:
    """Training rows {prompt_ids, response_ids}. Raises UserError naming file and record for one that cannot be used."""
    tokenizer, rows = policy.tokenizer, []
    for path in paths:
        for number, r in enumerate(common.read_jsonl(path), 1):
            where = f"{path}: record {number}"
            if r.get("reward", 1) == 0:
                continue
            if "prompt_ids" in r and "response_ids" in r:
                rollout.check_ids(r, policy.model.get_input_embeddings().num_embeddings, where)
                row = {"prompt_ids": r["prompt_ids"], "response_ids": r["response_ids"]}
            elif "problem" in r and isinstance(r.get("response"), str):
                end = policy.eos[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
                try:
                    response = tokenizer(r["response"], add_special_tokens=False)["input_ids"]
                except TypeError:
                    raise UserError(f"{where}: the response is not Unicode text") from None
                row = {"prompt_ids": rollout.prompt_ids(tokenizer, rollout.clean_problem(r["problem"], where), args),
                       "response_ids": [*response, end]}
            else:
                raise UserError(f"{where}: needs prompt_ids and response_ids, or problem and response")
            if len(row["prompt_ids"]) + len(row["response_ids"]) > policy.context:
                raise UserError(f"{where}: longer than the context of --model, {policy.context} tokens")
            rows.append(row)
    if not rows:
        raise UserError(f"{' '.join(paths)}: no rows to train on (rows with reward 0 are left out)")
    return rows


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, nargs="+", help="[ours] trajectories, JSONL; several files are joined")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("--batch-size", type=int, default=512, help="[Table 7] trajectories per optimizer step")
    parser.add_argument("--seed", type=int, default=0, help="[ours] of the data order")
    parser.add_argument("--instruction", default=rollout.INSTRUCTION,
                        help="[ours] for rows with `problem`; '' for none")
    parser.add_argument("--prompt-format", default="auto", choices=["auto", "chat", "plain"],
                        help="[ours] for rows with `problem`")
    training.add_training_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    training.check_training_args(args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, training.FREE,
                           data_digest=[common.file_digest(p) for p in args.data])
    if checkpoints.trained(out, args.steps):
        if common.rank() == 0:
            print(f"{out / 'model'} is trained already")
        return
    policy = training.load_model(args, device, train=True)
    model, tokenizer = policy.model, policy.tokenizer
    rows = read_rows(policy, args.data, args)
    optimizer = training.make_optimizer(model, args)
    state = checkpoints.load(out, model, optimizer)
    checkpoints.check_steps(args.steps, state)
    log = training.open_logs(out, args, state["step"])
    for step in tqdm(range(state["step"] + 1, args.steps + 1), desc="sft", unit="step", initial=state["step"],
                     total=args.steps, disable=common.rank() > 0):
        start = time.time()
        first = (step - 1) * args.batch_size
        batch = [rows[i] for i in training.draw_rows(len(rows), first, args.batch_size, args.seed)]
        lengths = [len(r["response_ids"]) for r in batch]
        tokens = sum(lengths)  # of all processes, before any forward
        mine = batch[common.rank()::common.world_size()]
        loss_sum = entropy_sum = 0.0
        for indices in training.plan(mine, args.train_tokens):
            with common.checkpointed(model, args.checkpoint_activations):
                logp, entropy, _ = training.response_logprobs(model, [mine[i] for i in indices])
                loss = -logp.sum() / tokens  # denominator: response tokens of the whole optimizer step
                loss.backward()
            loss_sum += float(loss.detach())
            entropy_sum += float(entropy.sum())
        norm = training.apply_gradients(model, optimizer, args.grad_clip)
        seconds = time.time() - start
        log({"step": step, "loss": training.total(loss_sum), "entropy": training.total(entropy_sum) / tokens,
             "grad_norm": norm, "tokens": tokens, "length_mean": tokens / len(batch), "length_max": max(lengths),
             "lr": optimizer.param_groups[0]["lr"], "tokens_per_second": round(tokens / seconds, 1),
             "memory_gb": training.peak_memory(device), "seconds": round(seconds, 3)})
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            checkpoints.save(out, step, model, tokenizer, optimizer, {})
    checkpoints.finish(out, model, tokenizer)
    if common.rank() == 0:
        print(f"{len(rows)} trajectories, {args.steps} steps; model in {out / 'model'}")


if __name__ == "__main__":
    common.run_script(get_args, main)
