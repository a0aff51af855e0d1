"""One update of train_grpo.py against TRL's GRPOTrainer and against a plain loop, each in a process of its own."""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

import train_grpo
from experiments.benches.tools import report
from helpers import training
from helpers.common import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
GROUPS, GROUP, ROWS = 1, 8, 4  # prompts, responses to each, rows of a micro-batch of the references
VOCAB = 151936


def grpo_rows() -> list[dict]:
    """Rollouts with lengths as a sampler leaves them: log-normal, median 150, few of them several times as long."""
    rng = random.Random(0)
    rows = []
    for _ in range(GROUPS):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randint(40, 120))]
        rewards = [float(s % 3 == 0) for s in range(GROUP)]
        for reward, advantage in zip(rewards, train_grpo.advantages(rewards)):
            n = min(600, int(rng.lognormvariate(5.0, 0.8)) + 2)
            rows.append({"prompt_ids": prompt, "response_ids": [rng.randrange(3, 90) for _ in range(n)],
                         "reward": reward, "advantage": advantage})
    return rows


def grpo_model():
    """Random weights, small but for a real vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def longest(rows: list[dict]) -> int:
    """Width of a batch that pads prompts and responses apart, as TRL does."""
    return max(len(r["prompt_ids"]) for r in rows) + max(len(r["response_ids"]) for r in rows)


def ours_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """As many padded tokens a micro-batch as the references have."""
    flags = train_grpo.get_args(["--model", "m", "--data", "d", "--out", "o", "--kl-coef", "0", "--train-tokens",
                                 str(ROWS * longest(rows))])
    optimizer = training.make_optimizer(model, flags)
    for _ in range(args.runs + 1):
        mark(lambda: train_grpo.update(model, None, optimizer, rows, flags)["grad_norm"])


def plain_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """The usual short loop: every row padded to the longest of all, logits of the whole micro-batch, log_softmax."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    T = max(len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows)
    ids = torch.tensor([(r["prompt_ids"] + r["response_ids"] + [0] * T)[:T] for r in rows])  # (B, T)
    mask = torch.tensor([[len(r["prompt_ids"]) <= t < len(r["prompt_ids"]) + len(r["response_ids"]) for t in range(T)]
                         for r in rows])
    advantage = torch.tensor([r["advantage"] for r in rows])[:, None]

    def update() -> float:
        for s in range(0, len(rows), ROWS):
            logits = model(input_ids=ids[s:s + ROWS], use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            logp = F.log_softmax(logits, -1).gather(-1, ids[s:s + ROWS, 1:, None])[..., 0]
            ratio = (logp - logp.detach()).exp()
            a = advantage[s:s + ROWS]
            loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            # denominator: response tokens of the step
            ((loss * mask[s:s + ROWS, 1:]).sum() / mask[:, 1:].sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    for _ in range(args.runs + 1):
        mark(update)


def trl_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """GRPOTrainer on the same rows (its own rollout_func), token-mean loss, no KL, no checkpointing. What it does
    before the first micro-batch (sampling, rewards, decoding for its logs) is not counted."""
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as e:  # RuntimeError: trl imports its parts late
        raise UserError("bench grpo needs TRL: pip install -r requirements-bench.txt "
                        f"({str(e).splitlines()[-1]})") from None
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/sums_model")
    updates, prepare = [], GRPOTrainer._generate_and_score_completions
    seconds = {"prepare": 0.0}

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.process_time()
            try:
                return prepare(self, inputs)
            finally:
                seconds["prepare"] = time.process_time() - start

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.start = time.process_time()

        def on_step_end(self, args, state, control, **more):
            updates.append(time.process_time() - self.start - seconds["prepare"])

    def rollouts(prompts, trainer):
        assert len(prompts) == len(rows)
        return {"prompt_ids": [r["prompt_ids"] for r in rows], "completion_ids": [r["response_ids"] for r in rows],
                "logprobs": None}

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, per_device_train_batch_size=ROWS,
                            gradient_accumulation_steps=len(rows) // ROWS, num_generations=GROUP,
                            max_completion_length=600, beta=0.0, loss_type="dapo", epsilon=0.2, learning_rate=1e-5,
                            lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, bf16=False,
                            gradient_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no",
                            logging_steps=1, max_steps=args.runs + 1, shuffle_dataset=False, disable_tqdm=True, seed=0)
        trainer = Trainer(model=model, args=config, processing_class=tokenizer, rollout_func=rollouts,
                          callbacks=[Timer()], reward_funcs=lambda completions, **more: [r["reward"] for r in rows],
                          train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(GROUPS)]}))

        def run():
            trainer.train()
            return next(x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x)

        mark(run, updates)


def grpo_child(args: argparse.Namespace) -> None:
    """One contender in this process: processor seconds (of one thread, so that a busy machine does not count) of each
    update but the first, which allocates; and the largest resident set."""
    model, rows, seconds, norms = grpo_model(), grpo_rows(), [], []
    start = []

    def mark(function, own: list[float] | None = None):
        if not start:
            start.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        begun = time.process_time()
        norms.append(function())
        seconds.extend([time.process_time() - begun] if own is None else own)

    {"ours": ours_updates, "trl": trl_updates, "plain": plain_updates}[args.only](model, rows, args, mark)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    print(json.dumps({"seconds": seconds[1:], "peak": peak, "beyond_start": peak - start[0], "grad_norm": norms[0]}))


def main(args: argparse.Namespace) -> None:
    if args.only:
        return grpo_child(args)
    rows, results = grpo_rows(), {"ours": [], "trl": [], "plain": []}
    for _ in range(args.rounds):  # interleaved, a process each
        for name, found in results.items():
            child = subprocess.run(
                [sys.executable, "-m", "experiments.bench", "grpo", "--only", name, "--runs", str(args.runs)],
                capture_output=True, text=True, check=False, cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"})
            if child.returncode:
                raise UserError(child.stderr.strip().splitlines()[-1].removeprefix("bench.py: error: "))
            found.append(json.loads(child.stdout.splitlines()[-1]))
    seconds = {k: statistics.median(t for r in v for t in r["seconds"]) for k, v in results.items()}
    peak, beyond = ({k: statistics.median(r[x] for r in v) for k, v in results.items()}
                    for x in ("peak", "beyond_start"))
    norm = {k: v[0]["grad_norm"] for k, v in results.items()}
    real = sum(len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows)
    for name in ("trl", "plain"):
        facts = {"rows": len(rows), "tokens": real, "padded_to_longest": len(rows) * longest(rows), "vocabulary": VOCAB,
                 "grad_norm_relative_difference": abs(norm["ours"] / norm[name] - 1)}
        report(f"grpo_step_time_vs_{name}", seconds["ours"], seconds[name], "seconds", threads=1, **facts)
        report(f"grpo_peak_memory_vs_{name}", peak["ours"], peak[name], "bytes", ours_beyond_start=beyond["ours"],
               reference_beyond_start=beyond[name], ratio_beyond_start=round(beyond[name] / beyond["ours"], 3))
