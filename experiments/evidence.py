"""What the method does, measured with the controls that the paper lacks: makes the tables and figures of RESULTS.md.

    python -m experiments.evidence     recovery and training, from three base models of the first world and one of the
                                       second, with fewer training arms there; it continues where it was stopped
    --worlds toy     one world (toy, toy_words); --seeds 0 1 2: base models of every world
    --all            also three base models of the second world, other losses, and in the first world longer and shaped
                     training, and training with other draws
    --tables         runs no stage, counts and draws what is complete
    --write          and puts the tables below "## Tables" of docs/tables.md, the figures beside it
    --quick          a small run of the same code, not for reading

Base models: of seed 0 those that ship with the repository; others are trained first. Problems and every draw are of the
base model's seed. The stage scripts make all numbers; tables.py counts, plot.py draws, and this file says what is run.
"""
import argparse
import shutil
import time
from pathlib import Path

from experiments import demo, plot, tables
from experiments.demo import LENGTH, PROBLEMS
from helpers import common
from helpers.common import UserError
from toy import sums as toy
from toy import words as toy_words

WORLDS = {"toy": toy, "toy_words": toy_words}
# hard: problems; test: held-out problems of a set; attempts: failed rollouts revised per prompt, for the training data
FULL = {"hard": 180, "test": 60, "attempts": 3, "steps": 16, "long": 40, "batch": 16, "continuations": 8}
QUICK = {"hard": 16, "test": 3, "attempts": 1, "steps": 2, "long": 3, "batch": 2, "continuations": 2}

LIKELY = "--min-logprob -0.5"
REVISE = "--revise --template '{template}' --revise-tokens 4096"
HINT = "{template}{{answer}}}}. Check your work."  # in the world's words, which its base models understand
LR = "3e-4"  # of every training run: the toy models are small

# name -> flags of revise.py, or another script. The first is the paper's method at its defaults; {equal}: as many tries
# as its tokens pay for
RECOVERY = {
    "Controls": {
        "LatentRevise": "--attempts {attempts}",  # the tables take the first; training takes all
        "fresh sampling": "rollout.py -n {continuations}",
        "fresh sampling, equal compute": "rollout.py -n {equal}",
        "hard prefix": "--revision-steps 0",
        "random vertices": "--vertices random",
        "permuted gold": "--gold permuted",
        "answer hint": "-m baselines.hint -n {continuations} --hint '{hint}'"},
    "Longer steps without the gold answer": {
        "no L_guide, gamma0 0.3": "--alpha-guide 0 --gamma0 0.3",
        "random vertices, gamma0 0.3": "--vertices random --gamma0 0.3",
        "random vertices, gamma0 0.3, equal compute": "--vertices random --gamma0 0.3 --continuations {equal}"},
    "Ablations of Table 3": {
        "no Frank-Wolfe (Adam, lr 0.01)": "--adam 0.01 --record-every 1",
        "no L_guide": "--alpha-guide 0",
        "no L_explore": "--explore-weight 0",
        "no L_NLL": "--beta-nll 0",
        "rho 0.5": "--rho 0.5",
        "rho 0.2": "--rho 0.2",
        "K 5": "--revision-steps 5",
        "K 20": "--revision-steps 20 --record-every 2"},
    "Choices of ours": {
        "gamma0 0.3": "--gamma0 0.3",
        "likely only": LIKELY + " --attempts {attempts}"},
    "Other choices (--all)": {
        "losses as means": "--reduction mean",
        "no special tokens as vertices": "--vertex-rows text"}}

# arm -> flags of train_grpo.py, another script, or the file that train_sft.py learns from. Table 1 and more;
# {template}: the world's
HARD = {
    "RFT": "rft-samples/rollouts.jsonl",
    "GRPO N=8": "",
    "GRPO N=16": "--group-size 16",
    "DAPO": "--algo dapo",
    "OPSD": f"-m baselines.train_opsd --group-size 8 --hint '{HINT}'",
    "SFT+LatentRevise": "revise/latentrevise/recovered.jsonl",
    "SFT+LatentRevise, sound only": "recovered-sound.jsonl",
    "SFT+LatentRevise, likely only": "revise/likely-only/recovered.jsonl",
    "GRPO+LatentRevise": REVISE,
    "GRPO+LatentRevise, likely only": f"{REVISE} {LIKELY}",
    "GRPO+noise, gamma0 0.3": f"{REVISE} --vertices random --gamma0 0.3",
    "GRPO+hint": f"-m baselines.train_hint --hint '{HINT}'",
    "GRPO+LatentRevise, LUFFY": f"{REVISE} --injected-ratio luffy",
    "GRPO+LatentRevise, likely only, LUFFY": f"{REVISE} --injected-ratio luffy {LIKELY}"}
