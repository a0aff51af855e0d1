"""The table of a real model's recovery, from the folders that recipes/qwen2.5-0.5b-cpu.sh leaves.

    python -m experiments.real_model out/real --model Qwen/Qwen2.5-0.5B-Instruct

Reads   OUT/ARM/revised.jsonl (revise.py) or OUT/ARM/rollouts.jsonl (rollout.py, baselines/hint.py), for every ARM.
Prints  Markdown: prompts recovered with a 95 % Wilson interval; right continuations, and how many of them pass two
        proxies of soundness (there is no oracle for a word problem):
          arithmetic  it states at least one equation `a op b = c`, and every one of them is right
          last step   the boxed answer is the right side of its last equation
        tokens of compute (forward and backward passes of the revision, and what is drawn), tokens of a continuation,
        share of prefix tokens that the projection keeps, and how far an embedding moved, as a share of its norm.
"""
import argparse
import re
from pathlib import Path

import torch

import revise
from eval import wilson_interval
from helpers import common
from helpers.common import UserError

NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
EQUATION = re.compile(rf"({NUMBER})\s*([-+*/])\s*({NUMBER})\s*=\s*({NUMBER})")
SIGNS = [("\\times", "*"), ("\\cdot", "*"), ("\u00d7", "*"), ("\\div", "/"), ("\u00f7", "/"), ("\\$", ""), ("$", ""),
         ("\\,", ""), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", "")]


def number(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def equations(text: str) -> list[tuple[float, bool]]:
    """(right side, whether it is right to a cent) of every `a op b = c` of a text, in order."""
    for sign, plain in SIGNS:
        text = text.replace(sign, plain)
    found = []
    for a, op, b, c in EQUATION.findall(text):
        x, y, z = number(a), number(b), number(c)
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else float("inf")}[op]
        found.append((z, abs(value - z) <= 0.01))
    return found


def proxies(text: str, answer: str) -> tuple[bool, bool]:
    """(arithmetic, last step) of a right continuation. answer: the gold."""
    found = equations(text)
    try:
        gold = number(answer)
    except ValueError:
        return all(good for _, good in found) and bool(found), False
    return bool(found) and all(good for _, good in found), bool(found) and abs(found[-1][0] - gold) <= 0.01


def moved(W: torch.Tensor, folder: Path, record: dict) -> float:
    """Mean over positions of |E_j - W[r_j]| / |W[r_j]|."""
    atoms, weights = revise.load_prefix(folder, record)
    E, start = revise.soft_prefix(W, list(atoms), weights), W[torch.tensor(record["prefix_ids"])].float()
    return float(((E - start).norm(dim=-1) / start.norm(dim=-1).clamp(min=1e-12)).mean())  # denominator: own norm


def read_arm(folder: Path, tokenizer, W: torch.Tensor) -> dict:
    """Counts of one arm. Raises UserError for a folder that holds no records."""
    arm = {"prompts": 0, "recovered": 0, "right": [], "drawn": [], "compute": [], "kept": [], "moved": []}
    if (folder / "revised.jsonl").exists():
        for r in common.read_jsonl(folder / "revised.jsonl"):
            arm["prompts"] += 1
            arm["recovered"] += r["recovered"]
            arm["drawn"] += [len(c["ids"]) for c in r["continuations"]]
            # A pass reads q, r and c (not the template, which is short), and each has a backward
            passes = 2 * r["passes"] * (len(r["prompt_ids"]) + r["prefix_len"] / 0.8)
            arm["compute"].append(passes + sum(len(c["ids"]) for c in r["continuations"]))
            arm["right"] += [proxies(tokenizer.decode(c["ids"]), r["answer"]) for c in r["continuations"]
                             if c["reward"]]
            if r["gammas"]:
                arm["kept"].append(r["kept"])
                arm["moved"].append(moved(W, folder, r))
    elif (folder / "rollouts.jsonl").exists():
        by_prompt = {}
        for r in common.read_jsonl(folder / "rollouts.jsonl"):
            by_prompt.setdefault(r["id"], []).append(r)
        arm["prompts"] = len(by_prompt)
        for rows in by_prompt.values():
            arm["recovered"] += any(r["reward"] for r in rows)
            arm["drawn"] += [len(r["response_ids"]) for r in rows]
            arm["compute"].append(sum(len(r["response_ids"]) for r in rows))
            arm["right"] += [proxies(r["response"], r["answer"]) for r in rows if r["reward"]]
    if not arm["prompts"]:
        raise UserError(f"{folder}: holds neither revised.jsonl nor rollouts.jsonl with records")
    return arm


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
    parser = argparse.ArgumentParser(prog="python -m experiments.real_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder with one folder an arm")
    common.add_model_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model, tokenizer, *_ = common.load_model(args, common.pick_device(args))
    W = model.get_input_embeddings().weight.detach()
    folders = sorted({p.parent for name in ("revised", "rollouts") for p in Path(args.out).glob(f"*/{name}.jsonl")})
    if not folders:
        raise UserError(f"{args.out}: holds no arm")
    print("| arm | recovered | right | arithmetic | last step | tokens of compute | drawn | kept | moved |\n"
          + "|---" * 9 + "|")
    for folder in folders:
        print(row(folder.name, read_arm(folder, tokenizer, W)))


if __name__ == "__main__":
    common.run_script(get_args, main)
