"""Sharded (FSDP2) and plain training on several gloo processes, against one process that does the obvious."""
import json
import shutil

import pytest
import torch
from conftest import Shapes, read, save, stage, tiny_model, write_problems, write_verifier
from processes import Group, in_group
from safetensors.torch import load_file, save_file
from test_grpo import train
from test_train import (
    SIZES,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_training,
    gradients,
    literal_logprobs,
    make_rows,
    sft_args,
    write_rows,
)
from transformers import AutoModelForCausalLM

from experiments.benches import memory, tools
from helpers import common, training


def on_processes(count, tmp_path, function, *args):
    """function(*args) on `count` processes in one gloo group."""
    group = Group(count, tmp_path, in_group, function, *args)
    assert group.finish() == [0] * count, "\n".join(group.said(2))


BUDGETS = {1: 1, 2: 24, 4: 48}  # largest micro-batch of SIZES in rows (one alone is not padded): padded tokens


def write_gradients(out, model_dir, shard):
    """Summed gradients of the mean cross-entropy, by number of rows and largest micro-batch;
    activations recomputed for 2."""
    args = sft_args(model_dir, "d", out, "--shard", shard, "--dtype", "float32")
    model, *_ = training.load_model(args, torch.device("cpu"), train=True)
    for count in (5, 3, 1):  # with 1 a process has no row, with 3 their numbers of micro-batches differ
        rows = make_rows(SIZES)[:count]
        tokens = sum(len(r["response_ids"]) for r in rows)
        mine = rows[common.rank()::common.world_size()]
        for size, budget in BUDGETS.items():
            for batch in training.equal_batches(mine, budget):
                with common.checkpointed(model, size == 2):
                    (-training.response_logprobs(model, batch, 4)[0].sum() / tokens).backward()
            found = {}
            for n, p in model.named_parameters():
                found[n] = training.full_tensor(p.grad).clone()
                if shard == "off" and common.world_size() > 1:
                    common.dist.all_reduce(found[n])
            model.zero_grad()
            if common.rank() == 0:
                save_file(found, out / f"{count}-{size}.safetensors")


@pytest.mark.parametrize("family,shard,processes", [("qwen2", "off", 1), ("qwen2", "off", 2), ("qwen3", "on", 1),
                                                    ("qwen2", "on", 2), ("qwen3", "on", 3)])
def test_gradients_do_not_depend_on_micro_batches_processes_or_sharding(tmp_path, family, shard, processes):
    model = tiny_model(family, tied=family == "qwen2")
    save(tmp_path / "m", model)
    on_processes(processes, tmp_path, write_gradients, tmp_path, tmp_path / "m", shard)
    for count in (5, 3, 1):
        (-torch.cat([literal_logprobs(model, r)[0] for r in make_rows(SIZES)[:count]]).mean()).backward()
        expected = gradients(model)
        for size in BUDGETS:
            assert_same_gradients(load_file(tmp_path / f"{count}-{size}.safetensors"), expected)


def test_the_head_never_has_logits_of_more_than_a_chunk_of_rows():
    model, rows = tiny_model("qwen3"), make_rows([(5, 90), (7, 61), (3, 1)])
    with Shapes() as shapes:
        training.response_logprobs(model, rows, head_rows=8)[0].sum().backward()
    vocab = model.config.vocab_size
    weight = {*model.get_output_embeddings().weight.shape}
    logits = [s for s in shapes.seen if vocab in s and {*s} != weight]
    assert max(s.numel() for s in logits) == 8 * vocab


