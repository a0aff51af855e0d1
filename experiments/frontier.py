"""Where does it pay to revise, and where to sample? Recovery and training against the base model's hit rate.

    python -m experiments.frontier    a part, which `make evidence` runs: recovery, at two rates of the first world
    --rates 0.001 0 --seeds 0 1       other rates and base models; --worlds toy_words; --train: training as well, of all
                                      arms or of those that are named: --train "GRPO N=8" RFT
    --all                             both worlds, all rates, three base models, training: twelve hours, estimated
    --quick                           to see that it runs

A base model of evidence.py is trained on for a while with texts in which a first pass almost always makes the
world's mistake (0.95), and a share of the texts corrects itself unasked: RATES. So a hard prompt is hit at about that
rate, and hardly by luck. The hit rate is measured on the problems that are then used, and the zero-hit ones are those
without a hit in the first 32 samples. Every method continues the first failed rollout of each, or samples anew;
"at 8" counts eight tries, "at equal tokens" as many as the tokens of LatentRevise with eight pay for, at most 48.
"""
import argparse
import time
from pathlib import Path

import torch

from experiments import demo, evidence, plot, show, style, tables
from experiments.demo import PROBLEMS, share, wilson_interval
from experiments.evidence import HINT, LIKELY, REVISE
from helpers import common

RATES = {"toy": [0.003, 0.001, 0.0003, 0.0001, 0.0], "toy_words": [0.003, 0.0003]}  # self-correction, unasked
SLIP = 0.95
FULL = {"hard": 200, "measured": 256, "prompts": 100, "test": 60, "largest": 48, "steps": 16, "batch": 16, "adapt": 400}
QUICK = {"hard": 12, "measured": 40, "prompts": 6, "test": 3, "largest": 4, "steps": 2, "batch": 2, "adapt": 4}

# name -> flags of revise.py ({n}: continuations), or of another script
EXPLORE, NOISE = "--alpha-guide 0 --gamma0 0.3", "--vertices random --gamma0"
RECOVERY = {
    "LatentRevise": "--continuations 8",
    "LatentRevise, gamma0 0.3": "--continuations 8 --gamma0 0.3",
    "explore-only, gamma0 0.3": EXPLORE + " --continuations {n}",
    "noise, gamma0 0.1": NOISE + " 0.1 --continuations {n}",
    "noise, gamma0 0.2": NOISE + " 0.2 --continuations {n}",
    "noise, gamma0 0.3": NOISE + " 0.3 --continuations {n}",
    "unmoved prefix": "--revision-steps 0 --continuations {n}",
    "fresh samples": "rollout.py -n {n}",
    "answer hint": "-m baselines.hint -n {n} --hint '{hint}'",
    "perturbed prompt": "-m baselines.hint --from perturbed -n {n}"}
LEARNED = {  # and what training also learns from
    "LatentRevise, likely only": f"--continuations 8 {LIKELY}",
    "noise, gamma0 0.3, no projection": NOISE + " 0.3 --projection none --continuations {n}",
    "noise, gamma0 0.3, no projection, likely only": f"{NOISE} 0.3 --projection none {LIKELY} --continuations {{n}}"}
