"""train_sft.py and train_grpo.py against loops written the obvious way, for any micro-batch, process count, restart."""
import argparse
import copy
import math
import statistics

import pytest
import torch
from conftest import (
    TOKENS,
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
import train_grpo
import train_sft
from helpers import checkpoints, common, training


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
    rows = [{"prompt_ids": [5] * q, "response_ids": [5] * n} for q, n in sizes]
    batches = training.micro_batches(rows, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    widths = [max(sum(sizes[i]) for i in b) for b in batches]
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
    return train_sft.get_args(["--model", str(model_dir), "--data", str(data), "--out", str(out), "--device", "cpu",
                               *extra])


def test_sft_gradient_equals_the_mean_cross_entropy_for_every_micro_batch_budget(tmp_path, model_dir, monkeypatch):
    rows = make_rows(SIZES)
    data = write_rows(tmp_path / "d.jsonl", rows)
    model = tiny_model("qwen2")
    loss = -torch.cat([literal_logprobs(model, r)[0] for r in rows]).mean()  # mean over the tokens of the step
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    plans = []
    micro = training.micro_batches
    monkeypatch.setattr(training, "micro_batches", lambda r, b: plans.append(micro(r, b)) or plans[-1])
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


def test_sft_is_the_same_on_one_and_two_processes(tmp_path, model_dir):
    data = write_rows(tmp_path / "d.jsonl", make_rows(SIZES))
    flags = ["--model", model_dir, "--data", data, "--steps", 3, "--batch-size", 3, "--device", "cpu",
             "--train-tokens", 20]
    for n in (1, 2):
        stage("train_sft.py", *flags, "--out", tmp_path / str(n), processes=n)
    assert_same_metrics(tmp_path / "1", tmp_path / "2", 1e-6)
    assert_same_training(tmp_path / "1", tmp_path / "2", load_file(model_dir / "model.safetensors"))


def test_sft_runs_where_a_process_has_no_row(tmp_path, model_dir):
    data = write_rows(tmp_path / "d.jsonl", make_rows(SIZES))
    for n in (1, 2):
        stage("train_sft.py", "--model", model_dir, "--data", data, "--steps", 2, "--batch-size", 1, "--device", "cpu",
              "--out", tmp_path / str(n), processes=n)
    assert_same_metrics(tmp_path / "1", tmp_path / "2", 1e-6)
    assert_same_training(tmp_path / "1", tmp_path / "2", load_file(model_dir / "model.safetensors"))


def test_sft_first_loss_is_the_models_own_cross_entropy(tmp_path, model_dir):
    rows = make_rows([(4, 9)])
    data = write_rows(tmp_path / "d.jsonl", rows)
    train_sft.main(sft_args(model_dir, data, tmp_path / "o", "--steps", "1", "--batch-size", "1"))
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["response_ids"]])
    labels = ids.clone()
    labels[:, :4] = -100  # the prompt is masked out
    expected = tiny_model("qwen2")(input_ids=ids, labels=labels).loss.item()
    assert read(tmp_path / "o" / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_sft_reads_plain_rows_and_leaves_out_failed_ones(tmp_path, model_dir):
    wrapped = ("Solve the following math problem step by step. The last line of your response should be of the form "
               "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nHow many?\n\nRemember "
               "to put your answer on its own line after \"Answer:\".")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(map(common.to_line, [
        {"problem": "1+1?", "response": "two \\boxed{2}"},
        {"problem": [{"role": "user", "content": "1+2?"}], "response": "3"},
        {"problem": "wrong", "response": "x", "reward": 0},
        {"prompt_ids": [5, 6], "response_ids": [7, 8], "reward": 0},
        {"prompt_ids": [5, 6], "response_ids": [7, 1], "reward": 1},
        {"prompt_ids": [5], "response_ids": [9]},
        {"problem": wrapped, "response": "4"}])))
    tokenizer, model = tiny_tokenizer(), tiny_model("qwen2")
    rows = train_sft.read_rows([str(data)], model, tokenizer, sft_args(model_dir, data, tmp_path / "o"))
    text = [(tokenizer.decode(r["prompt_ids"]), tokenizer.decode(r["response_ids"])) for r in rows]
    assert text[:2] == [(f"[user]1+1?\n{rollout.INSTRUCTION}[assistant]", "two \\boxed{2}<eos>"),
                        ("[user]1+2?[assistant]", "3<eos>")]
    assert rows[2:4] == [{"prompt_ids": [5, 6], "response_ids": [7, 1]}, {"prompt_ids": [5], "response_ids": [9]}]
    assert text[4] == (f"[user]How many?\n{rollout.INSTRUCTION}[assistant]", "4<eos>")  # as rollout.py would ask it


