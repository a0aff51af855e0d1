"""evidence.py, tables.py and plot.py, on a small folder written by hand, so that every number is known."""
import argparse
import functools
import importlib
import json
import shlex

import numpy as np
import pytest
from conftest import ROOT

import demo
import evidence
import plot
import tables
import toy
from benches import hours
from common import UserError, to_line
from eval import wilson_interval

TOKENIZER = toy.build_tokenizer(toy)
PROBLEMS = {"hard-0": ("17+5?", "22"), "hard-1": ("28+4?", "32"), "hard-2": ("19+9+1?", "29"),
            "hard-3": ("11+9?", "20")}
SOUND = {"hard-0": "17+5=22. So the answer is \\boxed{22}.", "hard-1": "28+4=32. So the answer is \\boxed{32}."}
JUMPS = {"hard-0": "17+5=12. So the answer is \\boxed{22}.", "hard-2": "19+9=18;18+1=19. So the answer is \\boxed{29}."}


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def record(name: str, texts: list[str], right: list[int], curve: dict | None = None, losses: int = 10, **more) -> dict:
    """A line of revised.jsonl whose prefix is the first token of each text."""
    problem, gold = PROBLEMS[name]
    conts = [{"ids": ids(t)[1:], "finish": "stop", "response": t, "soft_reward": x, "reward": x}
             for t, x in zip(texts, right)]
    return {"id": name, "sample": 0, "answer": gold, "prefix_len": 1, "recovered": any(right),
            "losses": [[-1.0, 5.0 - k / 10, 1.0] for k in range(losses)],
            "gaps": [float(10 + k) for k in range(losses)], "gammas": [0.1] * losses, "passes": losses, "kept": 1.0,
            "prompt_ids": ids(toy.render(TOKENIZER, problem)), "prefix_ids": ids(texts[0])[:1],
            "projected_ids": ids(texts[0])[:1], "continuations": conts, "curve": curve or {}} | more


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
        for name in group:
            rows = steered if name == "permuted gold" else records
            if name == "K 20":
                rows = [record(r["id"], [c["response"] for c in r["continuations"]],
                               [c["reward"] for c in r["continuations"]], curve(r, 20), 20) for r in records]
            elif name == tables.ADAM:  # falls by 1 a step: after one it is where steps of 0.1 are after ten, at 4.0
                losses = [[-1.0, 5.0 - k, 1.0] for k in range(10)]
                rows = [r | {"curve": curve(r, 10), "losses": losses} for r in records]
            write(folder / "revise" / tables.slug(name) / "revised.jsonl", rows)
            write(folder / "revise" / tables.slug(name) / "recovered.jsonl", [
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
    assert hull[:3] == ["10", demo.share(2, 4), demo.share(1, 4)]
    assert free[:3] == ["1.0", demo.share(0, 4), demo.share(0, 4)]  # its curve has no hit before step 10
    assert lines[-1] == "Prompts recovered by one alone: Frank-Wolfe 2, Adam 0; soundly: 1 and 0."


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
    train_arm(base, "base", "hard", "toy_model", [0, 0])
    train_arm(base, "GRPO N=8", "hard", "grpo-n-8-model", [32, 0], seconds_sample=1.0, seconds_update=2.0,
              memory_gb=0.5)
    train_arm(base, "RFT", "hard", "rft-model", [16, 1], seconds=6.0, memory_gb=0.7)
    text = tables.training_table([base], ["RFT", "GRPO N=8", "DAPO"], "hard")
    rows = {c[1].strip(): [x.strip() for x in c[2:-1]] for c in (line.split("|") for line in text.splitlines()[2:])}
    assert rows["base"][1].startswith("0.0 [0.0, ") and rows["base"][-2:] == ["-", "-"]
    assert rows["GRPO N=8"][1].startswith("50.0 [") and rows["GRPO N=8"][-2:] == ["1.00", "0.50 GB"]
    assert rows["RFT"][1].startswith("26.6 [") and rows["RFT"][3].startswith("100.0 [")
    assert rows["RFT"][-2:] == ["2.00", "0.70 GB"]
    assert rows["DAPO"][0] == "nothing to train on"


def test_signal_table_tells_sound_injected_trajectories_apart(base):
    rows = [{"step": 1, "id": "hard-0", "response": SOUND["hard-0"], "reward": 1, "injected": True},
            {"step": 1, "id": "hard-2", "response": JUMPS["hard-2"], "reward": 1, "injected": True},
            {"step": 2, "id": "hard-1", "response": SOUND["hard-1"], "reward": 1, "injected": False},
            {"step": 2, "id": "hard-1", "response": "x", "reward": 0, "injected": False}]
    write(base / "train" / "hard" / tables.slug("GRPO+LatentRevise") / "samples.jsonl", rows)
    lines = tables.signal_table(toy, [tables.Records(base)], ["GRPO+LatentRevise"], "hard").splitlines()[2:]
    assert lines == ["| GRPO+LatentRevise | 1-1 | 0 | - | 2 | 50 % |",
                     "| GRPO+LatentRevise | 2-2 | 1 | 100 % | 0 | - |"]


def test_every_command_of_evidence_is_taken_by_its_stage(base, monkeypatch):
    commands = []
    monkeypatch.setattr(demo, "run", lambda out, *found, processes=1: commands.extend(found))
    write(base / "rft-samples" / "rollouts.jsonl", [{"id": "hard-0", "reward": 1}])
    for stage in (evidence.prepare, evidence.recover, functools.partial(evidence.train, long=True)):
        stage(toy, base, "toy_model", 0, evidence.FULL)
    assert len(commands) > 40
    parsed = []
    for command in commands:
        script, *argv = shlex.split(command)
        parsed.append((script, importlib.import_module(script.removesuffix(".py")).get_args(argv)))
    hints = {a.opsd_hint for s, a in parsed if s == "train_grpo.py" and a.algo == "opsd"}
    assert {h.replace("{answer}", "72") for h in hints} == {" So the answer is \\boxed{72}. Check your work."}
    assert TOKENIZER.unk_token_id not in ids(hints.pop().replace("{answer}", "72"))
    equal = [a for s, a in parsed if s == "revise.py" and a.out.endswith("equal-compute")]
    ours = tables.Records(base).variant("LatentRevise")
    fresh = sum(len(c["ids"]) for r in ours for c in r["continuations"]) / 32  # fresh sampling wrote the same ones
    assert equal[0].continuations == round(sum(map(tables.cost, ours)) / 4 / fresh)
    sound = [json.loads(line)["response"] for line in (base / "recovered-sound.jsonl").read_text().splitlines()]
    assert sound == [SOUND["hard-0"]]


def test_tables_replace_what_stands_below_their_heading(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n\nfound\n\n## Tables\n\nold\n")
    tables.write_results(file, "new\n")
    assert file.read_text() == "# Results\n\nfound\n\n## Tables\n\nnew\n"
    file.write_text("# Results\n")
    with pytest.raises(UserError, match="## Tables"):
        tables.write_results(file, "new\n")


def test_plot_draws_from_the_files(base, tmp_path, monkeypatch):
    for arm in plot.ARMS:
        train_arm(base, arm, "hard", "x", [1], reward=0.5, rescued=0.1)
    plot.main(argparse.Namespace(evidence=str(tmp_path), out=str(tmp_path / "figures")))
    names = {p.name: p.read_bytes()[:4] for p in (tmp_path / "figures").iterdir()}
    assert names == dict.fromkeys(("evidence-steps.png", "evidence-variants.png", "evidence-training.png"), b"\x89PNG")
    with pytest.raises(UserError, match="holds no run"):
        plot.main(argparse.Namespace(evidence=str(tmp_path / "figures"), out=str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        plot.load(tmp_path)


def test_hours_in_the_recipes_are_those_computed():
    rows = {}
    for line in (ROOT / "recipes" / "README.md").read_text().split("## GPU-hours, computed")[1].splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if len(cells) == 3:
            rows[cells[0].split(",")[0]] = cells[1:]
    names = {"rollout, N = 32": "rollout", "revise, one attempt a prompt": "revise", "SFT": "SFT",
             "GRPO N=8": "GRPO N=8", "GRPO N=16": "GRPO N=16", "OPSD": "OPSD", "DAPO, two rounds of sampling": "DAPO",
             "evaluation of a model": "evaluation of one model"}
    for column, name in enumerate(hours.QWEN):
        low, high = hours.hours(name, host=False), hours.hours(name, host=True)
        for key, row in names.items():
            written = [float(x.replace("below ", "")) for x in rows[row][column].split(" - ")]
            computed = [low[key], high[key]][:len(written)]
            assert written == pytest.approx(computed, abs=0.5 if max(computed) > 20 else 0.11), key


def test_hours_of_an_update_are_eight_operations_a_parameter_and_token():
    root, block = hours.parameters(hours.QWEN["Qwen2.5-1.5B"])
    seconds = 512 * 8 * 1150 * 8 * (root + 28 * block) / (0.5 * 790e12)
    sampling = 512 * 8 * 1000 / 512 * (2 * (root + 28 * block) + 512 * 650 * 28 * 2 * 256 * 2) / (0.6 * 4.8e12)
    computed = hours.hours("Qwen2.5-1.5B", host=False)["GRPO N=8"]
    assert computed == pytest.approx(100 * (seconds + sampling) / 3600, abs=0.05)
