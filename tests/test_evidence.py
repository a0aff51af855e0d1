"""evidence.py, tables.py and plot.py, on a small folder written by hand, so that every number is known."""
import argparse
import importlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, parsed, read
from conftest import stage as run_stage
from transformers import AutoTokenizer

import revise
from experiments import demo, evidence, plot, style, tables
from experiments.benches import hours
from experiments.demo import wilson_interval
from helpers import common
from helpers.common import UserError, to_line
from toy import sums as toy

TOKENIZER = toy.build_tokenizer(toy)
PROBLEMS = {"hard-0": ("17+5?", "22"), "hard-1": ("28+4?", "32"), "hard-2": ("19+9+1?", "29"),
            "hard-3": ("11+9?", "20")}
SOUND = {"hard-0": "17+5=22. So the answer is \\boxed{22}.", "hard-1": "28+4=32. So the answer is \\boxed{32}."}
JUMPS = {"hard-0": "17+5=12. So the answer is \\boxed{22}.", "hard-2": "19+9=18;18+1=19. So the answer is \\boxed{29}."}


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def record(name: str, texts: list[str], right: list[int], curve: dict | None = None, losses: int = 10) -> dict:
    """A line of revised.jsonl whose prefix is the first token of each text."""
    problem, gold = PROBLEMS[name]
    conts = [{"ids": ids(t)[1:], "finish": "stop", "response": t, "soft_reward": x, "reward": x}
             for t, x in zip(texts, right)]
    return {"id": name, "sample": 0, "answer": gold, "prefix_len": 1, "recovered": any(right),
            "losses": [[-1.0, 5.0 - k / 10, 1.0] for k in range(losses)],
            "gaps": [float(10 + k) for k in range(losses)], "gammas": [0.25] * losses, "passes": losses, "kept": 1.0,
            "prompt_ids": ids(toy.render(TOKENIZER, problem)), "prefix_ids": ids(texts[0])[:1],
            "projected_ids": ids(texts[0])[:1], "continuations": conts, "curve": curve or {},
            "vertices": [[7]] + [[revise.STAYS]] * (losses - 1)}


def write(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(to_line, rows)))