# --- Sec. 3.1: the objective of GRPO ----------------------------------------------------------------------------------
@pytest.mark.parametrize("rewards", [[1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0.5, -1, 0, 1], [1, 0]])
def test_sec31_advantages_equal_a_hand_computation(rewards):
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert train_grpo.advantages(rewards) == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], abs=1e-9)


@pytest.mark.parametrize("rewards", [[0] * 8, [1] * 8, [0.1] * 3, [1], [0]])
def test_sec31_groups_without_a_difference_have_no_advantage(rewards):
    assert train_grpo.advantages(rewards) == [0.0] * len(rewards)


def literal_policy_loss(logp, old, ref, advantage, low, high, kl_coef):
    losses, kls, clipped = [], [], []
    for p, o, r, a in zip(logp.tolist(), old.tolist(), ref.tolist(), advantage.tolist()):
        ratio = math.exp(p - o)
        inside = max(1 - low, min(1 + high, ratio))
        kl = math.exp(r - p) - (r - p) - 1
        losses.append(-min(ratio * a, inside * a) + kl_coef * kl)
        kls.append(kl)
        # the clip binds where the ratio has left the interval in the direction that the advantage rewards
        clipped.append((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))
    return losses, kls, clipped


@pytest.mark.parametrize("low,high", [(0.2, 0.2), (0.2, 0.28)], ids=["ppo", "dapo-eq8"])
def test_eq8_policy_loss_equals_a_loop_over_tokens(low, high):
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.0])
    logp = torch.linspace(-3, -0.1, 9).repeat(3)
    old = logp - ratios.log().repeat(3)
    advantage = torch.tensor([1.5, -0.7, 0.0]).repeat_interleave(9)
    ref = logp + torch.linspace(-1, 1, 27)
    loss, kl, clipped = train_grpo.policy_loss(logp, old, ref, advantage, low, high, 0.05)
    expected = literal_policy_loss(logp, old, ref, advantage, low, high, 0.05)
    torch.testing.assert_close(loss, torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl, torch.tensor(expected[1]), rtol=1e-5, atol=1e-5)
    assert clipped.tolist() == expected[2]
    assert 0 < sum(expected[2]) < 27


def test_eq8_no_gradient_flows_where_the_clip_binds():
    logp = torch.zeros(4, requires_grad=True)
    old = -torch.tensor([1.5, 1.5, 0.5, 0.5]).log()  # ratios 1.5 and 0.5
    loss, _, clipped = train_grpo.policy_loss(logp, old, None, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.2, 0.0)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False, True]
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))  # -ratio * A elsewhere


