"""What the method does, measured with the controls that the paper lacks: makes the tables of RESULTS.md from seeds.

    python evidence.py                        everything, on both toy worlds, cached: continues where it was stopped
    python evidence.py --worlds toy_words     one world (toy, toy_words); --seeds 0 1 2: base models
    python evidence.py --quick                a small run of the same code, not for reading

Base models: of seed 0 those that ship with the repository; others are trained first. Every number comes from files that the
stage scripts wrote; evidence.py runs them, counts, and writes OUT/WORLD/results.md.
"""
import argparse
import time
from pathlib import Path

import torch

import common
import demo
import revise
import rollout
import toy
import toy_words
from demo import CONTINUATIONS, LENGTH, PROBLEMS, share
from verifier import verify

WORLDS = {"toy": toy, "toy_words": toy_words}

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
    """Tokens that a revision and its continuations cost: a token of a forward pass counts 1, and so does one of a backward.
    The pass over what a continuation follows, prompt and prefix, is left out, as it is for fresh samples."""
    branch = 6  # the worlds' template, 5 tokens, and a gold answer of two digits
    trunk = len(record["prompt_ids"]) + record["failed_tokens"] + branch
    return trunk * (record["passes"] + len(record["gaps"])) + sum(len(c["ids"]) for c in record["continuations"])


def read_variant(folder: Path, failed: dict) -> list[dict]:
    records = demo.first_attempts(common.read_jsonl(folder / "revised.jsonl"))
    return [r | {"failed_tokens": len(failed[r["id"], r["sample"]]["response_ids"])} for r in records]


def recovery_row(world, name: str, seeds: list[list[dict]], problems: dict[str, str], score: str = "reward") -> str:
    """One line of a recovery table, over the records of all base models."""
    records = [r for records in seeds for r in records]
    hits = [[c for c in r["continuations"] if c[score]] for r in records]
    sound = [[c for c in h if world.is_sound(problems[r["id"]], c["response"])] for r, h in zip(records, hits)]
    n = len(records)
    by_seed = " ".join(f"{100 * sum(any(c[score] for c in r['continuations']) for r in rs) / len(rs):.1f}" for rs in seeds)
    right, gold = sum(map(len, hits)), score == "reward"  # a wrong answer cannot be reached soundly
    mean = lambda values: sum(values) / n  # denominator: failed rollouts
    length = mean([sum(len(c["ids"]) for c in r["continuations"]) / len(r["continuations"]) for r in records])
    return (f"| {name} | {share(sum(map(bool, hits)), n)} | {by_seed} | {share(sum(map(bool, sound)), n) if gold else '-'} | "
            f"{share(sum(map(len, sound)), right) if right and gold else '-'} | {mean([r['passes'] for r in records]):.1f} | "
            f"{mean([cost(r) for r in records]):.0f} | {length:.1f} | {100 * mean([r['kept'] for r in records]):.0f} % |")


HEAD = ("| | recovered | by base model | soundly | sound of the right | forward passes | tokens of compute | continuation | kept |\n"
        + "|---" * 9 + "|")


def recovery(world, out: Path, models: dict[int, str], limit: int) -> str:
    """The recovery tables: every variant on the zero-hit prompts of every base model."""
    tables, problems, records, wrong = [], {}, {}, []
    for seed, model in models.items():
        base = out / f"base{seed}"
        demo.run(out, f"{world.__name__}.py data --out {base}/data")
        demo.run(out, f"rollout.py --model {model} --data {base}/data/hard.jsonl --limit {limit} -n 32 {PROBLEMS} --out "
                      f"{base}/rollouts", processes=2)
        problems |= {p["id"]: p["problem"] for p in common.read_jsonl(base / "data" / "hard.jsonl")}
        failed = {(r["id"], r["sample"]): r for r in common.read_jsonl(base / "rollouts" / "rollouts.jsonl")}
        stage = (f"revise.py --model {model} --rollouts {base}/rollouts {LENGTH} --batch-tokens 4096 --attempts 1 "
                 f"--template '{world.TEMPLATE}'")

        def commands(flags: dict[str, str], stage=stage, base=base) -> list[str]:
            return [f"{stage} {'' if '--continuations' in f else f'--continuations {CONTINUATIONS} '}{f} --out "
                    f"{base}/{slug(name)}" for name, f in flags.items()]

        plain = {name: f for group in RECOVERY.values() for name, f in group.items() if "{equal}" not in f}
        demo.run(out, *commands(plain))
        ours, fresh = (read_variant(base / slug(name), failed) for name in ("LatentRevise", "fresh sampling"))
        # As many fresh samples as the tokens of the method would pay for
        each = sum(len(c["ids"]) for r in fresh for c in r["continuations"]) / (CONTINUATIONS * len(fresh))
        equal = round(sum(map(cost, ours)) / len(ours) / each)
        demo.run(out, *commands({"fresh sampling, equal compute": f"--from scratch --continuations {equal}"}))
        for group in RECOVERY.values():
            for name in group:
                records.setdefault(name, []).append(read_variant(base / slug(name), failed))
        wrong.append(demo.not_reached(records["permuted gold"][-1], list(failed.values())))
    for group, rows in RECOVERY.items():
        lines = [recovery_row(world, name, records[name], problems) for name in rows]
        if "permuted gold" in rows:
            lines.append(recovery_row(world, "permuted gold, scored on it", wrong, problems, "guide_reward"))
        tables.append(f"### {group[0].upper() + group[1:]}\n\n{HEAD}\n" + "\n".join(lines) + "\n")
    return "\n".join(tables)


