"""Faults, hostile data and hostile models: the rows of the table in docs/reliability.md, a test each.

Files are compared with those of an undisturbed run, times left out: byte for byte but for draws (conftest.NEAR).
tests/soak.py kills at random moments.
"""
import argparse
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    READERS,
    ROOT,
    SAMPLERS,
    STAGES,
    Trap,
    assert_same_files,
    assert_same_sampling,
    files,
    read,
    run,
    tiny_model,
    tiny_tokenizer,
    write_problems,
)
from processes import Group, run_stage

import revise
from helpers import common, sampling, training

# A verifier that hits and misses, and does to one process what a file named `trigger` beside it says: "rank call what".
VERIFIER = """import contextlib, os, pathlib, time
calls = 0
def verify(response, gold):
    global calls
    calls += 1
    trigger = pathlib.Path(__file__).with_name("trigger")
    said = ""
    with contextlib.suppress(FileNotFoundError):  # also where another process has just removed it
        said = trigger.read_text()
    if said:
        rank, call, what = said.split()
        if (os.environ.get("RANK", "0"), str(calls)) == (rank, call):
            trigger.unlink()
            if what == "raise":
                raise TimeoutError("no reply")
            os.kill(os.getpid(), int(what))
    time.sleep(0.3 * (os.environ.get("SLOW") == os.environ.get("RANK", "0")))
    return sum(map(ord, response[-1:])) % 4 == 1
"""


class World:
    """A small job for every stage; runs of it, undisturbed or not."""

    def __init__(self, path: Path, model_dir: Path):
        self.path, self.straight = path, {}
        (path / "v.py").write_text(VERIFIER)
        data = write_problems(path / "d.jsonl", 8)
        shared = ["--model", model_dir, "--device", "cpu"]
        sampling = ["--verifier", f"{path / 'v.py'}:verify", "--max-new-tokens", 12]
        self.flags = {
            "rollout": [*shared, *sampling, "--data", data, "-n", 2, "--decode-rows", 3],
            "train_grpo": [*shared, *sampling, "--data", data, "--steps", 4, "--save-every", 2, "--batch-size", 4,
                           "--group-size", 2, "--revise", "--revision-steps", 2, "--continuations", 2],
            "eval": [*shared, *sampling, "--data", data, write_problems(path / "e.jsonl", 3), "-n", 2, "--k", 1,
                     "--decode-rows", 3]}
        self.flags["baselines.train_opsd"] = [*shared, *sampling, "--data", data, "--steps", 4, "--save-every", 2,
                                              "--batch-size", 4]
        rollouts = self.undisturbed("rollout")
        self.flags["revise"] = [*shared, *sampling, "--rollouts", rollouts, "--continuations", 2, "--revision-steps", 2,
                                "--revise-tokens", 120]
        self.flags["train_sft"] = [*shared, "--data", rollouts / "rollouts.jsonl", "--steps", 6, "--save-every", 2,
                                   "--batch-size", 3]

    def start(self, name: str, out: Path, processes: int = 1, kill_at: int = 0, more=(), **env: str) -> Group:
        """A stage under way, one at a time. more: flags."""
        argv = [*map(str, [*self.flags[name], *more]), "--out", str(out)]
        return Group(processes, self.path, run_stage, f"{name}.py", argv, kill_at, **env)

    def run(self, *args, **more) -> tuple[list[int], list[str]]:
        """Exit code and standard error of every process. None is waited for longer than a minute, nor left behind."""
        group = self.start(*args, **more)
        return group.finish(60), group.said(2)

    def succeeds(self, name: str, out: Path, processes: int = 1) -> None:
        codes, errors = self.run(name, out, processes)
        assert codes == [0] * processes, errors

    def undisturbed(self, name: str, processes: int = 1) -> Path:
        if (name, processes) not in self.straight:
            self.straight[name, processes] = self.path / f"{name}-{processes}"
            self.succeeds(name, self.straight[name, processes], processes)
        return self.straight[name, processes]

    def finishes_like_an_undisturbed_run(self, name: str, out: Path, processes: int = 1) -> None:
        """Byte for byte where batches are the same by construction: in training, where a step draws what it always
        draws, and in revision, whose batches are whole or not there. In rollout and eval other rows are drawn together
        after a restart, and by whoever comes first: there up to float32 rounding."""
        self.succeeds(name, out, processes)
        straight = self.undisturbed(name, processes)
        if name in ("rollout", "eval"):
            assert_same_sampling(straight, out, lambda: self.succeeds(name, out, processes))
        else:
            assert_same_files(straight, out)

    def goes_on_after(self, what: str, name: str, out: Path, code: int, message: str) -> None:
        """A run that ends with this code and message when its verifier meets with `what` at its seventh call."""
        self.undisturbed(name)
        (self.path / "trigger").write_text(f"0 7 {what}")
        codes, errors = self.run(name, out)
        assert not (self.path / "trigger").exists() and codes == [code]
        assert re.search(f"{message}$", last_line(errors[0])), errors
        self.finishes_like_an_undisturbed_run(name, out)


