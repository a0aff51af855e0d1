"""baselines/train_opsd.py: the divergence against hand computations, and whole runs: sharded, in torchrun.
test_faults.py kills and continues it."""
import math

import pytest
import torch
from conftest import read, run, stage, tiny_model, tiny_tokenizer, write_problems, write_verifier
from test_train import SELECTIVE, SIZES, assert_same_gradients, assert_same_runs, gradients, make_rows

import rollout
from baselines import train_opsd
from helpers import common, training


def opsd_args(*extra):
    return train_opsd.get_args(["--model", "m", "--data", "d", "--out", "o", *map(str, extra)])


def opsd_rows():
    """Rows whose teacher prompt is longer than their prompt."""
    return [r | {"teacher_ids": [7, 8, 9, *r["prompt_ids"]]} for r in make_rows(SIZES)]


def test_defaults_are_those_of_the_first_version():
    args = opsd_args()
    assert (args.group_size, args.beta, args.clip, args.lr, args.batch_size) == (1, 0.5, 0.0, 1e-5, 512)


def literal_terms(p, q, beta):
    """Contribution of every vocabulary entry to JSD_beta(p || q), by its definition; the limits at beta 0 and 1."""
    kl, m = lambda a, b: a * (a / b).log(), beta * p + (1 - beta) * q
    return kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0, 0.2, 0.5, 0.9, 1])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gkd_divergence_equals_a_hand_computation(beta, clip):
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [1e-6, 0.5, 0.499999]])
    student = torch.tensor([[0.1, 0.3, 0.6], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    same = torch.nn.Identity()
    ours, entropy = train_opsd.head_divergence(same, student.log(), same, teacher.log(), beta, clip)
    expected = [literal_terms(p, q, beta).clamp(max=clip or math.inf).sum() for p, q in zip(teacher, student)]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert ours[1] == pytest.approx(0, abs=1e-6) and (clip or ours.min() >= -1e-7)
    torch.testing.assert_close(entropy, -(student * student.log()).sum(-1), rtol=1e-6, atol=1e-6)


def test_gkd_divergence_at_one_half_is_symmetric_and_at_most_log_2():
    g = torch.Generator().manual_seed(0)
    x, y = 20 * torch.randn(2, 50, 40, generator=g)  # nearly one-hot: the probabilities of most entries underflow
    same = torch.nn.Identity()
    a, b = (train_opsd.head_divergence(same, q, same, p, 0.5, 0.0)[0] for p, q in ((x, y), (y, x)))
    torch.testing.assert_close(a, b)
    assert 0 < a.min() and a.max() <= math.log(2) + 1e-6 and a.max() > 0.6


def literal_divergence(model, teacher, row, beta):
    """The divergence at every response token, a forward each, full logits, differentiable."""
    found = []
    for t in range(len(row["response_ids"])):
        seen = row["response_ids"][:t]
        q = model(input_ids=torch.tensor([row["prompt_ids"] + seen]), use_cache=False).logits[0, -1].softmax(-1)
        with torch.no_grad():
            p = teacher(input_ids=torch.tensor([row["teacher_ids"] + seen]), use_cache=False).logits[0, -1].softmax(-1)
        found.append(literal_terms(p, q, beta).sum())
    return torch.stack(found)


@pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("head_rows", [1, 4, 1024])
def test_opsd_divergence_and_gradient_equal_a_token_by_token_loop(family, tied, beta, head_rows):
    model, teacher, rows = tiny_model(family, tied), tiny_model(family, tied, seed=5), opsd_rows()
    sizes = []
    for m in (model, teacher):
        m.get_output_embeddings().register_forward_hook(
            lambda _, inputs, out: sizes.append(inputs[0].shape[:-1].numel()))
    weights = torch.linspace(-1, 2, sum(n for _, n in SIZES))
    divergence, _ = train_opsd.response_divergence(model, teacher, rows, beta, 0.0, head_rows)
    (weights * divergence).sum().backward()
    assert max(sizes) <= min(head_rows, sum(n for _, n in SIZES))  # rows of logits at a time, in the backward too
    assert len(sizes) == 2 * 2 * math.ceil(30 / head_rows)  # forward and recomputed, student and teacher
    assert all(p.grad is None for p in teacher.parameters())
    ours = gradients(model)
    expected = torch.cat([literal_divergence(model, teacher, r, beta) for r in rows])
    (weights * expected).sum().backward()
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(ours, gradients(model), 1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10000])
def test_opsd_update_is_the_mean_over_generated_tokens_of_the_step(monkeypatch, budget):
    model, teacher, rows = tiny_model("qwen2"), tiny_model("qwen2", seed=5), opsd_rows()
    loss = torch.cat([literal_divergence(model, teacher, r, 0.5) for r in rows]).mean()
    loss.backward()
    expected, seen = gradients(model), []
    monkeypatch.setattr(training, "apply_gradients", lambda m, *_: seen.append(gradients(m)) or 0.0)
    stats = train_opsd.update(model, teacher, None, rows, opsd_args("--train-tokens", budget))
    assert_same_gradients(seen[0], expected, 1e-5)
    assert stats["loss"] == pytest.approx(float(loss.detach()), rel=1e-5) and stats["tokens"] == 30
    assert "kl" not in stats and "clipped" not in stats  # it has neither


def with_teacher(problems, hint="The answer is {answer}.", model=None):
    args, tokenizer = opsd_args("--hint", hint), tiny_tokenizer()
    model = model or tiny_model("qwen2")
    policy = common.Policy(model, tokenizer, 0, [], model.config.max_position_embeddings)
    problems = rollout.add_prompts(policy, problems, args)
    train_opsd.add_teacher_prompts(policy, problems, args)
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
    with pytest.raises(common.UserError, match="--hint: with it problem 'a' is .* tokens long"):
        with_teacher([{"id": "a", "problem": "1+1?", "answer": "2"}], "x" * 60 + "{answer}", model)


@pytest.mark.parametrize("flags,message", [
    (["--beta", "1.5"], "argument --beta: 1.5 is out of range"), (["--beta", "nan"], "--beta: nan"),
    (["--clip", "-1"], "--clip: -1"), (["--hint", "no"], "--hint: 'no' has no {answer}"),
    (["--revise"], "unrecognized arguments: --revise"), (["--kl-coef", "0.1"], "unrecognized arguments: --kl-coef")])
def test_opsd_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises((SystemExit, common.UserError)) as e:
        train_opsd.main(opsd_args(*flags))
    assert message in capsys.readouterr().err + str(e.value)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model_dir):
    path = tmp_path_factory.mktemp("opsd")
    flags = ["--model", model_dir, "--data", write_problems(path / "d.jsonl"), "--verifier",
             write_verifier(path / "v.py", SELECTIVE), "--device", "cpu", "--max-new-tokens", 12, "--batch-size", 4,
             "--steps", 5, "--lr", 1e-3, "--train-tokens", 60]
    stage("baselines.train_opsd", *flags, "--out", path / "o", draws=path / "o")
    return path / "o", flags


@pytest.mark.parametrize("processes,shard", [(2, "off"), (1, "on"), (3, "on")])
def test_opsd_is_the_same_on_several_processes_and_sharded(tmp_path, straight, model_dir, processes, shard):
    """Sharded, the teacher's head is used again in the student's backward."""
    out, flags = straight
    stage("baselines.train_opsd", *flags, "--out", tmp_path / "o", "--shard", shard, processes=processes,
          draws=tmp_path / "o")
    assert_same_runs(out, tmp_path / "o", model_dir)


def test_opsd_runs_as_a_module_under_torchrun(tmp_path, straight):
    run("baselines.train_opsd", *straight[1], "--steps", 1, "--out", tmp_path / "o", processes=2)
    assert len(read(tmp_path / "o/metrics.jsonl")) == 1
