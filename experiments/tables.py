"""docs/tables.md, counted from the files that the stage scripts wrote under evidence.py.

Shares of prompts have a 95 % Wilson interval; shares of continuations a 95 % bootstrap interval over prompts, since
what belongs to one prompt is not independent. Both are over the prompts of these base models; "by base model" shows how
far the models differ. Means of pass@k have a 95 % bootstrap interval over base models and, of each, over problems.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch

import revise
from eval import BOOTSTRAP, pass_at_k
from experiments import demo, show
from experiments.demo import share, wilson_interval
from helpers import common, sampling
from verifier import verify

ADAM = "no Frank-Wolfe (Adam, lr 0.01)"
GROUPS = ("LatentRevise", ADAM, "gamma0 0.3")  # variants whose trajectories are looked at closely
SETS = {"hard": "Trained on the zero-hit prompts", "full": "Trained on the full set",
        "long": "Trained on the zero-hit prompts for 40 steps (--all)",
        "again-1": "Trained on the zero-hit prompts with other draws (--all)",
        "again-2": "And with others again (--all)"}
# What made the data of an arm: folder below BASE, processes that worked on it
DATA = {"RFT": ("rft-samples", 2), "SFT+LatentRevise": ("revise/latentrevise", 1),
        "SFT+LatentRevise, sound only": ("revise/latentrevise", 1),
        "SFT+LatentRevise, likely only": ("revise/likely-only", 1)}
AGAIN = 16  # samples from the projected prefix


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def mean(values: list) -> float:
    return sum(values) / max(len(values), 1)  # denominator: the values


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines) + "\n"


def cost(record: dict, branch: int = 6) -> float:
    """Tokens that a revision and its continuations cost: a token of a forward pass counts 1, and so does one of a
    backward. The pass over what a continuation follows, prompt and prefix, is left out, as it is for fresh samples; so
    is the scoring of --min-logprob. branch: of the worlds, a template of 5 tokens and a gold answer of 1."""
    trunk = len(record["prompt_ids"]) + record["failed_tokens"] + branch
    return trunk * (record["passes"] + len(record["gaps"])) + sum(len(c["ids"]) for c in record["continuations"])


class Records:
    """What the stages wrote about one base model, in BASE; every revision record gets `problem` and `failed_tokens`."""

    def __init__(self, base: Path):
        self.base, self.read = base, {}
        problems = [p for name in ("hard", "train") for p in common.read_jsonl(base / "data" / f"{name}.jsonl")]
        self.problems = {p["id"]: p["problem"] for p in problems}
        self.rollouts = common.read_jsonl(base / "rollouts" / "rollouts.jsonl")
        self.failed = {(r["id"], r["sample"]): len(r["response_ids"]) for r in self.rollouts}

    def folder(self, name: str) -> Path:
        return self.base / "revise" / slug(name)

    def complete(self, name: str) -> bool:
        return any((self.folder(name) / f"{file}.jsonl").exists() for file in ("revised", "rollouts"))

    def variant(self, name: str) -> list[dict]:
        """The first attempt at every prompt, so that all variants had the same failed rollouts."""
        if name not in self.read:
            records = demo.first_attempts(self.folder(name))
            for r in records:
                r |= {"failed_tokens": self.failed[r["id"], r["sample"]], "problem": self.problems[r["id"]]}
            self.read[name] = records
        return self.read[name]


def share_of(parts: list[int], wholes: list[int]) -> str:
    """sum(parts) / sum(wholes) with the bootstrap interval over prompts, one part and whole each. At 0 and 1 it would
    have no width: there, Wilson's, for as many prompts as have a part in the whole."""
    a, b = np.asarray(parts), np.asarray(wholes)
    if a.sum() in (0, b.sum()):
        low, high = wilson_interval(int(a.sum() > 0) * int((b > 0).sum()), int((b > 0).sum()))
    else:
        draws = np.random.default_rng(0).integers(0, len(a), (BOOTSTRAP // 5, len(a)))
        part, whole = a[draws].sum(1), b[draws].sum(1)
        low, high = np.percentile(part[whole > 0] / whole[whole > 0], [2.5, 97.5])  # denominator: of the resample
    return f"{100 * a.sum() / b.sum():.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({a.sum()}/{b.sum()})"


# --- recovery --------------------------------------------------------------------------------------------------------
RECOVERY_HEAD = ["", "recovered", "by base model", "soundly", "by base model", "sound of the right", "forward passes",
                 "tokens of compute", "continuation", "kept"]


def right_and_sound(world, records: list[dict], score: str = "reward") -> list[tuple[int, int]]:
    """Of every prompt, its right continuations and the sound ones among them."""
    right = [[c["response"] for c in r["continuations"] if c[score]] for r in records]
    return [(len(texts), sum(world.is_sound(r["problem"], t) for t in texts)) for r, texts in zip(records, right)]


def recovery_row(world, name: str, bases: list[list[dict]], score: str = "reward") -> list[str]:
    """One line, over the records of all base models."""
    found = [right_and_sound(world, records, score) for records in bases]

    def prompts(k: int) -> list[str]:
        counts = [sum(x[k] > 0 for x in of) for of in found]
        each = " ".join(f"{100 * c / max(len(of), 1):.1f}" for c, of in zip(counts, found))
        return [share(sum(counts), sum(map(len, found))), each]

    records = [r for records in bases for r in records]
    right, sound = zip(*(x for of in found for x in of))
    gold = score == "reward"  # a wrong answer cannot be reached soundly
    return [name, *prompts(0), *(prompts(1) if gold else "--"),
            share_of(sound, right) if any(right) and gold else "-",
            f"{mean([r['passes'] for r in records]):.1f}", f"{mean([cost(r) for r in records]):.0f}",
            f"{mean([mean([len(c['ids']) for c in r['continuations']]) for r in records]):.1f}",
            f"{100 * mean([r['kept'] for r in records]):.0f} %"]


def recovery(world, bases: list[Records], groups: dict[str, dict[str, str]]) -> str:
    """The paper's Table 3 before training, with the controls that it lacks."""
    text = []
    for group, names in groups.items():
        names = [n for n in names if all(b.complete(n) for b in bases)]
        if not names:
            continue
        rows = [recovery_row(world, name, [b.variant(name) for b in bases]) for name in names]
        if "permuted gold" in names:
            wrong = [demo.not_reached(b.variant("permuted gold"), b.rollouts) for b in bases]
            rows.append(recovery_row(world, "permuted gold, scored on it", wrong, "guide_reward"))
        text.append(f"#### {group}\n\n{table(RECOVERY_HEAD, rows)}")
    return "\n".join(text)


def on_the_way(world, tokenizer, r: dict, at: dict) -> tuple[bool, bool, float]:
    """A prompt at one step of its curve: recovered, soundly, mean continuation in tokens. A curve counts what is right
    after the soft prefix."""
    right = [ids for ids, reward in zip(at["ids"], at["rewards"]) if reward]
    texts = [tokenizer.decode(r["prefix_ids"] + ids, skip_special_tokens=True) for ids in right]
    return bool(texts), any(world.is_sound(r["problem"], t) for t in texts), mean([*map(len, at["ids"])])


def by_step(world, tokenizer, bases: list[Records], name: str) -> list[dict]:
    """The paper's Figure 3, {step, n, recovered, sound (counts of prompts), length (tokens), losses}, of a variant that
    was decoded on the way. Losses: mean over the prompts that have not stopped early."""
    records, rows = [r for b in bases for r in b.variant(name)], []
    for step in sorted(map(int, records[0]["curve"])):
        found = [on_the_way(world, tokenizer, r, r["curve"][str(step)]) for r in records]
        losses = [r["losses"][step] for r in records if step < len(r["losses"])]
        rows.append({"step": step, "n": len(records), "recovered": sum(x[0] for x in found),
                     "sound": sum(x[1] for x in found), "length": mean([x[2] for x in found]),
                     "losses": [mean(x) for x in zip(*losses)]})
    return rows


def step_table(rows: list[dict]) -> str:
    head = ["step", "recovered", "soundly", "continuation (tokens)", "L_explore", "L_guide", "L_NLL"]
    return table(head, [[r["step"], share(r["recovered"], r["n"]), share(r["sound"], r["n"]), f"{r['length']:.1f}",
                         *([f"{x:.2f}" for x in r["losses"]] or "---")] for r in rows])


# --- soundness and the hull ------------------------------------------------------------------------------------------
@torch.no_grad()
def logprobs_after(model, x: torch.Tensor, ids: list[int]) -> list[float]:
    """Log-probability of every token of ids, after the input embeddings x (T, D)."""
    W, c = model.get_input_embeddings().weight, torch.tensor(ids)
    logits = model(inputs_embeds=torch.cat([x, W[c]])[None], use_cache=False).logits[0, len(x) - 1:-1]  # (C, V)
    return logits.log_softmax(-1).gather(1, c[:, None])[:, 0].tolist()


def trajectories(world, model, tokenizer, base: Records, name: str) -> list[dict]:
    """Facts of every recovered trajectory of a variant: `sound`; `hard`, the log-probabilities of its continuation's
    tokens after the projected prefix, and `soft` after the soft one (None where that is not stored); `again`, how many
    of AGAIN continuations of the projected prefix reach the gold answer; `leaks`, whether the same prompt reached a
    wrong answer when it was steered toward that."""
    W = model.get_input_embeddings().weight.detach()
    policy = common.Policy(model, tokenizer, len(tokenizer), common.eos_ids(model, tokenizer))
    permuted = {r["id"]: r for r in base.variant("permuted gold")}
    found = []
    for r in (r for r in base.variant(name) if r["recovered"]):
        q, projected = W[torch.tensor(r["prompt_ids"])], W[torch.tensor(r["prompt_ids"] + r["projected_ids"])]
        soft = None if name == ADAM else torch.cat([q, revise.replay(W, r)])
        keys, limit = [sampling.row_key("again", r["id"], m) for m in range(AGAIN)], 160 - len(r["prefix_ids"])
        fresh, = sampling.sample(policy, [projected], [keys], [limit])
        texts = [tokenizer.decode(r["projected_ids"] + s.ids, skip_special_tokens=True) for s in fresh]
        facts = {"prompt": (str(base.base), r["id"]), "again": sum(verify(text, r["answer"]) for text in texts),
                 "leaks": any(c["guide_reward"] for c in permuted[r["id"]]["continuations"])}
        found += [facts | {"sound": world.is_sound(r["problem"], c["response"]),
                           "soft": None if soft is None else logprobs_after(model, soft, c["ids"]),
                           "hard": logprobs_after(model, projected, c["ids"])}
                  for c in r["continuations"] if c["reward"]]
    return found


FILTERS = {"all recovered": lambda t: True,
           "answer reached again from the projected prefix, 1 of 16": lambda t: t["again"] >= 1,
           "prompt does not reach a wrong answer when steered toward it": lambda t: not t["leaks"],
           "continuation likely after the projected prefix (> -0.5 nat a token)": lambda t: mean(t["hard"]) > -0.5}


def filter_table(groups: dict[str, list[dict]]) -> str:
    """What filters that need no reasoning trace keep, and how much of it is sound."""
    rows, prompts = [], lambda ts: {t["prompt"] for t in ts}
    for name, found in groups.items():
        ids = sorted(prompts(found))
        count = lambda ts, ids=ids: [sum(t["prompt"] == i for t in ts) for i in ids]
        for label, passes in FILTERS.items():
            kept = [t for t in found if passes(t)]
            sound = [t for t in kept if t["sound"]]
            rows.append([name, label, share_of(count(kept), count(found)) if found else "-",
                         share_of(count(sound), count(kept)) if kept else "-", len(prompts(kept)),
                         f"{len(prompts(sound))} of {len(prompts(t for t in found if t['sound']))}"])
    return table(["variant", "filter", "kept of the recovered", "of them sound", "prompts kept",
                  "prompts with a sound one kept"], rows)


def likelihood_table(groups: dict[str, list[dict]]) -> str:
    """Does the projected prefix still lead to the continuation? Log-probabilities (nats) of the tokens of recovered
    continuations: mean over tokens, and mean over trajectories of the least likely one."""
    rows = []
    for name, every in groups.items():
        for label, found in ((name, every), (f"{name}, sound", [t for t in every if t["sound"]])):
            cells = []
            for some in ([t[key] for t in found if t[key]] for key in ("soft", "hard")):
                tokens, least = mean([y for x in some for y in x]), mean([min(x) for x in some])
                cells += [f"{tokens:.2f}", f"{least:.1f}"] if some else "--"
            rows.append([label, len(found), *cells])
    return table(["variant", "trajectories", "a token after the soft prefix", "the least likely",
                  "after its projection", "the least likely"], rows)


def prefixes(W: torch.Tensor, tokenizer, base: Records, name: str) -> list[dict]:
    """Facts of every revised prefix: `distance` to the nearest token and `moved`, both as shares of the norm of its own
    token's embedding; share `kept` by each projection; `gaps`; `recovered`."""
    allowed, found = torch.arange(len(tokenizer)), []
    for r in base.variant(name):
        own, E = torch.tensor(r["prefix_ids"]), revise.replay(W, r)
        ids = {m: revise.best_rows(E, W, allowed, m) for m in ("inner", "cosine", "l2")}
        # denominator: the norm of the position's own embedding, as of the displacement
        found.append({"distance": float(((E - W[ids["l2"]]).norm(dim=-1) / W[own].norm(dim=-1)).mean()),
                      "moved": float(show.displacement(W, E, r["prefix_ids"]).mean()), "gaps": r["gaps"],
                      "recovered": r["recovered"],
                      "kept": {m: float((i == own).float().mean()) for m, i in ids.items()}})
    return found


def hull_table(found: list[dict]) -> str:
    groups = [[p for p in found if p["recovered"] == r] for r in (True, False)]
    average = lambda key: [f"{mean([key(p) for p in g]):.3f}" for g in groups]
    return table(["", "recovered", "not recovered"], [
        ["prefixes", *map(len, groups)],
        ["moved, share of the token's norm", *average(lambda p: p["moved"])],
        ["distance to the nearest token, the same", *average(lambda p: p["distance"])],
        *([f"share of tokens kept by {m}", *average(lambda p, m=m: p["kept"][m])] for m in found[0]["kept"]),
        ["Frank-Wolfe gap before the first step", *average(lambda p: p["gaps"][0])],
        ["Frank-Wolfe gap before the last step", *average(lambda p: p["gaps"][-1])]])


def equal_loss(world, tokenizer, bases: list[Records]) -> str:
    """Hull against unconstrained at equal loss: Adam is read after the step whose L_total is nearest to that of
    Frank-Wolfe after ten, on the prompts where it gets so low; Frank-Wolfe's tenth step is that of K 20."""
    total = lambda loss: loss[0] + loss[1] + 0.1 * loss[2]  # Eq. (5) at the paper's weights
    hull, free, out_of_reach = [], [], 0
    for b in bases:
        adam = {r["id"]: r for r in b.variant(ADAM)}
        for r in (r for r in b.variant("K 20") if len(r["losses"]) > 10):  # the others stopped early
            target, losses = total(r["losses"][10]), [*map(total, adam[r["id"]]["losses"])]
            if min(losses) > target:
                out_of_reach += 1
                continue
            step = min(range(len(losses)), key=lambda i, x=losses, y=target: abs(x[i] - y))
            hull.append((*on_the_way(world, tokenizer, r, r["curve"]["10"]), 10, target))
            free.append((*on_the_way(world, tokenizer, r, adam[r["id"]]["curve"][str(step)]), step, losses[step]))
    rows = []
    for name, found in (("Frank-Wolfe", hull), ("Adam", free)):
        recovered, sound, length, steps, loss = zip(*found)
        rows.append([name, f"{mean(steps):.1f}", f"{mean(loss):.2f}", share(sum(recovered), len(found)),
                     share(sum(sound), len(found)), f"{mean(length):.1f}"])
    alone = [sum(x[k] and not y[k] for x, y in zip(*pair)) for k in (0, 1) for pair in ((hull, free), (free, hull))]
    return (table(["at equal loss", "steps", "L_total", "recovered", "soundly", "continuation (tokens)"], rows) +
            "\nPrompts recovered by one alone: Frank-Wolfe {}, Adam {}; soundly: {} and {}. Left out, since Adam never "
            "gets so low: {}.\n".format(*alone, out_of_reach))


# --- training --------------------------------------------------------------------------------------------------------
def pass_values(folder: Path) -> dict[int, list[float]]:
    """pass@1 and pass@32 of every problem of one model on one set, from the samples behind them."""
    counts = {}
    for r in common.read_jsonl(folder / "rollouts.jsonl"):
        counts.setdefault(r["id"], []).append(r["reward"])
    return {k: [pass_at_k(len(x), sum(x), k) for x in counts.values()] for k in (1, 32)}


def spent(base: Path, folder: str, arm: str) -> float:
    """Seconds of one core: the steps of a training run, and the whole stage that made its data where one did. Starting
    and evaluating are left out."""
    metrics = common.read_jsonl(base / "train" / folder / slug(arm) / "metrics.jsonl")
    steps = sum(v for row in metrics for key, v in row.items() if key == "seconds" or key.startswith("seconds_"))
    stage, processes = DATA.get(arm, (None, 0))
    if stage is None:
        return steps
    seconds = json.loads((base.parent / "seconds.json").read_text())
    return steps + processes * next(s for command, s in seconds.items() if command.endswith(f"{base.name}/{stage}"))


def percent(values: list[list[float]]) -> str:
    """Mean over the problems of all base models, as many of each, with the interval of a bootstrap in two stages: base
    models, then problems of each. Where all have 0 or all 1 it would have no width: there, Wilson's."""
    x, rng = np.asarray(values), np.random.default_rng(0)  # (base models, problems)
    if x.min() == x.max():
        low, high = wilson_interval(round(x.sum()), x.size)
    else:
        models = rng.integers(0, len(x), (BOOTSTRAP // 5, len(x), 1))
        problems = rng.integers(0, x.shape[1], (BOOTSTRAP // 5, len(x), x.shape[1]))
        low, high = np.percentile(x[models, problems].mean((1, 2)), [2.5, 97.5])
    return f"{100 * x.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def training_table(bases: list[Path], arms: list[str], folder: str) -> str:
    """The paper's Tables 1, 2 and 4: pass@k on held-out problems, time and memory of every arm."""
    rows = []
    for arm in ["base", *arms]:
        cells, times, memory, count = {}, [], [], 0
        for base in bases:
            if arm != "base" and not (base / "train" / folder / slug(arm)).exists():
                continue  # nothing to train on
            first = json.loads((base / "eval" / "hard" / "results.json").read_text())[0]["model"]
            where = base / "eval" / "hard" / first if arm == "base" else base / "eval" / folder / f"{slug(arm)}-model"
            count += 1
            for data in ("hard", "easy"):
                for k, values in pass_values(where / f"test_{data}").items():
                    cells.setdefault((data, k), []).append(values)
            if arm != "base":
                times.append(spent(base, folder, arm) / spent(base, folder, "GRPO N=8"))
                metrics = common.read_jsonl(base / "train" / folder / slug(arm) / "metrics.jsonl")
                memory.append(max(m["memory_gb"] for m in metrics))
        row = [arm, count or "nothing to train on"]
        for data in ("hard", "easy") if count else ():
            each = " ".join(f"{100 * mean(values):.1f}" for values in cells[data, 1])
            row += [percent(cells[data, 1]), each, percent(cells[data, 32])]
        row += [f"{np.median(times):.2f}", f"{max(memory):.2f} GB"] if times else "--"
        rows.append(row + [""] * (10 - len(row)))
    return table(["", "bases", "hard @1", "by base model", "hard @32", "easy @1", "by base model", "easy @32",
                  "time, of GRPO's", "peak memory"], rows)


def signal_table(world, bases: list[Records], arms: list[str], folder: str) -> str:
    """What a GRPO run learned from, in both halves of its steps: right responses of the policy, in groups that have
    wrong ones too, and injected trajectories, each with the sound ones among them (samples.jsonl); and how far it went
    from the base model, mean over base models (metrics.jsonl)."""
    rows = []
    for arm in arms:
        runs = [(b, b.base / "train" / folder / slug(arm)) for b in bases]
        runs = [(b, run) for b, run in runs if run.exists()]
        found = [s | {"problem": b.problems[s["id"]]} for b, run in runs
                 for s in common.read_jsonl(run / "samples.jsonl")]
        kl = {}  # step -> one of every base model
        for m in (m for _, run in runs for m in common.read_jsonl(run / "metrics.jsonl")):
            kl.setdefault(m["step"], []).append(m.get("kl", 0.0))
        last = max((s["step"] for s in found), default=0)
        for first, end in ((1, last // 2), (last // 2 + 1, last)):
            row = [arm, f"{first}-{end}"]
            for injected in (False, True):
                right = [s for s in found if first <= s["step"] <= end and s["reward"] and s["advantage"]
                         and s["injected"] == injected]
                sound = sum(world.is_sound(s["problem"], s["response"]) for s in right)
                row += [len(right), f"{100 * sound / len(right):.0f} %" if right else "-"]
            rows.append([*row, f"{mean(kl[end]):.2f}" if any(kl.get(end, ())) else "-"])  # DAPO has no reference
    return table(["", "steps", "hits with an advantage", "of them sound", "injected", "of them sound",
                  "KL after them"], rows)


# --- all of it -------------------------------------------------------------------------------------------------------
def everything(worlds: dict, bases: dict, groups: dict, arms: dict) -> str:
    """bases: {world: {folder: model}}; groups: names of variants; arms: {set: names}."""
    text = []
    for name, of in bases.items():
        world, records = worlds[name], [Records(base) for base in of]
        close, found = {g: [] for g in GROUPS}, []
        for b, path in zip(records, of.values()):
            args = argparse.Namespace(model=path, dtype="float32")
            model, tokenizer, *_ = common.load_model(args, torch.device("cpu"))
            for g in GROUPS:
                close[g] += trajectories(world, model, tokenizer, b, g)
            found += prefixes(model.get_input_embeddings().weight.detach(), tokenizer, b, "LatentRevise")
        zero = [len(b.variant("LatentRevise")) for b in records]
        each = f"{' + '.join(map(str, zero))} of {len(zero)} base models"
        text += [f"### {name}: {sum(zero)} zero-hit prompts, {each}\n", recovery(world, records, groups),
                 "#### By Frank-Wolfe steps (Figure 3)\n", step_table(by_step(world, tokenizer, records, "K 20")),
                 "#### Filters without a reasoning trace\n", filter_table(close),
                 "#### The hull\n", hull_table(found), equal_loss(world, tokenizer, records), likelihood_table(close)]
        for folder, title in SETS.items():
            on = [a for a in arms[folder] if any((b.base / "train" / folder / slug(a)).exists() for b in records)]
            if on:
                text += [f"#### {title}\n", training_table([b.base for b in records], on, folder),
                         signal_table(world, records, [a for a in on if "GRPO" in a], folder)]
    return "\n".join(text)


def head_of(file: Path) -> str:
    """docs/tables.md up to its line `## Tables`, below which the tables go. Raises UserError if there is none."""
    head, found, _ = file.read_text().partition("\n## Tables\n")
    if not found:
        raise common.UserError(f"{file}: has no line `## Tables`, below which the tables go")
    return head + found
