"""The figures of RESULTS.md, from the JSONL files of evidence.py, which calls it. Readable without colour.

    python -m experiments.plot      docs/headline.svg and .png alone, from docs/tables.md and docs/runs/

Needs matplotlib (requirements-dev.txt). Again from what is there: python -m experiments.evidence --tables
"""
import importlib.util
import json
import re
from pathlib import Path

from eval import wilson_interval
from experiments import tables
from helpers import common
from toy import sums as toy

WIDTH = 4.6  # inches, of one panel
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito: told apart by everybody
HEADLINE = {"LatentRevise": "LatentRevise", "random vertices": "noise of the same size",
            "hard prefix": "the unmoved prefix", "fresh sampling": "fresh samples, as many",
            "answer hint": "answer hint, as many"}
RUNS = "runs/qwen2.5-coder-0.5b-gsm8k"
ARMS = {"GRPO N=8": "-", "GRPO N=16": "--", "DAPO": ":", "GRPO+LatentRevise": "-.",
        "GRPO+LatentRevise, likely only": (0, (1, 4))}
VARIANTS = ("LatentRevise", "permuted gold", "random vertices", "hard prefix", "fresh sampling",
            "fresh sampling, equal compute", tables.ADAM, "no L_guide", "no L_explore", "no L_NLL", "rho 0.5",
            "rho 0.2", "K 5", "K 20", "gamma0 0.3", "likely only")


def load(out: Path):
    """matplotlib's pyplot, drawing into files alone. Raises UserError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise common.UserError("figures need matplotlib: pip install -r requirements-dev.txt")
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latentrevise"  # the same file every time
    import matplotlib.pyplot as plt
    out.mkdir(parents=True, exist_ok=True)
    return plt


def steps(plt, worlds: dict, out: Path) -> None:
    """Figure 3: recovery and continuation length against Frank-Wolfe steps, all base models of a world together."""
    fig, axes = plt.subplots(1, len(worlds), figsize=(WIDTH * len(worlds), 3.2), layout="constrained", squeeze=False)
    for axis, (name, (world, tokenizer, records)) in zip(axes[0], worlds.items()):
        rows = tables.by_step(world, tokenizer, records, "K 20")
        at = [r["step"] for r in rows]
        for key, style, shade in (("recovered", "ko-", "0.85"), ("sound", "ks--", "0.7")):
            axis.fill_between(at, *zip(*(wilson_interval(r[key], r["n"]) for r in rows)), color=shade, linewidth=0)
            axis.plot(at, [r[key] / r["n"] for r in rows], style, markersize=4, label=key)
        axis.set(xlabel="Frank-Wolfe step", ylabel="share of zero-hit prompts", title=f"{name}.py", ylim=(0, None))
        length = axis.twinx()
        length.plot(at, [r["length"] for r in rows], "k^:", markersize=4, label="continuation")
        length.set_ylabel("mean continuation (tokens)")
        legends = axis.get_legend_handles_labels(), length.get_legend_handles_labels()
        axis.legend(*[a + b for a, b in zip(*legends)], fontsize=8)
    fig.savefig(out / "evidence-steps.png", dpi=120)


def variants(plt, worlds: dict, out: Path) -> None:
    """Recovered and soundly recovered of every ablation and control, with intervals."""
    fig, axes = plt.subplots(1, len(worlds), figsize=(WIDTH * len(worlds), 4.6), layout="constrained", squeeze=False,
                             sharey=True)
    for axis, (name, (world, _, records)) in zip(axes[0], worlds.items()):
        names = [v for v in VARIANTS if all((b.base / "revise" / tables.slug(v)).exists() for b in records)]
        for y, variant in enumerate(reversed(names)):
            found = [r for b in records for r in b.variant(variant)]
            right, sound = (sum(n > 0 for n in of) for of in zip(*tables.right_and_sound(world, found)))
            for label, k, style, fill, shift in (("recovered", right, "ko", "k", 0.15),
                                                 ("soundly recovered", sound, "ks", "w", -0.15)):
                low, high = wilson_interval(k, len(found))
                axis.plot([100 * low, 100 * high], [y + shift] * 2, "k-", linewidth=0.8)
                axis.plot(100 * k / len(found), y + shift, style, markersize=4, markerfacecolor=fill,
                          label=None if y else label)
        axis.set(xlabel="percent of zero-hit prompts, 95 % interval", title=f"{name}.py", xlim=(0, None))
        axis.set_yticks(range(len(names)), reversed(names), fontsize=8)
        axis.grid(axis="y", linewidth=0.3)
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    fig.savefig(out / "evidence-variants.png", dpi=120)


def curves(plt, bases: dict[str, list[Path]], out: Path) -> None:
    """Learning curves: reward of the policy's own samples, and rescued groups. Mean over base models; grey: each."""
    sets = {f"{name}.py, {folder} set": [base / "train" / folder for base in of] for name, of in bases.items()
            for folder in tables.SETS if any((base / "train" / folder).exists() for base in of)}
    fig, axes = plt.subplots(2, len(sets), figsize=(WIDTH * len(sets), 5), layout="constrained", squeeze=False,
                             sharex="col")
    for column, (title, folders) in zip(axes.T, sets.items()):
        for arm, style in ARMS.items():
            files = [f / tables.slug(arm) / "metrics.jsonl" for f in folders]
            logs = [common.read_jsonl(f) for f in files if f.exists()]
            for axis, key in zip(column, ("reward", "rescued") if logs else ()):
                lines = [[r[key] for r in log] for log in logs]
                steps = range(1, len(lines[0]) + 1)
                for line in lines if key == "reward" else ():
                    axis.plot(steps, line, color="0.6", linestyle=style, linewidth=0.5)
                axis.plot(steps, [sum(x) / len(x) for x in zip(*lines)], color="k", linestyle=style, linewidth=1.4,
                          label=arm)
        column[0].set(title=title, ylabel="reward of samples")
        column[1].set(xlabel="training step", ylabel="groups rescued")
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    fig.savefig(out / "evidence-training.png", dpi=120)