@pytest.fixture
def base(tmp_path):
    """OUT/toy/base0: four prompts; the method recovers two, one of them soundly, as does every other variant."""
    folder = tmp_path / "toy" / "base0"
    problems = [{"id": i, "problem": p, "answer": a} for i, (p, a) in PROBLEMS.items()]
    write(folder / "data" / "hard.jsonl", problems)
    write(folder / "data" / "train.jsonl", [{"id": "train-0", "problem": "10+1?", "answer": "11"}])
    wrong = "17+5=12. So the answer is \\boxed{12}."
    write(folder / "rollouts" / "rollouts.jsonl", [
        {"id": i, "sample": s, "response": wrong, "response_ids": ids(wrong), "reward": 0}
        for i in PROBLEMS for s in (0, 1)])
    records = [record("hard-0", [SOUND["hard-0"], JUMPS["hard-0"]], [1, 1]),
               record("hard-1", [SOUND["hard-1"][:-3] + "3}.", wrong], [0, 0]),
               record("hard-2", [JUMPS["hard-2"], wrong], [1, 0]), record("hard-3", [wrong, wrong], [0, 0])]
    steered = [r | {"guide_answer": g, "continuations": [
        c | {"guide_reward": int(g == "12" and "{12}" in c["response"])} for c in r["continuations"]]}
        for r, g in zip(records, ("12", "12", "7", "7"))]
    curve = lambda r, upto: {str(s): {"rewards": [c["reward"] if s >= 10 else 0 for c in r["continuations"]],
                                      "ids": [c["ids"] for c in r["continuations"]]}
                             for s in range(0, upto + 1, upto // 10)}
    for group in evidence.RECOVERY.values():
        for name, flags in group.items():
            rows = steered if name == "permuted gold" else records
            if name == "K 20":
                rows = [record(r["id"], [c["response"] for c in r["continuations"]],
                               [c["reward"] for c in r["continuations"]], curve(r, 20), 20) for r in records]
            elif name == tables.ADAM:  # falls by 0.7 a step: 4.3 after one is nearer to 4.0, Frank-Wolfe's after ten
                losses = [[-1.0, 5.0 - 0.7 * k, 1.0] for k in range(10)]
                rows = [r | {"curve": curve(r, 10), "losses": losses} for r in records]
            place = folder / "revise" / tables.slug(name)
            if not flags.startswith("--"):  # of rollout.py, or a baseline
                write(place / "rollouts.jsonl", [
                    r | c | {"sample": m, "response_ids": c["ids"]} for r in rows
                    for m, c in enumerate(r["continuations"])])
                continue
            write(place / "revised.jsonl", rows)
            write(place / "recovered.jsonl", [
                {"id": r["id"], "response": c["response"], "reward": 1}
                for r in rows for c in r["continuations"] if c["reward"]])
    return folder


def test_a_recovery_row_counts_prompts_and_sound_ones(base):
    records = tables.Records(base).variant("LatentRevise")
    cells = tables.recovery_row(toy, "x", [records, records[:2]])[1:]
    assert cells[:4] == [demo.share(3, 6), "50.0 50.0", demo.share(2, 6), "25.0 50.0"]
    assert cells[4].endswith("(2/5)") and cells[4].startswith("40.0 %")  # hard-0: 1 of 2, twice; hard-2: 0 of 1
    assert cells[5] == "10.0" and cells[8] == "100 %"
    r = records[0]
    trunk = len(r["prompt_ids"]) + r["failed_tokens"] + 6  # template and gold
    assert tables.cost(r) == trunk * 20 + sum(len(c["ids"]) for c in r["continuations"])


def test_permuted_gold_is_scored_on_prompts_that_had_not_reached_it(base):
    text = tables.recovery(toy, [tables.Records(base)], evidence.RECOVERY)
    # all rollouts say 12, so only the two steered toward 7 count, and none says 7
    assert f"| permuted gold, scored on it | {demo.share(0, 2)} |" in text
    assert text.count("\n| LatentRevise |") == 1
    assert all(f"\n| {name} |" in text for group in evidence.RECOVERY.values() for name in group)


def test_a_share_of_continuations_has_the_interval_of_its_prompts():
    parts, wholes = [8, 0, 0, 8, 0, 0, 8, 0, 0, 8], [8] * 10  # a prompt has all or nothing
    low, high = (float(x) for x in tables.share_of(parts, wholes).split("[")[1].split("]")[0].split(", "))
    rng = np.random.default_rng(1)
    means = [np.mean([parts[i] / 8 for i in rng.integers(0, 10, 10)]) for _ in range(20_000)]
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]) * 100, abs=10.1)  # steps of ten percent
    assert high - low > 1.5 * 100 * (wilson_interval(32, 80)[1] - wilson_interval(32, 80)[0])
    none, three = tables.share_of([0, 0, 0], [8, 0, 8]), wilson_interval(0, 2)
    assert none == f"0.0 % [0.0, {100 * three[1]:.1f}] (0/16)"


def test_fig3_steps(base):
    rows = tables.by_step(toy, TOKENIZER, [tables.Records(base)], "K 20")
    assert [r["step"] for r in rows] == list(range(0, 21, 2))
    assert [r["recovered"] for r in rows] == [0] * 5 + [2] * 6 and [r["sound"] for r in rows] == [0] * 5 + [1] * 6
    assert rows[10]["losses"] == [] and rows[5]["losses"] == pytest.approx([-1, 4, 1]) and rows[0]["n"] == 4
    assert "| 20 |" in tables.step_table(rows)


def test_hull_against_unconstrained_at_equal_loss(base):
    lines = tables.equal_loss(toy, TOKENIZER, [tables.Records(base)]).splitlines()
    hull, free = ([c.strip() for c in line.split("|")[2:-1]] for line in lines[2:4])
    assert hull[:4] == ["10.0", "3.10", demo.share(2, 4), demo.share(1, 4)]
    assert free[:4] == ["1.0", "3.40", demo.share(0, 4), demo.share(0, 4)]  # its curve has no hit before step 10
    assert lines[-1] == ("Prompts recovered by one alone: Frank-Wolfe 2, Adam 0; soundly: 1 and 0. "
                         "Left out, since Adam never gets so low: 0.")