# --- soundness and the hull, from the recovered trajectories of the plain method ----------------------------------------------
@torch.no_grad()
def trace_logprobs(model, contexts: list[torch.Tensor], ids: list[list[int]]) -> list[float]:
    """Mean log-probability of a token of ids after its context, (T, D) input embeddings each; one pass for every pair."""
    W, values = model.get_input_embeddings().weight, []
    for x, c in zip(contexts, ids):
        logits = model(inputs_embeds=torch.cat([x, W[torch.tensor(c)]])[None], use_cache=False).logits[0, len(x) - 1:-1]
        values.append(float(logits.log_softmax(-1).gather(1, torch.tensor(c)[:, None]).mean()))  # denominator: tokens of c
    return values


def examine(world, model, tokenizer, folder: Path, permuted: dict[str, dict], problems: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """Facts of every recovered trajectory, and of every revised prefix, of one run of revise.py.

    A trajectory: `sound`; `again`, how many of 16 continuations of its hard prefix reach the gold answer; `soft` and `hard`,
    the mean log-probability of its continuation after the soft and the hard prefix; `leaks`, whether the same prompt
    reached a wrong answer when it was steered toward that. A prefix: `distance` to the nearest token and `moved`, both as
    shares of the norm of its own token's embedding; `kept` by each projection; `gaps`; `recovered`.
    """
    W = model.get_input_embeddings().weight.detach()
    allowed = torch.arange(len(tokenizer))
    eos = common.eos_ids(model, tokenizer)
    trajectories, prefixes = [], []
    for r in demo.first_attempts(common.read_jsonl(folder / "revised.jsonl")):
        E, start = revise.soft_prefix(W, *revise.load_prefix(folder, r)), W[torch.tensor(r["prefix_ids"])]
        norms = start.norm(dim=-1)  # denominator of both distances
        ids = {m: revise.best_rows(E, W, allowed, m) for m in ("inner", "cosine", "l2")}
        prefixes.append({"distance": float(((E - W[ids["l2"]]).norm(dim=-1) / norms).mean()),
                         "moved": float(((E - start).norm(dim=-1) / norms).mean()), "gaps": r["gaps"], "recovered": r["recovered"],
                         "kept": {m: float((i == torch.tensor(r["prefix_ids"])).float().mean()) for m, i in ids.items()}})
        right = [c for c in r["continuations"] if c["reward"]]
        if not right:
            continue
        q, hard = W[torch.tensor(r["prompt_ids"])], torch.cat([W[torch.tensor(x)] for x in (r["prompt_ids"], r["projected_ids"])])
        keys = [rollout.row_key("again", r["id"], m) for m in range(16)]
        fresh = rollout.sample(model, [hard], [keys], [160 - len(r["prefix_ids"])], eos=eos, vocab=len(tokenizer))[0]
        again = sum(verify(tokenizer.decode(r["projected_ids"] + s.ids, skip_special_tokens=True), r["answer"]) for s in fresh)
        conts = [c["ids"] for c in right]
        soft = trace_logprobs(model, [torch.cat([q, E])] * len(right), conts)
        trajectories += [{"sound": world.is_sound(problems[r["id"]], c["response"]), "again": again, "soft": a, "hard": b,
                          "leaks": any(x["guide_reward"] for x in permuted[r["id"]]["continuations"]), "id": r["id"]}
                         for c, a, b in zip(right, soft, trace_logprobs(model, [hard] * len(right), conts))]
    return trajectories, prefixes


FILTERS = {"all recovered": lambda t: True,
           "answer reached again from the hard prefix, 1 of 16": lambda t: t["again"] >= 1,
           "the same, 4 of 16": lambda t: t["again"] >= 4,
           "prompt does not reach a wrong answer when steered toward it": lambda t: not t["leaks"],
           "continuation likely after the hard prefix (> -0.5 nat a token)": lambda t: t["hard"] > -0.5,
           "the last and the first": lambda t: t["hard"] > -0.5 and t["again"] >= 1}


def soundness(world, out: Path, models: dict[int, str]) -> str:
    """Tables of the filters and of the hull, over all base models."""
    trajectories, prefixes = [], []
    for seed, path in models.items():
        base = out / f"base{seed}"
        model, tokenizer, _ = common.load_model(argparse.Namespace(model=path, dtype="float32"), torch.device("cpu"))
        problems = {p["id"]: p["problem"] for p in common.read_jsonl(base / "data" / "hard.jsonl")}
        permuted = {r["id"]: r for r in common.read_jsonl(base / "permuted-gold" / "revised.jsonl")}
        ts, ps = examine(world, model, tokenizer, base / "latentrevise", permuted, problems)
        trajectories += [t | {"seed": seed} for t in ts]
        prefixes += ps
    lines = ["| filter | kept of the recovered | of them sound | sound prompts kept |", "|---" * 4 + "|"]
    prompts = lambda ts: {(t["seed"], t["id"]) for t in ts}
    of_sound = prompts(t for t in trajectories if t["sound"])
    for name, passes in FILTERS.items():
        kept = [t for t in trajectories if passes(t)]
        sound = [t for t in kept if t["sound"]]
        lines.append(f"| {name} | {share(len(kept), len(trajectories))} | {share(len(sound), len(kept)) if kept else '-'} | "
                     f"{len(prompts(sound))} of {len(of_sound)} |")
    mean = lambda values: sum(values) / max(len(values), 1)  # denominator: the values
    hull = ["| | recovered | not recovered |", "|---" * 3 + "|"]
    groups = [[p for p in prefixes if p["recovered"] == r] for r in (True, False)]
    rows = {"prefixes": [f"{len(g)}" for g in groups],
            "moved, share of the token's norm": [f"{mean([p['moved'] for p in g]):.3f}" for g in groups],
            "distance to the nearest token, the same": [f"{mean([p['distance'] for p in g]):.3f}" for g in groups],
            **{f"tokens kept by {m}": [f"{100 * mean([p['kept'][m] for p in g]):.1f} %" for g in groups] for m in ("inner", "cosine", "l2")},
            "Frank-Wolfe gap before the first step": [f"{mean([p['gaps'][0] for p in g]):.1f}" for g in groups],
            "Frank-Wolfe gap before the last step": [f"{mean([p['gaps'][-1] for p in g]):.1f}" for g in groups]}
    hull += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    likely = [(t["soft"], t["hard"]) for t in trajectories]
    hull.append(f"\nMean log-probability of a token of a recovered continuation: {mean([s for s, _ in likely]):.3f} after the soft prefix, "
                f"{mean([h for _, h in likely]):.3f} after its projection ({len(likely)} continuations).")
    return "### Filters without a reasoning trace\n\n" + "\n".join(lines) + "\n\n### The hull\n\n" + "\n".join(hull) + "\n"


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="[ours] one base model and 24 prompts: to see that it runs")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS), help="[ours] toy worlds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[ours] base models of each world")
    parser.add_argument("--out", help="[ours] output folder; out/evidence or out/evidence-quick if not given")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    begun = time.time()
    root = Path(args.out or ("out/evidence-quick" if args.quick else "out/evidence"))
    seeds = [0] if args.quick else args.seeds
    for name in args.worlds:
        world, out = WORLDS[name], root / name
        out.mkdir(parents=True, exist_ok=True)
        models = {s: str(out / f"model{s}") if s else f"{name}_model" for s in seeds}
        demo.run(out, *[f"{name}.py train --out {path} --seed {s}" for s, path in models.items()
                        if s and not (demo.ROOT / path / "run.json").exists()])
        limit = 24 if args.quick else 300
        text = recovery(world, out, models, limit) + "\n" + soundness(world, out, models)
        common.write_atomic(out / "results.md", text)
        print(f"{text}\n[{time.time() - begun:.0f} s] {out}/results.md")


if __name__ == "__main__":
    common.run_script(get_args, main)
