"""What the method does, measured with the controls that the paper lacks: makes the tables of RESULTS.md from seeds.

    python evidence.py            everything, on the toy world, cached: continues where it was stopped
    python evidence.py --quick    a small run of the same code, not for reading

Base models: toy_model (seed 0) and two more that it trains with toy.py, seeds 1 and 2. Every number comes from files that the
stage scripts wrote; evidence.py runs them, counts, and writes OUT/recovery.md.
"""
import argparse
import time
from pathlib import Path

import common
import demo
import toy
from demo import CONTINUATIONS, LENGTH, PROBLEMS, share

# name -> flags of revise.py. The first is the paper's method at its defaults; all others differ from it by their flags alone
RECOVERY = {
    "controls": {
        "LatentRevise": "--record-every 2",
        "fresh sampling": "--from scratch",
        "fresh sampling, equal compute": "--from scratch --continuations {equal}",
        "hard prefix": "--from hard-prefix",
        "random vertices": "--vertices random",
        "permuted gold": "--gold permuted"},
    "ablations of Table 3": {
        "no Frank-Wolfe (Adam, lr 0.01)": "--optimizer adam",
        "no L_guide": "--alpha-guide 0",
        "no L_explore": "--explore-weight 0",
        "no L_NLL": "--beta-nll 0",
        "rho 0.5": "--rho 0.5",
        "rho 0.2": "--rho 0.2",
        "K 5": "--revision-steps 5",
        "K 20": "--revision-steps 20"},
    "choices of ours": {
        "losses as means": "--reduction mean",
        "cosine projection": "--projection cosine",
        "l2 projection": "--projection l2",
        "no special tokens as vertices": "--vertex-rows text",
        "gamma0 0.2": "--gamma0 0.2",
        "gamma0 0.3": "--gamma0 0.3"},
    "other steps": {
        "pairwise": "--direction pairwise",
        "away": "--direction away",
        "short step": "--step-rule short",
        "pairwise, short step": "--direction pairwise --step-rule short",
        "backtracking": "--step-rule backtracking",
        "backtracking, K 5": "--step-rule backtracking --revision-steps 5",
        "pairwise, backtracking": "--direction pairwise --step-rule backtracking",
        "pairwise, backtracking, K 5": "--direction pairwise --step-rule backtracking --revision-steps 5",
        "away, backtracking, K 5": "--direction away --step-rule backtracking --revision-steps 5",
        "pairwise, K 20": "--direction pairwise --revision-steps 20",
        "cut by surprise": "--rho-rule surprise"}}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def cost(record: dict) -> int:
    """Tokens that a revision and its continuations cost: a token of a forward pass counts 1, and so does one of a backward."""
    branch = 12  # about: the toy's template and gold answer
    trunk = len(record["prompt_ids"]) + record["failed_tokens"] + branch
    return trunk * (record["passes"] + len(record["gaps"])) + sum(len(c["ids"]) for c in record["continuations"])


def read_variant(folder: Path, failed: dict) -> list[dict]:
    records = demo.first_attempts(common.read_jsonl(folder / "revised.jsonl"))
    return [r | {"failed_tokens": len(failed[r["id"], r["sample"]]["response_ids"])} for r in records]


def recovery_row(name: str, seeds: list[list[dict]], problems: dict[str, str], score: str = "reward") -> str:
    """One line of a recovery table, over the records of all base models."""
    records = [r for records in seeds for r in records]
    hits = [[c for c in r["continuations"] if c[score]] for r in records]
    sound = [[c for c in h if toy.is_sound(problems[r["id"]], c["response"])] for r, h in zip(records, hits)]
    n = len(records)
    by_seed = " ".join(f"{100 * sum(any(c[score] for c in r['continuations']) for r in rs) / len(rs):.1f}" for rs in seeds)
    right = sum(map(len, hits))
    mean = lambda values: sum(values) / n  # denominator: failed rollouts
    length = mean([sum(len(c["ids"]) for c in r["continuations"]) / len(r["continuations"]) for r in records])
    return (f"| {name} | {share(sum(map(bool, hits)), n)} | {by_seed} | {share(sum(map(bool, sound)), n)} | "
            f"{share(sum(map(len, sound)), right) if right else '-'} | {mean([r['passes'] for r in records]):.1f} | "
            f"{mean([cost(r) for r in records]):.0f} | {length:.1f} | {100 * mean([r['kept'] for r in records]):.0f} % |")