TRAINING = {  # flags of train_grpo.py, another script, or what train_sft.py learns from
    "GRPO N=8": "", "GRPO N=8, lr 1e-4": "--lr 1e-4", "GRPO N=16": "--group-size 16",
    "GRPO N=32": "--group-size 32", "DAPO": "--algo dapo",
    "GRPO+LatentRevise": REVISE, "GRPO+LatentRevise, lr 1e-4": f"{REVISE} --lr 1e-4",
    "GRPO+LatentRevise, likely only": f"{REVISE} {LIKELY}",
    "GRPO+LatentRevise, LUFFY": f"{REVISE} --injected-ratio luffy",
    "GRPO+explore-only": f"{REVISE} {EXPLORE}",
    "GRPO+noise": f"{REVISE} {NOISE} 0.3",
    "GRPO+noise, no projection, likely only": f"{REVISE} {NOISE} 0.3 --projection none {LIKELY} --continuations 24",
    "GRPO+unmoved prefix, likely only": f"{REVISE} --revision-steps 0 {LIKELY} --continuations 24",
    "GRPO+hint": "-m baselines.train_hint --hint '{hint}'",
    "RFT": "fresh-samples/rollouts.jsonl", "SFT+LatentRevise": "latentrevise/recovered.jsonl",
    "SFT+LatentRevise, likely only": "latentrevise--likely-only/recovered.jsonl",
    "SFT+explore-only": "explore-only--gamma0-0-3/recovered.jsonl",
    "SFT+noise": "noise--gamma0-0-3/recovered.jsonl",
    "SFT+noise, no projection": "noise--gamma0-0-3--no-projection/recovered.jsonl",
    "SFT+noise, no projection, likely only": "noise--gamma0-0-3--no-projection--likely-only/recovered.jsonl",
    "SFT+hint": "answer-hint/recovered.jsonl"}
SHOWN = {"LatentRevise": "LatentRevise", "explore-only, gamma0 0.3": "explore-only", "noise, gamma0 0.3": "noise",
         "fresh samples": "fresh samples", "answer hint": "answer hint"}  # in the figure: of recovery, and trained
SHOWN_ARMS = {"GRPO+LatentRevise": "GRPO+LatentRevise", "GRPO N=8": "GRPO", "RFT": "SFT on right samples",
              "GRPO+noise, no projection, likely only": "GRPO+noise, unprojected", "GRPO+hint": "GRPO+hint"}


# --- running the stages ----------------------------------------------------------------------------------------------
def adapt(world, out: Path, starts: dict[int, str], rates: list[float], size: dict) -> dict[Path, tuple]:
    """A base model of every seed and rate, and its rollouts on the hard problems. {folder: (rate, seed)}."""
    bases = {out / f"rate{rate:g}-seed{seed}": (rate, seed) for rate in rates for seed in starts}
    name = world.__name__
    demo.run(out, *[f"-m {name} train --start {starts[seed]} --unasked {rate:g} --slip {SLIP} --steps {size['adapt']} "
                    f"--lr 1e-3 --seed {1000 + seed} --prompts 0 --out {base}/model"
                    for base, (rate, seed) in bases.items() if not (demo.ROOT / base / "model/run.json").exists()],
             *[f"-m {name} data --out {out}/data{seed} --seed {seed}" for seed in starts])
    for base, (_, seed) in bases.items():
        demo.run(out, f"rollout.py --model {base}/model --data {out}/data{seed}/hard.jsonl --limit {size['hard']} "
                      f"-n {size['measured']} --seed {seed} {PROBLEMS} --out {base}/measured", processes=2)
        first = [r for r in common.read_jsonl(base / "measured/rollouts.jsonl") if r["sample"] < 32]
        hit = {r["id"] for r in first if r["reward"]}
        zero = list(dict.fromkeys(r["id"] for r in first if r["id"] not in hit))
        chosen = {*zero[:size["prompts"]]}
        (base / "rollouts").mkdir(exist_ok=True)
        for file, rows in (("zero_hit", common.read_jsonl(out / f"data{seed}/hard.jsonl")), ("rollouts", first)):
            lines = "".join(common.to_line(r) for r in rows if r["id"] in chosen)
            common.write_atomic(base / f"rollouts/{file}.jsonl", lines)
    return bases


def filled(world, flags: str, size: dict) -> str:
    hint = HINT.format(template=world.TEMPLATE)
    return flags.replace("{template}", world.TEMPLATE).replace("{hint}", hint).replace("{n}", str(size["largest"]))


def recover(world, out: Path, bases: dict, size: dict, methods: dict[str, str]) -> None:
    demo.run(out, *[evidence.recovery_command(world, base, name, filled(world, flags, size), f"{base}/model",
                                              seed + 2000)
                    for base, (_, seed) in bases.items() for name, flags in methods.items()])


