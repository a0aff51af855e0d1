"""Calls the function of --verifier: in this process, or in workers with a time limit.

A worker is this file, run as a script: it imports no torch, which would cost seconds and 200 MB.
"""
import argparse
import contextlib
import faulthandler
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where the stages are
OPEN = []  # verifiers to close
DEFAULT = "verifier.py:verify"  # takes text alone for an answer


def add_verifier_args(parser: argparse.ArgumentParser) -> None:
    from helpers.common import COUNT, checked  # not above: a worker needs none of it
    add = parser.add_argument
    add("--verifier", default=DEFAULT,
        help="path.py:function(response, answer) -> bool; a third parameter gets the problem, a "
             "dict, if it has no default or is called problem")
    add("--verifier-workers", type=COUNT, default=0,
        help="processes for a slow verifier; 0: in this one, without a limit")
    add("--verifier-seconds", type=checked(float, lambda s: 0 < s < 1e6), default=10,
        help="a worker's time for a verdict; beyond it, it is wrong")


def from_args(args: argparse.Namespace) -> "Verifier":
    return Verifier(args.verifier, args.verifier_workers, args.verifier_seconds)


def file_of(spec: str) -> Path:
    """The file of `path.py:function`: where it says, or beside the stages."""
    path = Path(spec.rpartition(":")[0])
    return path if path.is_absolute() or path.exists() else ROOT / path


def load(spec: str) -> tuple:
    """The function of `path.py:function`, and whether it takes the problem. Raises anything."""
    path, name = file_of(spec).resolve(), spec.rpartition(":")[2]
    module_spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"{path}"), path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # where dataclasses look
    sys.path.insert(0, str(path.parent))  # for files beside it
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    function = getattr(module, name)
    third = list(inspect.signature(function).parameters.values())[2:3]
    return function, any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and
                         (p.default is p.empty or p.name == "problem") for p in third)


def judge(function, asked: list) -> tuple[bool, str]:
    """The verdict and, if the function raised something, what and where."""
    try:
        return bool(function(*asked)), ""
    except (Exception, SystemExit) as e:  # noqa: BLE001 (anybody's code)
        at = traceback.extract_tb(e.__traceback__)[-1]
        return False, f"{type(e).__name__}: {str(e)[:300]} ({at.filename}:{at.lineno})"


class Verifier:
    """The function of --verifier. Called, it gives a verdict; submit() gives a future of one.
    Raises UserError naming --verifier. Not closed (common.run_script does it), Python waits at its
    end for what is under way."""

    def __init__(self, spec: str, workers: int = 0, seconds: float = 10):
        self.spec, self.seconds = spec, seconds
        self.timeouts, self.lock = 0, threading.Lock()
        try:  # with workers too: a file that cannot be used is named at once
            self.function, self.takes_problem = load(spec)
        except (Exception, SystemExit) as e:  # noqa: BLE001 (anybody's code)
            raise self.refusal(f"expected path.py:function ({type(e).__name__}: {e})") from None
        self.threads = ThreadPoolExecutor(workers) if workers else None
        self.workers: dict[int, subprocess.Popen] = {}  # of each thread
        OPEN.append(self)

    def refusal(self, reason: str) -> Exception:
        from helpers.common import UserError  # not above: a worker needs none of it
        return UserError(f"--verifier {self.spec}: {reason}")

    def __call__(self, response: str, answer: object, problem: dict | None = None) -> bool:
        ask = self.ask_worker if self.threads else lambda asked: judge(self.function, asked)
        right, error = ask([response, answer, problem][:3 if self.takes_problem else 2])
        if error:
            name = f"problem {problem.get('id')!r}" if problem else f"answer {answer!r}"
            raise self.refusal(f"{name}: {error}")
        return right

    def submit(self, response: str, answer: object, problem: dict | None = None) -> Future:
        """With workers a verdict to come; without, it is there, or raises here."""
        if self.threads:
            return self.threads.submit(self, response, answer, problem)
        future = Future()
        future.set_result(self(response, answer, problem))
        return future

    def ask_worker(self, asked: list) -> tuple[bool, str]:
        """judge() by this thread's worker, which is killed if it takes too long."""
        me = threading.get_ident()
        worker, reply, late = self.workers.get(me), "", False
        if worker is None or worker.poll() is not None:  # none yet, or something has ended it
            worker = self.start_worker()
        with contextlib.suppress(BrokenPipeError):  # it has ended
            worker.stdin.write(json.dumps(asked) + "\n")
            worker.stdin.flush()
            late = not wait([worker.stdout], self.seconds)
            reply = "" if late else worker.stdout.readline()
        if reply:
            return tuple(json.loads(reply))
        kill(worker)  # the next question starts another one
        with self.lock:
            self.timeouts += late
        return False, "" if late else f"its worker ended with exit code {worker.returncode}"

    def start_worker(self) -> subprocess.Popen:
        spec = f"{file_of(self.spec).resolve()}:{self.spec.rpartition(':')[2]}"
        worker = self.workers[threading.get_ident()] = subprocess.Popen(
            [sys.executable, Path(__file__).resolve(), spec, str(self.seconds)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if not worker.stdout.readline():
            raise self.refusal("its worker does not start")
        return worker

    def close(self) -> None:
        """Forget what nobody waits for, end the workers, say how many verdicts were late."""
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)
            for worker in list(self.workers.values()):
                kill(worker)
        if self.timeouts:
            print(f"--verifier {self.spec}: {self.timeouts} verdicts took longer than "
                  f"{self.seconds:g} s and count as wrong", file=sys.stderr)


def close_all() -> None:
    """What the end of a script has to do."""
    while OPEN:
        OPEN.pop().close()


def kill(worker: subprocess.Popen) -> None:
    """With what the verifier has started."""
    if worker.returncode is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def work(spec: str, seconds: float) -> None:
    """A worker: arguments as a JSON list a line on standard input, until its parent is gone."""
    asked, told = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # a verifier may read
    os.dup2(2, 1)  # and print
    sys.path[0] = str(ROOT)
    function, _ = load(spec)
    print("ready", file=told, flush=True)
    for line in asked:
        # Should nobody be left to kill it: this needs no GIL, which a verifier may hold
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=nothing)
        reply = judge(function, json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=told, flush=True)
    os._exit(0)  # whatever threads a verifier has


if __name__ == "__main__":
    work(sys.argv[1], float(sys.argv[2]))
