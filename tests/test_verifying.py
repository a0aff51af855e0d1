"""--verifier: how its file is loaded, what it may do wrong, and the workers that give it a time limit."""
import contextlib
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import ROOT, here, read, write_problems, write_verifier

from helpers.common import UserError
from helpers.verifying import Verifier

MODES = pytest.mark.parametrize("workers", [0, 2])
MISDEEDS = """import os, re, subprocess, sys, time
def verify(response, answer):
    if response == "sleep": time.sleep(60)
    if response == "regex": re.match("(a+)+$", "a" * 60 + "b")  # for ever, and no other thread runs meanwhile
    if response == "child": subprocess.run(["sleep", "61.773"])
    if response == "die": os._exit(3)
    if response == "raise": raise TimeoutError("no\\nreply")
    if response == "exit": sys.exit("done")
    if response == "array": return type("", (), {"__bool__": lambda self: 1 / 0})()
    if response == "chatter": print("{}", flush=True), sys.stdin.read(), os.write(1, b"[true]")
    return response == answer
"""


@pytest.fixture
def make(tmp_path):
    """make(text, ...): a Verifier of a file with that text. Its workers end with the test."""
    made = []

    def make(text: str, *args, **more) -> Verifier:
        path = tmp_path / "v.py"
        path.write_text(text)
        made.append(Verifier(f"{path}:verify", *args, **more))
        return made[-1]

    yield make
    for verifier in made:
        verifier.close()


@MODES
def test_verdicts_are_the_same_in_workers(make, workers):
    verifier = make("def verify(response, answer):\n    return [] if response > answer else [response]\n", workers)
    pairs = [(chr(97 + i % 7) + "\ud800\n", chr(97 + i % 5)) for i in range(40)]
    futures = [verifier.submit(*pair) for pair in pairs]
    assert [f.result() for f in futures] == [a <= b for a, b in pairs] == [verifier(*pair) for pair in pairs]
    assert verifier.timeouts == 0


@MODES
def test_a_verifier_file_is_a_module(make, tmp_path, workers):
    """Dataclasses with postponed annotations, pickling, and files beside it."""
    (tmp_path / "beside.py").write_text("right = 'yes'\n")
    verifier = make("from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
                    "import beside\n@dataclass\nclass Reply:\n    text: str\n"
                    "def verify(response, answer):\n"
                    "    return pickle.loads(pickle.dumps(Reply(response))) == Reply(beside.right)\n", workers)
    assert verifier("yes", "") and not verifier("no", "")
    assert str(tmp_path) not in sys.path
    other = tmp_path / "other"  # a file of the same name, elsewhere
    other.mkdir()
    (other / "v.py").write_text("def verify(response, answer):\n    return response == 'no'\n")
    assert Verifier(f"{other / 'v.py'}:verify")("no", "") and verifier("yes", "")


@MODES
@pytest.mark.parametrize("parameters,takes_it", [
    ("response, answer, problem", True), ("response, answer, record, /", True), ("r, a, problem=None", True),
    ("response, answer", False), ("response, answer, strict=False", False), ("*given", False), ("r, a, **more", False)])
def test_a_third_parameter_gets_the_problem(make, workers, parameters, takes_it):
    body = "return {}.get('level') == 5".format(parameters.split(", ")[2].split("=")[0]) if takes_it else "return True"
    verifier = make(f"def verify({parameters}):\n    {body}\n", workers)
    assert verifier("x", "y", {"id": "p", "level": 5})
    assert verifier("x", "y", {"id": "p", "level": 6}) is not takes_it


@MODES
@pytest.mark.parametrize("what,error", [("raise", r"TimeoutError: no\s+reply"), ("exit", "SystemExit: done"),
                                        ("array", "ZeroDivisionError: division by zero")])
def test_what_a_verifier_raises_names_it_its_line_and_the_problem(make, workers, what, error):
    verifier = make(MISDEEDS, workers)
    for problem, name in (({"id": "p3"}, "problem 'p3'"), (None, "answer '7'")):
        with pytest.raises(UserError, match=rf"--verifier .*v\.py:verify: {name}: {error} \(.*v\.py:\d+\)"):
            verifier.submit(what, "7", problem).result()
    assert verifier("7", "7")  # a worker goes on


@pytest.mark.parametrize("text,error", [
    ("1 / 0", "ZeroDivisionError"), ("import sys\nsys.exit(0)", "SystemExit"), ("import nowhere", "ModuleNotFound"),
    ("def verify(:", "SyntaxError"), ("raise TimeoutError", "TimeoutError"), ("verify = 3", "not a callable"),
    ("", "no attribute 'verify'")])
