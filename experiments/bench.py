"""Speed and memory, each measured against a reference in the same run: one JSON line per measure (benches/).

    python -m experiments.bench WHAT [--device cuda]

    revise    one Frank-Wolfe step against Algorithm 1 written literally; on CUDA in the shape of Qwen2.5-1.5B, and by
              batch size and length
    rollout   sampling against Transformers' generate(); on CUDA in the shape of Qwen2.5-1.5B
    grpo      one update of train_grpo.py against TRL's GRPOTrainer (requirements-bench.txt) and against full logits of
              rows padded to the longest (CPU)
    memory    the formula of the README against what toy/sums_model keeps (CPU), and the paper's models
    real      the first two with --model and the prompts of --data (CPU), and the share of the product rate
    hours     GPU-hours of the recipes, computed

Fields: `measure`, `ours`, `reference`, `ratio` = reference / ours (above 1: ours is better), `unit`, `shape`;
`ratio_to_frozen` is the same for a reference whose parameters ask for no gradient. Timings are medians of interleaved
runs. `revise_saved_bytes_*` is the most that autograd keeps alive at a time, parameters excluded. `grpo_peak_memory_*`
is the largest resident set of a process that does nothing else; `*_beyond_start` leaves out what it held before its
first update (libraries, weights), so that it is gradients, moments and activations. `rollout_*` are seconds per 1,000
response tokens. `row_steps` are the rows of all decoding steps, `ideal` those that some response needed;
`host_*_per_step` are the operations dispatched, and the time spent, outside of the model's forward pass.
"""
import argparse
import importlib

from helpers import common


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["revise", "rollout", "grpo", "memory", "real", "hours"],
                        help="what to measure")
    parser.add_argument("--model", default="toy/sums_model", help="real: a model")
    parser.add_argument("--data", help="real: its problems")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="as elsewhere")
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs of each; the median is reported")
    parser.add_argument("--rounds", type=int, default=3, help="grpo: processes of each, in turn")
    parser.add_argument("--only", choices=["ours", "trl", "plain"], help="grpo: one of them, in this process")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    importlib.import_module(f"experiments.benches.{args.what}").main(args)


if __name__ == "__main__":
    common.run_script(get_args, main)
