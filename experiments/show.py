"""What a revision did, position by position.

    python -m experiments.show out/revised/revised.jsonl --id hard-3

For every position of the prefix: its token, how far its embedding moved (in units of its own norm), the token that the
projection gives, and the tokens it moved toward with their weights (Eq. 7 makes each iterate a convex combination of
tokens). For every step: the step size, the Frank-Wolfe gap and the three losses before it. The prefix is replayed from
the vertices and step sizes that revise.py stored, in the dtype that it ran in: no pass is made.
"""
import argparse
import json
from pathlib import Path

import torch

import revise
from helpers import common
from helpers.common import UserError, printable


def displacement(W: torch.Tensor, E: torch.Tensor, prefix_ids: list[int]) -> torch.Tensor:
    """|E_j - W[r_j]| / |W[r_j]| of every position of a soft prefix E (R, D), (R,)."""
    start = W[torch.tensor(prefix_ids, device=W.device)].float()
    # denominator: the norm of the position's own embedding; clamped, since a row of zeros exists in some models
    return (E - start).norm(dim=-1) / start.norm(dim=-1).clamp(min=1e-12)


def moved(W: torch.Tensor, record: dict) -> float:
    """Mean displacement of a record's soft prefix."""
    return float(displacement(W, revise.replay(W, record), record["prefix_ids"]).mean())


def explain(record: dict, tokenizer, W: torch.Tensor) -> list[dict]:
    """Per position: `token`, `projected`, `changed`, `moved` (its displacement), `toward` = [(token, weight)], heaviest
    first: Eq. (7) multiplied out. What is left to 1 stays on the position's own token."""
    r, projected = record["prefix_ids"], record["projected_ids"]
    moved = displacement(W, revise.replay(W, record), r).tolist()
    name = lambda i: printable(tokenizer.decode([i]))
    rows = []
    for j, token in enumerate(r):
        toward = {}
        for ids, gamma in zip(record["vertices"], record["gammas"]):
            if ids[j] != revise.STAYS:
                toward = {i: (1 - gamma) * w for i, w in toward.items()}
                toward[ids[j]] = toward.get(ids[j], 0.0) + gamma
        rows.append({"token": name(token), "projected": name(projected[j]), "moved": moved[j],
                     "changed": projected[j] != token,
                     "toward": [(name(i), w) for i, w in sorted(toward.items(), key=lambda x: -x[1])]})
    return rows


def steps_of(record: dict) -> list[tuple]:
    """(step, gamma, gap, L_explore, L_guide, L_NLL) before each step; gamma and gap are None for a step not taken."""
    padded = lambda xs: xs + [None] * (len(record["losses"]) - len(xs))
    return [(i, g, gap, *loss) for i, (g, gap, loss) in
            enumerate(zip(padded(record["gammas"]), padded(record["gaps"]), record["losses"]), 1)]


def verdict(c: dict) -> str:
    """Of a continuation: --min-logprob takes the reward from right ones."""
    return "right" if c["reward"] else "right, unlikely" if "logprob" in c else "wrong"


def as_text(record: dict, rows: list[dict]) -> str:
    number = lambda x: "" if x is None else f"{x:.3f}"
    lines = [printable(f"{record['id']} rollout {record['sample']}: gold {record['answer']}, recovered "
                       f"{record['recovered']}, {len(rows)} prefix tokens, {100 * record['kept']:.0f} % kept"), "",
             " step   gamma        gap  L_explore    L_guide      L_NLL"]
    lines += [f"{i:5d} {number(g):>7} {number(gap):>10} " + " ".join(f"{x:10.3f}" for x in loss)
              for i, g, gap, *loss in steps_of(record)]
    lines += ["", "  pos  moved  token          projected      moved toward (weight)"]
    for j, row in enumerate(rows):
        toward = "  ".join(f"{t!r} {w:.3f}" for t, w in row["toward"][:5])
        lines.append(f"{j:5d} {row['moved']:6.3f}  {row['token']!r:14} {row['projected']!r:13}"
                     f"{'*' if row['changed'] else ' '} {toward}")
    lines += ["", "continuations:"]
    lines += [f"  {verdict(c)}  {printable(c['response'])}" for c in record["continuations"]]
    return "\n".join(lines)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m experiments.show")
    parser.add_argument("file", help="revised.jsonl of revise.py")
    parser.add_argument("--id", required=True, help="the problem; with several attempts, the last is shown")
    parser.add_argument("--sample", type=int, help="the failed rollout, to see an earlier attempt")
    parser.add_argument("--model", help="the model that was revised; from run.json beside FILE if not given")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    places = [place for (i, sample), place in common.scan([Path(args.file)]).items()
              if i == args.id and args.sample in (None, sample)]
    if not places:
        raise UserError(f"{args.file}: no record with --id {args.id}"
                        + (f" --sample {args.sample}" if args.sample is not None else ""))
    run = Path(args.file).parent / "run.json"
    if args.model is None and not run.exists():
        raise UserError(f"--model is needed: there is no {run}")
    settings = json.loads(run.read_text())["settings"] if run.exists() else {}
    path = args.model or settings["model"]
    model, tokenizer, *_ = common.load_model(argparse.Namespace(
        model=path, dtype=settings.get("dtype", "float32")), torch.device("cpu"))
    record = places[-1].read()
    try:
        print(as_text(record, explain(record, tokenizer, model.get_input_embeddings().weight.detach())))
    except UserError as e:
        raise UserError(f"{args.file}: {e}") from None
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError) as e:
        raise UserError(f"{args.file}: the record of {args.id!r} was not written by revise.py for --model {path} "
                        f"({e!r})") from None


if __name__ == "__main__":
    common.run_script(get_args, main)
