"""Stages and functions in real processes, to kill or to group, each started in half a second.

Group(2, tmp_path, run_stage, "rollout.py", argv).finish() == [0, 0]
Group(2, tmp_path, in_group, function, argument).finish() == [0, 0]
"""
import faulthandler
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from helpers import common

# A fork server that has imported everything once
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "safetensors.torch", "transformers.models.auto.modeling_auto",
                               "transformers.models.auto.tokenization_auto", "transformers.models.qwen2.modeling_qwen2",
                               "transformers.models.qwen3.modeling_qwen3", "transformers.models.llama.modeling_llama",
                               "torch.distributed.fsdp", "hypothesis", "pytest"])


class Group:
    """function(*args) in `count` processes, under way; several have what torchrun would tell them. Each writes what it
    prints to folder/log.RANK.1 and .2. env: more variables."""

    def __init__(self, count: int, folder: Path, function, *args, **env: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        self.folder = Path(folder)
        self.ranks = [server.Process(target=begin, args=(
            f"{folder}/log.{r}", (together if count > 1 else {}) | {"RANK": str(r), "LOCAL_RANK": str(r)} | env,
            function, args)) for r in range(count)]
        for p in self.ranks:
            p.start()

    def finish(self, seconds: float = 120) -> list[int | None]:
        """Exit codes, None of one that has not ended. Each is waited for so long, once one has failed 20 s; none is
        left behind."""
        for p in self.ranks:
            p.join(min(seconds, 20) if any(q.exitcode for q in self.ranks) else seconds)
        return self.end()

    def end(self) -> list[int | None]:
        codes = [p.exitcode for p in self.ranks]
        for p in self.ranks:
            p.kill()
            p.join()
        return codes

    def said(self, stream: int) -> list[str]:
        """What every rank printed: 1 for standard output, 2 for standard error."""
        return [Path(f"{self.folder}/log.{r}.{stream}").read_text() for r in range(len(self.ranks))]


def begin(log: str, env: dict[str, str], function, args: tuple) -> None:
    for number in (1, 2):
        os.dup2(os.open(f"{log}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update({"HF_HUB_OFFLINE": "1"} | env)
    torch.set_num_threads(1)
    # A shell starts what runs in its background deaf to Ctrl-C, and that is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    function(*args)


def in_group(function, *args) -> None:
    """function(*args) as a member of the process group."""
    common.start_group()
    try:
        function(*args)
    finally:
        common.dist.destroy_process_group()


def run_stage(script: str, argv: list[str], kill_at: int = 0, draws: str = "") -> None:
    """A stage. kill_at: see die_at. draws: prefix of the files that get every draw."""
    if kill_at:
        die_at(kill_at)
    sys.argv = [script, *argv]
    stage = importlib.import_module(script.removesuffix(".py"))
    from conftest import note_draws
    write = note_draws(f"{draws}.draws{os.environ['RANK']}") if draws else lambda: None
    common.run_script(stage.get_args, stage.main)
    write()


def die_at(point: int) -> None:
    """SIGKILL at the point-th moment at which files change: appends half done, renames just before them and (an odd
    number of moments later) just after."""
    moments = itertools.count(1)

    def maybe_die():
        if next(moments) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    append, replace = common.append_jsonl, os.replace

    def torn_append(path, records):
        text = "".join(map(common.to_line, records))
        with open(path, "a") as f:
            f.write(text[:len(text) // 2])
        maybe_die()
        os.truncate(path, os.path.getsize(path) - len(text) // 2)
        append(path, records)

    def torn_replace(a, b):
        maybe_die()
        replace(a, b)
        maybe_die()

    common.append_jsonl, os.replace = torn_append, torn_replace
