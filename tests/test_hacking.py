"""The worked tasks of docs/hacking.md: every block that names a file is written as that file, and run."""
import json
import re

import pytest
from conftest import ROOT, read, stage

from helpers.verifying import Verifier

PAGE = (ROOT / "docs" / "hacking.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
TASKS = [("choice.py", 1, []), ("unit.py", "add", ["--verifier-workers", 2]), ("dates.py", 7, [])]
PROBLEMS = {p["id"]: p for p in map(json.loads, re.findall(r'^\{"id".*\}$', PAGE, re.MULTILINE))}


@pytest.fixture
def files(tmp_path):
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_verifiers_judge_as_the_page_says(files):
    assert {*BLOCKS} == {name for name, *_ in TASKS}  # no block is left out
    assert [m["role"] for m in PROBLEMS[1]["problem"]] == ["system", "user", "assistant", "user"]
    choice, unit, dates = (Verifier(f"{files / name}:check") for name in ("choice.py", "unit.py", "dates.py"))
    assert choice("It is (A).", "A") and not choice("It is (B).", "A") and not choice("", "A")
    tests, block = PROBLEMS["add"]["answer"], "So:\n```python\n{}\n```\n"
    assert unit(block.format(PROBLEMS["add"]["guide"]), tests)
    assert not unit(block.format("def add(a, b):\n    return a"), tests) and not unit("\0", tests)
    assert not unit("while True: pass", tests)
    p = PROBLEMS[7]
    assert dates(f"Well,\n{p['guide']}", p["answer"], p) and not dates("25 November 2026", p["answer"], p)
    assert not dates("", p["answer"], p)


@pytest.mark.parametrize("name,problem,flags", TASKS)
def test_each_task_goes_through_sampling_revision_and_training(files, model_dir, name, problem, flags):
    """A random model answers nothing: what is kept, refused and steered toward is looked at."""
    p = PROBLEMS[problem]
    (files / "data.jsonl").write_text(json.dumps(p))
    shared = ["--model", model_dir, "--max-new-tokens", 12, "--verifier", f"{files / name}:check", *flags]
    stage("rollout.py", *shared, "--data", files / "data.jsonl", "-n", 2, "--out", files / "r")
    assert read(files / "r" / "zero_hit.jsonl") == [p | {"id": str(p["id"])}]  # every field
    assert [r["answer"] for r in read(files / "r" / "rollouts.jsonl")] == [p["answer"]] * 2
    stage("revise.py", *shared, "--rollouts", files / "r", "--revision-steps", 2, "--out", files / "v")
    records = read(files / "v" / "revised.jsonl")
    assert len(records) == 2 and all(len(r["losses"]) == 2 and r["losses"][0][1] > 0 for r in records)
    stage("train_grpo.py", *shared, "--data", files / "r" / "zero_hit.jsonl", "--revise", "--revision-steps", 1,
          "--steps", 1, "--group-size", 2, "--out", files / "g")
    assert read(files / "g" / "metrics.jsonl")[0]["zero_hit"] == 1
    if "guide" in p:  # without it, a gold that is no text is refused by name, before any work
        plain = {k: v for k, v in p.items() if k != "guide"} | {"answer": [p["answer"]]}
        (files / "plain.jsonl").write_text(json.dumps(plain))
        result = stage("train_grpo.py", *shared, "--data", files / "plain.jsonl", "--revise", "--steps", 1,
                       "--group-size", 2, "--out", files / "p", check=False)
        assert result.returncode == 2 and re.search(rf"problem '{p['id']}'.*'guide'", result.stderr)