def test_k3_estimates_the_kl_without_bias_and_is_never_negative():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 50, generator=g).log_softmax(-1)
    _, kl, _ = train_grpo.policy_loss(p, p, q, torch.zeros(50), 0.2, 0.2, 1.0)
    assert kl.min() >= 0
    expected = (p.exp() * (p - q)).sum()  # KL(p || q); the mean over x ~ p of k3 is a sum over all 50 outcomes
    torch.testing.assert_close((p.exp() * kl).sum(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length,expected", [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1)])
def test_dapo_eq13_overlong_penalty(length, expected):
    assert train_grpo.overlong_penalty(length, limit=100, buffer=20) == pytest.approx(expected)
    assert train_grpo.overlong_penalty(length, limit=100, buffer=0) == 0


def grpo_args(*extra):
    return train_grpo.get_args(["--model", "m", "--data", "d", "--out", "o", *extra])


def two_groups():
    rows = make_rows([(4, 5), (4, 8), (4, 2), (7, 3), (7, 6), (7, 6)])
    rewards = [1, 0, 0, 0, 1, 1]
    advantage = train_grpo.advantages(rewards[:3]) + train_grpo.advantages(rewards[3:])
    return [r | {"advantage": a} for r, a in zip(rows, advantage)]


def literal_grpo_loss(model, reference, old, rows, args):
    """The formula of Sec. 3.1, token by token, mean over all response tokens; old: log-probabilities of each row."""
    terms = []
    for r, o in zip(rows, old):
        logp = literal_logprobs(model, r)[0]
        ref = literal_logprobs(reference, r)[0].detach()
        for p, o_t, q in zip(logp, o, ref):
            ratio = (p - o_t).exp()
            inside = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
            kl = (q - p).exp() - (q - p) - 1
            terms.append(-torch.minimum(ratio * r["advantage"], inside * r["advantage"]) + args.kl_coef * kl)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("budget", ["1", "30", "10000"])
def test_sec31_grpo_gradient_equals_the_formula_differentiated(monkeypatch, budget):
    args, rows = grpo_args("--kl-coef", "0.3", "--train-tokens", budget), two_groups()
    model, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=5)
    loss = literal_grpo_loss(model, reference, [literal_logprobs(model, r)[0].detach() for r in rows], rows, args)
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    stats = train_grpo.update(model, reference, None, rows, args)
    assert_same_gradients(seen[0], expected)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert stats["tokens"] == 30 and stats["clipped"] == 0
    entropy = torch.cat([literal_logprobs(model, r)[1] for r in rows]).mean()
    assert stats["entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_sec31_two_updates_equal_a_literal_ppo_loop():
    args = grpo_args("--kl-coef", "0.01", "--updates", "2", "--lr", "0.003", "--train-tokens", "30")
    rows = two_groups()
    model, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=5)
    literal = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(literal.parameters(), lr=0.003, weight_decay=0.01)
    old = [literal_logprobs(literal, r)[0].detach() for r in rows]
    for _ in range(2):
        ratios = torch.cat([literal_logprobs(literal, r)[0].detach() - o for r, o in zip(rows, old)]).exp()
        loss = literal_grpo_loss(literal, reference, old, rows, args)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(literal.parameters(), 1.0)
        optimizer.step()
    assert (ratios - 1).abs().max() > 0.2  # the second pass is off-policy, and clips
    stats = train_grpo.update(model, reference, training.make_optimizer(model, args), rows, args)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert stats["clipped"] > 0
    for (name, ours), expected in zip(model.named_parameters(), literal.parameters()):
        # Adam divides by the gradient's size: where it is all but 0 the rounding decides, hence no tighter bound
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4, msg=name)
        assert (ours - expected).abs().mean() < 1e-6


# --- batches: dynamic sampling ----------------------------------------------------------------------------------------
def fake_groups(rewards, calls):
    def sample_groups(policy, problems, key, args, verify):
        calls.append((key, [p["id"] for p in problems]))
        return [[{"id": p["id"], "sample": s, "reward": r, "response_ids": [5] * 4, "finish": "eos"}
                 for s, r in enumerate(rewards[p["id"]])] for p in problems]
    return sample_groups


def collect(args, rewards, monkeypatch, step=1, cursor=0):
    calls = []
    monkeypatch.setattr(train_grpo, "sample_groups", fake_groups(rewards, calls))
    problems = [{"id": i} for i in rewards]
    return *train_grpo.collect(None, problems, step, cursor, args, None), calls


