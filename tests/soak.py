"""Long trials that are not part of `make test`: kills at random moments, and a long training run that must not grow.

    python tests/soak.py kill        20 kills -9 for every stage, on 1 and on 2 processes; the same files in the end
    python tests/soak.py long        300 steps of GRPO with revision on 2 processes: memory, open files, metrics
    python tests/soak.py torchrun    a rank that is killed, and one that hangs, under torchrun

Each prints what it saw and exits with 1 where a promise is broken. Set OMP_NUM_THREADS=1, and leave the machine alone.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, STAGES, read, run, save
from test_faults import World

from toy import sums as toy

SETTLE = 60  # seconds for a group to notice that one of its ranks is gone, and to end


def same(name: str, out: Path, world: World, processes: int = 1) -> bool:
    """Whether the same command comes to the files of an undisturbed run."""
    try:
        world.finishes_like_an_undisturbed_run(name, out, processes)
    except AssertionError as e:
        print(e)
        return False
    return True


def kill(args: argparse.Namespace, path: Path) -> bool:
    """Kill all ranks, or one of them, at moments drawn evenly over the time that an undisturbed run takes."""
    world, good = World(path, save(path / "qwen2")), True
    for name in args.stages:
        for processes in (1, 2):
            world.undisturbed(name, processes)
            start, out = time.time(), path / "killed"
            good &= same(name, out, world, processes)
            usual = time.time() - start
            shutil.rmtree(out)
            draw, kills, ends = random.Random(f"{args.seed} {name} {processes}"), 0, 0
            while kills < args.moments:
                # a process lost before the others have met it is waited for this long (torchrun would stop them)
                ranks = world.start(name, out, processes, LATENTREVISE_TIMEOUT="10").ranks
                time.sleep(draw.uniform(0, usual))
                victims = draw.choice([ranks, [draw.choice(ranks)]])
                alive = [p for p in victims if p.is_alive()]
                for p in alive:
                    p.kill()  # which does not mind that it has just ended
                for p in ranks:
                    p.join(SETTLE)
                    good &= p.exitcode is not None
                    p.kill()
                    p.join()
                kills += bool(alive)
                if not alive and all(p.exitcode == 0 for p in ranks):  # it came through: compare, and begin anew
                    ends += 1
                    good &= same(name, out, world, processes)
                    shutil.rmtree(out)
            equal = same(name, out, world, processes)
            print(f"{name} on {processes}: {kills} kills over {usual:.1f} s, {ends} runs ended between them; "
                  f"{'the same files' if equal else 'DIFFERENT'}", flush=True)
            good &= equal
            shutil.rmtree(out)
    return good


def usage(pid: int) -> tuple[int, int]:
    """Resident memory in KB and open files of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(os.listdir(f"/proc/{pid}/fd"))


def long(args: argparse.Namespace, path: Path) -> bool:
    """GRPO with revision on the toy model, under torchrun, watched from outside."""
    out = path / "grpo"
    run("toy.sums", "data", "--out", path / "data")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_grpo.py",
               "--model", "toy/sums_model", "--data", str(path / "data/hard.jsonl"), "--out", str(out), "--revise",
               "--device", "cpu", "--steps", str(args.steps), "--batch-size", "4", "--group-size", "4",
               "--max-new-tokens", "96", "--instruction", "", "--template", toy.TEMPLATE, "--save-every", "20",
               "--lr", "1e-4"]
    # glibc keeps what was freed, up to a third of the process here, in an amount that wanders; with every block of
    # 64 KB or more mapped on its own, the resident memory is what is in use
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with open(path / "log", "w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
    seen: dict[int, list[tuple[int, int]]] = {}  # process -> (memory, open files), every time it was looked at
    while launcher.poll() is None:
        time.sleep(args.every)
        done = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
        if done < args.steps // 5:  # warm-up: buffers, allocator
            continue
        for pid in map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()):
            try:
                seen.setdefault(pid, []).append(usage(pid))
            except (OSError, TypeError):
                pass  # it has just ended
    good = launcher.returncode == 0
    metrics = read(out / "metrics.jsonl") if good else []
    good &= [m["step"] for m in metrics] == list(range(1, args.steps + 1)) and (out / "model").is_dir()
    print(f"exit {launcher.returncode}, {len(metrics)} steps without a gap: {good}; rescued in "
          f"{sum(m['rescued'] > 0 for m in metrics)} of them"
          + ("" if good else f"\n{(path / 'log').read_text()[-3000:]}"))
    seen = {pid: looks for pid, looks in seen.items() if len(looks) >= 8}
    good &= len(seen) >= 2
    for pid, looks in seen.items():
        quarter = len(looks) // 4
        memory, handles = zip(*looks)
        early, late = statistics.median(memory[:quarter]), statistics.median(memory[-quarter:])
        flat = late <= early * 1.03 + 4096 and max(handles[-quarter:]) <= max(handles[:2 * quarter])
        print(f"process {pid}: {len(looks)} looks after warm-up, memory {early / 1024:.0f} -> {late / 1024:.0f} MB, "
              f"open files {max(handles[:quarter])} -> {max(handles[-quarter:])}: {'flat' if flat else 'GROWS'}")
        good &= flat
    return good


def torchrun(args: argparse.Namespace, path: Path) -> bool:
    """What torchrun and the other ranks say and how long it takes, when rank 1 of 3 dies and when it hangs."""
    world, good = World(path, save(path / "qwen2")), True
    for what, name in ((signal.SIGKILL, "dies"), (signal.SIGSTOP, "hangs")):
        (world.path / "trigger").write_text(f"1 4 {int(what)}")
        start = time.time()
        result = run("rollout.py", *world.flags["rollout"], "--out", path / name, processes=3, check=False,
                     LATENTREVISE_TIMEOUT="6")
        told = [line for line in result.stderr.splitlines() if " stops: rank " in line]
        told += re.findall(r"Root Cause.*?(rank +: \d+).*?(exitcode +: -?\d+)", result.stderr, re.DOTALL)
        print(f"rank 1 {name}: exit {result.returncode} after {time.time() - start:.0f} s; {told}")
        good &= result.returncode != 0 and "1" in str(told)
        equal = same("rollout", path / name, world, 3)
        print("  then the same command:", "the same files" if equal else "DIFFERENT")
        good &= equal
    return good


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=["kill", "long", "torchrun"])
    parser.add_argument("--moments", type=int, default=20, help="kills of each stage and number of processes")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="stages to kill")
    parser.add_argument("--steps", type=int, default=300, help="steps of the long run")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks at the long run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = get_args()
    with tempfile.TemporaryDirectory() as folder:
        fine = {"kill": kill, "long": long, "torchrun": torchrun}[arguments.trial](arguments, Path(folder))
    print(json.dumps({"trial": arguments.trial, "fine": fine}))
    sys.exit(not fine)