def train(world, out: Path, bases: dict, size: dict, arms: list[str]) -> None:
    """The arms from every base model on its zero-hit prompts, and pass@k of all on held-out hard problems."""
    def command(base: Path, seed: int, arm: str, flags: str) -> str:
        flags = filled(world, flags, size)
        shared = (f"--model {base}/model --steps {size['steps']} --train-tokens 8192 --seed {seed} "
                  f"--out {base}/train/{tables.slug(arm)}" + f" --lr {evidence.LR}" * ("--lr" not in flags))
        if flags.endswith(".jsonl"):
            right = any(r["reward"] for r in common.read_jsonl(base / "revise" / flags))
            return f"train_sft.py {shared} --batch-size 64 --data {base}/revise/{flags}" if right else ""
        return evidence.grpo_command(
            flags, f"{shared} --batch-size {size['batch']} --data {base}/rollouts/zero_hit.jsonl")

    runs = {base: {arm: command(base, seed, arm, TRAINING[arm]) for arm in arms}
            for base, (_, seed) in bases.items()}
    demo.run(out, *[c for arms in runs.values() for c in arms.values() if c])
    for base, (_, seed) in bases.items():
        models = " ".join(f"{base}/train/{tables.slug(arm)}/model" for arm, c in runs[base].items() if c)
        demo.run(out, f"eval.py --model {base}/model {models} --data {out}/data{seed}/test_hard.jsonl "
                      f"--limit {size['test']} -n 32 --k 1 32 --seed {seed} {PROBLEMS} --out {base}/eval", processes=2)


# --- counting --------------------------------------------------------------------------------------------------------
class Base:
    """What is read of one base model, in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems = {p["id"]: p["problem"] for p in common.read_jsonl(folder / "rollouts/zero_hit.jsonl")}
        self.failed = {(r["id"], r["sample"]): len(r["response_ids"])
                       for r in common.read_jsonl(folder / "rollouts/rollouts.jsonl")}
        args = argparse.Namespace(model=str(folder / "model"), dtype="float32")
        self.model = common.load_model(args, torch.device("cpu")).model
        self.W = self.model.get_input_embeddings().weight.detach()

    def complete(self, name: str) -> bool:
        return (self.folder / "revise" / tables.slug(name) / "summary.json").exists()

    def records(self, name: str) -> list[dict]:
        """Of one method, with the length of the failed rollout, which fresh samples do not have."""
        return [r | {"failed_tokens": self.failed.get((r["id"], r["sample"]), 0)}
                for r in demo.first_attempts(self.folder / "revise" / tables.slug(name))]

    def likely(self, r: dict, c: dict) -> bool:
        """What `--min-logprob -0.5` asks: the mean over the continuation's tokens, after the projected prefix."""
        x = self.W[torch.tensor(r["prompt_ids"] + r["projected_ids"])]
        return tables.mean(tables.logprobs_after(self.model, x, c["ids"])) >= float(LIKELY.split()[1])


def costs(records: list[dict]) -> tuple[float, float]:
    """Tokens that a prompt costs before anything is drawn, and those of a try: means."""
    return (tables.mean([tables.cost(r | {"continuations": []}) for r in records]),
            tables.mean([len(c["ids"]) for r in records for c in r["continuations"]]))


def read(world, base: Base, budget: float, name: str) -> dict:
    """One method on one base model: for 8 tries, and for as many as `budget` tokens a prompt pay for, counts of
    prompts recovered and soundly; of the latter also by what is likely, and of right tries and sound ones; tokens;
    `moved` (share of a token's norm) and `kept`."""
    records = base.records(name)
    fixed, each = costs(records)
    most = max(len(r["continuations"]) for r in records)
    equal = max(0, min(most, round((budget - fixed) / each)))
    found = {"n": len(records), "tokens": fixed + 8 * each, "tries": equal,
             "kept": tables.mean([r["kept"] for r in records]),
             "moved": tables.mean([show.moved(base.W, r) for r in records if r["gammas"]])}
    prompts = lambda sound: (sum(map(bool, sound)), sum(map(any, sound)))
    for label, tries in (("8", 8), ("equal", equal)):
        right = [[(r, c) for c in r["continuations"][:tries] if c["reward"]] for r in records]
        sound = [[world.is_sound(base.problems[r["id"]], c["response"]) for r, c in pairs] for pairs in right]
        found[label] = prompts(sound)
    likely = [[x for x, pair in zip(of, pairs) if base.likely(*pair)] for of, pairs in zip(sound, right)]
    return found | {"likely": prompts(likely), "sound_right": (sum(map(sum, sound)), sum(map(len, right)))}


