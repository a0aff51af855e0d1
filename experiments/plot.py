"""The figures of RESULTS.md, from the JSONL files of evidence.py, which calls it. Readable without colour.

    python -m experiments.plot      docs/headline, from docs/tables.md and docs/runs/, and docs/method, SVG and PNG

Needs matplotlib (requirements-dev.txt). Again from what is there: python -m experiments.evidence --tables
"""
import json
import random
import re
from pathlib import Path

from experiments import style, tables
from experiments.demo import wilson_interval
from experiments.style import BLUE, GREEN, GREY, INK, ORANGE
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
            "rho 0.2", "K 5", "K 20", "gamma0 0.3", "no L_guide, gamma0 0.3", "random vertices, gamma0 0.3",
            "random vertices, gamma0 0.3, equal compute", "answer hint", "likely only")


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
            for folder in ("hard", "full", "long") if any((base / "train" / folder).exists() for base in of)}
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
    for world, title in TITLES.items():
        section = text.split(f"## {world}: ")[1].split("\n## ")[0].split("### Ablations")[0]
        rows = [re.findall(r"\((\d+)/(\d+)\)", line)[:2] for line in section.splitlines()]
        names = [line.split("|")[1].strip() if "|" in line else "" for line in section.splitlines()]
        panels[title] = {n: [int(k) for k, _ in r] + [int(r[0][1])] for n, r in zip(names, rows) if len(r) == 2}
    real = json.loads((docs / RUNS / "recovery.json").read_text())
    panels["Qwen2.5-Coder-0.5B, GSM8K"] = {n: [a["recovered"], a["sound"], a["prompts"]] for n, a in real.items()}
    fig, axes = plt.subplots(1, len(panels), figsize=(9.6, 3.2), sharey=True)
    names = list(reversed(HEADLINE))
    for axis, (title, found) in zip(axes, panels.items()):
        most, end = max(n for *_, n in found.values()), 25 if title in TITLES.values() else 90  # one for the two worlds
        note = lambda y, text, axis=axis: axis.text(0.99, y, text, color=GREY, fontsize=9, va="center", ha="right",
                                                    transform=axis.get_yaxis_transform())
        for y, name in enumerate(names):
            *counts, n = found.get(name, (0, 0, 0))
            if n and 100 * max(counts) / n > end:
                note(y, "{:.0f} and {:.0f} % \u2192".format(*(100 * k / n for k in counts)))
                continue
            if n < most:
                note(y, f"{n} prompts" if n else "not run")
            for k, label, color, marker, shift in zip(counts if n else (), ("right answer", "right reasoning too"),
                                                      (ORANGE, BLUE), "os", (0.16, -0.16)):
                low, high = wilson_interval(k, n)
                axis.plot([100 * low, 100 * high], [y + shift] * 2, color=color, linewidth=2, alpha=0.45)
                axis.plot(100 * k / n, y + shift, marker, color=color, markersize=6, label=label, clip_on=False,
                          zorder=3)
        axis.set_title(f"{title}\n{most} prompts", fontsize=10)
        axis.set_xlim(0, end)
        axis.set_yticks(range(len(names)), [HEADLINE[n] for n in names])
        axis.grid(axis="y", visible=False)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    fig.supxlabel("percent of zero-hit prompts, 8 continuations or samples each, 95 % interval", fontsize=10)
    handles = dict(zip(*reversed(axes[-1].get_legend_handles_labels())))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=2, frameon=False)
    style.save(fig, docs / "headline")


# --- the picture of the method, in inches -----------------------------------------------------------------------------
# A run of toy/sums_model; docs/toy.md has its commands: 46+5+3+7 is 61, and none of 32 samples is right
PROBLEM, PREFIX, FAILED = "46+5+3+7?", "46+5=51;51+3=54;54+7=51. So the", r"answer is \boxed{51}."
FOLLOWED, VERTICES = 12, ["61"] * 2 + ["5"] * 8  # the position, a 54, at the right of the picture, and its vertices
HIGH = 0.26  # of a box of tokens
Q, R, C, RIGHT = 0.10, 1.14, 3.76, 6.46  # where the boxes of q, r and c begin, and where the longest ends
GAP = 0.08  # between two boxes
TOKEN, GOLD, OTHER = (7.38, 1.27), (8.2, 2.86), (9.2, 1.62)  # embeddings of 54, of 61 and of 5
HULL = [(6.92, 1.75), (7.1, 1.1), (8.3, 0.95), OTHER, (9.02, 2.4), GOLD, (7.2, 2.6)]
INSIDE = [TOKEN, (7.2, 2.25), (7.62, 2.5), (7.5, 2.0), (8.8, 2.05), (8.6, 2.42), (8.3, 2.1)]