def last_line(error: str) -> str:
    """What a stage said at its end: what follows the last progress bar."""
    assert "Traceback" not in error, error
    return re.split(r"[\r\n]", error.rstrip("\n"))[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_dir):
    return World(tmp_path_factory.mktemp("faults"), model_dir)


# --- kills, torn and damaged files ------------------------------------------------------------------------------------
# Moments at which files change (processes.die_at), of rank 0: 1-2 make run.json (eval.py: 1-2 and 5-6), then lines are
# appended, checkpoints (train_sft.py: 5-6, 9-10; train_grpo.py: 6-7) and results renamed. A continued run counts anew,
# and cuts its logs first. On two processes there are no fewer
KILLS = {"rollout": [(3,), (6,), (8,)], "revise": [(2,), (3,), (4, 3), (7,), (8,)],
         "train_sft": [(2,), (3, 3), (6, 5), (8,), (11, 4), (14,)], "train_grpo": [(3,), (5,), (9, 7), (11,)],
         "eval": [(3,), (6,), (9, 8)], "baselines.train_opsd": [(5,), (9, 7)]}


@pytest.mark.parametrize("name,kills,processes", [
    (name, kills, processes) for name, several in KILLS.items() for processes in (1, 2)
    for kills in (several if processes == 1 else several[1::2])], ids=str)
def test_kill_9_and_the_same_command_gives_the_same_files(tmp_path, world, name, kills, processes):
    for moment in kills:
        codes, _ = world.run(name, tmp_path / "o", processes, kill_at=moment)
        assert -signal.SIGKILL in codes and 0 not in codes[:1]
    world.finishes_like_an_undisturbed_run(name, tmp_path / "o", processes)


@pytest.mark.parametrize("name", STAGES)
def test_two_runs_with_one_seed_are_identical(tmp_path, world, name):
    world.succeeds(name, tmp_path / "o")
    assert_same_files(world.undisturbed(name), tmp_path / "o")  # the same shapes, and so the same bits


def test_a_part_file_cut_at_any_byte_keeps_its_whole_lines_alone(tmp_path):
    lines = [common.to_line({"id": "\u2028\ud800\n", "sample": s, "reward": 1}).encode() for s in range(2)]
    for cut in range(len(lines[1]) + 1):
        (tmp_path / "x.rank0.part").write_bytes(lines[0] + lines[1][:cut])
        part, done = common.open_part(tmp_path, "x", lambda record: record["reward"])
        assert part.read_bytes() == b"".join(lines[:1 + (cut == len(lines[1]))])
        assert [s for _, s in done] == [0, 1][:1 + (cut == len(lines[1]))]


def test_leftover_temporary_files_are_written_over(tmp_path, world):
    for name, kill_at, leftovers in [
            ("train_sft", 8, ["checkpoint.tmp/model.safetensors", "checkpoint.tmp/more", "model.tmp/model.safetensors",
                              "model.tmp/more", "metrics.jsonl.tmp"]),
            ("rollout", 7, ["rollouts.jsonl.tmp", "zero_hit.jsonl.tmp", "summary.json.tmp"])]:
        world.run(name, tmp_path / name, kill_at=kill_at)
        for leftover in leftovers:
            (tmp_path / name / leftover).parent.mkdir(exist_ok=True)
            (tmp_path / name / leftover).write_text('{"half": ')
        world.run(name, tmp_path / name, kill_at=8)
        assert not list((tmp_path / name).glob("*-*/more"))
        world.finishes_like_an_undisturbed_run(name, tmp_path / name)


