"""The tables of RESULTS.md, counted from the files that the stage scripts wrote under evidence.py.

Shares of prompts have a 95 % Wilson interval; shares of continuations and means of pass@k a 95 % bootstrap interval over prompts,
since what belongs to one prompt is not independent. Both are over the prompts of all base models together; "by base model"
shows how far these differ.
"""
import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch

import common
import demo
import revise
import rollout
from demo import share
from eval import BOOTSTRAP, bootstrap_interval, pass_at_k, wilson_interval
from verifier import verify

GROUPS = ("LatentRevise", "no Frank-Wolfe (Adam, lr 0.01)", "gamma0 0.3")  # variants whose trajectories are looked at closely
SETS = {"hard": "Trained on the zero-hit prompts", "full": "Trained on the full set",
        "long": "Trained on the zero-hit prompts for 40 steps (`--long`)"}
AGAIN = 16  # samples from the projected prefix


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def mean(values: list) -> float:
    return sum(values) / max(len(values), 1)  # denominator: the values


def cost(record: dict) -> int:
    """Tokens that a revision and its continuations cost: a token of a forward pass counts 1, and so does one of a backward.
    The pass over what a continuation follows, prompt and prefix, is left out, as it is for fresh samples."""
    branch = 6  # the worlds' template, 5 tokens, and a gold answer of two digits
    trunk = len(record["prompt_ids"]) + record["failed_tokens"] + branch
    return trunk * (record["passes"] + len(record["gaps"])) + sum(len(c["ids"]) for c in record["continuations"])


class Records:
    """What the stages wrote about one base model, in BASE; every revision record gets `problem` and `failed_tokens`."""

    def __init__(self, base: Path):
        self.base = base
        self.problems = {p["id"]: p["problem"] for name in ("hard", "train") for p in common.read_jsonl(base / "data" / f"{name}.jsonl")}
        self.rollouts = common.read_jsonl(base / "rollouts" / "rollouts.jsonl")
        self.failed = {(r["id"], r["sample"]): len(r["response_ids"]) for r in self.rollouts}
        self.read = {}

    def variant(self, name: str) -> list[dict]:
        """The first attempt at every prompt, so that all variants had the same failed rollouts."""
        if name not in self.read:
            records = demo.first_attempts(common.read_jsonl(self.base / "revise" / slug(name) / "revised.jsonl"))
            self.read[name] = [r | {"failed_tokens": self.failed[r["id"], r["sample"]], "problem": self.problems[r["id"]]}
                               for r in records]
        return self.read[name]