def box(axis, x: float, y: float, end: float, colour: str, letter: str, text: str = "", seed: int = 0) -> None:
    """Tokens from x to end, at height y, with the paper's letter for them; without a text, their embeddings."""
    from matplotlib import patches
    axis.add_patch(patches.FancyBboxPatch((x, y - HIGH / 2), end - x, HIGH, edgecolor=colour, facecolor=colour + "1a",
                                          boxstyle="round,pad=0,rounding_size=0.04", linewidth=1))
    axis.text(x + 0.08, y, letter, color=colour, fontsize=11, va="center")
    axis.text(x + 0.29, y - 0.01, text, color=INK, fontsize=8, va="center", family="monospace")
    shades = random.Random(seed)
    for k in range(0 if text else 20):  # a column of numbers for each token
        for level in range(3):
            axis.add_patch(patches.Rectangle(
                (x + 0.42 + 0.105 * k, y - 0.1 + 0.07 * level), 0.085, 0.06, linewidth=0,
                facecolor=colour + f"{shades.randrange(30, 230):02x}"))
    if not text:  # the one that the right of the picture follows
        axis.add_patch(patches.Rectangle((x + 0.405 + 0.105 * FOLLOWED, y - 0.115), 0.115, 0.23, linewidth=1.1,
                                         edgecolor=INK, facecolor="none"))


def arrow(axis, start: tuple, end: tuple, colour: str, line: str = "-", bend: float = 0) -> None:
    axis.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>,head_length=0.35,head_width=0.17", "color": colour, "linewidth": 1.2, "linestyle": line,
        "shrinkA": 3, "shrinkB": 3, "connectionstyle": f"arc3,rad={bend}"})


def strips(axis) -> None:
    """The left of the picture: what happens to the tokens of one failed response."""
    def row(y: float, number: int, title: str, letter: str = "", text: str = "", down: float = 0.26) -> float:
        axis.text(Q, y, f"{number}", color=INK, fontsize=9.5, va="center", weight="bold")
        axis.text(Q + 0.17, y, title, color=INK, fontsize=9.5, va="center")
        if letter:
            box(axis, Q, y - down, R - GAP, GREY, "$q$", PROBLEM)
            box(axis, R, y - down, C - GAP, BLUE, letter, text, seed=number)
        return y - down

    def say(x: float, y: float, text: str, colour: str = INK, size: float = 8.5, **kinds) -> None:
        axis.text(x, y, text, color=colour, fontsize=size, va="center", **kinds)

    y = row(3.46, 1, "A failed response is cut after 80 % of its tokens: prefix $r$, failed continuation $c$",
            "$r$", PREFIX)
    box(axis, C, y, 5.54, ORANGE, "$c$", FAILED)
    say(5.62, y, "✗  gold $y$: 61")

    y = row(2.84, 2, "$K=10$ small steps move the prefix's embeddings $E_r$, the model frozen, to lower the sum of",
            "$E_r$", down=0.39)
    for shift, colour, what, loss in ((0.17, ORANGE, "away from $c$", r"$\log\,p(c\,|\,q,E_r)$"),
                                      (0, GREEN, "toward $y$", r"$-\log\,p(y\,|\,q,E_r,$ “… answer is”$)$"),
                                      (-0.17, BLUE, "still readable", r"$-0.1\,\log\,p(r\,|\,q,E_r)$")):
        say(C + 0.03, y + shift, what, colour)
        say(C + 0.97, y + shift, loss)

    y = row(2.03, 3, "8 continuations are sampled after the moved prefix; the verifier keeps right ones",
            "$E_r^*$", down=0.43)
    for shift, mark, colour, n, text in ((0.22, "✗", ORANGE, "1", FAILED),
                                         (0.05, "✓", GREEN, "6", r"answer is \boxed{61}."),
                                         (-0.12, "✓", GREEN, "1", r"answer is \boxed{51}. But let me"),
                                         (-0.26, "", GREEN, "", r"make sure. 46+5=51; … \boxed{61}.")):
        say(C + 0.03, y + shift, mark, colour, 9)
        say(C + 0.19, y + shift, n and f"{n} ×")
        say(C + 0.46, y + shift - 0.01, text, size=8, family="monospace")

    y = row(1.06, 4, r"The rows of $E_r^*$ become their nearest tokens: a recovered trajectory $[\hat r;\hat c\,]$",
            r"$\hat r$", PREFIX)
    box(axis, C, y, RIGHT, GREEN, r"$\hat c$", r"answer is \boxed{51}. But let me …")

    y = row(0.33, 5, r"SFT trains on it; GRPO puts it into its group in place of $[r;c]$:", down=0)
    for k in range(8):
        x, right = 4.62 + 0.23 * k, k == 3
        colour = GREEN if right else ORANGE
        box_ = {"boxstyle": "round,pad=0.25", "facecolor": colour + ("ff" if right else "1a"), "edgecolor": colour}
        axis.text(x, y, "✓" if right else "✗", color="white" if right else colour, fontsize=8, va="center",
                  ha="center", bbox=box_)


