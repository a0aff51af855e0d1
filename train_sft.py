"""Supervised fine-tuning on trajectories: SFT+LatentRevise on recovered ones, RFT on any others
(paper Sec. 4.1, Table 1).

    python train_sft.py --model toy/sums_model --data out/revised/recovered.jsonl --out out/sft
    torchrun --nproc-per-node 8 train_sft.py --model Qwen/Qwen2.5-1.5B-Instruct \\
        --data recovered.jsonl --out out/sft

Reads   rows with `prompt_ids` and `response_ids` (rollouts.jsonl, recovered.jsonl; rows with
        `reward` 0 are left out), or plain rows with `problem` and `response`, which go through the
        prompt template of rollout.py.
Writes  metrics.jsonl; checkpoints, from which the same command continues and which eval.py takes
        as --model; OUT/model.

Loss: cross-entropy on response tokens (end-of-sequence included, prompt masked out), averaged over
the response tokens of the whole optimizer step: all micro-batches and all processes.
Differs from the paper: it gives no number of SFT steps or epochs.
"""
import argparse
import time

import rollout
from helpers import common, training
from helpers.common import POSITIVE, Policy, UserError


def read_row(record: dict, policy: Policy, args: argparse.Namespace, where: str) -> dict:
    """A training row {prompt_ids, response_ids}. Raises UserError, which begins with `where`."""
    if "prompt_ids" in record and "response_ids" in record:
        rollout.check_ids(record, policy.model.get_input_embeddings().num_embeddings, where)
        row = {key: record[key] for key in ("prompt_ids", "response_ids")}
    elif "problem" in record and isinstance(record.get("response"), str):
        problem = rollout.clean_problem(record["problem"], where)
        prompt = rollout.prompt_ids(policy.tokenizer, problem, args)
        try:
            response = policy.tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        except TypeError:
            raise UserError(f"{where}: the response is not Unicode text") from None
        end = policy.tokenizer.eos_token_id
        row = {"prompt_ids": prompt,
               "response_ids": [*response, policy.eos[0] if end is None else end]}
    else:
        raise UserError(f"{where}: needs prompt_ids and response_ids, or problem and response")
    if len(row["prompt_ids"]) + len(row["response_ids"]) > policy.context:
        raise UserError(f"{where}: longer than the context of --model, {policy.context} tokens")
    return row


def read_rows(policy: Policy, args: argparse.Namespace) -> list[dict]:
    """All rows of --data but those with reward 0. Raises UserError naming file and record."""
    rows = [read_row(record, policy, args, f"{path}: record {number}")
            for path in args.data for number, record in enumerate(common.read_jsonl(path), 1)
            if record.get("reward", 1) != 0]
    if not rows:
        raise UserError(f"{' '.join(args.data)}: no rows to train on (rows with reward 0 are left "
                        "out)")
    return rows


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser)
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="trajectories, JSONL; several files are joined")
    add("--out", required=True, help="output folder")
    add("--batch-size", type=POSITIVE, default=512, help="[Table 7] trajectories per step")
    add("--seed", type=int, default=0, help="of the data order")
    add("--instruction", default=rollout.INSTRUCTION, help="for rows with `problem`; '' for none")
    add("--prompt-format", default="auto", choices=["auto", "chat", "plain"],
        help="for rows with `problem`")
    training.add_training_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args)
    digests = [common.file_digest(path) for path in args.data]
    out = common.start_run(args.out, args, data_digest=digests)
    if training.is_finished(out, args.steps):
        return
    policy = training.load_model(args, device, train=True)
    model, rows = policy.model, read_rows(policy, args)
    optimizer = training.make_optimizer(model, args)
    state = training.load_checkpoint(out, model, optimizer, args.steps)
    log = training.open_logs(out, args, state["step"])
    for step in training.step_bar("sft", state["step"], args.steps):
        begun = time.time()
        first = (step - 1) * args.batch_size
        batch = [rows[i] for i in training.draw_rows(len(rows), first, args.batch_size, args.seed)]
        lengths = [len(r["response_ids"]) for r in batch]
        tokens = sum(lengths)  # of all processes, before any forward
        mine = batch[common.rank()::common.world_size()]
        loss_sum = entropy_sum = 0.0
        for some in training.equal_batches(mine, args.train_tokens):
            with common.checkpointed(model, args.checkpoint_activations):
                logp, entropy, _ = training.response_logprobs(model, some)
                loss = -logp.sum() / tokens  # denominator: response tokens of the optimizer step
                loss.backward()
            loss_sum += float(loss.detach())
            entropy_sum += float(entropy.sum())
        norm = training.apply_gradients(model, optimizer, args.grad_clip)
        seconds = time.time() - begun
        log({"step": step, "loss": training.total(loss_sum),
             "entropy": training.total(entropy_sum) / tokens, "grad_norm": norm, "tokens": tokens,
             "length_mean": tokens / len(batch), "length_max": max(lengths), "lr": args.lr,
             "tokens_per_second": round(tokens / seconds, 1),
             "memory_gb": training.peak_memory(device), "seconds": round(seconds, 3)})
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            training.save_checkpoint(out, policy, optimizer, {"step": step}, args.keep)
    training.finish(out, policy, args.steps)


if __name__ == "__main__":
    common.run_script(get_args, main)
