"""Every stage with --device cuda on a machine without a GPU: tensors stay where they are and carry a tag, and an
operation on two tags raises, as a GPU would.

What cannot be emulated: CUDA graphs, NCCL and so several processes, bfloat16 kernels, the order of
atomic sums, and host synchronisation. A tensor that autograd makes has no tag and goes with any.
"""
import functools
import json

import pytest
import torch
from conftest import QUARTER, here, read, write_problems, write_verifier
from torch.overrides import TorchFunctionMode

import eval as evaluation
import revise
import rollout
import train_grpo
import train_sft
from helpers import sampling, training

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def tensors(x):
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


class Tagged(TorchFunctionMode):
    """The emulated device: a tensor's tag is its attribute `tag`."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        if name in ("__get__", "__set__"):
            name = f"{func.__self__.__name__}.{name}"
        inputs = tensors([args, kwargs])
        first = getattr(inputs[0], "tag", None) if inputs else None
        if name == "device.__get__":
            return first or func(*args)
        if name == "is_cuda.__get__":
            return first == CUDA
        if name in ("numpy", "__array__") and first == CUDA:
            raise TypeError("a CUDA tensor as a numpy array")
        target = kwargs.get("device")
        if name in ("to", "cpu", "cuda"):
            places = [a for a in args[1:] if isinstance(a, str | torch.device | torch.Tensor)]
            target = {"cpu": CPU, "cuda": CUDA}.get(name, next(iter(places), target))
            target = getattr(target, "tag", CPU) if isinstance(target, torch.Tensor) else target
            if name != "to":
                func, args = torch.Tensor.to, args[:1]
            args = [CPU if any(a is p for p in places) and not isinstance(a, torch.Tensor) else a for a in args]
        if target is not None and torch.device(target).type == "meta":
            return func(*args, **kwargs)
        if "device" in kwargs and target is not None:
            kwargs["device"] = CPU
        moves = name in ("to", "cpu", "cuda", "copy_", "data.__set__", "grad.__set__")
        if not moves:
            checked = [t for t in inputs if t.dim()]  # a number on the CPU goes with any device
            if name in ("__getitem__", "__setitem__"):  # and so does an index
                checked = [t for t in checked if t is args[0] or getattr(t, "tag", CPU) == CUDA
                           or name == "__setitem__" and t is args[2]]
            tags = {t.tag for t in checked if hasattr(t, "tag")}
            if len(tags) > 1:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
        out = func(*args, **kwargs)
        if name == "data.__set__":
            args[0].tag = getattr(args[1], "tag", CPU)
        if target is not None:
            tag = CUDA if torch.device(target).type == "cuda" else CPU
            if name in ("to", "cpu", "cuda") and out is args[0] and getattr(out, "tag", CPU) != tag:
                out = out.clone()  # a copy: its source stays where it is
        else:
            known = [t.tag for t in inputs if hasattr(t, "tag")]
            tag = CUDA if CUDA in known else CPU if known or not inputs else None
        if tag is not None:
            for t in tensors(out):
                if not any(t is x for x in inputs):
                    t.tag = tag
        return out


@pytest.fixture
def stages(tmp_path, model_dir, monkeypatch):
    """The stages in order, as functions without arguments, each on what those before it wrote."""
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
                        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    data = write_problems(tmp_path / "d.jsonl", 6)
    shared = ["--model", model_dir, "--device", "cuda", "--dtype", "float32"]
    sampled = [*shared, "--verifier", write_verifier(tmp_path / "v.py", QUARTER), "--max-new-tokens", 12]
    method = ["--revision-steps", 2, "--continuations", 2]
    flags = {rollout: [*sampled, "--data", data, "-n", 2, "--decode-rows", 3],
             revise: [*sampled, *method, "--rollouts", tmp_path / "rollout"],
             train_sft: [*shared, "--data", tmp_path / "rollout/rollouts.jsonl", "--steps", 2, "--batch-size", 2],
             train_grpo: [*sampled, *method, "--data", data, "--revise", "--steps", 2, "--batch-size", 4,
                          "--group-size", 2, "--save-every", 1],
             evaluation: [*sampled, "--data", data, "-n", 2, "--k", 1]}

    def go(module):
        with Tagged():
            here(module.__name__, *flags[module], "--out", tmp_path / module.__name__)
    return {module: functools.partial(go, module) for module in flags}


def test_every_stage_keeps_its_tensors_on_the_emulated_device(stages, tmp_path, monkeypatch):
    used, draw = set(), sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda logits, *rest: used.add(logits.device.type) or draw(logits, *rest))
    for go in stages.values():
        go()
    assert used == {"cuda"}
    assert len(read(tmp_path / "rollout/rollouts.jsonl")) == 12 and read(tmp_path / "revise/revised.jsonl")
    assert any(m["zero_hit"] for m in read(tmp_path / "train_grpo/metrics.jsonl"))
    assert json.loads((tmp_path / "eval/results.json").read_text())


MIX_UPS = {  # stage: a function that it uses, and that function with a device forgotten
    rollout: (sampling, "uniforms", lambda right: lambda keys, position: torch.zeros(len(keys))),
    revise: (revise, "best_rows", lambda right: lambda X, W, *rest: right(X, W.cpu(), *rest)),
    train_sft: (training, "response_logprobs", lambda right: lambda *a: [t + t.cpu() for t in right(*a)]),
    train_grpo: (train_grpo, "policy_loss", lambda right: lambda logp, old, *rest: right(logp, old.cpu(), *rest)),
    evaluation: (sampling, "filter_logits", lambda right: lambda logits, *_: logits + torch.zeros(logits.shape))}


@pytest.mark.parametrize("stage", MIX_UPS, ids=lambda stage: stage.__name__)
def test_a_planted_mix_up_is_caught(stages, monkeypatch, stage):
    if stage in (revise, train_sft):
        stages[rollout]()
    module, name, wrong = MIX_UPS[stage]
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        stages[stage]()