TABLE_2 = ("GRPO N=8", "GRPO N=16", "DAPO", "GRPO+LatentRevise", "GRPO+LatentRevise, likely only")  # on the full set
SHAPED = ("GRPO+LatentRevise, LUFFY", "GRPO+LatentRevise, likely only, LUFFY")  # --all
LONG = ("GRPO N=8", "GRPO+LatentRevise", "GRPO+LatentRevise, likely only")  # --all: more steps
AGAIN = {"again-1": 1000, "again-2": 2000}  # --all: added to the seed of training, which draws prompts and responses
AGAIN_ARMS = ("GRPO N=16", *LONG, "GRPO+hint")
SECOND = [arm for arm in HARD if arm not in ("GRPO N=16", "DAPO", "OPSD", *SHAPED)]  # of the second world


# bases below: {base folder: (seed, model)} of one world. The commands of all wait in one queue for two cores


def base_models(world, out: Path, seeds: list[int], make: bool = True) -> dict[int, str]:
    """{seed: model}: that of seed 0 ships with the repository, others are trained where they are not there yet."""
    models = {s: f"{out}/model{s}" if s else world.__name__.replace(".", "/") + "_model" for s in seeds}
    if make:
        demo.run(out, *[f"-m {world.__name__} train --out {path} --seed {s} --prompts 50 -n 8"
                        for s, path in models.items() if s and not (demo.ROOT / path / "run.json").exists()])
    return models


def prepare(world, out: Path, bases: dict, size: dict) -> None:
    """The problems of every base model, and its rollouts on the hard ones."""
    demo.run(out, *[f"-m {world.__name__} data --out {base}/data --seed {seed}" for base, (seed, _) in bases.items()])
    for base, (seed, model) in bases.items():
        demo.run(out, f"rollout.py --model {model} --data {base}/data/hard.jsonl --limit {size['hard']} -n 32 "
                      f"--seed {seed} {PROBLEMS} --out {base}/rollouts", processes=2)


def recovery_command(world, base: Path, name: str, flags: str, model: str, seed: int) -> str:
    """One way to recover the zero-hit prompts of a base model, into BASE/revise."""
    if flags.startswith("--"):
        flags = (f"revise.py --rollouts {base}/rollouts {LENGTH} --revise-tokens 4096 --attempts 1 "
                 f"--template '{world.TEMPLATE}' {flags}")
    else:
        flags += f" --data {base}/rollouts/zero_hit.jsonl {PROBLEMS}"
    return f"{flags} --model {model} --seed {seed} --out {base}/revise/{tables.slug(name)}"


def recover(world, out: Path, bases: dict, size: dict, everything: bool) -> None:
    """The variants of RECOVERY on the zero-hit prompts of every base model."""
    groups = [of for group, of in RECOVERY.items() if everything or "--all" not in group]
    variants = {name: flags for of in groups for name, flags in of.items()}

    def equal(base: Path, name: str) -> int:
        """Tries that the tokens of the method pay for, by the length of those of the same variant."""
        records = tables.Records(base)
        ours, few = (records.variant(n) for n in ("LatentRevise", name.removesuffix(", equal compute")))
        # denominators: failed rollouts; tokens of a try
        return round(tables.mean([*map(tables.cost, ours)]) / tables.mean(
            [len(c["ids"]) for r in few for c in r["continuations"]]))

    def command(base: Path, name: str, flags: str) -> str:
        (seed, model), revised = bases[base], flags.startswith("--")
        flags = "--continuations {continuations} " * revised + flags
        flags = flags.format(**size, hint=HINT.format(template=world.TEMPLATE),
                             equal=equal(base, name) if "{equal}" in flags else 0)
        # another seed for what samples from the problem, or it would draw its rollouts again
        return recovery_command(world, base, name, flags, model, seed if revised else seed + 2000)

    for later in (False, True):
        demo.run(out, *[command(base, name, flags) for base in bases for name, flags in variants.items()
                        if later == ("{equal}" in flags)])


def grpo_command(flags: str, shared: str) -> str:
    """flags: of train_grpo.py, or a fork of it and its flags."""
    return f"{flags if flags.startswith('-m') else f'train_grpo.py {flags}'} {PROBLEMS} --samples 1 0 {shared}"