def test_filters_count_trajectories_and_prompts():
    found = [{"prompt": "a", "sound": True, "again": 2, "leaks": False, "hard": [-0.1, -0.1]},
             {"prompt": "a", "sound": False, "again": 0, "leaks": False, "hard": [-2.0, -2.0]},
             {"prompt": "b", "sound": False, "again": 0, "leaks": True, "hard": [-0.4, -0.4]}]
    rows = [[c.strip() for c in line.split("|")[3:-1]] for line in tables.filter_table({"x": found}).splitlines()[2:]]
    assert [r[0].split("(")[1] for r in rows] == ["3/3)", "1/3)", "2/3)", "2/3)"]
    assert [r[1].split("(")[1] for r in rows] == ["1/3)", "1/1)", "1/2)", "1/2)"]
    assert [r[2:] for r in rows] == [["2", "1 of 1"], ["1", "1 of 1"], ["1", "1 of 1"], ["2", "1 of 1"]]


def test_likelihood_of_continuations():
    found = [{"sound": True, "soft": [-1.0, -0.5], "hard": [-0.25, -9.0]},
             {"sound": False, "soft": None, "hard": [-7.0, -0.75, -1.25]}]
    lines = tables.likelihood_table({"x": found}).splitlines()[2:]
    assert lines == ["| x | 2 | -0.75 | -1.0 | -3.65 | -8.0 |", "| x, sound | 1 | -0.75 | -1.0 | -4.62 | -9.0 |"]


def train_arm(base, arm: str, folder: str, model: str, hits: list[int], **metrics) -> None:
    """An arm's log, and the evaluation of its model: 32 samples of two problems, `hits` of them right."""
    if metrics:
        write(base / "train" / folder / tables.slug(arm) / "metrics.jsonl", [metrics, metrics])
    for data in ("test_hard", "test_easy"):
        write(base / "eval" / folder / model / data / "rollouts.jsonl", [
            {"id": str(i), "sample": s, "reward": int(s < n)} for i, n in enumerate(hits) for s in range(32)])
    first = base / "eval" / folder / "results.json"
    if not first.exists():
        first.write_text(json.dumps([{"model": model}]))