def share_of(parts: list[int], wholes: list[int]) -> str:
    """sum(parts) / sum(wholes) with the bootstrap interval over prompts, one part and whole each. At 0 and 1 it would have no
    width: there, Wilson's, for as many prompts as have a part in the whole."""
    a, b = np.asarray(parts), np.asarray(wholes)
    if a.sum() in (0, b.sum()):
        low, high = wilson_interval(int(a.sum() > 0) * int((b > 0).sum()), int((b > 0).sum()))
    else:
        draws = np.random.default_rng(0).integers(0, len(a), (BOOTSTRAP // 5, len(a)))
        whole = b[draws].sum(1)
        low, high = np.percentile(a[draws].sum(1)[whole > 0] / whole[whole > 0], [2.5, 97.5])  # denominator: of the resample
    return f"{100 * a.sum() / b.sum():.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({a.sum()}/{b.sum()})"


# --- recovery ----------------------------------------------------------------------------------------------------------
RECOVERY_HEAD = ("| | recovered | by base model | soundly | by base model | sound of the right | forward passes | "
                 "tokens of compute | continuation | kept |\n" + "|---" * 10 + "|")


def recovery_row(world, name: str, bases: list[list[dict]], score: str = "reward") -> str:
    """One line, over the records of all base models."""
    def prompts(check) -> tuple[str, str]:
        counts = [sum(any(map(functools.partial(check, r), r["continuations"])) for r in records) for records in bases]
        return share(sum(counts), sum(map(len, bases))), " ".join(f"{100 * c / len(r):.1f}" for c, r in zip(counts, bases))

    records = [r for records in bases for r in records]
    right = [[c for c in r["continuations"] if c[score]] for r in records]
    sound = [[c for c in cs if world.is_sound(r["problem"], c["response"])] for r, cs in zip(records, right)]
    gold = score == "reward"  # a wrong answer cannot be reached soundly
    cells = [*prompts(lambda r, c: c[score]),
             *(prompts(lambda r, c: c[score] and world.is_sound(r["problem"], c["response"])) if gold else "--"),
             share_of([*map(len, sound)], [*map(len, right)]) if any(right) and gold else "-",
             f"{mean([r['passes'] for r in records]):.1f}", f"{mean([cost(r) for r in records]):.0f}",
             f"{mean([mean([len(c['ids']) for c in r['continuations']]) for r in records]):.1f}",
             f"{100 * mean([r['kept'] for r in records]):.0f} %"]
    return f"| {name} | {' | '.join(cells)} |"


def recovery(world, bases: list[Records], groups: dict[str, dict[str, str]]) -> str:
    """The paper's Table 3 before training, with the controls that it lacks."""
    text = []
    for group, names in groups.items():
        lines = [recovery_row(world, name, [b.variant(name) for b in bases]) for name in names]
        if "permuted gold" in names:
            wrong = [demo.not_reached(b.variant("permuted gold"), b.rollouts) for b in bases]
            lines.append(recovery_row(world, "permuted gold, scored on it", wrong, "guide_reward"))
        text.append(f"#### {group}\n\n{RECOVERY_HEAD}\n" + "\n".join(lines) + "\n")
    return "\n".join(text)


def by_step(world, tokenizer, bases: list[Records], name: str) -> list[dict]:
    """The paper's Figure 3: {step: {recovered, sound (counts of prompts), n, length (tokens), losses}} of a variant that was
    decoded on the way. A curve counts what is right after the soft prefix."""
    records = [r for b in bases for r in b.variant(name)]
    rows = []
    for step in sorted(map(int, records[0]["curve"])):
        at = [r["curve"][str(step)] for r in records]
        texts = [[tokenizer.decode(r["prefix_ids"] + ids, skip_special_tokens=True) for ids, x in zip(c["ids"], c["rewards"]) if x]
                 for r, c in zip(records, at)]
        losses = [r["losses"][step] for r in records if step < len(r["losses"])]
        rows.append({"step": step, "n": len(records), "recovered": sum(map(bool, texts)),
                     "sound": sum(any(world.is_sound(r["problem"], t) for t in ts) for r, ts in zip(records, texts)),
                     "length": mean([mean([*map(len, c["ids"])]) for c in at]),
                     "losses": [mean(x) for x in zip(*losses)]})
    return rows


def step_table(rows: list[dict]) -> str:
    lines = ["| step | recovered | soundly | continuation (tokens) | L_explore | L_guide | L_NLL |", "|---" * 7 + "|"]
    for r in rows:
        losses = " | ".join(f"{x:.2f}" for x in r["losses"]) or "- | - | -"
        lines.append(f"| {r['step']} | {share(r['recovered'], r['n'])} | {share(r['sound'], r['n'])} | {r['length']:.1f} | {losses} |")
    return "\n".join(lines) + "\n"


# --- soundness and the hull --------------------------------------------------------------------------------------------
@torch.no_grad()
def logprobs_after(model, x: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probability of every token of ids, (C,), after the input embeddings x (T, D)."""
    W, c = model.get_input_embeddings().weight, torch.tensor(ids)
    logits = model(inputs_embeds=torch.cat([x, W[c]])[None], use_cache=False).logits[0, len(x) - 1:-1]  # (C, V)
    return logits.log_softmax(-1).gather(1, c[:, None])[:, 0]


def trajectories(world, model, tokenizer, base: Records, name: str) -> list[dict]:
    """Facts of every recovered trajectory of a variant: `sound`; `hard`, the log-probabilities of its continuation's tokens after
    the projected prefix, and `soft` after the soft one (None where that is not stored); `again`, how many of AGAIN
    continuations of the projected prefix reach the gold answer; `leaks`, whether the same prompt reached a wrong answer
    when it was steered toward that."""
    W, eos = model.get_input_embeddings().weight.detach(), common.eos_ids(model, tokenizer)
    permuted = {r["id"]: r for r in base.variant("permuted gold")}
    found = []
    for r in (r for r in base.variant(name) if r["recovered"]):
        q, hard = W[torch.tensor(r["prompt_ids"])], r["prompt_ids"] + r["projected_ids"]
        E = None if "Adam" in name else revise.soft_prefix(W, *revise.load_prefix(base.base / "revise" / slug(name), r))
        keys = [rollout.row_key("again", r["id"], m) for m in range(AGAIN)]
        fresh = rollout.sample(model, [W[torch.tensor(hard)]], [keys], [160 - len(r["prefix_ids"])], eos=eos, vocab=len(tokenizer))[0]
        texts = [tokenizer.decode(r["projected_ids"] + s.ids, skip_special_tokens=True) for s in fresh]
        again = sum(verify(text, r["answer"]) for text in texts)
        found += [{"prompt": (str(base.base), r["id"]), "sound": world.is_sound(r["problem"], c["response"]), "again": again,
                   "leaks": any(x["guide_reward"] for x in permuted[r["id"]]["continuations"]),
                   "soft": None if E is None else logprobs_after(model, torch.cat([q, E]), c["ids"]).tolist(),
                   "hard": logprobs_after(model, W[torch.tensor(hard)], c["ids"]).tolist()} for c in r["continuations"] if c["reward"]]
    return found


FILTERS = {"all recovered": lambda t: True,
           "answer reached again from the projected prefix, 1 of 16": lambda t: t["again"] >= 1,
           "prompt does not reach a wrong answer when steered toward it": lambda t: not t["leaks"],
           "continuation likely after the projected prefix (> -0.5 nat a token)": lambda t: mean(t["hard"]) > -0.5}


def filter_table(groups: dict[str, list[dict]]) -> str:
    """What filters that need no reasoning trace keep, and how much of it is sound."""
    lines = ["| variant | filter | kept of the recovered | of them sound | prompts kept | prompts with a sound one kept |", "|---" * 6 + "|"]
    prompts = lambda ts: {t["prompt"] for t in ts}
    for name, found in groups.items():
        names = sorted(prompts(found))
        count = lambda ts, names=names: [sum(t["prompt"] == p for t in ts) for p in names]
        for label, passes in FILTERS.items():
            kept = [t for t in found if passes(t)]
            lines.append(f"| {name} | {label} | {share_of(count(kept), count(found)) if found else '-'} | "
                         f"{share_of(count([t for t in kept if t['sound']]), count(kept)) if kept else '-'} | "
                         f"{len(prompts(kept))} | {len(prompts(t for t in kept if t['sound']))} of "
                         f"{len(prompts(t for t in found if t['sound']))} |")
    return "\n".join(lines) + "\n"


def prefixes(W: torch.Tensor, tokenizer, base: Records, name: str) -> list[dict]:
    """Facts of every revised prefix: `distance` to the nearest token and `moved`, both as shares of the norm of its own
    token's embedding; share `kept` by each projection; `gaps`; `recovered`."""
    allowed, found = torch.arange(len(tokenizer)), []
    for r in base.variant(name):
        own = torch.tensor(r["prefix_ids"])
        E, start = revise.soft_prefix(W, *revise.load_prefix(base.base / "revise" / slug(name), r)), W[own]
        ids = {m: revise.best_rows(E, W, allowed, m) for m in ("inner", "cosine", "l2")}
        norms = start.norm(dim=-1)  # denominator of both distances
        found.append({"distance": float(((E - W[ids["l2"]]).norm(dim=-1) / norms).mean()),
                      "moved": float(((E - start).norm(dim=-1) / norms).mean()), "gaps": r["gaps"], "recovered": r["recovered"],
                      "kept": {m: float((i == own).float().mean()) for m, i in ids.items()}})
    return found


def hull_table(found: list[dict]) -> str:
    lines = ["| | recovered | not recovered |", "|---" * 3 + "|"]
    groups = [[p for p in found if p["recovered"] == r] for r in (True, False)]
    rows = {"prefixes": [f"{len(g)}" for g in groups],
            "moved, share of the token's norm": [f"{mean([p['moved'] for p in g]):.3f}" for g in groups],
            "distance to the nearest token, the same": [f"{mean([p['distance'] for p in g]):.3f}" for g in groups],
            **{f"tokens kept by {m}": [f"{100 * mean([p['kept'][m] for p in g]):.1f} %" for g in groups] for m in ("inner", "cosine", "l2")},
            "Frank-Wolfe gap before the first step": [f"{mean([p['gaps'][0] for p in g]):.1f}" for g in groups],
            "Frank-Wolfe gap before the last step": [f"{mean([p['gaps'][-1] for p in g]):.1f}" for g in groups]}
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]) + "\n"


def equal_loss(world, tokenizer, bases: list[Records]) -> str:
    """Hull against unconstrained at equal loss: Adam is read at its first step with an L_total at or below that of
    Frank-Wolfe after ten, on the prompts where it gets there; Frank-Wolfe's tenth step is that of K 20."""
    total = lambda loss: loss[0] + loss[1] + 0.1 * loss[2]  # Eq. (5) at the paper's weights
    hull, free, steps = [], [], []
    for b in bases:
        adam = {r["id"]: r for r in b.variant("no Frank-Wolfe (Adam, lr 0.01)")}
        for r in b.variant("K 20"):
            if len(r["losses"]) <= 10:
                continue  # stopped early
            step = next((i for i, x in enumerate(adam[r["id"]]["losses"]) if total(x) <= total(r["losses"][10])), None)
            if step is not None:
                hull.append((r, r["curve"]["10"]))
                free.append((r, adam[r["id"]]["curve"][str(step)]))
                steps.append(step)
    lines, found = ["| at equal loss | steps | recovered | soundly | continuation (tokens) |", "|---" * 5 + "|"], []
    for name, pairs, spent in (("Frank-Wolfe", hull, "10"), ("Adam", free, f"{mean(steps):.1f}")):
        texts = [[tokenizer.decode(r["prefix_ids"] + ids, skip_special_tokens=True) for ids, x in zip(c["ids"], c["rewards"]) if x]
                 for r, c in pairs]
        found.append([[bool(ts), any(world.is_sound(r["problem"], t) for t in ts)] for (r, _), ts in zip(pairs, texts)])
        recovered, sound = (share(sum(x[k] for x in found[-1]), len(pairs)) for k in (0, 1))
        lines.append(f"| {name} | {spent} | {recovered} | {sound} | {mean([mean([*map(len, c['ids'])]) for _, c in pairs]):.1f} |")
    alone = [[sum(x[k] and not y[k] for x, y in zip(*pair)) for pair in (found, found[::-1])] for k in (0, 1)]
    lines.append(f"\nPrompts recovered by one alone: Frank-Wolfe {alone[0][0]}, Adam {alone[0][1]}; soundly: {alone[1][0]} and {alone[1][1]}.")
    return "\n".join(lines) + "\n"


def likelihood_table(groups: dict[str, list[dict]]) -> str:
    """Does the projected prefix still lead to the continuation? Log-probabilities (nats) of the tokens of recovered
    continuations: mean over tokens, and mean over trajectories of the least likely one."""
    lines = ["| variant | trajectories | a token after the soft prefix | the least likely | after its projection | the least likely |",
             "|---" * 6 + "|"]
    for name, all_found in groups.items():
        for label, found in ((name, all_found), (f"{name}, sound", [t for t in all_found if t["sound"]])):
            cells = []
            for key in ("soft", "hard"):
                some = [t[key] for t in found if t[key]]
                cells += [f"{mean([y for x in some for y in x]):.2f}", f"{mean([min(x) for x in some]):.1f}"] if some else ["-", "-"]
            lines.append(f"| {label} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- training ----------------------------------------------------------------------------------------------------------
def pass_values(folder: Path) -> dict[int, list[float]]:
    """pass@1 and pass@32 of every problem of one model on one set, from the samples behind them."""
    counts = {}
    for r in common.read_jsonl(folder / "rollouts.jsonl"):
        counts.setdefault(r["id"], []).append(r["reward"])
    return {k: [pass_at_k(len(x), sum(x), k) for x in counts.values()] for k in (1, 32)}


def spent(metrics: list[dict]) -> float:
    """Seconds of a training run: its steps, evaluation and start-up left out."""
    return sum(v for row in metrics for key, v in row.items() if key == "seconds" or key.startswith("seconds_"))


def percent(values: list[list[float]]) -> str:
    """Mean over the problems of all base models, with the bootstrap interval (Wilson's where all have 0 or all 1)."""
    pooled = [v for of in values for v in of]
    low, high = bootstrap_interval(pooled) if len(set(pooled)) > 1 else wilson_interval(round(sum(pooled)), len(pooled))
    return f"{100 * mean(pooled):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def training_table(bases: list[Path], arms: list[str], folder: str) -> str:
    """The paper's Tables 1, 2 and 4: pass@k on held-out problems, time and memory of every arm."""
    plain = [spent(common.read_jsonl(b / "train" / folder / slug("GRPO N=8") / "metrics.jsonl")) for b in bases]
    lines = ["| | bases | hard @1 | by base model | hard @32 | easy @1 | by base model | easy @32 | time, of GRPO's | peak memory |", "|---" * 10 + "|"]
    for arm in ["base", *arms]:
        cells, times, memory, having = {}, [], [], []
        for base, grpo in zip(bases, plain):
            run = base / "train" / folder / slug(arm)
            if arm != "base" and not run.exists():
                continue  # nothing to train on
            first = json.loads((base / "eval" / "hard" / "results.json").read_text())[0]["model"]
            name = base / "eval" / ("hard" if arm == "base" else folder) / (first if arm == "base" else f"{slug(arm)}-model")
            having.append(base)
            for data in ("test_hard", "test_easy"):
                for k, values in pass_values(name / data).items():
                    cells.setdefault((data, k), []).append(values)
            if arm != "base":
                metrics = common.read_jsonl(run / "metrics.jsonl")
                times.append(spent(metrics) / grpo)
                memory.append(max(m["memory_gb"] for m in metrics))
        if not having:
            lines.append(f"| {arm} | nothing to train on |" + " |" * 8)
            continue
        each = lambda data, cells=cells: " ".join(f"{100 * mean(v):.1f}" for v in cells[data, 1])
        used = [f"{np.median(times):.2f}", f"{max(memory):.2f} GB"] if times else ["-", "-"]
        lines.append(f"| {arm} | {len(having)} | {percent(cells['test_hard', 1])} | {each('test_hard')} | {percent(cells['test_hard', 32])} | "
                     f"{percent(cells['test_easy', 1])} | {each('test_easy')} | {percent(cells['test_easy', 32])} | {' | '.join(used)} |")
    return "\n".join(lines) + "\n"


def signal_table(world, bases: list[Records], arms: list[str], folder: str) -> str:
    """What the gradient of a GRPO run came from, in both halves of its steps: hits of the policy and injected trajectories,
    each with the sound ones among them. From samples.jsonl."""
    lines = ["| | steps | hits of the policy | of them sound | injected | of them sound |", "|---" * 6 + "|"]
    for arm in arms:
        files = [(b, b.base / "train" / folder / slug(arm) / "samples.jsonl") for b in bases]
        rows = [s | {"problem": b.problems[s["id"]]} for b, f in files if f.exists() for s in common.read_jsonl(f)]
        last = max((s["step"] for s in rows), default=0)
        for label, some in ((f"1-{last // 2}", [s for s in rows if s["step"] <= last // 2]),
                            (f"{last // 2 + 1}-{last}", [s for s in rows if s["step"] > last // 2])):
            cells = []
            for injected in (False, True):
                right = [s for s in some if s["reward"] and s["injected"] == injected]
                sound = sum(world.is_sound(s["problem"], s["response"]) for s in right)
                cells += [str(len(right)), f"{100 * sound / len(right):.0f} %" if right else "-"]
            lines.append(f"| {arm} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- all of it ---------------------------------------------------------------------------------------------------------
def everything(worlds: dict, bases: dict, groups: dict, arms: dict) -> str:
    """bases: {world: {seed: (folder, model)}}; groups: names of variants; arms: {set: names}."""
    text = []
    for name, of in bases.items():
        world, records = worlds[name], [Records(base) for base, _ in of.values()]
        close, found = {g: [] for g in GROUPS}, []
        for b, (_, path) in zip(records, of.values()):
            model, tokenizer, _ = common.load_model(argparse.Namespace(model=path, dtype="float32"), torch.device("cpu"))
            for g in GROUPS:
                close[g] += trajectories(world, model, tokenizer, b, g)
            found += prefixes(model.get_input_embeddings().weight.detach(), tokenizer, b, "LatentRevise")
        zero = [len(b.variant("LatentRevise")) for b in records]
        text.append(f"### {name}.py: {sum(zero)} zero-hit prompts, {' + '.join(map(str, zero))} of {len(zero)} base models\n")
        text += [recovery(world, records, groups)]
        text += ["#### By Frank-Wolfe steps (Figure 3)\n", step_table(by_step(world, tokenizer, records, "K 20"))]
        text += ["#### Filters without a reasoning trace\n", filter_table(close)]
        text += ["#### The hull\n", hull_table(found), equal_loss(world, tokenizer, records)]
        text.append(likelihood_table(close))
        for folder, title in SETS.items():
            on = [a for a in arms[folder] if any((b.base / "train" / folder / slug(a)).exists() for b in records)]
            if on:
                text += [f"#### {title}\n", training_table([b.base for b in records], on, folder),
                         signal_table(world, records, [a for a in on if "GRPO" in a], folder)]
    return "\n".join(text)


def write_results(file: Path, text: str) -> None:
    """Replace what stands below the line `## Tables` of RESULTS.md. Raises UserError if there is none."""
    head, found, _ = file.read_text().partition("\n## Tables\n")
    if not found:
        raise common.UserError(f"{file}: has no line `## Tables`, below which the tables go")
    common.write_atomic(file, f"{head}{found}\n{text}")