DAMAGE = {"a cut model": ("model.safetensors", -1), "a cut optimizer": ("optimizer-exp_avg.safetensors", 100),
          "an empty model": ("model.safetensors", 0), "a cut state": ("state.json", 5),
          "no optimizer": ("optimizer-step.safetensors", None)}


def load_checkpoint(out: Path, model) -> dict:
    optimizer = training.make_optimizer(model, type("", (), {"lr": 0.1}))
    return training.load_checkpoint(out, model, optimizer, 80)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path, world):
    world.run("train_sft", tmp_path / "o", kill_at=11)
    assert sorted(p.name for p in tmp_path.glob("o/checkpoint-*")) == ["checkpoint-000002", "checkpoint-000004"]
    whole = shutil.copytree(tmp_path / "o", tmp_path / "whole")
    for kind, (name, size) in DAMAGE.items():
        path = tmp_path / "o/checkpoint-000004" / name
        data = path.read_bytes()
        path.unlink()
        if size is not None:
            path.write_bytes(data[:size])
        before = files(tmp_path / "o")
        with pytest.raises(common.UserError, match=r"checkpoint-000004: damaged .*remove it"):
            load_checkpoint(tmp_path / "o", tiny_model("qwen2"))
        if kind == "a cut model":
            codes, errors = world.run("train_sft", tmp_path / "o")
            assert codes == [2] and re.match(
                r"train_sft\.py: error: .*checkpoint-000004: damaged", last_line(errors[0]))
        assert files(tmp_path / "o") == before
        path.write_bytes(data)
    assert files(tmp_path / "o") == files(whole)
    shutil.rmtree(tmp_path / "o/checkpoint-000004")
    world.finishes_like_an_undisturbed_run("train_sft", tmp_path / "o")


def test_a_checkpoint_with_pickled_code_is_refused(tmp_path):
    """It is safetensors and text alone."""
    model = tiny_model("qwen2")
    optimizer = training.make_optimizer(model, type("", (), {"lr": 0.1}))
    training.save_checkpoint(tmp_path, common.Policy(model, tiny_tokenizer(), 0, []), optimizer, {"step": 2}, 2)
    folder = tmp_path / "checkpoint-000002"
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json", ".jinja"}
    for name, pickled in [("model.safetensors", "pytorch_model.bin"),
                          ("optimizer-exp_avg.safetensors", "optimizer.pt")]:
        safe = (folder / name).read_bytes()
        for place in (pickled, name):  # beside the name that is expected, and under it
            (folder / name).unlink()
            torch.save(Trap(tmp_path / "sprung"), folder / place)
            with pytest.raises(common.UserError, match="damaged"):
                load_checkpoint(tmp_path, model)
            (folder / place).unlink()
            (folder / name).write_bytes(safe)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["rollout", "eval", "revise"])