REWARDS = {f"p{i}": [[0, 0], [1, 1], [0, 1]][i % 3] for i in range(12)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_dapo_dynamic_sampling_drops_groups_without_signal_and_fills_the_batch(monkeypatch, size):
    args = grpo_args("--algo", "dapo", "--batch-size", str(size), "--resample", "9")
    groups, cursor, counts, calls = collect(args, REWARDS, monkeypatch, cursor=7)
    assert len(groups) == counts["kept"] == size
    assert all([r["reward"] for r in g] == [0, 1] for g in groups)
    assert len(calls) > 1 and cursor == 7 + size * len(calls)
    order = [training.draw_rows(12, i, 1, 0)[0] for i in range(7, cursor)]
    with_signal = [f"p{i}" for i in order if i % 3 == 2]
    assert [g[0]["id"] for g in groups] == with_signal[:size]  # in the order of the data, the first that have signal
    assert counts["groups"] == len(order) and counts["zero_hit"] == sum(i % 3 == 0 for i in order)


def test_dapo_last_round_gives_no_more_than_the_batch_needs(monkeypatch):
    rewards = {f"p{i}": [0, 1] if i else [0, 0] for i in range(4)}  # three of a round of four have signal
    groups, cursor, counts, calls = collect(grpo_args("--algo", "dapo", "--batch-size", "4"), rewards, monkeypatch)
    assert len(groups) == counts["kept"] == 4 and len(calls) == 2 and cursor == 8


def test_dapo_rounds_are_bounded_then_the_batch_is_smaller(monkeypatch):
    rewards = {i: [0, 0] for i in "abcdefgh"} | {"z": [0, 1]}
    args = grpo_args("--algo", "dapo", "--batch-size", "3", "--resample", "2")
    groups, _, counts, calls = collect(args, rewards, monkeypatch)
    assert len(calls) == 3 and counts["kept"] == len(groups) == 1


def test_dapo_samples_a_prompt_anew_when_a_further_round_meets_it_again(monkeypatch):
    rewards = {"a": [0, 0], "b": [0, 1]}
    args = grpo_args("--algo", "dapo", "--batch-size", "2", "--resample", "1")
    groups, _, _, calls = collect(args, rewards, monkeypatch)
    assert [sorted(ids) for _, ids in calls] == [["a", "b"]] * 2
    assert len({key for key, _ in calls}) == 2  # the same random numbers would give the very same responses
    assert len(groups) == 2


def test_grpo_keeps_every_group_and_samples_once(monkeypatch):
    groups, cursor, counts, calls = collect(grpo_args("--batch-size", "5"), REWARDS, monkeypatch)
    assert len(groups) == counts["kept"] == cursor == 5 and len(calls) == 1


def train(model_dir, data, out, verifier, *extra, **how):
    return stage("train_grpo.py", "--model", model_dir, "--data", data, "--out", out, "--verifier", verifier,
                 "--device", "cpu", "--max-new-tokens", 12, "--group-size", 4, "--batch-size", 4, *extra, **how)


def test_dapo_without_any_signal_warns_and_goes_on(tmp_path, model_dir):
    never = write_verifier(tmp_path / "v.py", "def verify(response, gold):\n    return False\n")
    data = write_problems(tmp_path / "d.jsonl")
    result = train(model_dir, data, tmp_path / "o", never, "--algo", "dapo", "--steps", 2, "--resample", 1)
    metrics = read(tmp_path / "o" / "metrics.jsonl")
    assert [m["kept_groups"] for m in metrics] == [0, 0] and [m["zero_hit"] for m in metrics] == [1, 1]
    assert "only 0 of 4 groups had signal" in result.stdout + result.stderr
    start = load_file(model_dir / "model.safetensors")
    assert all(torch.equal(v, start[k]) for k, v in weights_of(tmp_path / "o").items())  # nothing to learn from


# --- Sec. 3.6: rescue -------------------------------------------------------------------------------------------------
# Some groups are zero-hit. The last character decides, which a continuation has whatever its prefix is projected to.
SELECTIVE = "def verify(response, gold):\n    return sum(map(ord, response[-1:])) % 3 == 1\n"


def test_sec36_revise_is_bit_identical_to_grpo_where_every_group_has_a_hit(tmp_path, model_dir):
    data, verifier = write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py")
    plain, revised = tmp_path / "plain", tmp_path / "revised"
    train(model_dir, data, plain, verifier, "--steps", 3, "--group-size", 8)
    train(model_dir, data, revised, verifier, "--steps", 3, "--group-size", 8, "--revise")
    metrics = without_seconds(read(plain / "metrics.jsonl"))
    assert all(m["zero_hit"] == 0 and 0 < m["reward"] < 1 and m["grad_norm"] > 0 for m in metrics)
    assert metrics == without_seconds(read(revised / "metrics.jsonl"))
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (plain / name).read_bytes() == (revised / name).read_bytes()


def test_sec36_zero_hit_groups_are_rescued_and_change_the_update(tmp_path, model_dir):
    data, verifier = write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py", SELECTIVE)
    plain, revised = tmp_path / "plain", tmp_path / "revised"
    flags = ["--steps", 1, "--batch-size", 2]  # samples.jsonl shows two groups
    train(model_dir, data, plain, verifier, *flags)
    train(model_dir, data, revised, verifier, *flags, "--revise")
    before, after = read(plain / "metrics.jsonl")[0], read(revised / "metrics.jsonl")[0]
    assert before["zero_hit"] == after["zero_hit"] > 0 and before["reward"] == after["reward"]  # of the policy alone
    assert before["rescued"] == before["injected_tokens"] == 0
    assert 0 < after["rescued"] <= after["zero_hit"] and 0 < after["injected_tokens"] < 1
    assert (plain / "model/model.safetensors").read_bytes() != (revised / "model/model.safetensors").read_bytes()
    injected = [r for r in read(revised / "samples.jsonl") if r["injected"]]
    assert injected and all(r["reward"] == 1 and r["advantage"] == pytest.approx(1.5, rel=1e-5) for r in injected)


def group(name, rewards, lengths=None):
    return [{"id": name, "sample": s, "prompt_ids": [5], "response_ids": [6] * n, "reward": r, "answer": "1"}
            for s, (r, n) in enumerate(zip(rewards, lengths or [10] * len(rewards)))]


@pytest.mark.parametrize("inject", ["replace", "append"])
def test_sec36_the_recovered_trajectory_takes_the_place_of_the_rollout_it_came_from(monkeypatch, inject):
    args = grpo_args("--revise", "--inject", inject, "--revise-tokens", "1", "--group-size", "4")
    groups = [group("hit", [0, 1, 0, 0]), group("saved", [0] * 4, [1, 10, 10, 10]), group("lost", [0] * 4),
              group("short", [0] * 4, [1] * 4)]
    before, asked = copy.deepcopy(groups), []

    def revise_batch(policy, rollouts, args, verify):
        asked.extend((r["id"], r["sample"]) for r in rollouts)
        good = {"ids": [8, 9], "reward": 1, "response": "r", "finish": "eos"}
        found = {"saved": [good | {"reward": 0}, good, good | {"ids": [4]}], "lost": [good | {"reward": 0}]}
        return [{"id": r["id"], "sample": r["sample"], "prompt_ids": r["prompt_ids"], "projected_ids": [7] * 8,
                 "prefix_len": 8, "answer": "1", "continuations": found[r["id"]]} for r in rollouts]

    monkeypatch.setattr(train_grpo.revise, "revise_batch", revise_batch)
    after, rescued = train_grpo.rescue(None, groups, (0, 1), args, None)
    assert groups == before  # a new list; what was sampled stays as it was
    assert rescued == 1
    assert asked == [("saved", 1), ("lost", 0)]  # one rollout of each zero-hit group: the first that can be cut
    assert [after[0], after[2], after[3]] == [before[0], before[2], before[3]]
    new = next(r for r in after[1] if r.get("injected"))
    assert new["response_ids"] == [7] * 8 + [8, 9] and new["reward"] == 1 and new["sample"] == 1
    kept = [r for r in after[1] if not r.get("injected")]
    advantage = train_grpo.advantages([r["reward"] for r in after[1]])
    if inject == "replace":
        assert kept == [r for r in before[1] if r["sample"] != 1] and after[1].index(new) == 1
        # rewards 0 1 0 0: mean 1/4, standard deviation 1/2
        assert advantage == pytest.approx([-0.5, 1.5, -0.5, -0.5], rel=1e-5)
    else:
        assert kept == before[1] and after[1].index(new) == 4
        # rewards 0 0 0 0 1: mean 1/5, variance (4/25 + 16/25) / 4 = 1/5
        assert advantage == pytest.approx([-(0.2**0.5)] * 4 + [0.8 / 0.2**0.5], rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--algo", "dapo", "--resample", "2", "--batch-size", "3"],
                                   ["--batch-size", "1", "--group-size", "2", "--steps", "6"]],
                         ids=["grpo", "dapo", "one-prompt"])