# --- the copy that samples --------------------------------------------------------------------------------------------
def compare_actor(model_dir, dtype):
    args = sft_args(model_dir, "d", "o", "--shard", "on", "--dtype", dtype, "--lr", "0.01")
    device = torch.device("cpu")
    model, *_ = training.load_model(args, device, train=True)
    assert all(p.dtype == torch.float32 and p.to_local().numel() < p.numel() for p in model.parameters())
    actor, optimizer, rows = (training.load_actor(model, args, device), training.make_optimizer(model, args),
                              make_rows(SIZES))
    assert {p.dtype for p in actor.parameters()} == {getattr(torch, dtype)}
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["response_ids"]])
    seen = []
    for _ in range(3):
        with torch.no_grad():
            logits = actor(ids, use_cache=False).logits
            assert torch.equal(model(ids, use_cache=False).logits, logits)
            for ours, theirs in zip(training.response_logprobs(model, rows), training.response_logprobs(actor, rows)):
                assert torch.equal(ours, theirs)
        seen.append(logits)
        training.response_logprobs(model, rows)[0].sum().backward()
        training.apply_gradients(model, optimizer, 1.0)
        training.refresh_actor(actor, model)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    count = sum(p.numel() for p in model.parameters())  # whole; a process holds half, in float32, and of its moments
    held = [sum(t.to_local().nbytes for t in ts) for ts in (
        model.parameters(), *([s[key] for s in optimizer.state.values()] for key in ("exp_avg", "exp_avg_sq")))]
    assert held == [4 * count // 2] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_actor_has_the_logits_of_the_sharded_model_bit_for_bit(tmp_path, family, dtype):
    save(tmp_path / "m", tiny_model(family, tied=family == "qwen2"))
    on_processes(2, tmp_path, compare_actor, tmp_path / "m", dtype)


@pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False)])
def test_the_memory_formula_is_what_autograd_keeps(family, tied):
    rows = [{"prompt_ids": [5] * 60, "response_ids": [6] * 140}] * 3
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, tied).to(dtype)
        root, block = memory.parameters(model.config)
        assert root + 2 * block == sum(p.numel() for p in model.parameters())
        for checkpointed in (False, True):
            with common.checkpointed(model, checkpointed):
                kept = tools.saved_bytes(model, training.response_logprobs, model, rows)
            assert memory.activation_bytes(
                model.config, dtype.itemsize, 600, 420, checkpointed) == pytest.approx(kept, rel=0.06)


@pytest.mark.parametrize("processes", [1, 2])
def test_bfloat16_samples_refers_to_and_trains_one_and_the_same_policy(tmp_path, model_dir, processes):
    data, verifier = write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py")
    train(model_dir, data, tmp_path / "o", verifier, "--steps", 2, "--lr", "0.001", "--dtype", "bfloat16",
          "--group-size", 8, processes=processes)
    first, second = read(tmp_path / "o" / "metrics.jsonl")
    # the reference is the policy to the last bit, at first
    assert first["kl"] == 0 < second["kl"] and first["grad_norm"] > 0
    trained = load_file(tmp_path / "o" / "model" / "model.safetensors")
    assert all(v.dtype == torch.float32 for v in trained.values())
    assert any(not torch.equal(v, v.bfloat16().float()) for v in trained.values())  # master weights are finer


@pytest.mark.parametrize("dtype,device,world,expected", [
    ("float32", "cpu", 1, False), ("float32", "cpu", 2, False),
    ("float32", "cuda", 1, False), ("float32", "cuda", 2, True),
    ("bfloat16", "cpu", 1, True), ("bfloat16", "cuda", 1, True), ("bfloat16", "cuda", 8, True)])
def test_shard_auto_is_for_bfloat16_and_for_several_gpus(monkeypatch, dtype, device, world, expected):
    monkeypatch.setattr(common, "world_size", lambda: world)
    assert training.is_sharded(sft_args("m", "d", "o", "--dtype", dtype), torch.device(device)) is expected
    if dtype == "bfloat16":
        with pytest.raises(common.UserError, match="--shard off"):
            training.is_sharded(sft_args("m", "d", "o", "--dtype", dtype, "--shard", "off"), torch.device(device))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model_dir):
    """One plain process, and the flags of its run."""
    out = tmp_path_factory.mktemp("straight")
    flags = ["--model", model_dir, "--data", write_rows(out / "d.jsonl", make_rows(SIZES)), "--device", "cpu",
             "--batch-size", 3, "--steps", 5, "--save-every", 2, "--train-tokens", 12]
    stage("train_sft.py", *flags, "--out", out / "o")
    return out / "o", flags