HEAD = ("| | recovered | by base model | soundly | sound of the right | forward passes | tokens of compute | continuation | kept |\n"
        + "|---" * 9 + "|")


def recovery(out: Path, models: dict[int, str], limit: int) -> str:
    """The recovery tables: every variant on the zero-hit prompts of every base model."""
    tables, problems, records = [], {}, {}
    for seed, model in models.items():
        base = out / f"base{seed}"
        demo.run(out, f"toy.py data --out {base}/data")
        demo.run(out, f"rollout.py --model {model} --data {base}/data/hard.jsonl --limit {limit} -n 32 {PROBLEMS} --out "
                      f"{base}/rollouts", processes=2)
        problems |= {p["id"]: p["problem"] for p in common.read_jsonl(base / "data" / "hard.jsonl")}
        failed = {(r["id"], r["sample"]): r for r in common.read_jsonl(base / "rollouts" / "rollouts.jsonl")}
        stage = (f"revise.py --model {model} --rollouts {base}/rollouts {LENGTH} --batch-tokens 4096 --attempts 1 "
                 f"--template '{toy.TEMPLATE}'")

        def commands(flags: dict[str, str], stage=stage, base=base) -> list[str]:
            return [f"{stage} {'' if '--continuations' in f else f'--continuations {CONTINUATIONS} '}{f} --out "
                    f"{base}/{slug(name)}" for name, f in flags.items()]

        plain = {name: f for group in RECOVERY.values() for name, f in group.items() if "{equal}" not in f}
        demo.run(out, *commands(plain))
        ours, fresh = (read_variant(base / slug(name), failed) for name in ("LatentRevise", "fresh sampling"))
        # As many fresh samples as the tokens of the method would pay for, prompts included once
        each = sum(len(c["ids"]) for r in fresh for c in r["continuations"]) / (CONTINUATIONS * len(fresh))
        equal = round(sum(map(cost, ours)) / len(ours) / each)
        demo.run(out, *commands({"fresh sampling, equal compute": f"--from scratch --continuations {equal}"}))
        for group in RECOVERY.values():
            for name in group:
                records.setdefault(name, []).append(read_variant(base / slug(name), failed))
    for group, rows in RECOVERY.items():
        lines = [recovery_row(name, records[name], problems) for name in rows]
        if "permuted gold" in rows:
            lines.append(recovery_row("permuted gold, scored on it", records["permuted gold"], problems, "guide_reward"))
        tables.append(f"### {group[0].upper() + group[1:]}\n\n{HEAD}\n" + "\n".join(lines) + "\n")
    return "\n".join(tables)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="[ours] one base model and 24 prompts: to see that it runs")
    parser.add_argument("--out", help="[ours] output folder; out/evidence or out/evidence-quick if not given")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    begun = time.time()
    out = Path(args.out or ("out/evidence-quick" if args.quick else "out/evidence"))
    out.mkdir(parents=True, exist_ok=True)
    models = {0: "toy_model"}
    if not args.quick:
        missing = [s for s in (1, 2) if not (out / f"model{s}" / "run.json").exists()]
        demo.run(out, *[f"toy.py train --out {out}/model{s} --seed {s}" for s in missing])
        models |= {s: str(out / f"model{s}") for s in (1, 2)}
    text = recovery(out, models, 24 if args.quick else 300)
    common.write_atomic(out / "recovery.md", text)
    print(text)
    print(f"[{time.time() - begun:.0f} s] {out}/recovery.md")


if __name__ == "__main__":
    common.run_script(get_args, main)