def test_grpo_with_revise_is_the_same_on_one_and_two_processes(tmp_path, model_dir, flags):
    data, verifier = write_problems(tmp_path / "d.jsonl"), write_verifier(tmp_path / "v.py", SELECTIVE)
    for n in (1, 2):
        train(model_dir, data, tmp_path / str(n), verifier, "--steps", 3, "--revise", "--train-tokens", 200,
              *flags, processes=n, draws=tmp_path / str(n))
    if not same_draws(tmp_path / "1", tmp_path / "2"):  # a draw fell on the other side: other data from there on
        return
    assert_same_metrics(tmp_path / "1", tmp_path / "2", 1e-5)
    assert_same_training(tmp_path / "1", tmp_path / "2", load_file(model_dir / "model.safetensors"))
    assert any(m["rescued"] > 0 for m in read(tmp_path / "1" / "metrics.jsonl"))


# --- resume -----------------------------------------------------------------------------------------------------------
def assert_same_files(a, b, names):
    """Byte for byte: a training run that goes on makes batches of the same shapes."""
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    metrics = read(b / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))  # no step twice
    assert without_seconds(read(a / "metrics.jsonl")) == without_seconds(metrics)


# Files change at these moments: 1-2 run.json; 3, 4 steps 1, 2; 5-6 checkpoint; 7, 8 steps 3, 4; 9-10 checkpoint; 11, 12
# steps 5, 6; 13-14 the model. GRPO also writes samples.jsonl at step 1, so that all later ones come one later.
@pytest.mark.parametrize("kills", [(2,), (4,), (6, 5), (8,), (11, 4), (14,)], ids=str)
def test_sft_killed_and_continued_gives_the_same_bytes(tmp_path, model_dir, straight_sft, kills):
    straight, flags = straight_sft
    for point in kills:
        stage("train_sft.py", *flags, "--out", tmp_path / "o", kill_at=point)
    stage("train_sft.py", *flags, "--out", tmp_path / "o")
    assert_same_files(straight, tmp_path / "o", ["model/model.safetensors"])