@pytest.mark.parametrize("before,after", [((2, "on"), (1, "off")), ((1, "off"), (2, "on"))], ids=str)
def test_killed_and_continued_on_other_processes_gives_the_same_losses(tmp_path, model_dir, straight, before, after):
    """Killed while step 3 is logged: the checkpoint of step 2 is there."""
    out, flags = straight
    for (processes, shard), kill_at in ((before, 7), (after, 0)):
        stage("train_sft.py", *flags, "--shard", shard, "--out", tmp_path / "o", processes=processes, kill_at=kill_at)
    assert_same_metrics(out, tmp_path / "o", 1e-5)
    assert_same_training(out, tmp_path / "o", load_file(model_dir / "model.safetensors"))
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "checkpoint-000002", "checkpoint-000004", "metrics.jsonl", "model", "run.json"]


def step_and_save(out, model_dir, shard, resume):
    """Two steps, of which the first is read from the checkpoint that another run left where resume says so."""
    training.FILE_BYTES = 20_000
    args = sft_args(model_dir, "d", out, "--shard", shard, "--lr", "0.01", "--dtype", "float32")
    policy = training.load_model(args, torch.device("cpu"), train=True)
    optimizer, rows = training.make_optimizer(policy.model, args), make_rows(SIZES)
    if resume:
        assert training.load_checkpoint(out, policy.model, optimizer, 2) == {"step": 1, "note": "x"}
    for step in range(2 if resume else 1, 3):
        for batch in training.equal_batches(rows[common.rank()::common.world_size()], 30):
            training.response_logprobs(policy.model, batch)[0].sum().backward()
        training.apply_gradients(policy.model, optimizer, 1.0)
        if not resume:
            training.save_checkpoint(out, policy, optimizer, {"step": step, "note": "x"}, keep=2)
    weights = training.to_rank_0(dict(policy.model.named_parameters()))
    if common.rank() == 0:
        save_file(weights, out / f"{resume}.safetensors")


@pytest.mark.parametrize("before,after", [((5, "on"), (1, "off")), ((1, "off"), (5, "on")), ((2, "on"), (3, "on"))],
                         ids=str)
def test_a_checkpoint_loads_on_any_number_of_processes(tmp_path, before, after):
    """Of five processes the last holds no row of the 8 of a head's norm. Files of the model are bounded, those of the
    optimizer are no larger than the model, and transformers loads them."""
    save(tmp_path / "m", tiny_model("qwen3", tied=False))
    on_processes(before[0], tmp_path, step_and_save, tmp_path, tmp_path / "m", before[1], False)
    expected = load_file(tmp_path / "False.safetensors")
    last = tmp_path / "checkpoint-000002"
    loaded = dict(AutoModelForCausalLM.from_pretrained(last).named_parameters())
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected)
    assert json.loads((last / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    sizes = {f.name: [t.nbytes for t in load_file(f).values()] for f in last.glob("*.safetensors")}
    model = [x for name, x in sizes.items() if name.startswith("model")]
    assert len(model) > 1 and all(sum(x) <= max(20_000, max(x)) for x in model)
    assert sorted(sum(x) for name, x in sizes.items() if name.startswith("optimizer")) == [
        4 * len(expected), *[sum(map(sum, model))] * 2]  # a number, and two moments, of each parameter
    shutil.rmtree(last)
    on_processes(after[0], tmp_path, step_and_save, tmp_path, tmp_path / "m", after[1], True)
    continued, start = load_file(tmp_path / "True.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert max(float((expected[k] - start[k]).abs().max()) for k in expected) > 0.01  # Adam moves by about lr a step
    for k in expected:
        torch.testing.assert_close(continued[k], expected[k], rtol=0, atol=1e-4, msg=k)
        assert (continued[k] - expected[k]).abs().mean() < 1e-6
