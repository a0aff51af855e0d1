"""pass@k of one or several models on one or several problem sets, in one table (paper Sec. 4.1, Table 1).

    python eval.py --model toy/sums_model out/sft/model --data test_hard.jsonl -n 32 --k 1 32 --out out/eval
    torchrun --nproc-per-node 8 eval.py --model Qwen/Qwen2.5-1.5B-Instruct --benchmarks math500,amc23 --out out/eval

Reads   problems as rollout.py does (--data), and the paper's six test sets by name (--benchmarks:
        helpers/benchmarks.py).
Writes  OUT/MODEL/DATA/rollouts.jsonl (every sample behind the numbers), results.json and results.md.

Differs from the paper: adds the 95 % interval (bootstrap over problems).
"""
import argparse
import json
import os
from math import comb
from pathlib import Path

import numpy as np

import rollout
from helpers import benchmarks, common, sampling
from helpers.common import UserError

BOOTSTRAP = 10_000  # resamples


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from c correct samples of n: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, Eq. 1).

    The chance that k samples drawn from the n without replacement hold a correct one. Raises ValueError unless
    1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {c} correct in {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)  # denominator: all subsets of k samples; integers, so exact


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems, resampled with replacement."""
    v = np.asarray(values)
    distinct, counts = np.unique(v, return_counts=True)  # how often each is drawn is multinomial: no BOOTSTRAP x len(v)
    draws = np.random.default_rng(seed).multinomial(len(v), counts / len(v), BOOTSTRAP)
    means = draws @ distinct / len(v)  # denominator: problems
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sensible at 0 and at n, where the bootstrap has no width."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def distinct_names(paths: list[str]) -> list[str]:
    """Short folder names: the last part of each path, or more of it where the last parts are not distinct."""
    parts = [Path(os.path.abspath(p.removesuffix(".jsonl"))).parts[1:] for p in paths]  # `.` and `..` have names too
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same path twice among {' '.join(paths)}")


def table(results: list[dict], ks: list[int]) -> str:
    """Markdown: a row per model, a column per problem set and k, percent with the 95 % interval, and an average: the
    paper's over its four sets where they are among others, otherwise over all sets."""
    sets = list(dict.fromkeys(r["data"] for r in results))
    paper = [d for d in sets if d in benchmarks.PAPER_AVERAGE]
    averaged = paper if len(paper) == len(benchmarks.PAPER_AVERAGE) else sets
    columns = sets + ["avg" if averaged == sets else "paper's avg"] * (len(sets) > 1)
    lines = ["| model | " + " | ".join(f"{d} @{k}" for d in columns for k in ks) + " |",
             "|---" * (1 + len(columns) * len(ks)) + "|"]
    for model in dict.fromkeys(r["model"] for r in results):
        cells = []
        for d in sets:
            r = next(r for r in results if r["model"] == model and r["data"] == d)
            for k in ks:
                low, high = r["interval"][str(k)]
                cells.append(f"{100 * r['pass'][str(k)]:.2f} [{100 * low:.1f}, {100 * high:.1f}]")
        if len(sets) > 1:
            mine = [r for r in results if r["model"] == model and r["data"] in averaged]
            # denominator: averaged sets
            cells += [f"{100 * sum(r['pass'][str(k)] for r in mine) / len(mine):.2f}" for k in ks]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser, several=True)
    parser.add_argument("--data", nargs="+", default=[], help="[ours] problem sets, JSONL")
    parser.add_argument("--benchmarks", type=lambda names: names.split(","), default=[],
                        help=f"[Sec. 4.1] the paper's test sets, from the hub: of {','.join(benchmarks.TABLE)}")
    parser.add_argument("--benchmark-dir", help="[ours] folder with NAME.jsonl for --benchmarks, instead of the hub")
    parser.add_argument("--overlap", help="[ours] training file, JSONL: count the test problems that are in it as well")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("-n", "--n", type=int, default=32, help="[Table 1] samples per problem")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 32], help="[Table 1] pass@k for these k")
    sampling.add_sampling_args(parser, max_new_tokens=32000)
    rollout.add_problem_args(parser)
    return parser.parse_args(argv)


PAIR_FREE = (*rollout.FREE, "k", "benchmarks", "benchmark_dir", "overlap")
# Models, sets and ks can be added to a folder; each pair has a record of its own. Where two paths end alike all names
# get longer, and all is sampled again
FREE = (*PAIR_FREE, "model", "data")


def read_sets(args: argparse.Namespace) -> dict[str, tuple[list[dict], str, str]]:
    """{name: (all problems, where from, digest)} of --data and --benchmarks. Raises UserError naming file or flag."""
    names = distinct_names(args.data) if args.data else []
    sets = {name: (rollout.read_problems(path, args, limit=0), path, common.file_digest(path))
            for name, path in zip(names, args.data)}
    for name in args.benchmarks:
        if name in sets:
            raise UserError(f"--benchmarks {name}: the name is taken by another problem set")
        problems = benchmarks.load(name, args.benchmark_dir)
        sets[name] = problems, name, benchmarks.digest(problems)
    if not sets:
        raise UserError("--data or --benchmarks is needed")
    return sets


def report_overlap(sets: dict, args: argparse.Namespace) -> dict[str, dict]:
    """What every test set (all of it, whatever --limit) shares with --overlap; rank 0 prints it."""
    training = benchmarks.read_training(args.overlap, args.problem_key)
    shared = {name: benchmarks.overlap(problems, training) for name, (problems, _, _) in sets.items()}
    if common.rank() == 0:
        for name, ids in shared.items():
            print(f"{name}: of {len(sets[name][0])} problems {len(ids['equal'])} are in {args.overlap}, and "
                  f"{len(ids['contained'])} with those inside a longer problem", flush=True)
    return shared


def main(args: argparse.Namespace) -> list[dict]:
    if not all(1 <= k <= args.n for k in args.k):
        raise UserError(f"--k {args.k}: each must be between 1 and -n {args.n}")
    sets = read_sets(args)
    shared = report_overlap(sets, args) if args.overlap else {}
    device = common.pick_device(args)
    common.load_verifier(args.verifier)  # a wrong one is noticed before anything is written
    out = common.start_run(args.out, args, FREE)
    results, policy = [], None
    for name, path in zip(distinct_names(args.model), args.model):
        one = argparse.Namespace(**vars(args) | {"model": path})
        del policy  # the one before, so that two are never in memory
        policy = common.load_model(one, device)
        for data, (problems, file, digest) in sets.items():
            problems = problems[:args.limit or None]
            pair = argparse.Namespace(**vars(one) | {"data": file})
            folder = common.start_run(out / name / data, pair, PAIR_FREE, data_digest=digest)
            found = rollout.run_rollouts(policy, problems, args.n, folder, args, f"{name} {data}")
            summary = rollout.summarise(problems, args.n, found)
            correct = rollout.hits_per_problem(problems, args.n, found)
            values = {str(k): [pass_at_k(args.n, c, k) for c in correct] for k in args.k}
            results.append({"model": name, "data": data, "n": args.n, "problems": len(problems),
                            "pass": {k: sum(v) / len(v) for k, v in values.items()},  # denominator: problems
                            "interval": {k: bootstrap_interval(v, args.seed) for k, v in values.items()},
                            "mean_tokens": summary["mean_tokens"], "truncated": summary["truncated"]}
                           | ({"overlap": shared[data]} if shared else {}))
    if common.rank() == 0:
        common.write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
        common.write_atomic(out / "results.md", table(results, args.k) + "\n")
        print(table(results, args.k))
    return results


if __name__ == "__main__":
    common.run_script(get_args, main)
