"""Checkpoints and the final model of the two trainers: safetensors and JSON, written aside and renamed when whole.

They hold whole tensors, of which each process writes and reads its share, so that a run continues on any number of
processes, sharded or not.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from helpers import common
from helpers.common import UserError
from helpers.training import whole

FILE_BYTES = 4 * 2**30  # of a file, unless a single tensor is larger


def save(out: Path, step: int, model, tokenizer, optimizer, state: dict, keep: int = 2) -> None:
    """OUT/checkpoint-STEP: model, optimizer and state as safetensors and JSON, written aside and renamed."""
    folder, aside = out / f"checkpoint-{step:06d}", out / "checkpoint.tmp"
    save_model(aside, model, tokenizer)
    part, files = {}, 0
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            value = whole(value).cpu()  # every process takes part, one keeps it
            if common.rank() == 0:
                if part and sum(t.nbytes for t in part.values()) + value.nbytes > FILE_BYTES:
                    save_file(part, aside / f"optimizer-{files:05d}.safetensors")
                    part, files = {}, files + 1
                part[f"{name}.{key}"] = value.contiguous()
    if common.rank() == 0:
        save_file(part, aside / f"optimizer-{files:05d}.safetensors")
        (aside / "state.json").write_text(json.dumps(state | {"step": step}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for old in sorted(out.glob("checkpoint-*"))[:-keep]:
            shutil.rmtree(old)
    common.barrier()


def check_whole(folder: Path) -> None:
    """Raises UserError for a checkpoint that lacks a file or has a cut one.
    A kill leaves none: it is renamed when whole."""
    try:
        json.loads((folder / "state.json").read_text())["step"]
        for kind in ("model", "optimizer"):
            paths = list(folder.glob(f"{kind}*.safetensors"))
            for path in paths or [folder / f"{kind}.safetensors"]:
                safe_open(path, "pt").keys()  # compares the size of the file with its header
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: damaged ({e}); remove it, and the run continues from the one before") from None


def read_tensors(paths: list[Path], fill: dict[str, Tensor]) -> set[str]:
    """Fill tensors by name from safetensors files, of each no more than the rows that this process holds: those that
    torch.chunk gives it. Returns the names that the files have."""
    names = set()
    for path in paths:
        with safe_open(path, "pt") as f:
            names.update(f.keys())
            for name in fill.keys() & set(f.keys()):
                here = fill[name].to_local() if isinstance(fill[name], DTensor) else fill[name]
                if here is fill[name]:
                    here.copy_(f.get_tensor(name))
                elif len(here):  # with more processes than rows some have none
                    start = common.rank() * -(-len(fill[name]) // common.world_size())  # rounded up: rows per process
                    here.copy_(f.get_slice(name)[start:start + len(here)])
    return names


@torch.no_grad()
def load(out: Path, model, optimizer) -> dict:
    """Restore the last whole checkpoint into model and optimizer and cut metrics.jsonl back to it.
    {} if there is none."""
    folders = sorted(out.glob("checkpoint-*"))
    state = {"step": 0}
    if folders:
        check_whole(folders[-1])
        params = dict(model.named_parameters())
        saved = read_tensors(sorted(folders[-1].glob("model*.safetensors")), params)
        if saved != params.keys():
            raise UserError(f"{folders[-1]}: does not fit --model (missing {sorted(params.keys() - saved)[:3]}, "
                            f"unexpected {sorted(saved - params.keys())[:3]})")
        full = optimizer.state_dict()
        full["state"] = {
            i: {"step": torch.tensor(0.0)} | {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for i, p in enumerate(params.values())}
        moments = {f"{name}.{key}": t for name, s in zip(params, full["state"].values()) for key, t in s.items()}
        saved = read_tensors(sorted(folders[-1].glob("optimizer*.safetensors")), moments)
        if saved and saved != moments.keys():  # none: no step has been taken
            raise UserError(f"{folders[-1]}: damaged (no {sorted(moments.keys() - saved)[:1]}); remove it, and the run "
                            "continues from the one before")
        optimizer.load_state_dict(full)  # which moves what belongs on the device
        state = json.loads((folders[-1] / "state.json").read_text())
    if common.rank() == 0:
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            if (out / name).exists():
                rows = [r for r in common.read_jsonl(out / name, drop_torn=True) if r["step"] <= state["step"]]
                common.write_atomic(out / name, "".join(map(common.to_line, rows)))
    common.barrier()
    return state


def save_model(folder: Path, model, tokenizer) -> None:
    """Rank 0 gathers the weights, a parameter at a time, and writes a folder that from_pretrained loads."""
    weights = {}
    for name, p in model.named_parameters():
        value = whole(p.detach()).cpu()
        if common.rank() == 0:
            weights[name] = value
    if common.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, state_dict=weights, max_shard_size=FILE_BYTES)
        tokenizer.save_pretrained(folder)


def finish(out: Path, model, tokenizer) -> None:
    """OUT/model, written aside and renamed."""
    save_model(out / "model.tmp", model, tokenizer)
    if common.rank() == 0:
        os.replace(out / "model.tmp", out / "model")
        remove_checkpoints(out)
    common.barrier()


def remove_checkpoints(out: Path) -> None:
    for folder in out.glob("checkpoint*"):
        shutil.rmtree(folder)


def trained(out: Path, steps: int) -> bool:
    """Whether OUT/model is there; if so its checkpoints, which a kill may have left behind, are removed.

    Raises UserError if more steps than it has are asked for: without a checkpoint there is nothing to go on from.
    """
    if not (out / "model").exists():
        return False
    last = common.read_jsonl(out / "metrics.jsonl")[-1]["step"]
    if steps > last:
        raise UserError(f"--steps {steps}: {out / 'model'} was finished after {last} steps and its optimizer state is "
                        "gone; start a new run with it as --model")
    if common.rank() == 0:
        remove_checkpoints(out)
    return True


def check_steps(steps: int, state: dict) -> None:
    """Raises UserError where a checkpoint is beyond --steps already."""
    if state["step"] > steps:
        raise UserError(f"--steps {steps}: the run in --out has a checkpoint of step {state['step']} already")
