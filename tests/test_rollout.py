"""rollout.py: sampling against generate() and teacher forcing, random numbers, prompts, resume."""
import json

import pytest
import torch
from conftest import TOKENS, args_for, run, stage, tiny_model, tiny_tokenizer, write_problems, write_verifier

import common
import rollout

PROMPTS = [torch.tensor([5, 9, 30]), torch.tensor([7]), torch.arange(20, 37)]


def draw(model, prompts, n=4, limit=12, seed=0, **kw):
    keys = [[rollout.row_key(seed, i, s) for s in range(n)] for i in range(len(prompts))]
    return rollout.sample(model, prompts, keys, [limit] * len(prompts), **{"eos": [1], "vocab": TOKENS} | kw)


@pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False), ("llama", False)])
def test_greedy_tokens_equal_generate(family, tied):
    model = tiny_model(family, tied)
    ours = draw(model, PROMPTS, n=1, limit=40, temperature=0, eos=[1, 60, 61, 62], vocab=160)
    for p, (s,) in zip(PROMPTS, ours):
        out = model.generate(p[None], attention_mask=torch.ones_like(p)[None], do_sample=False, max_new_tokens=40,
                             eos_token_id=[1, 60, 61, 62], pad_token_id=1)[0, len(p):].tolist()
        assert s.ids == out
        assert s.finish == ("eos" if out[-1] in (1, 60, 61, 62) else "length")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logprobs_equal_teacher_forced_ones(family):
    model = tiny_model(family)
    for p, samples in zip(PROMPTS, draw(model, PROMPTS, n=6, limit=30, eos=[1, 60, 61, 62, 63])):
        for s in samples:
            logits = model(torch.cat([p, torch.tensor(s.ids)])[None]).logits[0, len(p) - 1:-1, :TOKENS].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(s.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)
            assert max(s.ids) < TOKENS
            assert all(i not in (1, 60, 61, 62, 63) for i in s.ids[:-1])


def test_text_does_not_depend_on_batch_neighbours_or_number_of_samples():
    model = tiny_model("qwen2")
    together = draw(model, PROMPTS, n=8, eos=[1, *range(60, 80)])
    for i, p in enumerate(PROMPTS):
        for s in range(8):
            alone = rollout.sample(model, [p], [[rollout.row_key(0, i, s)]], [12], eos=[1, *range(60, 80)], vocab=TOKENS)
            assert alone[0][0].ids == together[i][s].ids
    assert draw(model, PROMPTS, n=3)[2][1].ids == draw(model, PROMPTS, n=8)[2][1].ids
    assert draw(model, PROMPTS, seed=1)[0][0].ids != draw(model, PROMPTS, seed=2)[0][0].ids


def test_embeddings_as_prompt_equal_their_tokens():
    model = tiny_model("qwen2")
    embeds = [model.get_input_embeddings()(p).detach() for p in PROMPTS]
    assert [[s.ids for s in x] for x in draw(model, embeds)] == [[s.ids for s in x] for x in draw(model, PROMPTS)]


def test_greedy_from_embeddings_equals_generate_with_inputs_embeds():
    model = tiny_model("qwen3", tied=False)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    ours = draw(model, [x], n=1, limit=20, temperature=0, eos=[1], vocab=160)[0][0].ids
    assert ours == model.generate(inputs_embeds=x[None], attention_mask=torch.ones(1, 9), do_sample=False, max_new_tokens=20,
                                  eos_token_id=[1], pad_token_id=1)[0].tolist()


def test_limits_are_per_prompt():
    model = tiny_model("qwen2")
    samples = rollout.sample(model, PROMPTS, [[1, 2], [3], [4]], [3, 9, 1], eos=[1], vocab=TOKENS)
    assert [[len(s.ids) for s in x] for x in samples] == [[3, 3], [9], [1]]
    assert all(s.finish == "length" for x in samples for s in x)


def test_sample_frequencies_match_the_softmax():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    n = 20000
    u = rollout.uniforms(torch.tensor([rollout.row_key("chi", i) for i in range(n)]), 3)
    tokens, logprobs = rollout.draw(logits.expand(n, 12), u, 1.0, 0, 1.0)
    p = logits[0].softmax(-1)
    counts = torch.bincount(tokens, minlength=12)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom
    torch.testing.assert_close(logprobs, p.log()[tokens], atol=1e-5, rtol=0)


def test_uniforms_are_uniform_and_independent_across_rows_and_positions():
    keys = torch.tensor([rollout.row_key(0, i) for i in range(2000)])
    u = torch.stack([rollout.uniforms(keys, t) for t in range(20)])
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    centred = u - 0.5
    for a, b in [(centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])]:
        assert abs((a * b).mean() * 12) < 0.02  # correlation; its standard error is 0.005