def test_a_file_that_cannot_be_used_is_named(make, text, error):
    with pytest.raises(UserError, match=rf"--verifier .*v\.py:verify: expected path\.py:function .*{error}"):
        make(text)


@pytest.mark.parametrize("what", ["sleep", "regex", "child"])
def test_a_verdict_that_takes_too_long_is_wrong_and_counted(make, capfd, what):
    verifier = make(MISDEEDS, 1, 0.5)
    slow, right = verifier.submit(what, "7"), verifier.submit("7", "7")  # the second waits for another worker
    assert slow.result() is False and right.result() is True and verifier.timeouts == 1
    assert subprocess.run(["pgrep", "-f", "sleep 61.773"], capture_output=True, check=False).returncode == 1
    verifier.close()
    assert re.fullmatch(r"--verifier .*: 1 verdicts took longer than 0\.5 s and count as wrong\n",
                        capfd.readouterr().err)


def test_a_worker_that_dies_is_an_error_and_the_next_verdict_has_another(make):
    verifier = make(MISDEEDS, 1)
    with pytest.raises(UserError, match=r"problem 'p': its worker ended with exit code 3"):
        verifier("die", "", {"id": "p"})
    assert verifier("7", "7") and verifier.timeouts == 0
    worker, = verifier.workers.values()
    worker.kill()  # between two questions: nobody's fault
    worker.wait()
    assert verifier("7", "7")


def test_what_a_verifier_prints_and_reads_does_not_reach_the_exchange(make, capfd):
    verifier = make(MISDEEDS, 1)
    assert not verifier("chatter", "7") and verifier("7", "7")
    assert capfd.readouterr() == ("", "{}\n[true]")


def test_close_ends_workers_and_forgets_the_rest(make):
    verifier = make(MISDEEDS, 2)
    futures = [verifier.submit("sleep", "") for _ in range(20)]
    while len(verifier.workers) < 2:
        time.sleep(0.01)
    start, workers = time.time(), list(verifier.workers.values())
    verifier.close()
    assert all(w.returncode == -9 for w in workers) and sum(f.cancelled() for f in futures) == 18
    for thread in [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]:
        thread.join(10)
    assert time.time() - start < 5


@pytest.mark.parametrize("what", ["", "sleep", "regex"])
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path, what):
    """Idle ones at once, busy ones after twice their time."""
    (tmp_path / "v.py").write_text(MISDEEDS)
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom helpers.verifying import Verifier\n"
            f"v = Verifier({f'{tmp_path}/v.py:verify'!r}, 1, 2)\nv('7', '7')\nv.submit({what!r}, '7')\n"
            "time.sleep(0.3)\nprint(next(iter(v.workers.values())).pid, flush=True)\ntime.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    command = Path(f"/proc/{int(parent.stdout.readline())}/cmdline")
    assert command.read_text()
    parent.kill()
    parent.wait()
    start = time.time()
    with contextlib.suppress(OSError):  # gone; or a zombie without a command line, where nobody reaps it
        while command.read_text():
            assert time.time() - start < 8, "it is still there"
            time.sleep(0.1)


# --- in the stages ----------------------------------------------------------------------------------------------------
def test_late_verdicts_of_a_stage_are_wrong_and_counted(desk):
    slow = write_verifier(desk.path / "v.py", "import time\ndef verify(response, answer):\n    time.sleep(60)\n")
    code, said = desk.run("rollout", {"--verifier": slow, "--verifier-workers": 2, "--verifier-seconds": 0.3})
    assert code == 0 and "6 verdicts took longer than 0.3 s and count as wrong" in said
    assert [r["reward"] for r in read(desk.out / "rollouts.jsonl")] == [0] * 6


def test_what_is_judged_is_written_before_an_error_of_the_verifier_is_raised(tmp_path, model_dir, monkeypatch):
    """Two responses finish together; the verdict on the second one raises."""
    verdicts = iter([Future(), Future()])

    def submit(verify, text, answer, problem):
        verdict = next(verdicts)
        verdict.set_exception(UserError("--verifier: broken")) if problem["id"] == "p1" else verdict.set_result(True)
        return verdict

    monkeypatch.setattr(Verifier, "submit", submit)
    with pytest.raises(UserError, match="broken"):
        here("rollout", "--model", model_dir, "--data", write_problems(tmp_path / "d.jsonl", 2), "-n", 1,
             "--max-new-tokens", 1, "--out", tmp_path / "o")
    assert [r["id"] for r in read(tmp_path / "o" / "rollouts.rank0.part")] == ["p0"]