def hull(axis) -> None:
    """The right of the picture: the steps of one position, computed from Eq. (7) in two dimensions."""
    from matplotlib import patches
    axis.text(6.92, 3.46, "The steps at one token, 54 (outlined)", color=INK, fontsize=9.5, va="center")
    axis.text(6.92, 3.22, "inside the hull of all token embeddings $W$", color=GREY, fontsize=8.5, va="center")
    axis.add_patch(patches.Polygon(HULL, facecolor=BLUE + "12", edgecolor=GREY, linewidth=1))
    axis.plot(*zip(*HULL, *INSIDE), "o", color=GREY, markersize=3)
    E, path = TOKEN, [TOKEN]
    for i, vertex in enumerate(VERTICES, 1):
        gamma, v = 0.1 * 2 / (i + 1), GOLD if vertex == "61" else OTHER
        E = tuple((1 - gamma) * e + gamma * w for e, w in zip(E, v))
        path.append(E)
    for start, end in ((path[2], GOLD), (path[-1], OTHER)):
        axis.plot(*zip(start, end), ":", color=GREY, linewidth=1)
    axis.plot(*zip(*path), "-", color=BLUE, linewidth=1.2)
    axis.plot(*zip(*path), "o", color=BLUE, markersize=3.6, markeredgecolor="white", markeredgewidth=0.5)
    axis.plot(*TOKEN, "o", color=BLUE, markersize=5.5)
    arrow(axis, path[-1], TOKEN, INK, "--", bend=-0.45)
    for x, y, text, colour, at in (
            (TOKEN[0] - 0.09, TOKEN[1] - 0.03, "54", INK, "right"),
            (path[-1][0], path[-1][1] + 0.07, "$E_j$", BLUE, "left"),
            (GOLD[0] + 0.09, GOLD[1] - 0.02, "$v_j$: 61, steps 1, 2", INK, "left"),
            (OTHER[0] - 0.14, OTHER[1] + 0.08, "$v_j$: 5, steps 3–10", INK, "right"),
            (7.98, 1.22, r"$\hat r_j$: 54 again", INK, "left")):
        axis.text(x, y, text, color=colour, fontsize=8.5, ha=at)
    for y, text, equation in ((0.66, r"$v_j=\mathrm{argmin}_v\,\langle G_j,W[v]\rangle$", "Eq. (6)"),
                              (0.44, r"$E_j\leftarrow(1-\gamma)\,E_j+\gamma\,W[v_j]$", "Eq. (7)"),
                              (0.22, r"$\hat r_j=\mathrm{argmax}_v\,\langle E_j,W[v]\rangle$", "Eq. (8)")):
        axis.text(6.92, y, text, color=INK, fontsize=9, va="center")
        axis.text(9.45, y, equation, color=GREY, fontsize=8.5, va="center", ha="right")


def method(plt, docs: Path) -> None:
    """Algorithm 1 on an example: its tokens at the left, the geometry of its steps at the right."""
    with plt.rc_context({"figure.constrained_layout.use": False}):
        fig = plt.figure(figsize=(9.6, 3.6))
        axis = fig.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, 9.6), ylim=(0, 3.6))
        axis.axis("off")
        strips(axis)
        hull(axis)
        style.save(fig, docs / "method")


if __name__ == "__main__":
    common.Parser(__doc__, prog="python -m experiments.plot").parse_args()
    folder = Path(__file__).resolve().parent.parent / "docs"
    headline(style.load(), folder)
    method(style.load(), folder)