def test_a_zero_probability_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.49999, 0.5, 1 - 2**-24):
        token, _ = rollout.draw(logits, torch.tensor([u]), 1.0, 0, 1.0)
        assert token.item() == (1 if u < 0.5 else 3)


def test_top_k_and_top_p_against_the_definition():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(50, 20, generator=g) * 2
    for k, p in [(3, 1.0), (0, 0.7), (5, 0.5), (0, 1e-9), (25, 1.0)]:
        kept = rollout.filter_logits(logits, k, p).isfinite()
        for row, mask in zip(logits, kept):
            order = sorted(range(20), key=lambda i: -row[i])
            allowed = order[:k] if k else order
            probs = torch.softmax(row[allowed], -1)
            nucleus = next((m for m in range(1, len(allowed) + 1) if probs[:m].sum() >= p), len(allowed))
            assert set(mask.nonzero()[:, 0].tolist()) == set(allowed[:nucleus])


def test_checkpoint_sampling_settings_are_ignored():
    model = tiny_model("qwen2")
    plain = draw(model, PROMPTS)
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0)
    assert draw(model, PROMPTS) == plain


# --- prompts and problems ---------------------------------------------------------------------------------------------
def test_chat_and_plain_prompts(tmp_path):
    chat, plain = tiny_tokenizer(), tiny_tokenizer(chat=False)
    text = lambda t, p, *f: t.decode(rollout.prompt_ids(t, p, args_for(tmp_path, *f)))
    assert text(chat, "1+1?") == f"[user]1+1?\n{rollout.INSTRUCTION}[assistant]"
    assert text(chat, "1+1?", "--instruction", "") == "[user]1+1?[assistant]"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    assert text(chat, messages) == "[system]s[user]1+1?[assistant]"
    assert "\\boxed{}" in text(plain, "1+1?") and text(plain, "1+1?").startswith("Question: 1+1?")
    assert text(chat, "1+1?", "--prompt-format", "plain") == text(plain, "1+1?")
    with pytest.raises(common.UserError, match="--prompt-format chat"):
        text(plain, "1+1?", "--prompt-format", "chat")
    with pytest.raises(common.UserError, match="chat template"):
        text(plain, messages)


def test_dapo_wrapper_is_replaced(tmp_path):
    wrapped = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
               "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\nNote: x>0.\n\n"
               "Remember to put your answer on its own line after \"Answer:\".")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"problem": wrapped, "answer": 3}) + "\n")
    assert rollout.read_problems(str(path), args_for(tmp_path)) == [
        {"id": "1", "problem": "Find $x$.\n\nNote: x>0.", "answer": "3"}]


# --- the stage as a script --------------------------------------------------------------------------------------------
def test_same_files_for_any_batch_size_and_number_of_processes_and_after_a_kill(tmp_path, model_dir):
    data = write_problems(tmp_path / "d.jsonl")
    flags = ["--model", model_dir, "--data", data, "-n", 6, "--max-new-tokens", 10, "--device", "cpu",
             "--verifier", write_verifier(tmp_path / "v.py")]
    run("rollout.py", *flags, "--out", tmp_path / "a", "--batch-size", 4)
    stage("rollout.py", *flags, "--out", tmp_path / "b", "--batch-size", 64)
    run("rollout.py", *flags, "--out", tmp_path / "c", "--batch-size", 4, processes=2)
    whole = (tmp_path / "a" / "rollouts.jsonl").read_bytes()
    assert whole.count(b"\n") == 30
    assert (tmp_path / "b" / "rollouts.jsonl").read_bytes() == whole
    assert (tmp_path / "c" / "rollouts.jsonl").read_bytes() == whole
    # a run killed in mid-write: some whole records, one torn, a foreign rank's part
    lines = whole.splitlines(keepends=True)
    run_dir = tmp_path / "d"
    run_dir.mkdir()
    (run_dir / "run.json").write_text((tmp_path / "a" / "run.json").read_text())
    (run_dir / "rollouts.rank0.part").write_bytes(b"".join(lines[:7]) + lines[7][:20])
    (run_dir / "rollouts.rank3.part").write_bytes(b"".join(lines[20:22]) + lines[22][:9])
    stage("rollout.py", *flags, "--out", run_dir, "--batch-size", 4)
    for name in ("rollouts.jsonl", "zero_hit.jsonl", "summary.json"):
        assert (run_dir / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not list(run_dir.glob("*.part"))
    # other settings in the same folder are refused
    refused = stage("rollout.py", *flags, "--out", run_dir, "--seed", 1, check=False)
    assert refused.returncode == 2 and "--seed" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
