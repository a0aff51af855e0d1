"""The table of a real model's recovery, from the folders that recipes/qwen2.5-0.5b-cpu.sh leaves.

    python -m experiments.real_model out/real --model Qwen/Qwen2.5-0.5B-Instruct

Reads   OUT/ARM/revised.jsonl (revise.py) or OUT/ARM/rollouts.jsonl (rollout.py on the zero-hit prompts,
        baselines/hint.py), for every ARM that is there; revisions as with --attempts 1, the first of every prompt.
Prints  Markdown: prompts recovered with a 95 % Wilson interval; right continuations, and how many of them pass two
        proxies of soundness (there is no oracle for a word problem):
          arithmetic  it states at least one equation (numbers, + - * /), and every one of them is right
          last step   the boxed answer is the right side of its last equation
        tokens of compute (forward and backward passes of the revision, and what is drawn), tokens of a continuation,
        share of prefix tokens that the projection keeps, and how far an embedding moved, as a share of its norm.
"""
import argparse
import json
import re
from pathlib import Path

import torch

from experiments import demo, show, tables
from experiments.demo import wilson_interval
from helpers import common
from helpers.common import UserError

NUMBER = r"\d[\d,]*(?:\.\d+)?"
EQUATION = re.compile(rf"(-?{NUMBER}(?: *[-+*/] *{NUMBER})+) *= *(-?{NUMBER})")
WRITTEN = [(rf"(?<!/)(?<!/ )\\d?frac\{{({NUMBER})\}}\{{({NUMBER})\}}", r"\1 / \2"),
           (r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1) / (\2)"), (r"\\text\{[^{}]*\}", ""),
           (r"\\times|\\cdot|\u00d7", "*"), (r"\\div|\u00f7", "/"), (r"\\[$,()\[\]]|\$|\s", " ")]


def number(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def value(left: str) -> float:
    """The left side of an equation: numbers and + - * /, with the usual precedence."""
    first, *rest = re.findall(rf"^-?{NUMBER}|{NUMBER}|[-+*/]", left)
    total, term = 0.0, number(first)
    for op, x in zip(rest[::2], map(number, rest[1::2])):
        if op in "*/":
            term = term * x if op == "*" else term / x if x else float("inf")
        else:
            total, term = total + term, x if op == "+" else -x
    return total + term


def equations(text: str) -> list[tuple[float, bool]]:
    """(right side, whether it is right to a cent) of every sum, product, ... `= c` of a text, in order."""
    for pattern, plain in WRITTEN:
        text = re.sub(pattern, plain, text)
    return [(number(right), abs(value(left) - number(right)) <= 0.01) for left, right in EQUATION.findall(text)]


def proxies(text: str, answer: str) -> tuple[bool, bool]:
    """(arithmetic, last step) of a right continuation. answer: the gold."""
    found = equations(text)
    try:
        gold = number(answer)
    except (ValueError, AttributeError):  # a gold that is no number, or no text
        return all(good for _, good in found) and bool(found), False
    return bool(found) and all(good for _, good in found), bool(found) and abs(found[-1][0] - gold) <= 0.01


def read_arm(folder: Path, W: torch.Tensor, tokenizer) -> dict:
    """Counts of one arm. Raises UserError for a folder that holds no records."""
    records = demo.first_attempts(folder)
    if not records:
        raise UserError(f"{folder}: holds no records")
    rho = json.loads((folder / "run.json").read_text())["settings"].get("rho", 1.0)
    drawn = [c for r in records for c in r["continuations"]]
    moved = [r for r in records if r["gammas"]]
    return {
        "prompts": len(records), "recovered": sum(r["recovered"] for r in records),
        "drawn": [len(c["ids"]) for c in drawn],
        # A pass reads q, r and c; the template, which is short, is left out
        "compute": [tables.cost(r | {"failed_tokens": len(r["prefix_ids"]) / rho}, branch=0) for r in records],
        "right": [proxies(tokenizer.decode(c["ids"], skip_special_tokens=True), r["answer"])
                  for r in records for c in r["continuations"] if c["reward"]],
        "kept": [r["kept"] for r in moved],
        "moved": [show.moved(W, r) for r in moved]}


def row(name: str, arm: dict) -> str:
    n, k, right = arm["prompts"], arm["recovered"], arm["right"]
    low, high = wilson_interval(k, n)
    mean = lambda values: sum(values) / len(values)  # denominator: what was counted
    extra = [f"{mean(arm[x]):.0%}" if arm[x] else "-" for x in ("kept", "moved")]
    cells = [name, f"{k}/{n}, {k / n:.0%} [{100 * low:.0f}, {100 * high:.0f}]", f"{len(right)} of {len(arm['drawn'])}",
             str(sum(a for a, _ in right)), str(sum(b for _, b in right)), f"{mean(arm['compute']):,.0f}",
             f"{mean(arm['drawn']):.0f}", *extra]
    return "| " + " | ".join(cells) + " |"


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m experiments.real_model")
    parser.add_argument("out", help="folder with one folder an arm")
    common.add_model_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model, tokenizer, *_ = common.load_model(args, common.pick_device(args))
    W = model.get_input_embeddings().weight.detach()
    folders = sorted(p for p in Path(args.out).glob("*")
                     if (p / "revised.jsonl").exists() or (p / "rollouts.jsonl").exists())
    if not folders:
        raise UserError(f"{args.out}: holds no arm")
    print("| arm | recovered | right | arithmetic | last step | tokens of compute | drawn | kept | moved |\n"
          + "|---" * 9 + "|")
    for folder in folders:
        print(row(folder.name, read_arm(folder, W, tokenizer)))


if __name__ == "__main__":
    common.run_script(get_args, main)