def train(world, out: Path, bases: dict, size: dict, everything: bool) -> None:
    """Every training arm from every base model, into BASE/train/SET, and pass@k of all on held-out problems."""
    fresh = size["continuations"] * size["attempts"]  # as many for rejection sampling as for revision
    for base, (seed, model) in bases.items():
        problems = {p["id"]: p["problem"] for p in common.read_jsonl(base / "data" / "hard.jsonl")}
        sound = [r for r in common.read_jsonl(base / "revise" / "latentrevise" / "recovered.jsonl")
                 if world.is_sound(problems[r["id"]], r["response"])]
        common.write_atomic(base / "recovered-sound.jsonl", "".join(map(common.to_line, sound)))
        demo.run(out, f"rollout.py --model {model} --data {base}/rollouts/zero_hit.jsonl -n {fresh} "
                      f"--seed {seed + 1000} {PROBLEMS} --out {base}/rft-samples", processes=2)

    def command(base: Path, arm: str, folder: str, steps: int) -> str:
        """'' where there is nothing to learn from."""
        seed, model = bases[base]
        shared = (f"--model {model} --steps {steps} --lr {LR} --train-tokens 8192 "
                  f"--seed {seed + AGAIN.get(folder, 0)}")
        flags, run = HARD[arm].format(template=world.TEMPLATE), f"--out {base}/train/{folder}/{tables.slug(arm)}"
        if not flags.endswith(".jsonl"):
            data = "data/train.jsonl" if folder == "full" else "rollouts/zero_hit.jsonl"
            return grpo_command(flags, f"{shared} --batch-size {size['batch']} --data {base}/{data} {run}")
        if not any(r["reward"] for r in common.read_jsonl(base / flags)):
            return ""
        return f"train_sft.py {shared} --batch-size 64 --data {base}/{flags} {run}"

    first = world is toy
    sets = {"hard": ([arm for arm in HARD if everything or arm not in SHAPED] if first else SECOND, size["steps"]),
            "full": (TABLE_2 if first else (), size["steps"]),
            "long": (LONG if first and everything else (), size["long"]),
            **{folder: (AGAIN_ARMS if first and everything else (), size["steps"]) for folder in AGAIN}}
    runs = {(base, folder): {arm: command(base, arm, folder, steps) for arm in arms}
            for base in bases for folder, (arms, steps) in sets.items() if arms}
    demo.run(out, *[c for arms in runs.values() for c in arms.values() if c])
    for (base, folder), arms in runs.items():
        models = [f"{base}/train/{folder}/{tables.slug(arm)}/model" for arm, c in arms.items() if c]
        models = " ".join([bases[base][1], *models] if folder == "hard" else models)
        demo.run(out, f"eval.py --model {models} --data {base}/data/test_hard.jsonl {base}/data/test_easy.jsonl "
                      f"--limit {size['test']} -n 32 --k 1 32 --seed {bases[base][0]} {PROBLEMS} "
                      f"--out {base}/eval/{folder}", processes=2)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one base model, 16 prompts: to see that it runs")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS), help="toy worlds")
    parser.add_argument("--seeds", nargs="+", type=int, help="base models of each world, if not those above")
    parser.add_argument("--out", help="output folder; out/evidence or out/evidence-quick if not given")
    parser.add_argument("--all", action="store_true", help="more of everything: about 75 minutes more")
    parser.add_argument("--tables", action="store_true", help="run no stage: count and draw what is complete")
    parser.add_argument("--write", action="store_true", help="also into docs/")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    begun, results = time.time(), demo.ROOT / "docs" / "tables.md"
    if args.quick and args.write:
        raise UserError("--write: docs/tables.md is not for the figures of --quick")
    head = tables.head_of(results) if args.write else ""
    root = Path(args.out or ("out/evidence-quick" if args.quick else "out/evidence"))
    size, bases = QUICK if args.quick else FULL, {}
    for name in args.worlds:
        world, out = WORLDS[name], root / name
        seeds = args.seeds or ([0, 1, 2] if not args.quick and (world is toy or args.all) else [0])
        models = base_models(world, out, seeds, make=not args.tables)
        if not args.tables:
            of = {out / f"base{seed}": (seed, model) for seed, model in models.items()}
            prepare(world, out, of, size)
            recover(world, out, of, size, args.all)
            train(world, out, of, size, args.all)
        found = {out / f"base{seed}": model for seed, model in models.items()}
        bases[name] = {base: model for base, model in found.items() if (base / "eval/hard/results.json").exists()}
        for base in found.keys() - bases[name].keys():
            print(f"left out, not complete: {base}")
    bases = {name: found for name, found in bases.items() if found}
    if not bases:
        raise UserError(f"--tables: nothing in {root} is complete")
    arms = {"hard": list(HARD), "full": TABLE_2, "long": LONG, **dict.fromkeys(AGAIN, AGAIN_ARMS)}
    text = tables.everything(WORLDS, bases, RECOVERY, arms)
    common.write_atomic(root / "tables.md", text)
    plot.everything(WORLDS, bases, root)
    if args.write:
        for figure in [*root.glob("evidence-*.png"), *root.glob("evidence-*.svg")]:
            shutil.copy(figure, demo.ROOT / "docs")
        common.write_atomic(results, f"{head}\n{text}")
    print(f"{text}\n[{time.time() - begun:.0f} s] {root}/tables.md")


if __name__ == "__main__":
    common.run_script(get_args, main)