def hit_rate(base: Path) -> tuple[int, int]:
    rows = common.read_jsonl(base / "measured/rollouts.jsonl")
    return sum(r["reward"] for r in rows), len(rows)


def add(found: list[dict]) -> dict:
    """The same over several base models."""
    pair = lambda key: tuple(map(sum, zip(*(f[key] for f in found))))
    return {"n": sum(f["n"] for f in found), **{k: pair(k) for k in ("8", "equal", "likely", "sound_right")},
            **{k: tables.mean([f[k] for f in found]) for k in ("tokens", "tries", "kept", "moved")}}


def measure(world, bases: dict) -> list[dict]:
    """For every rate: its measured hit rate, each method's counts over the base models, and pass@k of each arm."""
    rows = []
    for rate in dict.fromkeys(rate for rate, _ in bases.values()):
        of = [base for base, (r, _) in bases.items() if r == rate]
        read_bases = [Base(folder) for folder in of]
        budgets = [fixed + 8 * each for fixed, each in (costs(b.records("LatentRevise")) for b in read_bases)]
        methods = {name: add([read(world, *pair, name) for pair in zip(read_bases, budgets)])
                   for name in RECOVERY | LEARNED if all(b.complete(name) for b in read_bases)}
        hits, samples = map(sum, zip(*map(hit_rate, of)))
        arms = {}
        for arm in ("base", *TRAINING):
            folders = [base / "eval" / (f"{base.name}-model" if arm == "base" else f"{tables.slug(arm)}-model")
                       for base in of]
            values = [tables.pass_values(f / "test_hard") for f in folders if (f / "test_hard").exists()]
            if values:
                arms[arm] = {k: [v[k] for v in values] for k in (1, 32)}
        rows.append({"rate": rate, "hits": hits, "samples": samples, "arms": arms, "methods": methods})
    return rows


def as_text(title: str, rows: list[dict]) -> str:
    text = []
    for row in rows:
        hits, samples = row["hits"], row["samples"]
        rate, low, high = (100 * x for x in (hits / samples, *wilson_interval(hits, samples)))
        text.append(f"#### {title}, self-correction in {100 * row['rate']:g} % of the texts: hit rate {rate:.3f} % "
                    f"[{low:.3f}, {high:.3f}] ({hits} of {samples} samples)\n")
        head = ["", "recovered at 8", "soundly", "tries at equal tokens", "recovered", "soundly",
                "by what is likely", "soundly", "sound of the right", "tokens at 8", "moved", "kept"]
        text.append(tables.table(head, [
            [name, *(share(k, m["n"]) for k in m["8"]), f"{m['tries']:.0f}", *(share(k, m["n"]) for k in m["equal"]),
             *m["likely"], "{} of {}".format(*m["sound_right"]), f"{m['tokens']:.0f}",
             f"{m['moved']:.2f}" if m["moved"] else "-", f"{m['kept']:.0%}"] for name, m in row["methods"].items()]))
        if row["arms"]:
            head = ["trained on the zero-hit prompts", "bases", "hard @1", "by base model", "hard @32"]
            text.append(tables.table(head, [
                [arm, len(v[1]), tables.percent(v[1]), " ".join(f"{100 * tables.mean(x):.1f}" for x in v[1]),
                 tables.percent(v[32])] for arm, v in row["arms"].items()]))
    return "\n".join(text)


