"""The figures of RESULTS.md, from the JSONL files of evidence.py, which calls it. Readable without colour.

    python -m experiments.plot      docs/headline.svg and .png alone, from docs/tables.md and docs/runs/

Needs matplotlib (requirements-dev.txt). Again from what is there: python -m experiments.evidence --tables
"""
import json
import re
from pathlib import Path

from experiments import style, tables
from experiments.demo import wilson_interval
from experiments.style import BLUE, ORANGE
from helpers import common
from toy import sums as toy

WIDTH = 4.6  # inches, of one panel
HEADLINE = {"LatentRevise": "LatentRevise", "permuted gold": "steered to a wrong answer",
            "random vertices": "noise of the same size", "hard prefix": "the unmoved prefix",
            "fresh sampling": "fresh samples, as many", "answer hint": "answer hint, as many"}
RUNS = "runs/qwen2.5-coder-0.5b-gsm8k"
TITLES = {"toy": "toy world, sums", "toy_words": "toy world, word problems"}
ARMS = ("GRPO N=8", "GRPO N=16", "DAPO", "GRPO+LatentRevise", "GRPO+LatentRevise, likely only")
VARIANTS = ("LatentRevise", "permuted gold", "random vertices", "hard prefix", "fresh sampling",
            "fresh sampling, equal compute", tables.ADAM, "no L_guide", "no L_explore", "no L_NLL", "rho 0.5",
            "rho 0.2", "K 5", "K 20", "gamma0 0.3", "likely only")


def steps(plt, worlds: dict, out: Path) -> None:
    """Figure 3: recovery and continuation length against Frank-Wolfe steps, all base models of a world together."""
    fig, axes = plt.subplots(1, 2 * len(worlds), figsize=(WIDTH * len(worlds), 2.9), squeeze=False)
    for k, (name, (world, tokenizer, records)) in enumerate(worlds.items()):
        share, length = axes[0][2 * k:2 * k + 2]
        rows = tables.by_step(world, tokenizer, records, "K 20")
        at = [r["step"] for r in rows]
        for key, label, colour, mark in (("recovered", "right answer", ORANGE, "o-"),
                                         ("sound", "right reasoning too", BLUE, "s--")):
            low, high = zip(*(wilson_interval(r[key], r["n"]) for r in rows))
            band = [100 * x for x in low], [100 * x for x in high]
            share.fill_between(at, *band, color=colour, alpha=0.2, linewidth=0)
            share.plot(at, [100 * r[key] / r["n"] for r in rows], mark, color=colour, markersize=4, label=label)
        share.set(xlabel="Frank-Wolfe steps", title=f"{TITLES[name]}\n% of zero-hit prompts", ylim=(0, None))
        share.legend(fontsize=8)
        length.plot(at, [r["length"] for r in rows], "o-", color=style.GREY, markersize=4)
        length.set(xlabel="Frank-Wolfe steps", title="continuation,\nmean tokens", ylim=(0, None))
    style.save(fig, out / "evidence-steps")


def variants(plt, worlds: dict, out: Path) -> None:
    """Recovered and soundly recovered of every ablation and control, with intervals."""
    fig, axes = plt.subplots(1, len(worlds), figsize=(WIDTH * len(worlds), 4.6), squeeze=False,
                             sharey=True)
    for axis, (name, (world, _, records)) in zip(axes[0], worlds.items()):
        names = [v for v in VARIANTS if all((b.base / "revise" / tables.slug(v)).exists() for b in records)]
        for y, variant in enumerate(reversed(names)):
            found = [r for b in records for r in b.variant(variant)]
            right, sound = (sum(n > 0 for n in of) for of in zip(*tables.right_and_sound(world, found)))
            for label, k, colour, mark, shift in (("right answer", right, ORANGE, "o", 0.18),
                                                  ("right reasoning too", sound, BLUE, "s", -0.18)):
                low, high = wilson_interval(k, len(found))
                axis.plot([100 * low, 100 * high], [y + shift] * 2, color=colour, linewidth=2, alpha=0.45)
                axis.plot(100 * k / len(found), y + shift, mark, color=colour, markersize=4,
                          label=None if y else label)
        axis.set(xlabel="percent of zero-hit prompts, 95 % interval", title=TITLES[name], xlim=(0, None))
        axis.set_yticks(range(len(names)), reversed(names), fontsize=8)
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    style.save(fig, out / "evidence-variants")


def training(plt, bases: dict[str, list[Path]], out: Path) -> None:
    """Learning curves: reward of the policy's own samples, and rescued groups. Mean over base models; thin: each."""
    sets = {f"{TITLES[name]}, {folder} set": [base / "train" / folder for base in of] for name, of in bases.items()
            for folder in tables.SETS if any((base / "train" / folder).exists() for base in of)}
    fig, axes = plt.subplots(2, len(sets), figsize=(WIDTH * len(sets), 5), squeeze=False,
                             sharex="col")
    for column, (title, folders) in zip(axes.T, sets.items()):
        for arm, colour, line in zip(ARMS, style.COLOURS, style.LINES):
            files = [f / tables.slug(arm) / "metrics.jsonl" for f in folders]
            logs = [common.read_jsonl(f) for f in files if f.exists()]
            for axis, key in zip(column, ("reward", "rescued") if logs else ()):
                curves = [[100 * r[key] for r in log] for log in logs]
                steps = range(1, len(curves[0]) + 1)
                for one in curves if key == "reward" else ():
                    axis.plot(steps, one, color=colour, linestyle=line, linewidth=0.5)
                axis.plot(steps, [sum(x) / len(x) for x in zip(*curves)], color=colour, linestyle=line, label=arm)
        column[0].set(title=title, ylabel="pass rate of samples, %")
        column[1].set(xlabel="training step", ylabel="groups rescued, %")
    fig.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    style.save(fig, out / "evidence-training")


def everything(worlds: dict, bases: dict, out: Path) -> None:
    """worlds: {name: module}; bases: {name: base folders}, complete ones."""
    plt = style.load()
    records = {name: (worlds[name], toy.build_tokenizer(worlds[name]), [tables.Records(base) for base in of])
               for name, of in bases.items()}
    steps(plt, records, out)
    variants(plt, records, out)
    training(plt, {name: list(of) for name, of in bases.items()}, out)


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
    fig, axes = plt.subplots(1, len(panels), figsize=(9.6, 3.2), sharey=True)
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
        axis.grid(axis="y", visible=False)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    fig.supxlabel("percent of zero-hit prompts, 8 continuations or samples each, 95 % interval", fontsize=10)
    handles = dict(zip(*reversed(axes[-1].get_legend_handles_labels())))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=2, frameon=False)
    style.save(fig, docs / "headline")


if __name__ == "__main__":
    common.Parser(__doc__, prog="python -m experiments.plot").parse_args()
    folder = Path(__file__).resolve().parent.parent / "docs"
    headline(style.load(), folder)
