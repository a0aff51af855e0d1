"""The whole method on the toy world: `make demo`, or `make demo QUICK=1`. Ends with a report, OUT/report.md.

Runs the stage scripts as a user would, each command printed before it runs, and reports
1. recovery of zero-hit prompts by LatentRevise and by its controls, at the same number of continuations;
2. pass@1 and pass@32 on held-out hard problems after training on the same zero-hit prompts in several ways;
3. three recovered trajectories in full.
A stage that is complete is not run again, so an interrupted demo continues; `make clean` starts over.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval import table
from experiments import style
from helpers import common
from toy import sums as toy
from verifier import verify

ROOT = Path(__file__).resolve().parent.parent

# hard, test: problems; attempts: failed rollouts revised per prompt, for the training data; record: --record-every
FULL = {"hard": 300, "test": 150, "attempts": 3, "steps": 16, "batch": 16, "record": 2}
QUICK = {"hard": 48, "test": 24, "attempts": 2, "steps": 6, "batch": 8, "record": 5}
CONTINUATIONS = 8
LENGTH = "--max-new-tokens 160 --decode-rows 512"
PROBLEMS = f"{LENGTH} --instruction ''"
METHODS = {"LatentRevise": "", "hard prefix": "--revision-steps 0", "random vertices": "--vertices random",
           "permuted gold": "--gold permuted"}  # flags of revise.py


# --- running stages --------------------------------------------------------------------------------------------------
def run_one(command: str, quiet: bool, processes: int, seconds: dict[str, float]) -> None:
    launcher = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
                if processes > 1 else [])
    shown = f"torchrun --standalone --nproc-per-node {processes}" if processes > 1 else "python"
    print(f"\n$ {shown} {command}", flush=True)
    # Two processes of one thread each are faster than one of two threads at this size
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    start = time.time()
    done = subprocess.run([sys.executable, *launcher, *shlex.split(command)], cwd=ROOT, env=env, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None)
    if done.returncode:
        raise common.UserError(f"this command failed: {shown} {command}\n{done.stdout}{(done.stderr or '')[-3000:]}")
    # A stage that was complete before keeps the time it took then
    seconds[command] = max(seconds.get(command, 0.0), round(time.time() - start, 1))
    print(f"{done.stdout.strip()}\n[{seconds[command]:.0f} s]", flush=True)


def run(out: Path, *commands: str, processes: int = 1) -> dict[str, float]:
    """Run stage commands, two at a time, and return what each has taken in seconds (kept in OUT/seconds.json)."""
    if not Path.cwd().samefile(ROOT):
        raise common.UserError(f"the stages run in {ROOT}, and so must this: cd {ROOT}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "seconds.json"
    seconds = json.loads(file.read_text()) if file.exists() else {}
    with ThreadPoolExecutor(2) as pool:
        try:
            for job in [pool.submit(run_one, c, len(commands) > 1, processes, seconds) for c in commands]:
                job.result()
                common.write_atomic(file, json.dumps(dict(seconds), indent=1) + "\n")
        except BaseException:  # of what waits nothing is begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return seconds


# --- reading what they wrote -----------------------------------------------------------------------------------------
def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): also at 0 and n, where the bootstrap has no width."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def share(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"{100 * k / max(n, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({k}/{n})"


def recovery_row(name: str, records: list[dict], problems: dict[str, str], tokenizer, score: str = "reward") -> str:
    """One line of the recovery table, from the first failed rollout of every prompt. Self-correction is looked for in
    the continuation alone: the projected prefix may hold its words without their meaning."""
    continuations = [(r["id"], c) for r in records for c in r["continuations"]]
    hits = [(i, c) for i, c in continuations if c[score]]
    sound = [i for i, c in hits if toy.is_sound(problems[i], c["response"])]
    length = sum(len(c["ids"]) for _, c in continuations) / len(continuations)
    reflects = sum(toy.has_reflection(tokenizer.decode(c["ids"])) for _, c in continuations)
    gold = score == "reward"  # a wrong answer cannot be reached soundly
    return (f"| {name} | {share(len({i for i, _ in hits}), len(records))} | "
            f"{share(len(set(sound)), len(records)) if gold else '-'} | {length:.1f} | "
            f"{share(reflects, len(continuations))} | {share(len(sound), len(hits)) if hits and gold else '-'} |")


def not_reached(records: list[dict], rollouts: list[dict]) -> list[dict]:
    """Those steered toward an answer that no rollout of their prompt gave: the gold answer was given by none either."""
    given = {}
    for r in rollouts:
        given.setdefault(r["id"], []).append(r["response"])
    return [r for r in records if not any(verify(text, r["guide_answer"]) for text in given[r["id"]])]


def first_attempts(folder: Path) -> list[dict]:
    """The first record of every prompt in revised.jsonl. In a folder of rollout.py, fresh samples: one record a prompt,
    as if its samples were the continuations of an empty prefix."""
    seen = {}
    if (folder / "revised.jsonl").exists():
        for r in common.read_jsonl(folder / "revised.jsonl"):
            seen.setdefault(r["id"], r)
        return list(seen.values())
    for r in common.read_jsonl(folder / "rollouts.jsonl"):
        fresh = seen.setdefault(r["id"], r | {"losses": [], "gaps": [], "gammas": [], "vertices": [], "passes": 0,
                                              "kept": 1.0, "prefix_ids": [], "projected_ids": [],
                                              "continuations": []})
        fresh["continuations"].append({k: r[k] for k in ("response", "finish", "reward")} | {"ids": r["response_ids"]})
    return [r | {"recovered": any(c["reward"] for c in r["continuations"])} for r in seen.values()]


def marked(tokenizer, before: list[int], after: list[int]) -> str:
    """The projected prefix, with every run of changed tokens as «new».  A reader sees at once what the hull did."""
    text = "".join(tokenizer.decode([b]) if a == b else f"«{tokenizer.decode([b])}»" for a, b in zip(before, after))
    return text.replace("»«", "")


def example(tokenizer, record: dict, failed: dict, problem: str) -> str:
    c = next(c for c in sorted(record["continuations"], key=lambda c: -toy.is_sound(problem, c["response"]))
             if c["reward"])
    show = lambda text: text.replace("\n", "\\n")
    sound = "every step right" if toy.is_sound(problem, c["response"]) else "jumps to the answer: not sound"
    return "\n".join([
        f"**{problem}** gold {record['answer']}", "", "```",
        f"failed rollout   {show(failed['response'])}",
        f"prefix r         {show(tokenizer.decode(record['prefix_ids']))}",
        f"revised prefix   {show(marked(tokenizer, record['prefix_ids'], record['projected_ids']))}",
        f"continuation c^  {show(tokenizer.decode(c['ids'], skip_special_tokens=True))}",
        "```", f"({sound})", ""])


def figures(out: Path, records: dict[str, list[dict]], runs: dict[str, Path]) -> str:
    """Two figures, if matplotlib is installed (requirements-dev.txt). Returns Markdown."""
    try:
        plt = style.load()
    except common.UserError as e:
        return f"No figures: {e}.\n"
    revision_figure(plt, out, records)
    training_figure(plt, out, runs)
    return ("![Losses, recovered prompts and length of the continuation against Frank-Wolfe steps](revision.png)\n\n"
            "![Reward, zero-hit and rescued fraction against training steps](training.png)\n")


def revision_figure(plt, out: Path, records: dict[str, list[dict]]) -> None:
    """Losses, recovery and length of the continuation against Frank-Wolfe steps (the paper's Fig. 3)."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 2.9))
    ours = records["LatentRevise"]
    moved = [r for r in ours if r["losses"]]
    names = {"L_explore": "failed continuation, L_explore", "L_guide": "gold answer, L_guide", "L_NLL": "prefix, L_NLL"}
    for k, (name, colour, line) in enumerate(zip(names.values(), style.COLOURS, style.LINES)):
        at = [[r["losses"][i][k] for r in moved if i < len(r["losses"])]
              for i in range(max(len(r["losses"]) for r in moved))]
        left.plot(range(len(at)), [sum(v) / len(v) for v in at], color=colour, linestyle=line, label=name)
    left.set(title="the three losses (nats)", xlabel="Frank-Wolfe steps")
    left.set_ylim(top=1.45 * left.get_ylim()[1])
    left.legend(loc="upper right", fontsize=8)
    steps, n = sorted(map(int, ours[0]["curve"])), len(ours)
    found = [sum(any(r["curve"][str(s)]["rewards"]) for r in ours) for s in steps]
    low, high = zip(*(wilson_interval(k, n) for k in found))
    band = [100 * x for x in low], [100 * x for x in high]
    middle.fill_between(steps, *band, color=style.BLUE, alpha=0.2, linewidth=0)
    middle.plot(steps, [100 * k / n for k in found], "o-", color=style.BLUE, label="LatentRevise")
    for name, colour, line in (("fresh sampling", style.ORANGE, "--"), ("random vertices", style.GREEN, ":")):
        share = sum(r["recovered"] for r in records[name]) / len(records[name])
        middle.axhline(100 * share, color=colour, linestyle=line, label=name)
    middle.set(title=f"recovered, % of {n} prompts", xlabel="Frank-Wolfe steps", ylim=(0, None))
    middle.legend(loc="upper left", fontsize=8)
    at = [[sum(map(len, r["curve"][str(s)]["ids"])) / len(r["curve"][str(s)]["ids"]) for r in ours] for s in steps]
    right.plot(steps, [sum(x) / len(x) for x in at], "o-", color=style.BLUE)
    right.set(title="continuation, mean tokens", xlabel="Frank-Wolfe steps", ylim=(0, None))
    style.save(fig, out / "revision")


def training_figure(plt, out: Path, runs: dict[str, Path]) -> None:
    """Training curves of the arms that sample; those that revise come first and are alone in what is rescued."""
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 2.9), sharex=True)
    titles = {"reward": "pass rate of samples, %", "zero_hit": "groups without a hit, %",
              "rescued": "groups rescued, %"}
    arms = sorted(runs, key=lambda name: "Revise" not in name)
    for name, colour, line in zip(arms, style.COLOURS, style.LINES):
        rows = common.read_jsonl(runs[name] / "metrics.jsonl")
        for axis, key in zip(axes, titles if "Revise" in name else ("reward", "zero_hit")):
            axis.plot([r["step"] for r in rows], [100 * r[key] for r in rows], color=colour, linestyle=line, label=name)
    for axis, title in zip(axes, titles.values()):
        axis.set(title=title, xlabel="training step", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), fontsize=9)
    style.save(fig, out / "training")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller run, at most 2 minutes on 2 cores")
    parser.add_argument("--model", default="toy/sums_model", help="base model, made by toy/sums.py")
    parser.add_argument("--lr", default="3e-4", help="of every training run: the toy model is small")
    parser.add_argument("--out", help="output folder; out/demo or out/demo-quick if not given")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    begun = time.time()
    size = QUICK if args.quick else FULL
    out = Path(args.out or ("out/demo-quick" if args.quick else "out/demo"))
    out.mkdir(parents=True, exist_ok=True)
    model = f"--model {args.model}"

    # === zero-hit prompts ===
    run(out, f"-m toy.sums data --out {out}/data")
    run(out, f"rollout.py {model} --data {out}/data/hard.jsonl --limit {size['hard']} -n 32 {PROBLEMS} "
             f"--out {out}/rollouts", processes=2)

    # === recovery: the method and its controls, same prompts, same number of continuations ===
    revise = (f"revise.py {model} --rollouts {out}/rollouts --continuations {CONTINUATIONS} {LENGTH} "
              "--revise-tokens 4096")
    template = f"--template '{toy.TEMPLATE}'"
    zero = f"{out}/rollouts/zero_hit.jsonl"
    methods = ["LatentRevise", "fresh sampling", *list(METHODS)[1:]]  # in the order of the table
    folders = {name: out / "revise" / name.replace(" ", "-").lower() for name in methods}
    commands = {name: f"{revise} {template} {flags or '--record-every ' + str(size['record'])} "
                      f"--attempts {1 if flags else size['attempts']} --out {folders[name]}"
                for name, flags in METHODS.items()}
    run(out, commands.pop("LatentRevise"), processes=2)
    run(out, *commands.values(), f"rollout.py {model} --data {zero} -n {CONTINUATIONS} --seed 2 {PROBLEMS} "
                                 f"--out {folders['fresh sampling']}")

    # === training: the same zero-hit prompts for every arm ===
    grpo = (f"train_grpo.py {model} --data {zero} {PROBLEMS} --batch-size {size['batch']} "
            f"--steps {size['steps']} --lr {args.lr} --train-tokens 8192")
    sft = f"train_sft.py {model} --steps {size['steps']} --batch-size 64 --lr {args.lr} --train-tokens 8192"
    fresh = CONTINUATIONS * size["attempts"]  # rejection sampling has as many samples as the revision had continuations
    samples = out / "rft-samples" / "rollouts.jsonl"
    if not args.quick:
        run(out, f"rollout.py {model} --data {zero} -n {fresh} --seed 1 {PROBLEMS} --out {out}/rft-samples",
            processes=2)
    method = f"--revise {template} --revise-tokens 4096"
    arms = {
        "RFT": f"{sft} --data {samples}",
        "GRPO N=8": grpo, "GRPO N=16": f"{grpo} --group-size 16", "DAPO": f"{grpo} --algo dapo",
        "SFT+LatentRevise": f"{sft} --data {folders['LatentRevise']}/recovered.jsonl",
        "GRPO+LatentRevise": f"{grpo} {method}"}
    if args.quick:
        arms = {name: arms[name] for name in ("GRPO N=8", "SFT+LatentRevise", "GRPO+LatentRevise")}
    # What only a world that can check every step allows: the same training on the recovered trajectories that are sound
    problems = {p["id"]: p["problem"] for p in common.read_jsonl(f"{out}/data/hard.jsonl")}
    sound = [r for r in common.read_jsonl(folders["LatentRevise"] / "recovered.jsonl")
             if toy.is_sound(problems[r["id"]], r["response"])]
    if sound and not args.quick:
        common.write_atomic(out / "recovered-sound.jsonl", "".join(map(common.to_line, sound)))
        arms["SFT+LatentRevise, sound only"] = f"{sft} --data {out}/recovered-sound.jsonl"
    # What every world allows: only what the policy finds likely after the projected prefix
    likely, least = out / "revise" / "likely", "--min-logprob -0.5"
    if not args.quick:
        run(out, f"{revise} {template} {least} --attempts {size['attempts']} --out {likely}", processes=2)
        arms["GRPO+LatentRevise, likely only"] = f"{grpo} {method} {least}"
        if common.read_jsonl(likely / "recovered.jsonl"):
            arms["SFT+LatentRevise, likely only"] = f"{sft} --data {likely}/recovered.jsonl"
    names = {name: name.lower().replace(",", "").replace(" ", "-").replace("=", "").replace("+", "-") for name in arms}
    if "RFT" in arms and not any(r["reward"] for r in common.read_jsonl(samples)):
        del arms["RFT"]  # fresh sampling found nothing: there is no RFT model, and the table says so
    if not common.read_jsonl(folders["LatentRevise"] / "recovered.jsonl"):
        del arms["SFT+LatentRevise"]
    train = {name: f"{command} --out {out}/{names[name]}" for name, command in arms.items()}
    seconds = run(out, *train.values())

    # === pass@k on held-out hard problems ===
    run(out, f"eval.py --model {args.model} {' '.join(f'{out}/{names[name]}/model' for name in train)} --data "
             f"{out}/data/test_hard.jsonl --limit {size['test']} -n 32 --k 1 32 {PROBLEMS} --out {out}/eval",
        processes=2)

    # === report ===
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / args.model if not Path(args.model).exists() else args.model)
    records = {name: first_attempts(folder) for name, folder in folders.items()}
    rows = [recovery_row(name, r, problems, tokenizer) for name, r in records.items()]
    wrong = not_reached(records["permuted gold"], common.read_jsonl(out / "rollouts" / "rollouts.jsonl"))
    rows.append(recovery_row("permuted gold, scored on it", wrong, problems, tokenizer, "guide_reward"))
    results = json.loads((out / "eval" / "results.json").read_text())
    labels = ["base", *train]
    for r, label in zip(results, labels):
        r["model"] = label
    lines = table(results, [1, 32]).splitlines()
    spent = ["seconds", "---", "0", *(f"{seconds[c]:.0f}" for c in train.values())]
    missing = [f"| {name} | nothing to train on | | |" for name in names if name not in train]
    training = "\n".join([f"{line} {s} |" for line, s in zip(lines, spent)] + missing)
    every = common.read_jsonl(folders["LatentRevise"] / "revised.jsonl")
    failed = {(r["id"], r["sample"]): r for r in common.read_jsonl(out / "rollouts" / "rollouts.jsonl")}
    good = sorted((r for r in every if r["recovered"]), key=lambda r: (
        -max(toy.is_sound(problems[r["id"]], c["response"]) for c in r["continuations"] if c["reward"]), r["kept"]))
    shown = [example(tokenizer, r, failed[r["id"], r["sample"]], problems[r["id"]]) for r in good[:2] + good[2:][-1:]]
    curves = {name: out / names[name] for name in train if "GRPO" in name or name == "DAPO"}
    summary = json.loads((out / "rollouts" / "summary.json").read_text())
    report = f"""# LatentRevise on the toy world

{summary['zero_hit']} of {summary['problems']} hard problems are zero-hit at N = 32
(pass rate {100 * summary['pass_rate']:.2f} %).

## Recovery of zero-hit prompts

One failed rollout per prompt, {CONTINUATIONS} continuations; shares with 95 % interval. A right continuation is sound
when its last pass is a complete and arithmetically right chain to the answer: the others jump to it. The last row
leaves out the prompts of which some rollout had given the wrong answer anyway. Intervals of the last two columns take
continuations of a prompt as independent: they are too narrow.

| | prompts recovered | soundly | continuation (tokens) | self-correction | sound of the right |
|---|---|---|---|---|---|
{chr(10).join(rows)}

## Training on the zero-hit prompts

pass@k on {size['test']} held-out hard problems (percent, 95 % bootstrap interval), {size['steps']} optimizer steps
each, and the seconds of the training run (two runs at a time, one core each).

{training}

## Recovered trajectories

Changed tokens of the prefix are «marked».

{chr(10).join(shown) or 'None was recovered.'}
## Figures

{figures(out, records, curves)}"""
    common.write_atomic(out / "report.md", report)
    print("\n" + re.sub(r"!\[.*?\]\((.*?)\)", rf"{out}/\1", report))
    print(f"{out}/report.md, {time.time() - begun:.0f} s")


if __name__ == "__main__":
    common.run_script(get_args, main)