def figure(found: dict[str, list[dict]], out: Path) -> None:
    """Soundly recovered at equal tokens, and pass@1 after training, against the measured hit rate."""
    plt = style.load()
    fig, axes = plt.subplots(len(found), 2, figsize=(9.6, 3.0 * len(found)), sharex="row", squeeze=False)
    for (title, rows), (left, right) in zip(found.items(), axes):
        x = [100 * max(r["hits"], 0.5) / r["samples"] for r in rows]
        for (name, label), colour, line in zip(SHOWN.items(), style.COLOURS, style.LINES):
            at = [r["methods"][name] for r in rows]
            left.plot(x, [100 * m["equal"][1] / m["n"] for m in at], "o", linestyle=line, color=colour, label=label)
            band = [[100 * b for b in wilson_interval(m["equal"][1], m["n"])] for m in at]
            left.fill_between(x, *zip(*band), color=colour, alpha=0.12, linewidth=0)
        for (arm, label), colour, line in zip(SHOWN_ARMS.items(), style.COLOURS, style.LINES):
            on = [(a, [100 * tables.mean(v) for v in r["arms"][arm][1]]) for a, r in zip(x, rows) if arm in r["arms"]]
            right.plot([a for a, _ in on], [tables.mean(v) for _, v in on], "o", linestyle=line, color=colour,
                       label=label)
            right.vlines([a for a, _ in on], [min(v) for _, v in on], [max(v) for _, v in on], color=colour)
        left.set(title=f"{plot.TITLES[title]}:\nrecovered with right reasoning, %", ylim=(0, None))
        right.set(title="after training on these prompts,\npass@1 on others, %", ylim=(0, None))
        trained = any(r["arms"] for r in rows)
        right.set_visible(trained)
        for axis in (left, right) if trained else (left,):
            axis.set(xscale="log", xlabel="right samples before training, %")
            ticks = sorted({float(f"{share:.1g}") for share in x})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    style.save(fig, out / "frontier")


# --- the script ------------------------------------------------------------------------------------------------------
def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m experiments.frontier")
    parser.add_argument("--worlds", nargs="+", default=["toy"], choices=list(RATES), help="toy worlds")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.003, 0.0003], help="of self-correction, unasked")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="base models of evidence.py")
    parser.add_argument("--train", nargs="*", metavar="ARM", choices=list(TRAINING), help="not recovery alone")
    parser.add_argument("--all", action="store_true", help="everything: both worlds, RATES, seeds 0 1 2, training")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs")
    parser.add_argument("--tables", action="store_true", help="run no stage: count and draw what is complete")
    parser.add_argument("--out", default="out/evidence/frontier", help="output folder")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    begun, size, found = time.time(), QUICK if args.quick else FULL, {}
    for name in RATES if args.all else args.worlds:
        world, out = evidence.WORLDS[name], Path(args.out) / name
        rates, seeds = (RATES[name], [0, 1, 2]) if args.all else (args.rates, args.seeds)
        if args.tables:
            bases = {out / f"rate{rate:g}-seed{seed}": (rate, seed) for rate in rates for seed in seeds}
            bases = {b: of for b, of in bases.items() if (b / "revise/perturbed-prompt/summary.json").exists()}
        else:
            starts = evidence.base_models(world, Path(args.out).parent / name, seeds)
            bases = adapt(world, out, starts, rates, size)
            trained = args.train is not None or args.all
            recover(world, out, bases, size, RECOVERY | LEARNED if trained else RECOVERY)
            if trained:
                train(world, out, bases, size, args.train or list(TRAINING))
        found[name] = measure(world, bases)
    text = "\n".join(as_text(name, rows) for name, rows in found.items())
    common.write_atomic(Path(args.out) / "frontier.md", text)
    figure(found, Path(args.out))
    print(f"{text}\n[{time.time() - begun:.0f} s] {args.out}/frontier.md")


if __name__ == "__main__":
    common.run_script(get_args, main)