def everything(worlds: dict, bases: dict, out: Path) -> None:
    """worlds: {name: module}; bases: {name: base folders}, complete ones."""
    plt = load(out)
    records = {name: (worlds[name], toy.build_tokenizer(worlds[name]), [tables.Records(base) for base in of])
               for name, of in bases.items()}
    steps(plt, records, out)
    variants(plt, records, out)
    curves(plt, {name: list(of) for name, of in bases.items()}, out)


def headline(plt, docs: Path) -> None:
    """Recovered and soundly recovered by the method and its controls, both worlds and the real model."""
    text, panels = (docs / "tables.md").read_text(), {}
    for world, title in (("toy", "toy world, sums"), ("toy_words", "toy world, word problems")):
        section = text.split(f"## {world}: ")[1].split("\n## ")[0].split("### Ablations")[0]
        rows = [re.findall(r"\((\d+)/(\d+)\)", line)[:2] for line in section.splitlines()]
        names = [line.split("|")[1].strip() if "|" in line else "" for line in section.splitlines()]
        panels[title] = {n: [int(k) for k, _ in r] + [int(r[0][1])] for n, r in zip(names, rows) if len(r) == 2}
    real = json.loads((docs / RUNS / "recovery.json").read_text())
    panels["Qwen2.5-Coder-0.5B, GSM8K"] = {n: [a["recovered"], a["sound"], a["prompts"]] for n, a in real.items()}
    fig, axes = plt.subplots(1, len(panels), figsize=(9.6, 2.9), layout="constrained", sharey=True)
    names = list(reversed(HEADLINE))
    for axis, (title, found) in zip(axes, panels.items()):
        for y, name in enumerate(names):
            for label, index, color, marker, shift in (("right answer", 0, ORANGE, "o", 0.16),
                                                       ("right reasoning too", 1, BLUE, "s", -0.16)):
                if name in found:
                    k, n = found[name][index], found[name][2]
                    low, high = wilson_interval(k, n)
                    axis.plot([100 * low, 100 * high], [y + shift] * 2, color=color, linewidth=2, alpha=0.45)
                    axis.plot(100 * k / n, y + shift, marker, color=color, markersize=6, label=label)
        axis.set_title(f"{title}\n{max(n for *_, n in found.values())} prompts", fontsize=10)
        axis.set_xlim(0, None)
        axis.set_yticks(range(len(names)), [HEADLINE[n] for n in names])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", linewidth=0.4)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    fig.supxlabel("percent of zero-hit prompts, 8 continuations or samples each, 95 % interval", fontsize=10)
    handles = dict(zip(*reversed(axes[-1].get_legend_handles_labels())))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=2, frameon=False)
    for kind in ("svg", "png"):
        fig.savefig(docs / f"headline.{kind}", dpi=160, metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    common.Parser(__doc__, prog="python -m experiments.plot").parse_args()
    folder = Path(__file__).resolve().parent.parent / "docs"
    headline(load(folder), folder)
