"""pass@k of models on problem sets, in one table (paper Sec. 4.1, Table 1).

    python eval.py --model toy/sums_model out/sft/model --data test_hard.jsonl -n 32 --k 1 32 \\
        --out out/eval
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen2.5-1.5B-Instruct \\
        --data data/math500.jsonl data/amc23.jsonl --out out/eval

Reads   problems, as rollout.py does; recipes/get_data.py fetches the paper's test sets.
Writes  OUT/MODEL/DATA/rollouts.jsonl (every sample behind the numbers), results.json, results.md.
        Models of other names, sets and ks can be added to OUT: what it holds is not sampled again.

Differs from the paper: adds the 95 % interval (bootstrap over problems).
"""
import argparse
import json
import os
from math import comb
from pathlib import Path

import numpy as np

import rollout
from helpers import common, sampling, verifying
from helpers.common import POSITIVE, UserError

BOOTSTRAP = 10_000  # resamples
PAPER_AVERAGE = {"aime24", "aime25", "amc23", "math500"}  # of Tables 1 to 3
# Flags that may differ when a folder is continued: each (model, set) pair has its own
# record, which holds the digest of the set, so that the file can be moved
FREE = ("k", "data")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from c correct samples of n (Chen et al. 2021, Eq. 1): the chance
    that k of the n, drawn without replacement, hold a correct one. Raises ValueError."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {c} correct in {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)  # denominator: all subsets of k; integers, so exact


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems, resampled with replacement."""
    v = np.asarray(values)
    distinct, counts = np.unique(v, return_counts=True)
    # How often each distinct value is drawn is multinomial: no array of BOOTSTRAP x problems
    draws = np.random.default_rng(seed).multinomial(len(v), counts / len(v), BOOTSTRAP)
    means = draws @ distinct / len(v)  # denominator: problems
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def distinct_names(paths: list[str]) -> list[str]:
    """The last part of each path, or more of it where the last parts are not distinct."""
    # `.` and `..` have names too
    parts = [Path(os.path.abspath(p.removesuffix(".jsonl"))).parts[1:] for p in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same path twice among {' '.join(paths)}")


def score(problems: list[dict], found: dict, args: argparse.Namespace) -> dict:
    """pass@k with its interval for every k, lengths, and the share that was cut off."""
    hits = rollout.hits_per_problem(problems, args.n, found)
    values = {str(k): [pass_at_k(args.n, c, k) for c in hits] for k in args.k}
    summary = rollout.summarise(hits, args.n, found)
    return {"n": args.n, "problems": len(problems),
            "pass": {k: sum(v) / len(v) for k, v in values.items()},  # denominator: problems
            "interval": {k: bootstrap_interval(v, args.seed) for k, v in values.items()},
            "mean_tokens": summary["mean_tokens"], "truncated": summary["truncated"]}


def table(results: list[dict], ks: list[int]) -> str:
    """Markdown: a row per model, a column per set and k, percent with the 95 % interval, and an
    average: the paper's over its four sets where they are among others, otherwise over all."""
    found = {(r["model"], r["data"]): r for r in results}
    sets = list(dict.fromkeys(r["data"] for r in results))
    averaged = [d for d in sets if d in PAPER_AVERAGE] if PAPER_AVERAGE <= {*sets} else sets
    columns = sets + ["avg" if averaged == sets else "paper's avg"] * (len(sets) > 1)
    lines = ["| model | " + " | ".join(f"{d} @{k}" for d in columns for k in ks) + " |",
             "|---" * (1 + len(columns) * len(ks)) + "|"]
    for model in dict.fromkeys(r["model"] for r in results):
        cells = []
        for d in sets:
            for k in ks:
                r = found[model, d]
                low, high = r["interval"][str(k)]
                cells.append(f"{100 * r['pass'][str(k)]:.2f} [{100 * low:.1f}, {100 * high:.1f}]")
        if len(sets) > 1:
            shares = {k: [found[model, d]["pass"][str(k)] for d in averaged] for k in ks}
            cells += [f"{100 * sum(v) / len(v):.2f}" for v in shares.values()]  # denominator: sets
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser, several=True)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="problem sets, JSONL")
    add("--out", required=True, help="output folder")
    add("-n", "--n", type=POSITIVE, default=32, help="[Table 1] samples per problem")
    add("--k", type=POSITIVE, nargs="+", default=[1, 32], help="[Table 1] pass@k for these k")
    sampling.add_sampling_args(parser, max_new_tokens=32000)
    rollout.add_problem_args(parser)
    verifying.add_verifier_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[dict]:
    if max(args.k) > args.n:
        raise UserError(f"--k {max(args.k)} is more than the samples of a problem, -n {args.n}")
    models = dict(zip(distinct_names(args.model), args.model))
    sets = {name: (rollout.read_problems(path, args), common.file_digest(path))
            for name, path in zip(distinct_names(args.data), args.data)}
    device = common.pick_device(args)
    verify = verifying.from_args(args)  # a wrong one is noticed before anything is written
    out = common.start_run(args.out, args, (*FREE, "model"))

    results, policy = [], None
    for model, path in models.items():
        one = argparse.Namespace(**vars(args) | {"model": path})  # as the record of a pair has it
        policy = None  # the one before goes first, so that two are never in memory
        for data, (problems, digest) in sets.items():
            folder = common.start_run(out / model / data, one, FREE, data_digest=digest)
            if policy is None and not (folder / "rollouts.jsonl").exists():
                policy = common.load_model(one, device)
            label = f"{model} {data}"
            found = rollout.run_rollouts(policy, problems, verify, folder, args, label)
            results.append({"model": model, "data": data} | score(problems, found, args))

    if common.rank() == 0:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
        common.write_atomic(out / "results.md", table(results, args.k) + "\n")
        print(table(results, args.k))
    return results


if __name__ == "__main__":
    common.run_script(get_args, main)