def test_training_table_is_made_of_samples_and_logs(base):
    train_arm(base, "base", "hard", "toy/sums_model", [0, 0])
    train_arm(base, "GRPO N=8", "hard", "grpo-n-8-model", [32, 0], seconds_sample=1.0, seconds_update=2.0,
              memory_gb=0.5)
    train_arm(base, "RFT", "hard", "rft-model", [16, 1], seconds=6.0, memory_gb=0.7)
    (base.parent / "seconds.json").write_text(json.dumps({"rollout.py --out x/base0/rft-samples": 9.0}))
    text = tables.training_table([base], ["RFT", "GRPO N=8", "DAPO"], "hard")
    rows = {c[1].strip(): [x.strip() for x in c[2:-1]] for c in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["base"][1].startswith("0.0 [0.0, ") and rows["base"][-2:] == ["-", "-"]
    assert rows["GRPO N=8"][1].startswith("50.0 [") and rows["GRPO N=8"][-2:] == ["1.00", "0.50 GB"]
    assert rows["RFT"][1].startswith("26.6 [") and rows["RFT"][3].startswith("100.0 [")
    assert rows["RFT"][-2:] == ["5.00", "0.70 GB"]  # 2 x 6 s, and 9 s of two processes, of 2 x 3 s
    assert rows["DAPO"][0] == "nothing to train on"


def test_signal_table_tells_sound_injected_trajectories_apart(base):
    rows = [{"step": 1, "id": "hard-0", "response": SOUND["hard-0"], "reward": 1, "advantage": 2.0, "injected": True},
            {"step": 1, "id": "hard-2", "response": JUMPS["hard-2"], "reward": 1, "advantage": 2.0, "injected": True},
            {"step": 2, "id": "hard-1", "response": SOUND["hard-1"], "reward": 1, "advantage": 1.0, "injected": False},
            {"step": 2, "id": "hard-2", "response": JUMPS["hard-2"], "reward": 1, "advantage": 0.0, "injected": False},
            {"step": 2, "id": "hard-1", "response": "x", "reward": 0, "advantage": -1.0, "injected": False}]
    write(base / "train" / "hard" / tables.slug("GRPO+LatentRevise") / "samples.jsonl", rows)
    write(base / "train" / "hard" / tables.slug("GRPO+LatentRevise") / "metrics.jsonl", [
        {"step": 1, "kl": 0.0}, {"step": 2, "kl": 0.25}])
    lines = tables.signal_table(toy, [tables.Records(base)], ["GRPO+LatentRevise"], "hard").splitlines()[2:]
    assert lines == ["| GRPO+LatentRevise | 1-1 | 0 | - | 2 | 50 % | - |",
                     "| GRPO+LatentRevise | 2-2 | 1 | 100 % | 0 | - | 0.25 |"]


def test_every_command_of_evidence_is_taken_by_its_stage(base, monkeypatch):
    commands = []
    monkeypatch.setattr(demo, "run", lambda out, *found, processes=1: commands.extend(found))
    write(base / "rft-samples" / "rollouts.jsonl", [{"id": "hard-0", "reward": 1}])
    world = toy, base.parent, {base: (0, "toy/sums_model")}, evidence.FULL
    evidence.prepare(*world)
    for stage in (evidence.recover, evidence.train):
        few = len(commands)
        stage(*world, everything=False)
        few, before = len(commands) - few, len(commands)
        stage(*world, everything=True)
        assert len(commands) - before > few and set(commands[before - few:before]) - set(commands[before:]) <= {
            c for c in commands if "/eval" in c}  # a model more to evaluate
    assert len(commands) > 60
    runs = list(map(parsed, commands))
    hints = {a.hint for s, a in runs if s.startswith("baselines.")}
    assert {h.replace("{answer}", "72") for h in hints} == {" So the answer is \\boxed{72}. Check your work."}
    assert TOKENIZER.unk_token_id not in ids(hints.pop().replace("{answer}", "72"))
    equal = [a for s, a in runs if s == "rollout.py" and a.out.endswith("equal-compute")]
    ours = tables.Records(base).variant("LatentRevise")
    fresh = sum(len(c["ids"]) for r in ours for c in r["continuations"]) / 8  # fresh sampling wrote the same
    assert equal[0].n == round(sum(map(tables.cost, ours)) / 4 / fresh)
    sound = [json.loads(line)["response"] for line in (base / "recovered-sound.jsonl").read_text().splitlines()]
    assert sound == [SOUND["hard-0"]]


def complete(base) -> None:
    """What evidence.py has written about a base model when it is done, but for the arms that found nothing to learn."""
    train_arm(base, "base", "hard", "toy/sums_model", [0, 1])
    for arm in plot.ARMS:
        train_arm(base, arm, "hard", f"{tables.slug(arm)}-model", [1, 1], reward=0.5, rescued=0.1, seconds=1.0,
                  memory_gb=1.0, step=1)
        write(base / "train" / "hard" / tables.slug(arm) / "samples.jsonl", [])


def test_facts_of_trajectories_and_prefixes_by_hand(base):
    args = argparse.Namespace(model=str(ROOT / "toy/sums_model"), dtype="float32")
    model, tokenizer, *_ = common.load_model(args, torch.device("cpu"))
    W, records = model.get_input_embeddings().weight.detach(), tables.Records(base)
    found = tables.trajectories(toy, model, tokenizer, records, "LatentRevise")
    assert [(t["prompt"][1], t["sound"]) for t in found] == [("hard-0", True), ("hard-0", False), ("hard-2", False)]
    assert [t["leaks"] for t in found] == [False] * 3  # hard-1 leaks, but is not recovered
    r = records.variant("LatentRevise")[0]
    own, rest = r["prefix_ids"][0], r["continuations"][0]["ids"]
    for key, row in (("soft", 0.75 * W[own] + 0.25 * W[7]), ("hard", W[own])):
        x = torch.cat([W[torch.tensor(r["prompt_ids"])], row[None]])
        by_hand = []
        for token in rest:  # one at a time
            with torch.no_grad():
                by_hand.append(float(model(inputs_embeds=x[None]).logits[0, -1].log_softmax(-1)[token]))
            x = torch.cat([x, W[token][None]])
        assert found[0][key] == pytest.approx(by_hand, abs=1e-4)
    fact = tables.prefixes(W, tokenizer, records, "LatentRevise")[0]
    moved = float(0.25 * (W[own] - W[7]).norm() / W[own].norm())
    assert fact["moved"] == pytest.approx(moved, rel=1e-4)
    E = 0.75 * W[own] + 0.25 * W[7]
    nearest = min(float((E - W[i]).norm()) for i in range(len(tokenizer)))
    assert fact["distance"] == pytest.approx(nearest / float(W[own].norm()), rel=1e-4)
    assert fact["kept"]["l2"] == float(min(range(len(tokenizer)), key=lambda i: float((E - W[i]).norm())) == own)
    assert "| prefixes | 1 | 1 |" in tables.hull_table([fact, fact | {"recovered": False}])


def test_tables_of_what_is_complete_go_into_results(base, tmp_path, monkeypatch, capsys):
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    monkeypatch.setattr(demo, "ROOT", root)
    run = lambda *argv: evidence.main(evidence.get_args(["--out", str(tmp_path), "--worlds", "toy", "--tables", *argv]))
    with pytest.raises(UserError, match="is complete"):
        run("--seeds", "0")
    complete(base)
    (root / "docs" / "tables.md").write_text("# Results\n")
    with pytest.raises(UserError, match="## Tables"):
        run("--seeds", "0", "--write")
    (root / "docs" / "tables.md").write_text("# Results\n\nfound\n\n## Tables\n\noutdated\n")
    monkeypatch.chdir(ROOT)
    run("--seeds", "0", "1", "--write")
    assert f"left out, not complete: {tmp_path}/toy/base1" in capsys.readouterr().out
    text = (root / "docs" / "tables.md").read_text()
    assert text.startswith("# Results\n\nfound\n\n## Tables\n\n### toy: 4 zero-hit prompts")
    assert "outdated" not in text
    assert text.endswith((tmp_path / "tables.md").read_text())
    figures = [f"evidence-{name}.{kind}" for name in ("steps", "training", "variants") for kind in ("png", "svg")]
    assert sorted(p.name for p in (root / "docs").iterdir()) == [*figures, "tables.md"]
    with pytest.raises(UserError, match="--quick"):
        run("--quick", "--write")


def test_figures_show_what_is_in_the_tables(base, tmp_path, monkeypatch):
    complete(base)
    drawn = {}

    records = {"toy": (toy, TOKENIZER, [tables.Records(base)])}
    plt = style.load()
    saved = plt.Figure.savefig
    monkeypatch.setattr(plt.Figure, "savefig",
                        lambda fig, path, **k: (drawn.update({Path(path).name: fig}), saved(fig, path, **k)))
    plot.steps(plt, records, tmp_path)
    plot.variants(plt, records, tmp_path)
    plot.training(plt, {"toy": [base]}, tmp_path)
    line = {x.get_label(): list(x.get_ydata()) for x in drawn["evidence-steps.png"].axes[0].lines}
    assert line["right answer"] == [0] * 5 + [50] * 6 and line["right reasoning too"] == [0] * 5 + [25] * 6
    points = [(float(x.get_xdata()[0]), round(float(x.get_ydata()[0]), 2)) for x in
              drawn["evidence-variants.png"].axes[0].lines if len(x.get_xdata()) == 1]
    assert points[-2:] == [(50.0, len(plot.VARIANTS) - 1 + 0.18), (25.0, len(plot.VARIANTS) - 1 - 0.18)]
    means = [x for x in drawn["evidence-training.png"].axes[0].lines if x.get_linewidth() > 1]
    assert [list(x.get_ydata()) for x in means] == [[50, 50]] * len(plot.ARMS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        style.load()


def test_the_picture_of_the_method_is_a_run(tmp_path):
    """That of docs/toy.md: cut, vertices and projection; draws may differ between processors."""
    problem = {"id": plot.PROBLEM, "problem": plot.PROBLEM, "answer": "61"}
    (tmp_path / "one.jsonl").write_text(json.dumps(problem))
    shared = ["--model", ROOT / "toy/sums_model", "--max-new-tokens", 160, "--device", "cpu"]
    run_stage("rollout.py", *shared, "--data", tmp_path / "one.jsonl", "-n", 4, "--instruction", "",
              "--out", tmp_path / "r")
    failed = next(r for r in read(tmp_path / "r" / "rollouts.jsonl") if r["response"] == f"{plot.PREFIX} {plot.FAILED}")
    (tmp_path / "failed.jsonl").write_text(json.dumps(failed))
    run_stage("revise.py", *shared, "--rollouts", tmp_path / "failed.jsonl", "--template", toy.TEMPLATE,
              "--out", tmp_path / "v")
    record, = read(tmp_path / "v" / "revised.jsonl")
    text = AutoTokenizer.from_pretrained(ROOT / "toy/sums_model").decode
    assert text(record["prefix_ids"]) == text(record["projected_ids"]) == plot.PREFIX
    assert text(record["prefix_ids"][plot.FOLLOWED]) == "54" and record["recovered"]
    assert [text(v[plot.FOLLOWED]) for v in record["vertices"]] == plot.VERTICES
    plot.method(style.load(), tmp_path)
    assert {f.suffix for f in tmp_path.glob("method.*")} == {".svg", ".png"}


def test_a_failed_command_ends_the_others(monkeypatch, tmp_path):
    begun = []

    def one(command, *_):
        begun.append(command)
        if command == "b":
            raise UserError("b")
        time.sleep(0.1)

    monkeypatch.setattr(demo, "run_one", one)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(1))
    with pytest.raises(UserError, match="b"):
        demo.run(tmp_path, *"abcdefgh")
    assert begun[:2] == ["a", "b"] and len(begun) < 8
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cd "):
        demo.run(tmp_path, "a")


ORDER = ["rollout, N = 32", "revise, one attempt a prompt", "SFT", "GRPO N=8", "GRPO N=16",
         "DAPO, two rounds of sampling", "OPSD", "GRPO+LatentRevise, all zero-hit", "GRPO+LatentRevise, full set",
         "evaluation of a model"]  # rows of the table


def test_hours_in_the_recipes_are_those_computed():
    text = (ROOT / "recipes" / "README.md").read_text().split("## GPU-hours, computed")[1].split("## Memory")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    for column, name in enumerate(hours.QWEN, 1):
        low, high = hours.hours(name, host=False), hours.hours(name, host=True)
        assert len(low) == len(rows)
        for row, run in zip(rows, ORDER):
            assert row[0].startswith(run.split(",")[0].replace(" of a model", " of one model"))
            written = [x.strip() for x in row[column].replace("below 0.1", "0.0").split(" - ")]
            assert written == [f"{x:.1f}" for x in dict.fromkeys((low[run], high[run]))], run
    more = lambda run: [100 * (h[run] / h["GRPO N=8"] - 1) for h in (
        hours.hours(name, host) for name in hours.QWEN for host in (False, True))]
    added = [round(x) for run in ("GRPO+LatentRevise, all zero-hit", "GRPO+LatentRevise, full set")
             for x in (min(more(run)), max(more(run)))]
    assert "adds {} to {} % to GRPO by this count, and on the full set at least {} to {} %".format(*added) in text


def test_hours_of_an_update_are_eight_operations_a_parameter_and_token():
    root, block = hours.parameters(hours.QWEN["Qwen2.5-1.5B"])
    seconds = 512 * 8 * 1150 * 8 * (root + 28 * block) / (0.5 * 790e12)
    sampling = 512 * 8 * 1000 / 512 * (2 * (root + 28 * block) + 512 * 650 * 28 * 2 * 256 * 2) / (0.6 * 4.8e12)
    computed = hours.hours("Qwen2.5-1.5B", host=False)["GRPO N=8"]
    assert computed == pytest.approx(100 * (seconds + sampling) / 3600, abs=0.05)
