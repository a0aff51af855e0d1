"""train_sft.py and train_grpo.py against loops written the obvious way, for any micro-batch, process count, restart."""
import argparse
import copy
import shutil

import pytest
import torch
from conftest import (
    TOKENS,
    WRAPPER,
    assert_same_files,
    here,
    read,
    same_draws,
    stage,
    tiny_model,
    tiny_tokenizer,
    without_seconds,
    write_problems,
    write_verifier,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import rollout
import train_sft
from helpers import common, training

# Some groups are zero-hit. The last character decides, which a continuation has whatever its prefix is projected to.
SELECTIVE = "def verify(response, gold):\n    return sum(map(ord, response[-1:])) % 3 == 1\n"


def make_rows(sizes, seed=0):
    """Rows of (prompt, response) tokens. Every other response has the padding id, which is also EOS, inside."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(2, TOKENS, (n,), generator=g).tolist()
    rows = [{"prompt_ids": ids(q), "response_ids": ids(n)} for q, n in sizes]
    for row in rows[::2]:
        row["response_ids"][len(row["response_ids"]) // 2] = 1
        row["response_ids"][-1] = 1
    return rows


SIZES = [(3, 6), (9, 1), (1, 11), (5, 5), (2, 7)]


def literal_logprobs(model, row):
    """log p and entropy of every response token, a forward each, full logits."""
    logps, entropies = [], []
    for t, token in enumerate(row["response_ids"]):
        context = torch.tensor([row["prompt_ids"] + row["response_ids"][:t]])
        p = model(input_ids=context, use_cache=False).logits[0, -1].log_softmax(-1)
        logps.append(p[token])
        entropies.append(-sum(float(x.exp() * x) for x in p.detach()))
    return torch.stack(logps), torch.tensor(entropies)


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(ours, expected, tolerance=1e-6):
    assert ours.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=tolerance * scale, msg=name)


# --- log-probabilities and micro-batches ------------------------------------------------------------------------------
@pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False), ("llama", False)])
@pytest.mark.parametrize("head_rows", [1, 4, 1024])
def test_response_logprobs_entropies_and_gradients_equal_a_token_by_token_loop(family, tied, head_rows):
    model, rows = tiny_model(family, tied), make_rows(SIZES)
    weights = torch.linspace(-1, 2, sum(n for _, n in SIZES))
    logp, entropy, owner = training.response_logprobs(model, rows, head_rows)
    (weights * logp).sum().backward()
    ours = gradients(model)
    literal = [literal_logprobs(model, r) for r in rows]
    expected = torch.cat([x for x, _ in literal])
    (weights * expected).sum().backward()
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.cat([e for _, e in literal]), rtol=1e-5, atol=1e-5)
    assert owner.tolist() == [b for b, (_, n) in enumerate(SIZES) for _ in range(n)]
    assert_same_gradients(ours, gradients(model), 1e-5)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), max_size=30), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_micro_batches_hold_every_row_once_within_the_budget(sizes, budget):
    rows = [{"prompt_ids": [5] * q, "response_ids": [5] * n, "i": i} for i, (q, n) in enumerate(sizes)]
    batches = training.equal_batches(rows, budget)
    assert sorted(r["i"] for b in batches for r in b) == list(range(len(rows)))
    widths = [max(sum(sizes[r["i"]]) for r in b) for b in batches]
    assert all(len(b) * w <= budget or len(b) == 1 for b, w in zip(batches, widths))
    assert widths == sorted(widths, reverse=True)  # like lengths share a batch


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 30), st.integers(0, 3))
def test_draw_rows_visits_every_row_once_an_epoch_and_has_no_state(count, start, size, seed):
    rows = training.draw_rows(count, start, size, seed)
    assert rows == [training.draw_rows(count, i, 1, seed)[0] for i in range(start, start + size)]  # pure
    epoch = start // count + 1
    assert sorted(training.draw_rows(count, epoch * count, count, seed)) == list(range(count))


def test_draw_rows_shuffles_each_epoch_differently():
    epochs = [tuple(training.draw_rows(20, 20 * e, 20, seed=0)) for e in range(5)]
    assert len({*epochs, tuple(training.draw_rows(20, 0, 20, seed=1))}) == 6


# --- supervised fine-tuning -------------------------------------------------------------------------------------------
def write_rows(path, rows, **more):
    path.write_text("".join(map(common.to_line, [r | more for r in rows])))
    return path


def sft_args(model_dir, data, out, *extra):
    return train_sft.get_args(["--model", str(model_dir), "--data", str(data), "--out", str(out), *extra])


def test_sft_gradient_equals_the_mean_cross_entropy_for_every_micro_batch_budget(tmp_path, model_dir, monkeypatch):
    rows = make_rows(SIZES)
    data = write_rows(tmp_path / "d.jsonl", rows)
    model = tiny_model("qwen2")
    loss = -torch.cat([literal_logprobs(model, r)[0] for r in rows]).mean()  # mean over the tokens of the step
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    plans = []
    batches = training.equal_batches
    monkeypatch.setattr(training, "equal_batches", lambda r, b: plans.append(batches(r, b)) or plans[-1])
    for budget in (1, 24, 48, 10_000):
        out = tmp_path / str(budget)
        train_sft.main(sft_args(model_dir, data, out, "--steps", "1", "--batch-size", "5",
                                "--train-tokens", str(budget)))
        assert_same_gradients(seen[-1], expected)
        assert read(out / "metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert read(out / "metrics.jsonl")[0]["tokens"] == sum(n for _, n in SIZES)
    assert [max(map(len, p)) for p in plans] == [1, 2, 4, 5]


def weights_of(out):
    return load_file(out / "model" / "model.safetensors")


def assert_same_training(a, b, start, tolerance=1e-6):
    """Weights equal to the tolerance, and moved by more than it."""
    one, two = weights_of(a), weights_of(b)
    assert one.keys() == two.keys()
    assert max(float((one[k] - start[k]).abs().max()) for k in one) > 5 * tolerance
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < tolerance


def assert_same_metrics(a, b, tolerance):
    one, two = (without_seconds(read(x / "metrics.jsonl")) for x in (a, b))
    assert len(one) == len(two) > 0
    for x, y in zip(one, two):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)


def assert_same_runs(a, b, model_dir, tolerance=1e-5):
    """Metrics and weights of runs with stage(draws=...), unless a draw fell on the other side: then the data are
    others from there on."""
    if same_draws(a, b):
        assert_same_metrics(a, b, tolerance)
        assert_same_training(a, b, load_file(model_dir / "model.safetensors"))


@pytest.mark.parametrize("size", [3, 1])
def test_sft_is_the_same_on_one_and_two_processes_and_sharded(tmp_path, model_dir, size):
    """Of one row a step, a process has none."""
    data = write_rows(tmp_path / "d.jsonl", make_rows(SIZES))
    for n, shard in ((1, "off"), (1, "on"), (2, "off"), (2, "on")):
        out = tmp_path / f"{n}-{shard}"
        stage("train_sft.py", "--model", model_dir, "--data", data, "--steps", 3, "--batch-size", size,
              "--train-tokens", 20, "--shard", shard, "--out", out, processes=n)
        assert_same_metrics(tmp_path / "1-off", out, 1e-6 if shard == "off" else 1e-5)
        assert_same_training(tmp_path / "1-off", out, load_file(model_dir / "model.safetensors"))


def test_sft_reads_plain_rows_and_leaves_out_failed_ones(tmp_path, model_dir):
    data = tmp_path / "d.jsonl"
    data.write_text("".join(map(common.to_line, [
        {"problem": "1+1?", "response": "two \\boxed{2}"},
        {"problem": [{"role": "user", "content": "1+2?"}], "response": "3"},
        {"problem": "wrong", "response": "x", "reward": 0},
        {"prompt_ids": [5, 6], "response_ids": [7, 8], "reward": 0},
        {"prompt_ids": [5, 6], "response_ids": [7, 1], "reward": 1},
        {"prompt_ids": [5], "response_ids": [9]},
        {"problem": WRAPPER.format("How many?"), "response": "4"}])))
    tokenizer, model = tiny_tokenizer(), tiny_model("qwen2")
    rows = train_sft.read_rows(common.Policy(model, tokenizer, TOKENS, [1]), sft_args(model_dir, data, tmp_path / "o"))
    text = [(tokenizer.decode(r["prompt_ids"]), tokenizer.decode(r["response_ids"])) for r in rows]
    assert text[:2] == [(f"[user]1+1?\n{rollout.INSTRUCTION}[assistant]", "two \\boxed{2}<eos>"),
                        ("[user]1+2?[assistant]", "3<eos>")]
    assert rows[2:4] == [{"prompt_ids": [5, 6], "response_ids": [7, 1]}, {"prompt_ids": [5], "response_ids": [9]}]
    assert text[4] == (f"[user]How many?\n{rollout.INSTRUCTION}[assistant]", "4<eos>")  # as rollout.py would ask it


# --- resume and checkpoints -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("sft")
    data = write_rows(path / "d.jsonl", make_rows(SIZES))
    flags = ["--model", model_dir, "--data", data, "--batch-size", 3, "--steps", 6, "--save-every", 2, "--lr", 0.01]
    stage("train_sft.py", *flags, "--out", path / "o")
    return path / "o", flags


def test_steps_is_free_until_the_run_is_finished(tmp_path, straight):
    out, flags = straight
    again = lambda *more, to="o", **how: stage("train_sft.py", *flags, "--out", tmp_path / to, *more, **how)
    again("--steps", 3, kill_at=7)
    assert [p.name for p in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-000002"]
    failed = again("--steps", 1, check=False)
    assert failed.returncode == 2 and "--steps 1: --out holds a checkpoint of step 2" in failed.stderr
    shutil.copytree(tmp_path / "o", tmp_path / "two")
    again("--steps", 2, to="two")  # lowered to the checkpoint
    one, two = (tmp_path / x / "model.safetensors" for x in ("o/checkpoint-000002", "two/model"))
    assert one.read_bytes() == two.read_bytes()
    again()
    assert_same_files(out, tmp_path / "o")
    assert "trained already" in again("--steps", 4).stdout  # asked for no more than it has: nothing to do
    failed = again("--steps", 7, check=False)
    assert failed.returncode == 2 and "was finished after 6 steps" in failed.stderr
    assert_same_files(out, tmp_path / "o")


@pytest.mark.parametrize("keep,steps", [(2, [3, 4]), (1, [4]), (0, [1, 2, 3, 4]), (3, [2, 3, 4])])
def test_the_last_checkpoints_stay_and_where_nothing_continues_they_are_models_alone(
        tmp_path, model_dir, monkeypatch, keep, steps):
    data, out = write_rows(tmp_path / "d.jsonl", make_rows(SIZES)), tmp_path / "o"
    args = sft_args(model_dir, data, out, "--steps", "5", "--batch-size", "1", "--save-every", "1", "--keep", str(keep))
    optimizers = lambda: {p.name: len(list(p.glob("optimizer*"))) for p in out.glob("checkpoint*")}
    with monkeypatch.context() as unfinished:
        unfinished.setattr(training, "finish", lambda *_: None)
        train_sft.main(args)
    assert optimizers() == {f"checkpoint-{step:06d}": 3 * (step > 2) for step in steps}  # a run continues from two
    train_sft.main(args)
    assert optimizers() == {f"checkpoint-{step:06d}": 0 for step in steps}


def test_eval_takes_checkpoints_as_models(tmp_path, straight):
    """The learning curve: the checkpoint of step 4 is the model of a run of 4 steps, which eval.py finds as good."""
    out, flags = straight
    stage("train_sft.py", *flags, "--steps", 4, "--out", tmp_path / "four")
    models = [*sorted(out.glob("checkpoint-*")), out / "model", tmp_path / "four" / "model"]
    results = here("eval", "--model", *models, "--data", write_problems(tmp_path / "test.jsonl"), "-n", 4, "--k", 1,
                   "--max-new-tokens", 12, "--verifier", write_verifier(tmp_path / "v.py", SELECTIVE),
                   "--out", tmp_path / "eval")
    numbers = [{k: v for k, v in r.items() if k not in ("model", "seconds")} for r in results]
    assert len(numbers) == 4 and numbers[1] == numbers[3] and numbers[0] != numbers[1] != numbers[2]


def test_a_checkpoint_restores_weights_moments_and_step_of_an_untied_model(tmp_path):
    model, rows = tiny_model("qwen3", tied=False), make_rows(SIZES)

    def step(policy, optimizer):
        training.response_logprobs(policy.model, rows)[0].sum().backward()
        training.apply_gradients(policy.model, optimizer, 1.0)

    one, other = (common.Policy(m, tiny_tokenizer(), TOKENS, [1]) for m in (model, tiny_model("qwen3", False, seed=9)))
    optimizers = [training.make_optimizer(p.model, argparse.Namespace(lr=1e-2)) for p in (one, other)]
    for steps in (0, 2):  # before the first step there are no moments
        for _ in range(steps):
            step(one, optimizers[0])
        training.save_checkpoint(tmp_path, one, optimizers[0], {"step": steps, "cursor": 7}, 2)
        assert training.load_checkpoint(tmp_path, other.model, optimizers[1], 9) == {"step": steps, "cursor": 7}
        for policy, optimizer in zip((one, other), optimizers):
            step(policy, optimizer)
        assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))
    wider = copy.deepcopy(model.config)
    wider.intermediate_size *= 2
    for wrong in (tiny_model("qwen2"), type(model)(wider)):  # other names, other shapes
        with pytest.raises(common.UserError, match="checkpoint-000002: damaged, or not of --model"):
            training.load_checkpoint(tmp_path, wrong, training.make_optimizer(wrong, argparse.Namespace(lr=1e-2)), 9)
