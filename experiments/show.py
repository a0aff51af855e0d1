"""What a revision did, position by position, as text or as a page.

    python -m experiments.show out/revised/revised.jsonl --id hard-3
    python -m experiments.show out/revised/revised.jsonl --id hard-3 --html page.html

For every position of the prefix: its token, how far its embedding moved (in units of its own norm), the token that the
projection gives, and the tokens it moved toward with their weights (Eq. 7 makes each iterate a convex combination of
tokens). For every step: the step size, the Frank-Wolfe gap and the three losses before it. The prefix is rebuilt from
the tokens and weights that revise.py stored, in the dtype that it ran in:
nothing is recomputed but the embeddings' look-up.
"""
import argparse
import html
import json
from pathlib import Path

import torch

import revise
from helpers import common
from helpers.common import UserError, printable

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td.t,th.t{text-align:left;font-family:ui-monospace,monospace;white-space:pre-wrap}.p{font-family:ui-monospace,monospace;
white-space:pre-wrap;line-height:2}.p span{padding:.2rem .1rem;border-radius:.2rem}.changed{text-decoration:underline}
.ok{color:#060}.no{color:#900}"""


def explain(record: dict, atoms: torch.Tensor, weights: list[float], tokenizer, W: torch.Tensor) -> list[dict]:
    """Per position: `token`, `projected`, `moved` = |E_j - W[r_j]| / |W[r_j]|,
    `toward` = [(token, weight)], heaviest first.

    atoms (m, R) and weights (m) as revise.load_prefix gives them. A token that several steps picked has the sum of
    their weights; what is left to 1 stays on the position's own token.
    """
    r = record["prefix_ids"]
    E, start = revise.soft_prefix(W, atoms, weights), W[torch.tensor(r)].float()
    # denominator: the norm of the position's own embedding; clamped, since a row of zeros exists in some models
    moved = ((E - start).norm(dim=-1) / start.norm(dim=-1).clamp(min=1e-12)).tolist()
    name = lambda i: printable(tokenizer.decode([i]))
    rows, columns = [], atoms.T.tolist()
    for j, token in enumerate(r):
        toward = {}
        for atom, weight in zip(columns[j][1:], weights[1:]):  # the first is the position's own token
            toward[atom] = toward.get(atom, 0.0) + weight
        rows.append({"token": name(token), "projected": name(record["projected_ids"][j]), "moved": moved[j],
                     "changed": record["projected_ids"][j] != token,
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


def number(x: float | None, digits: int = 3) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def as_text(record: dict, rows: list[dict]) -> str:
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


def as_html(record: dict, rows: list[dict]) -> str:
    """One page without scripts, links or images; everything that a model wrote is escaped."""
    e = html.escape
    top = max([row["moved"] for row in rows], default=0.0) or 1.0
    # denominator: the position that moved farthest is the darkest
    prefix = "".join(f"<span class='{'changed' if row['changed'] else ''}' style='background:rgba(230,120,0,"
                     f"{0.75 * row['moved'] / top:.2f})' title='moved {row['moved']:.3f}'>{e(row['token'])}</span>"
                     for row in rows)
    steps = "".join(f"<tr><td>{i}<td>{number(g)}<td>{number(gap)}" + "".join(f"<td>{x:.3f}" for x in loss)
                    for i, g, gap, *loss in steps_of(record))
    positions = "".join(
        f"<tr><td>{j}<td>{row['moved']:.3f}<td class=t>{e(row['token'])}"
        f"<td class='t {'changed' if row['changed'] else ''}'>{e(row['projected'])}"
        f"<td class=t>{e(', '.join(f'{t} {w:.3f}' for t, w in row['toward'][:5]))}"
        for j, row in enumerate(rows))
    continuations = "".join(f"<tr><td class='{'ok' if c['reward'] else 'no'}'>{verdict(c)}"
                            f"<td class=t>{e(printable(c['response']))}" for c in record["continuations"])
    title = e(printable(f"{record['id']}, rollout {record['sample']}: gold {record['answer']}"))
    return f"""<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>
<p>{'Recovered' if record['recovered'] else 'Not recovered'}. The prefix, darker where its embedding moved farther;
tokens that the projection changed are underlined ({100 * record['kept']:.0f} % are kept).</p><p class=p>{prefix}</p>
<h2>Continuations</h2><table><tr><th>verdict<th class=t>hard trajectory{continuations}</table>
<h2>Steps</h2><table><tr><th>step<th>gamma<th>gap<th>L_explore<th>L_guide<th>L_NLL{steps}</table>
<h2>Positions</h2>
<table><tr><th>#<th>moved<th class=t>token<th class=t>projected<th class=t>moved toward (weight){positions}</table>
"""


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="[ours] revised.jsonl of revise.py")
    parser.add_argument("--id", required=True, help="[ours] the problem; with several attempts, the last is shown")
    parser.add_argument("--sample", type=int, help="[ours] the failed rollout, to see an earlier attempt")
    parser.add_argument("--model", help="[ours] the model that was revised; from run.json beside FILE if not given")
    parser.add_argument("--html", help="[ours] write a page here instead of printing")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    records = [r for r in common.read_jsonl(args.file, ("id", "sample", "losses", "gaps", "gammas", "prefix_ids",
                                                        "prefix_file", "continuations"))
               if r["id"] == args.id and args.sample in (None, r["sample"])]
    if records and records[-1]["gaps"] and not records[-1]["gammas"]:
        raise UserError(f"{args.file}: the prefix of {args.id!r} moved without Frank-Wolfe and is not stored")
    if not records:
        raise UserError(f"{args.file}: no record with --id {args.id}"
                        + (f" --sample {args.sample}" if args.sample is not None else ""))
    run = Path(args.file).parent / "run.json"
    if args.model is None and not run.exists():
        raise UserError(f"--model is needed: there is no {run}")
    settings = json.loads(run.read_text())["settings"] if run.exists() else {}
    path = args.model or settings["model"]
    model, tokenizer, *_ = common.load_model(argparse.Namespace(
        model=path, dtype=settings.get("dtype", "float32")), torch.device("cpu"))
    atoms, weights = revise.load_prefix(Path(args.file).parent, records[-1])
    try:
        rows = explain(records[-1], atoms, weights, tokenizer, model.get_input_embeddings().weight.detach())
        page = (as_html if args.html else as_text)(records[-1], rows)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, AttributeError) as e:
        raise UserError(f"{args.file}: the record of {args.id!r} was not written by revise.py for --model {path} "
                        f"({e!r})") from None
    if args.html:
        common.write_atomic(args.html, page)
        print(f"written: {args.html}")
    else:
        print(page)


if __name__ == "__main__":
    common.run_script(get_args, main)
