"""train_grpo.py's other algorithms and what a training run reports, against hand computations."""
import math
import re
import sys
import types

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
from safetensors.torch import load_file

import eval as evaluation
import rollout
import train_grpo
import train_sft
from helpers import common, training

# Some groups are zero-hit. The last character decides, which a continuation has whatever its prefix is projected to.
SELECTIVE = "def verify(response, gold):\n    return sum(map(ord, response[-1:])) % 3 == 1\n"
NEVER = "def verify(response, gold):\n    return False\n"


def make_rows(sizes, seed=0):
    """Rows whose teacher prompt is longer than their prompt;
    the padding id, which is also EOS, is in some responses."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(2, TOKENS, (n,), generator=g).tolist()
    rows = [{"prompt_ids": ids(q), "teacher_ids": ids(q + 3), "response_ids": ids(n), "advantage": 0.0}
            for q, n in sizes]
    for row in rows[::2]:
        row["response_ids"][len(row["response_ids"]) // 2] = 1
    return rows


SIZES = [(3, 6), (9, 1), (1, 11), (5, 5), (2, 7)]


def grpo_args(*extra):
    return train_grpo.get_args(["--model", "m", "--data", "d", "--out", "o", *map(str, extra)])


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(ours, expected):
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_table7_is_what_the_trainers_do_by_default():
    args = grpo_args()
    assert (args.algo, args.group_size, args.batch_size, args.kl_coef, args.lr) == ("grpo", 8, 512, 0.001, 1e-5)
    assert (args.grad_clip, args.max_new_tokens, args.temperature, args.updates) == (1.0, 8192, 1.0, 1)
    assert (args.revision_steps, args.rho, args.gamma0, args.alpha_guide, args.beta_nll) == (10, 0.8, 0.1, 1.0, 0.1)
    assert (args.eps_stop, args.revise, args.injected_ratio) == (1e-3, False, "current")
    dapo, opsd = grpo_args("--algo", "dapo"), grpo_args("--algo", "opsd")
    assert (dapo.group_size, dapo.kl_coef, dapo.clip_low, dapo.clip_high) == (8, 0.0, 0.2, 0.28)  # DAPO Eq. (10)
    assert (opsd.group_size, opsd.kl_coef, opsd.opsd_beta, opsd.opsd_clip) == (1, 0.0, 0.5, 0.0)  # OPSD v1, Sec. 4.1


# --- OPSD: the divergence ---------------------------------------------------------------------------------------------
def literal_terms(p, q, beta):
    """Contribution of every vocabulary entry to JSD_beta(p || q), plain numbers; the limits at beta 0 and 1."""
    if beta == 0:
        return [a * math.log(a / b) for a, b in zip(p, q)]
    if beta == 1:
        return [b * math.log(b / a) for a, b in zip(p, q)]
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
    return [beta * a * math.log(a / c) + (1 - beta) * b * math.log(b / c) for a, b, c in zip(p, q, m)]


@pytest.mark.parametrize("beta", [0, 0.2, 0.5, 0.9, 1])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gkd_divergence_equals_a_hand_computation(beta, clip):
    teacher = [[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [1e-6, 0.5, 0.499999]]
    student = [[0.1, 0.3, 0.6], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]]
    ours, entropy = training.head_divergence(torch.nn.Identity(), torch.tensor(student).log(), torch.nn.Identity(),
                                             torch.tensor(teacher).log(), beta, clip)
    expected = [sum(min(t, clip or math.inf) for t in literal_terms(p, q, beta)) for p, q in zip(teacher, student)]
    assert ours.tolist() == pytest.approx(expected, abs=1e-6)
    assert ours[1] == pytest.approx(0, abs=1e-6) and (clip or ours.min() >= -1e-7)
    assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in q) for q in student], abs=1e-6)


def test_gkd_divergence_at_one_half_is_symmetric_and_at_most_log_2():
    g = torch.Generator().manual_seed(0)
    x, y = 20 * torch.randn(2, 50, 40, generator=g)  # nearly one-hot: the probabilities of most entries underflow
    same = torch.nn.Identity()
    a, b = (training.head_divergence(same, q, same, p, 0.5, 0.0)[0] for p, q in ((x, y), (y, x)))
    torch.testing.assert_close(a, b)
    assert 0 < a.min() and a.max() <= math.log(2) + 1e-6 and a.max() > 0.6


def kl(a, b):
    return (a * (a / b).log()).sum()


def literal_divergence(model, teacher, row, beta):
    """The divergence at every response token, a forward each, full logits,
    as a differentiable sum of the definition."""
    found = []
    for t in range(len(row["response_ids"])):
        seen = row["response_ids"][:t]
        q = model(input_ids=torch.tensor([row["prompt_ids"] + seen]), use_cache=False).logits[0, -1].softmax(-1)
        with torch.no_grad():
            p = teacher(input_ids=torch.tensor([row["teacher_ids"] + seen]), use_cache=False).logits[0, -1].softmax(-1)
        m = beta * p + (1 - beta) * q
        found.append(kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m))
    return torch.stack(found)


@pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("head_rows", [1, 4, 1024])
def test_opsd_divergence_and_gradient_equal_a_token_by_token_loop(family, tied, beta, head_rows):
    model, teacher, rows = tiny_model(family, tied), tiny_model(family, tied, seed=5), make_rows(SIZES)
    sizes = []
    for m in (model, teacher):
        m.get_output_embeddings().register_forward_hook(
            lambda _, inputs, out: sizes.append(inputs[0].shape[:-1].numel()))
    weights = torch.linspace(-1, 2, sum(n for _, n in SIZES))
    divergence, _ = training.response_divergence(model, teacher, rows, beta, 0.0, head_rows)
    (weights * divergence).sum().backward()
    assert max(sizes) <= min(head_rows, sum(n for _, n in SIZES))  # rows of logits at a time, in the backward too
    assert len(sizes) == 2 * 2 * math.ceil(30 / head_rows)  # forward and recomputed, student and teacher
    assert all(p.grad is None for p in teacher.parameters())
    ours = gradients(model)
    expected = torch.cat([literal_divergence(model, teacher, r, beta) for r in rows])
    (weights * expected).sum().backward()
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(ours, gradients(model))


@pytest.mark.parametrize("budget", ["1", "40", "10000"])
def test_opsd_update_is_the_mean_over_generated_tokens_of_the_step(monkeypatch, budget):
    args = grpo_args("--algo", "opsd", "--train-tokens", budget)
    model, teacher, rows = tiny_model("qwen2"), tiny_model("qwen2", seed=5), make_rows(SIZES)
    loss = torch.cat([literal_divergence(model, teacher, r, 0.5) for r in rows]).mean()
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    stats = train_grpo.update(model, teacher, None, rows, args)
    assert_same_gradients(seen[0], expected)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-5) and stats["tokens"] == 30
    assert "kl" not in stats and "clipped" not in stats  # it has neither


# --- OPSD: the teacher's prompt ---------------------------------------------------------------------------------------
def with_teacher(problems, hint="The answer is {answer}.", model=None, *extra):
    args = grpo_args("--algo", "opsd", "--opsd-hint", hint, *extra)
    model, tokenizer = model or tiny_model("qwen2"), tiny_tokenizer()
    policy = common.Policy(model, tokenizer, 0, [], model.config.max_position_embeddings)
    rollout.add_prompts(policy, problems, args)
    train_grpo.add_teacher_prompts(policy, problems, args)
    return problems, tokenizer


def test_opsd_teacher_reads_the_problem_and_then_the_gold_answer_through_the_same_template():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"}]
    problems, tokenizer = with_teacher([{"id": "a", "problem": "1+1?", "answer": r"\frac{4}{2}"},
                                        {"id": "b", "problem": messages, "answer": "7"}])
    text = [(tokenizer.decode(p["prompt_ids"]), tokenizer.decode(p["teacher_ids"])) for p in problems]
    end = f"\n{rollout.INSTRUCTION}[assistant]"
    assert text[0] == (f"[user]1+1?{end}", rf"[user]1+1?{chr(10)}The answer is \frac{{4}}{{2}}.{end}")
    assert text[1] == ("[system]Be brief.[user]3+4?[assistant]",
                       "[system]Be brief.[user]3+4?\nThe answer is 7.[assistant]")
    assert messages[1]["content"] == "3+4?"  # the student's prompt is left alone


def test_opsd_response_leaves_room_for_the_teachers_longer_prompt():
    model = tiny_model("qwen2")
    model.config.max_position_embeddings = 120
    problems, _ = with_teacher([{"id": "a", "problem": "1+1?", "answer": "2"}], "{answer}", model)
    p = problems[0]
    assert p["response_limit"] == 120 - len(p["teacher_ids"]) < 120 - len(p["prompt_ids"])
    with pytest.raises(common.UserError, match="--opsd-hint: with it problem 'a' is .* tokens long"):
        with_teacher([{"id": "a", "problem": "1+1?", "answer": "2"}], "x" * 60 + "{answer}", model)


@pytest.mark.parametrize("flags,message", [
    (["--opsd-hint", "no"], "--opsd-hint 'no' has no {answer}"),
    (["--kl-coef", "0.1"], "--kl-coef does not go with --algo opsd"),
    (["--revise"], "--revise does not go with --algo opsd"), (["--opsd-beta", "1.5"], "--opsd-beta 1.5"),
    (["--opsd-beta", "nan"], "--opsd-beta nan"), (["--opsd-clip", "-1"], "--opsd-clip -1"),
    (["--luffy-gamma", "0"], "--luffy-gamma 0"), (["--eval-every", "0"], "--eval-every 0"),
    (["--eval-n", "0"], "--eval-n 0"), (["--sample-every", "-1"], "--sample-every -1"),
    (["--warn-after", "-1"], "--warn-after -1")])
def test_flags_that_make_no_sense_are_named(flags, message):
    with pytest.raises(common.UserError, match=re.escape(message)):
        train_grpo.check_args(grpo_args("--algo", "opsd", *flags))


# --- injected trajectories: LUFFY -------------------------------------------------------------------------------------
def test_luffy_shaping_of_injected_tokens_equals_a_hand_computation():
    p, old = torch.tensor([0.9, 0.1, 0.01, 0.5, 0.5]), torch.tensor([0.1, 0.9, 0.5, 0.25, 0.5])
    logp = p.log().requires_grad_()
    advantage = torch.tensor([1.5, 1.5, -2.0, 1.0, -0.5])
    shaped = torch.tensor([True, True, True, False, False])
    loss, _, clipped = train_grpo.policy_loss(logp, old.log(), None, advantage, 0.2, 0.2, 0.0, shaped, 0.1)
    # f(p) A with f(x) = x / (x + 0.1), whatever the old probability; others as ever: ratio 2 clipped at 1.2, ratio 1
    expected = [-1.5 * 0.9 / 1.0, -1.5 * 0.1 / 0.2, 2.0 * 0.01 / 0.11, -1.2, 0.5]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert clipped.tolist() == [False, False, False, True, False]
    loss.sum().backward()
    # d/dlogp of -A p / (p + g) is -A g p / (p + g)^2: largest at p = g, so unlikely tokens are not drowned out
    expected = [-1.5 * 0.1 * 0.9 / 1.0**2, -1.5 * 0.1 * 0.1 / 0.2**2, 2.0 * 0.1 * 0.01 / 0.11**2, 0.0, 0.5]
    assert logp.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ratio", ["current", "luffy"])
@pytest.mark.parametrize("updates", [1, 2])
def test_injected_ratio_in_the_update_equals_the_formula_differentiated(monkeypatch, ratio, updates):
    args = grpo_args("--injected-ratio", ratio, "--kl-coef", 0, "--train-tokens", 30, "--luffy-gamma", 0.3,
                     "--updates", updates)
    model, rows = tiny_model("qwen2"), make_rows(SIZES)
    for r, a in zip(rows, (1.5, -0.5, -0.5, -0.5, 1.0)):
        r["advantage"] = a
    rows[0]["injected"] = rows[4]["injected"] = True
    terms = []
    for r in rows:
        for t, token in enumerate(r["response_ids"]):
            ids = torch.tensor([r["prompt_ids"] + r["response_ids"][:t]])
            p = model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[token]
            off = ratio == "luffy" and r.get("injected")
            terms.append(-r["advantage"] * (p / (p + 0.3) if off else p / p.detach()))  # on policy the ratio is 1
    torch.stack(terms).mean().backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    train_grpo.update(model, None, None, rows, args)
    assert len(seen) == updates  # the weights stay, so that every update is the first one
    for found in seen:
        assert_same_gradients(found, expected)


# --- leftovers --------------------------------------------------------------------------------------------------------
def test_k3_and_ratio_are_finite_for_differences_beyond_exp():
    logp = torch.tensor([-200.0, -0.1, -200.0, -0.1], requires_grad=True)
    other = torch.tensor([-0.1, -200.0, -0.1, -200.0])
    loss, kl, _ = train_grpo.policy_loss(logp, other, other, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.2, 0.01)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(kl).all() and torch.isfinite(logp.grad).all()
    inside = torch.tensor([19.9, -19.9])  # the bound changes nothing within it
    _, kl, _ = train_grpo.policy_loss(torch.zeros(2), torch.zeros(2), inside, torch.zeros(2), 0.2, 0.2, 1.0)
    torch.testing.assert_close(kl, inside.exp() - inside - 1)


def test_entropy_is_computed_in_the_passes_that_are_trained_alone(monkeypatch):
    asked, head = [], training.head_logprobs
    monkeypatch.setattr(training, "head_logprobs", lambda *a: asked.append((a[3], torch.is_grad_enabled())) or head(*a))
    args = grpo_args("--updates", 2, "--train-tokens", 30)
    monkeypatch.setattr(training, "apply_gradients", lambda *_: 0.0)
    train_grpo.update(tiny_model("qwen2"), tiny_model("qwen2", seed=5), None, make_rows(SIZES), args)
    assert {grad for entropy, grad in asked if entropy} == {True}
    assert {grad for entropy, grad in asked if not entropy} == {False}  # old policy and reference


def test_sec36_groups_with_a_hit_are_never_revised(monkeypatch):
    def revise_batch(*_):
        raise AssertionError("revised")
    monkeypatch.setattr(train_grpo.revise, "revise_batch", revise_batch)
    groups = [[{"id": g, "sample": s, "prompt_ids": [5], "response_ids": [6] * 10, "reward": int(s == 0)}
               for s in range(4)] for g in range(3)]
    assert train_grpo.rescue(None, groups, (0, 1), grpo_args("--revise"), None) == (groups, 0)


# --- what a run reports -----------------------------------------------------------------------------------------------
def flags_for(model_dir, tmp_path, *extra, verifier=SELECTIVE):
    return ["--model", model_dir, "--data", write_problems(tmp_path / "d.jsonl"), "--verifier",
            write_verifier(tmp_path / "v.py", verifier), "--device", "cpu", "--max-new-tokens", 12, "--group-size", 4,
            "--batch-size", 4, *extra]


def train(*flags):
    train_grpo.main(train_grpo.get_args(list(map(str, flags))))


def test_every_metric_equals_a_count_over_what_was_sampled_and_trained(tmp_path, model_dir, monkeypatch):
    sampled, trained, sample, learn = [], [], train_grpo.sample_groups, train_grpo.update
    monkeypatch.setattr(train_grpo, "sample_groups", lambda *a: sampled.append(sample(*a)) or sampled[-1])
    monkeypatch.setattr(train_grpo, "update", lambda *a: trained.append(a[3]) or learn(*a))
    train(*flags_for(model_dir, tmp_path, "--revise", "--steps", 3, "--sample-every", 2, "--out", tmp_path / "o"))
    metrics = read(tmp_path / "o" / "metrics.jsonl")
    assert len(metrics) == 3 and any(m["rescued"] for m in metrics)
    for m, groups, rows in zip(metrics, sampled, trained):
        responses = [r for g in groups for r in g]
        lengths = [len(r["response_ids"]) for r in responses]
        mean = lambda values: pytest.approx(sum(values) / len(values))
        assert m["reward"] == mean([r["reward"] for r in responses])
        assert m["zero_hit"] == mean([not any(r["reward"] for r in g) for g in groups])
        assert m["length_mean"] == mean(lengths) and m["length_max"] == max(lengths)
        assert m["truncated"] == mean([r["finish"] == "length" for r in responses])
        assert m["rescued"] == pytest.approx(len({r["id"] for r in rows if r.get("injected")}) / len(groups))
        after = [[r["reward"] for r in rows if r["id"] == g[0]["id"]] for g in groups]
        assert m["signal"] == mean([len(set(rewards)) > 1 for rewards in after])
        tokens = [(len(r["response_ids"]), r.get("injected", False)) for r in rows]
        assert m["tokens"] == sum(n for n, _ in tokens)
        assert m["injected_tokens"] == pytest.approx(sum(n for n, i in tokens if i) / m["tokens"])
        assert m["lr"] == 1e-5 and m["tokens_per_second"] > 0 and 0.05 < m["memory_gb"] < 100
        assert all(m[k] >= 0 for k in (
            "kl", "clipped", "entropy", "grad_norm", "seconds_sample", "seconds_revise", "seconds_update"))
    samples = read(tmp_path / "o" / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 3}
    for s in samples:
        row = next(r for r in trained[s["step"] - 1] if (r["id"], r["response"]) == (s["id"], s["response"]))
        assert s["prompt"] == tiny_tokenizer().decode(row["prompt_ids"]) and s["advantage"] == row["advantage"]
        assert s["injected"] == row.get("injected", False)


def test_counts_of_a_step_are_over_all_its_rounds(monkeypatch):
    rounds = iter([[(0, 9, "length"), (0, 3, "eos")], [(1, 4, "eos"), (0, 2, "length")]])  # reward, length, finish

    def sample_groups(policy, problems, key, args, verify):
        return [[{"id": "a", "sample": s, "reward": r, "response_ids": [5] * n, "finish": f}
                 for s, (r, n, f) in enumerate(next(rounds))]]
    monkeypatch.setattr(train_grpo, "sample_groups", sample_groups)
    args = grpo_args("--algo", "dapo", "--batch-size", 1)
    groups, _, counts = train_grpo.collect(None, [{"id": "a"}], 1, 0, args, None)
    assert [r["reward"] for r in groups[0]] == [1, 0]
    for key, expected in {"groups": 2, "zero_hit": 1, "signal": 1, "sampled": 4, "hits": 1, "tokens": 18,
                          "truncated": 2, "longest": 9, "kept": 1, "rescued": 0}.items():
        assert counts[key] == expected, key


def recorders(monkeypatch):
    """Stand-ins for the two optional packages, and what they were told."""
    calls = []
    board = types.SimpleNamespace(add_scalar=lambda *a: calls.append(("board", *a)), flush=lambda: None)
    wandb_run = types.SimpleNamespace(log=lambda metrics, step: calls.append(("wandb", step, metrics)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: calls.append(("open", folder, purge_step)) or board))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **how: calls.append(("init", how)) or wandb_run))
    return calls


def test_tensorboard_and_wandb_get_every_metric_of_every_step(tmp_path, model_dir, monkeypatch):
    calls = recorders(monkeypatch)
    data = tmp_path / "rows.jsonl"
    data.write_text(common.to_line({"prompt_ids": [5, 6], "response_ids": [7, 1]}))
    train_sft.main(train_sft.get_args(list(map(str, [
        "--model", model_dir, "--data", data, "--out", tmp_path / "o", "--steps", 2, "--batch-size", 1,
        "--device", "cpu", "--tensorboard", "--wandb", "toy"]))))
    metrics = read(tmp_path / "o" / "metrics.jsonl")
    assert [c[1:] for c in calls if c[0] == "open"] == [(str(tmp_path / "o" / "tensorboard"), 1)]
    assert [c[1]["project"] for c in calls if c[0] == "init"] == ["toy"]
    assert [c[1:] for c in calls if c[0] == "wandb"] == [(m["step"], m) for m in metrics]
    assert sorted(c[1:] for c in calls if c[0] == "board") == sorted(
        (k, v, m["step"]) for m in metrics for k, v in m.items() if k != "step")


@pytest.mark.parametrize("flags,module", [(["--tensorboard"], "torch.utils.tensorboard"), (["--wandb", "x"], "wandb")])
@pytest.mark.parametrize("get_args", [train_grpo.get_args, train_sft.get_args], ids=["grpo", "sft"])
def test_a_logger_that_is_not_installed_is_one_line_naming_the_flag(monkeypatch, flags, module, get_args):
    monkeypatch.setitem(sys.modules, module, None)  # as an import of what is not there
    with pytest.raises(common.UserError, match=rf"^{flags[0]} needs a package .*pip install {flags[0][2:]}$"):
        training.check_training_args(get_args(["--model", "m", "--data", "d", "--out", "o", *flags]))


@pytest.mark.parametrize("warn_after,expected", [(2, 1), (0, 0), (9, 0)])
def test_steps_without_any_signal_are_warned_of_once(tmp_path, model_dir, capsys, warn_after, expected):
    train(*flags_for(model_dir, tmp_path, "--steps", 4, "--warn-after", warn_after, "--out", tmp_path / "o",
                     verifier=NEVER))
    out, err = capsys.readouterr()
    assert (out + err).count("warning: no group of the last 2 steps") == expected
    assert all(m["signal"] == 0 for m in read(tmp_path / "o" / "metrics.jsonl"))


# --- evaluation while training ----------------------------------------------------------------------------------------
def own_evaluation(model, data, verifier, out, n):
    """What eval.py says of a model."""
    return evaluation.main(evaluation.get_args(list(map(str, [
        "--model", model, "--data", data, "--out", out, "-n", n, "--k", 1, n, "--verifier", verifier, "--device", "cpu",
        "--max-new-tokens", 12]))))[0]


def test_evaluations_are_those_of_eval_py_on_the_first_and_the_last_model(tmp_path, model_dir):
    test = write_problems(tmp_path / "test.jsonl", 7)
    flags = flags_for(model_dir, tmp_path, "--steps", 4, "--lr", 0.01, "--limit", 3, "--save-every", 2)
    train(*flags, "--eval-data", test, "--eval-every", 2, "--eval-n", 4, "--out", tmp_path / "o")
    rows = read(tmp_path / "o" / "eval.jsonl")
    assert [r["step"] for r in rows] == [0, 2, 4]
    for row, model in ((rows[0], model_dir), (rows[2], tmp_path / "o" / "model")):
        expected = own_evaluation(model, test, tmp_path / f"v.py{':verify'}", tmp_path / f"e{row['step']}", 4)
        # one process and the same batch: the same bits
        assert row["eval_pass@1"] == expected["pass"]["1"] and row["eval_pass@4"] == expected["pass"]["4"]
        assert row["eval_length_mean"] == expected["mean_tokens"] and row["eval_truncated"] == expected["truncated"]
    assert rows[0]["eval_pass@1"] != rows[2]["eval_pass@1"]  # training changed something
    assert len(read(tmp_path / "o" / "eval" / "step-000004" / "rollouts.jsonl")) == 7 * 4
    train(*flags, "--out", tmp_path / "plain")  # looking does not change what is seen
    assert ((tmp_path / "o/model/model.safetensors").read_bytes()
            == (tmp_path / "plain/model/model.safetensors").read_bytes())


OPSD = ["--algo", "opsd", "--group-size", 1, "--steps", 5, "--save-every", 2, "--eval-every", 2, "--eval-n", 2,
        "--lr", 1e-3]


@pytest.fixture(scope="module")
def straight_opsd(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("opsd")
    flags = [*flags_for(model_dir, path), *OPSD, "--eval-data", write_problems(path / "test.jsonl", 3)]
    stage("train_grpo.py", *flags, "--out", path / "o", draws=path / "o")
    return path / "o", flags


def test_opsd_moves_the_student_toward_the_teacher(straight_opsd, model_dir):
    out, _ = straight_opsd
    metrics = read(out / "metrics.jsonl")
    assert all(0 < m["loss"] <= math.log(2) and m["grad_norm"] > 0 for m in metrics)
    start = load_file(model_dir / "model.safetensors")
    assert any(not torch.equal(v, start[k]) for k, v in load_file(out / "model" / "model.safetensors").items())


# Moments at which files change: 1-2 run.json; 3-5 evaluation 0 (part, merge before and after); 6 eval.jsonl; 7 step 1;
# 8 samples; 9 step 2; 10-11 checkpoint; 12-14 evaluation 2; 15 eval.jsonl; 16-17 steps 3, 4; 18-19 checkpoint;
# 20-22 evaluation 4; 23 eval.jsonl; 24 step 5; 25-26 the model. Continued from a checkpoint: 1-6 the three files are
# cut; (15, 8) thus dies in writing the row of evaluation 2, then just after it
@pytest.mark.parametrize("kills", [(6, 3), (13, 5), (15, 8), (21, 6)], ids=str)
def test_opsd_with_evaluations_killed_and_continued_gives_the_same_bytes(tmp_path, straight_opsd, kills):
    straight, flags = straight_opsd
    for point in kills:
        stage("train_grpo.py", *flags, "--out", tmp_path / "o", kill_at=point)
    stage("train_grpo.py", *flags, "--out", tmp_path / "o")
    names = sorted(str(p.relative_to(straight)) for p in straight.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*") if p.is_file())
    for name in names:
        a, b = straight / name, tmp_path / "o" / name
        if name in ("metrics.jsonl", "eval.jsonl"):
            assert without_seconds(read(a)) == without_seconds(read(b))
        elif name != "run.json":  # which holds when and how it was started
            # steps have the same shapes after a restart; an evaluation is one batch here, drawn whole or not at all
            assert a.read_bytes() == b.read_bytes(), name
    assert [r["step"] for r in read(tmp_path / "o" / "eval.jsonl")] == [0, 2, 4]


@pytest.mark.parametrize("processes,shard", [(2, "off"), (1, "on"), (3, "on")])
def test_opsd_with_evaluations_is_the_same_on_several_processes_and_sharded(tmp_path, straight_opsd, processes, shard):
    straight, flags = straight_opsd
    stage("train_grpo.py", *flags, "--out", tmp_path / "o", "--shard", shard, processes=processes, draws=tmp_path / "o")
    if not same_draws(straight, tmp_path / "o"):  # a draw fell on the other side: other data from there on
        return
    for name in ("metrics.jsonl", "eval.jsonl"):
        one, two = without_seconds(read(straight / name)), without_seconds(read(tmp_path / "o" / name))
        assert [list(a) for a in one] == [list(b) for b in two]
        for a, b in zip(one, two):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    a, b = (load_file(x / "model" / "model.safetensors") for x in (straight, tmp_path / "o"))
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


def test_samples_of_a_policy_that_is_gone_are_not_evaluated_again(tmp_path):
    for step in (0, 2, 4):
        (tmp_path / "eval" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "eval.jsonl").write_text(common.to_line({"step": 0}))
    assert train_grpo.evaluated(tmp_path, 2) == {0}
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["step-000000", "step-000002"]


# --- --steps on resume ------------------------------------------------------------------------------------------------
def test_steps_is_free_until_the_run_is_finished(tmp_path, model_dir):
    flags = flags_for(model_dir, tmp_path, "--save-every", 2)
    train(*flags, "--steps", 5, "--out", tmp_path / "straight")
    stage("train_grpo.py", *flags, "--steps", 3, "--out", tmp_path / "o", kill_at=7)  # beyond the checkpoint of step 2
    assert [p.name for p in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-000002"]
    with pytest.raises(common.UserError, match="--steps 1: the run in --out has a checkpoint of step 2 already"):
        train(*flags, "--steps", 1, "--out", tmp_path / "o")
    train(*flags, "--steps", 5, "--out", tmp_path / "o")
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("straight", "o"))
    assert a.read_bytes() == b.read_bytes()
    assert (without_seconds(read(tmp_path / "straight" / "metrics.jsonl"))
            == without_seconds(read(tmp_path / "o" / "metrics.jsonl")))
    before = b.read_bytes()
    train(*flags, "--steps", 4, "--out", tmp_path / "o")  # finished, and asked for no more than it has: nothing to do
    with pytest.raises(common.UserError, match="--steps 6: .*finished after 5 steps"):
        train(*flags, "--steps", 6, "--out", tmp_path / "o")
    assert b.read_bytes() == before


def test_steps_lowered_to_the_checkpoint_gives_the_model_of_that_step(tmp_path, model_dir):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(common.to_line({"prompt_ids": [5, 6], "response_ids": [i, 1]}) for i in range(7, 12)))
    flags = ["--model", model_dir, "--data", data, "--device", "cpu", "--batch-size", 2, "--save-every", 2]
    stage("train_sft.py", *flags, "--steps", 2, "--out", tmp_path / "two")
    stage("train_sft.py", *flags, "--steps", 4, "--out", tmp_path / "o", kill_at=7)
    stage("train_sft.py", *flags, "--steps", 2, "--out", tmp_path / "o")
    assert ((tmp_path / "two/model/model.safetensors").read_bytes()
            == (tmp_path / "o/model/model.safetensors").read_bytes())