def test_finished_files_that_were_cut_are_not_taken_for_whole(tmp_path, world, name):
    out = shutil.copytree(world.undisturbed(name), tmp_path / "o")
    final = min(out.rglob("revised.jsonl" if name == "revise" else "rollouts.jsonl"))
    lines = final.read_text().splitlines(keepends=True)
    for text, message in [("".join(lines[:-1]), "(does not hold 2 rollouts of each problem|lacks records); remove it"),
                          ("".join(lines)[:-9], rf"\.jsonl:{len(lines)}: not JSON"),
                          ("".join(lines + lines[:1]), rf"\.jsonl:{len(lines) + 1}: .*there twice")]:
        final.write_text(text)
        codes, errors = world.run(name, out)
        assert codes == [2] and re.search(message, last_line(errors[0])), errors
    final.unlink()
    world.finishes_like_an_undisturbed_run(name, out)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"settings": 3}', '{"settings', "\xff", None])
def test_a_damaged_run_json_is_not_taken_for_other_settings(desk, text):
    assert desk.run("rollout", {})[0] == 0
    record = desk.out / "run.json"
    record.unlink() if text is None else record.write_text(text, encoding="latin-1")
    desk.fails("rollout", "its run.json is damaged or gone")


# --- the disk ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def disk(tmp_path):
    """mount(options): a small disk of its own at the path returned, unmounted after the test."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False)
        if result.returncode:
            pytest.skip("mounting a small disk takes root")
        return path

    try:
        yield mount
    finally:
        subprocess.run(["umount", path], capture_output=True, check=False)


@pytest.mark.parametrize("name,size,processes,slow", [
    ("rollout", "12k", 1, ""), ("rollout", "12k", 2, ""), ("rollout", "12k", 2, "0"), ("rollout", "12k", 2, "1"),
    ("train_sft", "200k", 1, "")])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(disk, world, name, size, processes, slow):
    """Whichever rank meets it: the other may be held up meanwhile, and then finds it gone."""
    out = disk(f"size={size}") / "o"
    codes, errors = world.run(name, out, processes, SLOW=slow)
    assert 2 in codes and 0 not in codes, errors
    full, lost = (rf"{name}\.py: error: .*No space left on device.*",
                  rf"{name}\.py: rank (0 stops: rank 1|1 stops: rank 0)\b.*; the same command continues")
    assert all(re.fullmatch(full if code == 2 else lost, last_line(error))
               for code, error in zip(codes, errors)), errors
    disk("remount,size=8m")
    world.finishes_like_an_undisturbed_run(name, out, processes)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, disk, world):
    shutil.copytree(world.undisturbed("rollout"), disk("size=8m") / "begun")
    (tmp_path / "disk/begun/summary.json").unlink()
    before = files(tmp_path / "disk")
    disk("remount,ro")
    for name in ("new", "begun"):
        codes, errors = world.run("rollout", tmp_path / "disk" / name)
        assert codes == [2] and re.fullmatch(
            r"rollout\.py: error: .*Read-only file system.*", last_line(errors[0])), errors
    assert files(tmp_path / "disk") == before


# --- signals, and processes that die or hang --------------------------------------------------------------------------
@pytest.mark.parametrize("name,number,code", [*((name, signal.SIGINT, 130) for name in SAMPLERS),
                                              ("rollout", signal.SIGTERM, -15), ("train_grpo", signal.SIGTERM, -15)])
def test_ctrl_c_and_sigterm_in_mid_step_leave_a_run_to_continue(tmp_path, world, name, number, code):
    message = rf"^{name}\.py: interrupted; the same command continues" if number == signal.SIGINT else ""
    world.goes_on_after(str(int(number)), name, tmp_path / "o", code, message)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_verifier_that_raises_ends_the_run_in_one_line_and_nothing_is_lost(tmp_path, world, name):
    world.goes_on_after("raise", name, tmp_path / "o", 2, rf"^{name}\.py: error: --verifier .*v\.py:verify: "
                        r"(problem|answer) .*: TimeoutError: no reply \(.*v\.py:\d+\)")


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, -15)], ids=["Ctrl-C", "SIGTERM"])
def test_the_same_in_the_middle_of_supervised_training(tmp_path, world, number, code):
    process, = world.start("train_sft", tmp_path / "o", more=["--steps", 80]).ranks
    while process.is_alive() and not list(tmp_path.glob("o/checkpoint-*")):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    step = max(int(p.name[11:]) for p in tmp_path.glob("o/checkpoint-0*"))
    assert 2 <= step < 80
    assert world.run("train_sft", tmp_path / "o", more=["--steps", 80, "--save-every", 0])[0] == [0]
    assert [m["step"] for m in read(tmp_path / "o/metrics.jsonl")] == list(range(1, 81))


@pytest.mark.parametrize("name,processes,lost,what", [
    ("rollout", 3, 2, signal.SIGKILL), ("rollout", 3, 1, signal.SIGSTOP), ("rollout", 2, 0, signal.SIGKILL),
    ("train_grpo", 2, 1, signal.SIGKILL), ("train_grpo", 2, 0, signal.SIGSTOP)],
    ids=lambda x: x.name if isinstance(x, signal.Signals) else str(x))
def test_a_rank_that_dies_or_hangs_is_named_and_the_others_stop(tmp_path, world, name, processes, lost, what):
    (world.path / "trigger").write_text(f"{lost} 4 {int(what)}")
    wait = {"LATENTREVISE_TIMEOUT": "4"} if what == signal.SIGSTOP else {}  # a death is noticed at once
    group, others = world.start(name, tmp_path / "o", processes, **wait), [r for r in range(processes) if r != lost]
    for r in others:
        group.ranks[r].join(60)
    codes, errors = group.end(), group.said(2)
    for r in others:
        assert codes[r] == 1 and re.fullmatch(rf"(.*[\r\n])?{name}\.py: rank {r} stops: rank {0 if r else lost}\b.*; "
                                              "the same command continues\n", errors[r], re.DOTALL), errors[r]
    world.finishes_like_an_undisturbed_run(name, tmp_path / "o", processes)


def test_a_rank_whose_others_never_come_says_so_in_one_line(tmp_path, world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    codes, errors = world.run("rollout", tmp_path / "o", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                              LATENTREVISE_TIMEOUT="1")
    assert codes == [1] and re.fullmatch(r"rollout\.py: rank 0 stops: the others are gone, or did not come .*",
                                         last_line(errors[0])), errors


def test_processes_meet_before_the_gradients_are_summed(monkeypatch):
    """A collective does not say who is missing."""
    order, model = [], tiny_model("qwen2")
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "barrier", lambda: order.append("meet"))
    monkeypatch.setattr(training.dist, "all_reduce", lambda g: order.append("sum"))
    training.apply_gradients(model, training.make_optimizer(model, type("", (), {"lr": 0})), 1.0)
    assert order == ["meet"] + ["sum"] * len(list(model.parameters()))


def test_torchrun_names_the_rank_that_died_and_stops_the_others(tmp_path, world):
    (world.path / "trigger").write_text("1 4 9")
    result = run("rollout.py", *world.flags["rollout"], "--out", tmp_path / "o", processes=2, check=False)
    assert result.returncode != 0 and re.search(r"Root Cause.*rank +: 1 .*exitcode +: -9", result.stderr, re.DOTALL)
    world.finishes_like_an_undisturbed_run("rollout", tmp_path / "o", 2)


@pytest.mark.parametrize("seconds", ["0", "x", "-1", "1.5", "", "1" * 20])
def test_a_timeout_that_is_no_number_of_seconds(monkeypatch, seconds):
    monkeypatch.setenv("LATENTREVISE_TIMEOUT", seconds)
    with pytest.raises(common.UserError, match="LATENTREVISE_TIMEOUT"):
        common.process_timeout()


# --- malformed input, beside tests/test_inputs.py ---------------------------------------------------------------------
BAD_ROLLOUTS = {  # a record, the error it gives
    "not an object": ("[1]", "expected a JSON object"), "text": ('"x"', "expected a JSON object"),
    "null": ("null", "expected a JSON object"), "torn": ('{"id": "p1", "samp', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "list as id": ({"id": [1]}, "not a record"), "list as sample": ({"sample": [0]}, "not a record"),
    "no id": ({"id": ...}, "no field 'id'"),
    "no prompt": ({"prompt_ids": ...}, "no field 'prompt_ids'"), "no reward": ({"reward": ...}, "no field 'reward'"),
    "same id and sample": ({"id": "p0"}, "sample 0 of 'p0' is there twice"),
    "control characters": ({"id": "p0", "sample": "\x1b[2J\n"}, "sample is not a number"),
    **{f"sample {v!r}": ({"sample": v}, "sample is not a number") for v in (None, "0", 1.5, True)},
    **{f"reward {v!r}": ({"reward": v}, "reward not 0 or 1") for v in (None, "0", 2, 0.5, [0], float("nan"))},
    **{f"answer {v!r}": ({"answer": v}, "problem 'p1': its answer is not text") for v in (None, 5, [], ["5"], {})},
    **{f"answer {v!r}": ({"answer": v}, "has no tokens under the tokenizer") for v in ("", "\ud800")},
    **{f"prompt {v!r}": ({"prompt_ids": v}, "'prompt_ids' is not a list of token ids")
       for v in ([], [-1], [160], [10**30], [True], "ab")},
    **{f"response {v!r}"[:40]: ({"response_ids": v}, "(not a record|'response_ids' is not a list of token ids)")
       for v in (5, None, {"a": 1, "b": 2, "c": 3}, "abc", *([7, x, 7] for x in (160, -1, "x", 7.0, [7], None)))}}


@pytest.mark.parametrize("case", BAD_ROLLOUTS)
def test_bad_rollouts(desk, case):
    changes, message = BAD_ROLLOUTS[case]
    file = desk.rollouts / "rollouts.jsonl"
    first, second = file.read_text().splitlines()
    if isinstance(changes, dict):
        changes = json.dumps({k: v for k, v in (json.loads(second) | changes).items() if v is not ...})
    file.write_text(f"{first}\n{changes}\n")
    desk.fails("revise", message)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_become_nan_in_mid_response(monkeypatch, temperature):
    model, calls = tiny_model("qwen2"), itertools.count(1)
    forward = model.forward

    def later(*args, **kwargs):
        out = forward(*args, **kwargs)
        if next(calls) == 5:
            out.logits[:, :, 7] = torch.nan
        return out

    monkeypatch.setattr(model, "forward", later)
    with pytest.raises(common.UserError, match="logits are not numbers"):
        sampling.sample(common.Policy(model, None, 150, []), [torch.tensor([5, 6])], [[1, 2]], [8],
                        temperature=temperature)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    model = tiny_model("qwen2")
    before = [p.clone() for p in model.parameters()]
    optimizer = training.make_optimizer(model, type("", (), {"lr": 0.1}))
    for bad in (torch.nan, torch.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.model.norm.weight.grad[0] = bad
        with pytest.raises(common.UserError, match="gradient is not finite"):
            training.apply_gradients(model, optimizer, 1.0)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ["revise", "train_grpo"])
def test_golds_without_tokens_are_found_before_any_work(desk, name, monkeypatch):
    monkeypatch.setattr(revise, "revise_batch", None)  # never reached
    desk.data.write_text("".join(common.to_line({"id": i, "problem": "1+1?", "answer": "2" if i < 9 else "\ud800"})
                                 for i in range(10)))
    desk.write_rollouts(answer="\ud800")
    desk.fails(name, r"answer '\\ud800' has no tokens under the tokenizer of --model")


@pytest.mark.parametrize("name", READERS)
def test_a_prompt_may_fill_the_context_but_for_one_token(desk, name):
    flags = {"--prompt-format": "plain", "--instruction": ""}
    empty = len("Question: \n\nAnswer:")
    desk.data.write_text(common.to_line({"id": "a", "problem": "x" * (512 - empty), "answer": "1"}))
    desk.fails(name, "problem 'a' is 512 tokens long, and the context of --model holds 512", flags)
    desk.data.write_text(common.to_line({"id": "a", "problem": "x" * (511 - empty), "answer": "1"}))
    assert desk.run(name, flags)[0] == 0


def test_rho_that_leaves_every_prefix_empty_is_counted(desk):
    assert desk.run("revise", {"--rho": "0.001"})[0] == 0
    assert json.loads((desk.out / "summary.json").read_text())["skipped_too_short"] == 2
    assert (desk.out / "recovered.jsonl").read_text() == ""
    empty = {"--data": desk.out / "recovered.jsonl", "--out": desk.path / "more"}
    desk.fails("train_sft", "no rows to train on", empty)


# --- hostile text and hostile models ----------------------------------------------------------------------------------
HOSTILE = ["../../x", "/tmp/x", "\x1b[2J\x1b]0;x\x07", "a\nb\r\u2028\u0085c", "<script>alert(1)</script>",
           '"}\n{"id": 1', "\x00", "NaN", "~", "\ud800"]


def test_hostile_ids_problems_and_golds_go_through_as_text(tmp_path, world):
    """No file outside --out, every line of JSONL whole, nothing for the terminal to obey."""
    data, folder = tmp_path / "d.jsonl", tmp_path / "in"
    texts = [t.replace("\ud800", "s") for t in HOSTILE]  # tokenizers refuse what is not Unicode; an id may be anything
    data.write_text("".join(common.to_line({"id": i, "problem": t, "answer": f"5{t}"}) for i, t in zip(HOSTILE, texts)))
    folder.mkdir()
    before = {p for p in tmp_path.parent.rglob("*") if p.is_file()}
    for name, more in [("rollout", ["--data", data]), ("revise", ["--rollouts", folder / "rollout"]),
                       ("eval", ["--data", data])]:
        codes, errors = world.run(name, folder / name, more=more)
        assert codes == [0], errors
        shown = errors[0] + Path(f"{world.path}/log.0.1").read_text()
        assert not set(shown) & set("\x00\x07\u2028\u0085") and "\x1b[2J" not in shown and "\x1b]" not in shown
    new = {p for p in tmp_path.parent.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(folder) or p.parent == world.path and p.name.startswith("log.") for p in new)
    rows = [json.loads(line) for line in (folder / "rollout/rollouts.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [(r["id"], r["answer"]) for r in rows] == [
        pair for pair in zip(HOSTILE, [f"5{t}" for t in texts]) for _ in range(2)]
    assert "\ud800" in {r["id"] for r in read(folder / "revise/revised.jsonl")}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_and_names_in_an_error_stay_one_printable_line(desk, text):
    desk.data.write_text(common.to_line({"id": text, "problem": "x", "answer": "1"}) * 2)
    assert desk.fails("rollout", "was used by record 1")[:-1].isprintable()
    desk.data.write_text(common.to_line({"id": text, "problem": "x" * 600, "answer": "1"}))
    assert desk.fails("rollout", "tokens long")[:-1].isprintable()
    if not {"\x00", "\ud800"} & {*text}:
        assert desk.fails("rollout", "No such file", {"--data": f"{desk.path}/no{text}"})[:-1].isprintable()


def test_code_that_comes_with_a_model_is_never_run(desk):
    path = desk.path / "model"
    shutil.copytree(desk.flags["rollout"]["--model"], path)
    (path / "evil.py").write_text(f"open({str(desk.path / 'sprung')!r}, 'w')\n"
                                  "from transformers import Qwen2ForCausalLM as Model, Qwen2Config as Config\n")
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(settings | {"auto_map": {
            "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.Model", "evil.Model"]}}))
    desk.run("rollout", {"--model": path})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    desk.fails("rollout", "--model", {"--model": path, "--out": desk.path / "o2"})
    assert not (desk.path / "sprung").exists()


SOURCES = sorted(p for folder in (".", "helpers", "baselines", "experiments", "toy")
                 for p in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_source_unpickles_runs_text_or_trusts_remote_code(path):
    text = path.read_text()
    for pattern in (r"trust_remote_code\s*=\s*(?!False)", r"(?<![.\w])(eval|exec|compile)\(", r"\bpickle\b(?!d)",
                    r"torch\.load\(", r"weights_only=False", r"shell=True", r"os\.system"):
        assert not re.search(pattern, text.replace("no pickle", "")), pattern


# --- what a result depends on -----------------------------------------------------------------------------------------
def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    common.start_run(tmp_path / "o", argparse.Namespace(seed=0))
    assert json.loads((tmp_path / "o/run.json").read_text())["git"] is None


@pytest.mark.parametrize("change", ["verifier", "chat template"])
def test_a_run_does_not_go_on_with_another_verifier_or_chat_template(tmp_path, model_dir, change):
    model, verifier = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "v.py"
    verifier.write_text("def check(response, gold):\n    return True\n")
    args = argparse.Namespace(model=str(model), verifier=f"{verifier}:check")
    common.start_run(tmp_path / "o", args)
    (tmp_path / "o/rollouts.rank0.part").write_text("")
    common.start_run(tmp_path / "o", args)
    if change == "verifier":
        verifier.write_text("def check(response, gold):\n    return False\n")
    else:
        next(model.glob("*.jinja")).write_text("{{ messages[0]['content'] }}")
    with pytest.raises(common.UserError, match=f"--{change.split()[0] if change == 'verifier' else 'model'}-digest"):
        common.start_run(tmp_path / "o", args)