@pytest.fixture(scope="module")
def straight_sft(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("sft")
    data = write_rows(path / "d.jsonl", make_rows(SIZES))
    flags = ["--model", model_dir, "--data", data, "--device", "cpu", "--batch-size", 3, "--steps", 6,
             "--save-every", 2]
    stage("train_sft.py", *flags, "--out", path / "o")
    return path / "o", flags


@pytest.fixture(scope="module")
def straight_grpo(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("grpo")
    rest = [write_problems(path / "d.jsonl"), write_verifier(path / "v.py", SELECTIVE)]
    train(model_dir, rest[0], path / "o", rest[1], "--steps", 6, "--save-every", 2, "--revise")
    return path / "o", rest


@pytest.mark.parametrize("kills", [(5,), (8,), (10, 7), (15,)], ids=str)
def test_grpo_with_revise_killed_and_continued_gives_the_same_bytes(tmp_path, model_dir, straight_grpo, kills):
    straight, (data, verifier) = straight_grpo
    flags = ["--steps", 6, "--save-every", 2, "--revise"]
    for point in kills:
        train(model_dir, data, tmp_path / "o", verifier, *flags, kill_at=point)
    train(model_dir, data, tmp_path / "o", verifier, *flags)
    assert_same_files(straight, tmp_path / "o", ["model/model.safetensors", "samples.jsonl"])


def test_a_checkpoint_restores_weights_moments_and_step_of_an_untied_model(tmp_path):
    args = argparse.Namespace(lr=1e-2, weight_decay=0.1)
    model, rows = tiny_model("qwen3", tied=False), make_rows(SIZES)
    optimizer = training.make_optimizer(model, args)
    for _ in range(2):
        training.response_logprobs(model, rows)[0].sum().backward()
        training.apply_gradients(model, optimizer, 1.0)
    checkpoints.save(tmp_path, 2, model, tiny_tokenizer(), optimizer, {"cursor": 7})
    other = tiny_model("qwen3", tied=False, seed=9)
    fresh = training.make_optimizer(other, args)
    assert checkpoints.load(tmp_path, other, fresh) == {"step": 2, "cursor": 7}
    for m, o in ((model, optimizer), (other, fresh)):
        training.response_logprobs(m, rows)[0].sum().backward()
        training.apply_gradients(m, o, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
