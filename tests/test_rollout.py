"""rollout.py: sampling against generate() and teacher forcing, random numbers, prompts, resume."""
import collections
import json
import re

import pytest
import torch
from conftest import (
    TOKENS,
    WRAPPER,
    args_for,
    assert_same_sampling,
    assert_same_texts,
    common_tokens,
    here,
    read,
    run,
    same_draws,
    same_rollouts,
    stage,
    tiny_model,
    tiny_tokenizer,
    write_problems,
    write_verifier,
)

import rollout
from helpers import common, sampling
from helpers.common import Policy

PROMPTS = [torch.tensor([5, 9, 30]), torch.tensor([7]), torch.arange(20, 37)]
ENDS = [1, *range(60, 70)]  # about one token in 14: lengths differ much
MANY = [torch.arange(3, 3 + n) for n in (4, 1, 9, 2, 40, 3, 1, 70, 5, 12, 2, 6)]  # longer ones join after shorter ones
FAMILIES = pytest.mark.parametrize("family,tied", [("qwen2", True), ("qwen3", False), ("llama", False)])


def keys_of(prompts, n=4, seed=0):
    return [[sampling.row_key(seed, i, s) for s in range(n)] for i in range(len(prompts))]


def draw(model, prompts, n=4, limit=12, seed=0, eos=(1,), vocab=TOKENS, **kw):
    policy = Policy(model, None, vocab, list(eos))
    return sampling.sample(policy, prompts, keys_of(prompts, n, seed), [limit] * len(prompts), **kw)


def texts(found):
    """What is drawn, and nothing of the rows' place in the batch."""
    return [[(row.ids, row.logprobs, row.finish) for row in of_prompt] for of_prompt in found]


def assert_generate_agrees(model, prompts, ours, limit, eos):
    for p, (s,) in zip(prompts, ours):
        how = {"inputs_embeds": p[None]} if p.is_floating_point() else {"input_ids": p[None]}
        out = model.generate(**how, attention_mask=torch.ones(1, len(p), dtype=torch.long), do_sample=False,
                             max_new_tokens=limit, eos_token_id=eos, pad_token_id=1)[0].tolist()
        out = out if p.is_floating_point() else out[len(p):]
        common_tokens(model, p, 0, s.ids, out, vocab=160, temperature=0)
        assert s.finish == ("eos" if s.ids[-1] in eos else "length")


@FAMILIES
@pytest.mark.parametrize("prompts,limit,slots", [(PROMPTS, 40, 0), (MANY, 90, 3)], ids=["together", "slots refilled"])
def test_greedy_tokens_equal_generate(family, tied, prompts, limit, slots):
    model = tiny_model(family, tied)
    ours = draw(model, prompts, n=1, limit=limit, temperature=0, eos=ENDS, vocab=160, slots=slots)
    assert_generate_agrees(model, prompts, ours, limit, ENDS)


# --- the queue: slots refilled, rows put back -------------------------------------------------------------------------
def watched(model, monkeypatch) -> dict:
    """Counts of what a model is asked for: rows of each decoding step, rows prefilled,
    tokens that the cache has room for."""
    seen = {"steps": [], "prefilled": 0, "room": []}
    prefill, update = sampling.prefill, sampling.SlotLayer.update

    def counting_prefill(model, rows):
        seen["prefilled"] += len(rows)
        return prefill(model, rows)

    def counting_update(layer, keys, values, *args, **kwargs):
        seen["room"].append(max(b.shape[0] * b.shape[2] for b in layer.buffers))
        if layer is layer.batch.cache.layers[0]:
            seen["steps"].append(len(keys))
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(sampling, "prefill", counting_prefill)
    monkeypatch.setattr(sampling.SlotLayer, "update", counting_update)
    return seen


def test_greedy_tokens_equal_generate_with_a_sliding_window():
    model = tiny_model("qwen2")
    config = model.config.to_dict() | {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"]}
    windowed = type(model)(type(model.config).from_dict(config)).eval()
    windowed.load_state_dict(model.state_dict())
    settings = {"n": 1, "limit": 40, "temperature": 0, "eos": ENDS, "vocab": 160, "slots": 4}
    ours = draw(windowed, MANY, **settings)
    assert texts(ours) != texts(draw(model, MANY, **settings))  # the window matters
    assert_generate_agrees(windowed, MANY, ours, 40, ENDS)


def test_text_does_not_depend_on_slots_order_or_budget(monkeypatch):
    model = tiny_model("qwen2")
    keys = [[sampling.row_key(i, s) for s in range(3)] for i in range(len(MANY))]
    limits = [1 + 9 * (i % 7) for i in range(len(MANY))]

    def sample(order=1, **kw):
        given = [x[::order] for x in (MANY, keys, limits)]
        return sampling.sample(Policy(model, None, TOKENS, ENDS), *given, **kw)[::order]

    expected = sample()
    assert {s.finish for x in expected for s in x} == {"eos", "length"}
    assert all((len(s.ids) == limit and s.ids[-1] not in ENDS) if s.finish == "length" else len(s.ids) <= limit
               for x, limit in zip(expected, limits) for s in x)
    for slots in (1, 2, 5, 64):
        assert_same_texts(model, MANY, keys, expected, sample(-1 if slots == 5 else 1, slots=slots))
    put_back = []
    for budget in (130, 350, 1500):
        seen = watched(model, monkeypatch)
        assert_same_texts(model, MANY, keys, expected, sample(slots=16, max_tokens=budget))
        assert max(seen["room"]) <= budget
        put_back.append(seen["prefilled"] - 36)
        monkeypatch.undo()
    assert max(put_back) > 0  # rows joined again


# --- what these comparisons let through, and what not -----------------------------------------------------------------
def faulty(monkeypatch, model, fault: str) -> None:
    forward, uniforms, add = model.forward, sampling.uniforms, sampling.Batch.add

    def position(*args, **kw):
        if kw.get("input_ids") is not None:  # a decoding step
            kw["position_ids"] = kw["position_ids"] + 1
        return forward(*args, **kw)

    def mask(batch, rows, *rest):  # the first token of a prompt is hidden
        add(batch, rows, *rest)
        for row in rows:
            row.start += len(row) > 1

    def key(keys, drawn):  # of rows that were put back
        return uniforms(torch.where(torch.as_tensor(drawn) > 9, keys + 1, keys), drawn)

    if fault != "none":
        monkeypatch.setattr(*{"position": (model, "forward", position), "mask": (sampling.Batch, "add", mask),
                              "key": (sampling, "uniforms", key)}[fault])


@pytest.mark.parametrize("fault", ["none", "mask", "position", "key"])
def test_a_wrong_mask_position_or_key_is_not_taken_for_rounding(monkeypatch, fault):
    model, keys = tiny_model("qwen2"), keys_of(MANY, 2)
    expected = draw(model, MANY, n=2, limit=30, eos=ENDS)
    faulty(monkeypatch, model, fault)
    found = draw(model, MANY, n=2, limit=30, eos=ENDS, slots=7)
    if fault == "none":
        assert_same_texts(model, MANY, keys, expected, found)
        return
    with pytest.raises(AssertionError, match=r"row \(\d+, \d+\), position \d+: tokens .* at a distance of [\d.]+e"):
        assert_same_texts(model, MANY, keys, expected, found)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_draw_may_differ_where_its_uniform_lies_on_a_boundary_and_nowhere_else(family):
    model, prompt = tiny_model(family, tied=False), PROMPTS[0]
    with torch.no_grad():
        cdf = model.double()(prompt[None]).logits[0, -1, :TOKENS].softmax(-1).cumsum(-1)
    model.float()
    keys = torch.arange(200_000)
    distance = (sampling.uniforms(keys, 0).double()[:, None] - cdf).abs()  # (keys, boundaries)
    for low, high, allowed in [(0, 5e-7, True), (2e-6, 1, False)]:
        key, token = ((distance > low) & (distance < high))[:, :-1].nonzero()[0].tolist()
        decodes = [token, 5, 6], [token + 1, 9]  # what follows the difference is not compared
        if allowed:
            assert common_tokens(model, prompt, key, *decodes) == 0
            continue
        with pytest.raises(AssertionError, match=f"row {key}, position 0: tokens {token} and {token + 1}"):
            common_tokens(model, prompt, key, *decodes)
    with pytest.raises(AssertionError, match="position 1"):  # greedy: two tokens that no rounding confuses
        common_tokens(model, prompt, 0, [7, 5], [7, 6], temperature=0)
    with pytest.raises(AssertionError, match="the beginning of the other"):
        common_tokens(model, prompt, 0, [7], [7, 6])


def test_another_token_in_a_file_or_in_training_is_not_taken_for_rounding(tmp_path, model_dir):
    data = write_problems(tmp_path / "d.jsonl", 2)
    here("rollout", "--model", model_dir, "--data", data, "-n", 2, "--max-new-tokens", 6, "--out", tmp_path / "a",
         "--verifier", write_verifier(tmp_path / "v.py"))
    (tmp_path / "b").mkdir()
    one, other = tmp_path / "a/rollouts.jsonl", tmp_path / "b/rollouts.jsonl"
    good = common.read_jsonl(one)[0]
    for field, wrong in [("response_ids", [(good["response_ids"][0] + 75) % TOKENS]), ("answer", "x"), ("reward", 5)]:
        other.write_text(common.to_line(good | {field: wrong}) + "".join(one.read_text().splitlines(True)[1:]))
        with pytest.raises(AssertionError, match="position 0" if field == "response_ids" else None):
            same_rollouts(one, other)
    other.write_bytes(one.read_bytes())
    assert same_rollouts(one, other)
    for name, drawn in [("x", [[7, 0.2], [8, 0.1]]), ("near", [[7, 0.2], [9, 1e-7]]), ("far", [[7, 0.2], [9, 0.1]])]:
        (tmp_path / f"{name}.draws0").write_text(json.dumps({"5": [[0.0, *drawn]]}))
    assert same_draws(tmp_path / "x", tmp_path / "x") and not same_draws(tmp_path / "x", tmp_path / "near")
    with pytest.raises(AssertionError, match="row 5, position 1: tokens 8 and 9"):
        same_draws(tmp_path / "x", tmp_path / "far")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("budget", [0, 200])
def test_logprobs_equal_teacher_forced_ones(monkeypatch, family, budget):
    model = tiny_model(family)
    seen = watched(model, monkeypatch)
    found = draw(model, PROMPTS, n=6, limit=60, eos=[1, 60], slots=18, max_tokens=budget)
    assert (seen["prefilled"] > 18) == (budget > 0)  # rows were put back
    for p, s in ((p, s) for p, samples in zip(PROMPTS, found) for s in samples):
        logits = model(torch.cat([p, torch.tensor(s.ids)])[None]).logits[0, len(p) - 1:-1, :TOKENS].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(s.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)
        assert max(s.ids) < TOKENS and not {1, 60} & set(s.ids[:-1])


def test_no_step_is_spent_on_a_finished_row_and_the_batch_stays_full(monkeypatch):
    model = tiny_model("qwen2")
    seen = watched(model, monkeypatch)
    prompts = [torch.tensor([3 + i]) for i in range(40)]
    lengths = [len(s.ids) for x in draw(model, prompts, n=4, limit=80, eos=ENDS, slots=16) for s in x]
    assert max(lengths) > 4 * sum(lengths) / len(lengths)  # skewed
    assert sum(seen["steps"]) == sum(lengths) - len(lengths)  # the first token comes from the prompt's pass
    last = max(i for i, rows in enumerate(seen["steps"]) if rows == 16)  # the queue is empty soon after
    assert sum(seen["steps"][:last]) >= 0.9 * 16 * last


def test_an_iterator_is_asked_for_no_more_rows_than_fit():
    model, taken = tiny_model("qwen2"), 0

    def rows():
        nonlocal taken
        for i in range(20):
            taken += 1
            yield sampling.Row(PROMPTS[i % 3], i, 10, tag=i)

    finished = 0
    for done in sampling.decode(Policy(model, None, TOKENS, [1]), rows(), slots=4):
        finished += len(done)
        assert taken <= finished + 4
    assert finished == taken == 20


def test_text_does_not_depend_on_the_number_of_samples_but_on_the_seed():
    model = tiny_model("qwen2")
    few, many = draw(model, PROMPTS, n=3, eos=ENDS), [x[:3] for x in draw(model, PROMPTS, n=8, eos=ENDS)]
    assert_same_texts(model, PROMPTS, keys_of(PROMPTS, 3), few, many)
    assert draw(model, PROMPTS, seed=1)[0][0].ids != draw(model, PROMPTS, seed=2)[0][0].ids


def test_embeddings_as_prompt():
    model = tiny_model("qwen3", tied=False)
    embeds = [model.get_input_embeddings()(p).detach() for p in PROMPTS]
    assert_same_texts(model, PROMPTS, keys_of(PROMPTS), draw(model, embeds), draw(model, PROMPTS))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)) * 0.3  # of no token
    assert_generate_agrees(model, [x], draw(model, [x], n=1, limit=20, temperature=0, vocab=160), 20, [1])


def test_sample_frequencies_match_the_softmax():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    n = 20000
    u = sampling.uniforms(torch.tensor([sampling.row_key("chi", i) for i in range(n)]), 3)
    tokens, logprobs = sampling.draw(logits.expand(n, 12), u, 1.0, 0, 1.0)
    p = logits[0].softmax(-1)
    counts = torch.bincount(tokens, minlength=12)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 31.3  # 99.9 % quantile of chi-square with 11 degrees of freedom
    torch.testing.assert_close(logprobs, p.log()[tokens], atol=1e-5, rtol=0)


def test_uniforms_equal_splitmix64_in_whole_numbers():
    keys, positions, mask = [0, 5, 2**62 + 12345, 2**63 - 1], [0, 1, 7, 31999], 2**64 - 1
    for position in positions:
        expected = []
        for key in keys:
            z = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
            z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
            expected.append(((z ^ z >> 31) >> 40 & 0xFFFFFF) / 2**24)
        assert sampling.uniforms(torch.tensor(keys), position).tolist() == expected
        assert sampling.uniforms(torch.tensor(keys), torch.full((4,), position)).tolist() == expected


@pytest.mark.parametrize("size", [1, 12, sampling.BLOCK, 3 * sampling.BLOCK + 7])
def test_draw_is_the_inverse_of_the_cdf(size):
    g = torch.Generator().manual_seed(size)
    logits = (torch.randn(1, size, generator=g) * 3).masked_fill(torch.rand(1, size, generator=g) < 0.5, -torch.inf)
    logits[0, 0], logits[0, size // 2] = -torch.inf, 0  # not even u = 0 draws the first
    p = logits[0].double().softmax(-1)
    cdf = p.cumsum(-1)
    u = torch.cat([torch.linspace(0, 1, 4000)[:-1], torch.tensor([1 - 2**-24])])
    token, logprob = sampling.draw(logits.expand(len(u), size), u, 1.0, 0, 1.0)
    assert (p[token] > 0).all()
    assert (u <= cdf[token] + 1e-6).all() and (u >= cdf[token] - p[token] - 1e-6).all()
    torch.testing.assert_close(logprob.double(), p[token].log(), atol=1e-5, rtol=0)


def test_top_k_and_top_p_against_the_definition():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(50, 20, generator=g) * 2
    for k, p in [(3, 1.0), (0, 0.7), (5, 0.5), (0, 1e-9), (25, 1.0)]:
        kept = sampling.filter_logits(logits, k, p).isfinite()
        for row, mask in zip(logits, kept):
            order = sorted(range(20), key=lambda i: -row[i])
            allowed = order[:k] if k else order
            probs = torch.softmax(row[allowed], -1)
            nucleus = next((m for m in range(1, len(allowed) + 1) if probs[:m].sum() >= p), len(allowed))
            assert set(mask.nonzero()[:, 0].tolist()) == set(allowed[:nucleus])


def test_checkpoint_sampling_settings_are_ignored():
    model = tiny_model("qwen2")
    plain = texts(draw(model, PROMPTS))
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0)
    assert texts(draw(model, PROMPTS)) == plain  # the same shapes, and so the same bits


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


def problems_in(tmp_path, record: dict, *flags, **more) -> list[dict]:
    (tmp_path / "d.jsonl").write_text(common.to_line(record))
    return rollout.read_problems(str(tmp_path / "d.jsonl"), args_for(tmp_path, *flags), **more)


def test_dapo_wrapper_is_replaced(tmp_path):
    assert problems_in(tmp_path, {"problem": WRAPPER.format("Find $x$.\n\nNote: x>0."), "answer": 3}) == [
        {"id": "1", "problem": "Find $x$.\n\nNote: x>0.", "answer": "3"}]


@pytest.mark.parametrize("answer", [["3"], [], {"tests": [[1, 2]]}, True])
def test_an_answer_may_be_any_json_value_for_a_verifier_of_ones_own(tmp_path, answer):
    record = {"problem": "1+1?", "answer": answer}
    own = ["--verifier", write_verifier(tmp_path / "v.py")]
    assert problems_in(tmp_path, record, *own)[0]["answer"] == answer
    with pytest.raises(common.UserError, match="d.jsonl: record 1: 'answer' is not a string or a number"):
        problems_in(tmp_path, record)  # verifier.py would call every response wrong
    with pytest.raises(common.UserError, match="'guide' is not a string"):
        problems_in(tmp_path, record | {"guide": answer}, *own)


@pytest.mark.parametrize("head,asks", [("response, answer", False), ("response, answer, problem", True)])
def test_the_other_fields_of_a_problem_travel(tmp_path, model_dir, head, asks):
    """To zero_hit.jsonl always, and to a verifier, and with the rollouts, if it asks for them."""
    more = {"answer": {"2": 2}, "guide": "two", "limit": 3, "reward": "high"}
    record, read_as = {"name": "a", "question": "1+1?"} | more, {"id": "a", "problem": "1+1?"} | more
    verifier = write_verifier(tmp_path / "v.py", f"def verify({head}):\n    open({str(tmp_path / 'log')!r}, 'a').write("
                                                 "repr(locals()) + '\\n')\n")
    (tmp_path / "d.jsonl").write_text(common.to_line(record))
    here("rollout", "--model", model_dir, "--data", tmp_path / "d.jsonl", "--fields", "name", "question", "answer",
         "-n", 2, "--max-new-tokens", 4, "--verifier", verifier, "--out", tmp_path / "o")
    for r, seen in zip(read(tmp_path / "o/rollouts.jsonl"), (tmp_path / "log").read_text().splitlines(), strict=True):
        assert (r["answer"], r["guide"], r["reward"]) == ({"2": 2}, "two", 0)
        assert r.get("problem_fields") == (read_as if asks else None)
        assert (repr(read_as) in seen) == asks and repr({"2": 2}) in seen
    assert read(tmp_path / "o/zero_hit.jsonl") == [read_as]


# --- the stage as a script --------------------------------------------------------------------------------------------
def test_same_files_for_any_batch_size_and_number_of_processes(tmp_path, model_dir):
    data = write_problems(tmp_path / "d.jsonl")
    flags = ["--model", model_dir, "--data", data, "-n", 6, "--max-new-tokens", 10, "--device", "cpu",
             "--verifier", write_verifier(tmp_path / "v.py")]
    run("rollout.py", *flags, "--out", tmp_path / "a", "--decode-rows", 4)
    stage("rollout.py", *flags, "--out", tmp_path / "b", "--decode-rows", 64)
    run("rollout.py", *flags, "--out", tmp_path / "c", "--decode-rows", 4, "--decode-tokens", 300, processes=2)
    again = lambda out: lambda: stage("rollout.py", *flags, "--out", out)
    for name in "bc":
        assert_same_sampling(tmp_path / "a", tmp_path / name, again(tmp_path / name))
    assert (tmp_path / "a" / "rollouts.jsonl").read_bytes().count(b"\n") == 30


def counting_verifier(path, extra: str = "") -> str:
    """PARITY that also notes the rank of every call in path.log."""
    return write_verifier(path, f"import os, time\nRANK = os.environ.get('RANK', '0')\n"
                          "def verify(response, gold):\n"
                          f"    with open({f'{path}.log'!r}, 'a') as f: f.write(RANK + '\\n')\n"
                          f"    {extra or 'pass'}\n    return len(response) % 2 == 1\n")


def test_a_slow_process_takes_less_and_the_file_is_the_same(tmp_path, model_dir):
    data = write_problems(tmp_path / "d.jsonl", 12)
    flags = ["--model", model_dir, "--data", data, "-n", 2, "--max-new-tokens", 12, "--decode-rows", 2]
    stage("rollout.py", *flags, "--verifier", write_verifier(tmp_path / "v.py"), "--out", tmp_path / "a")
    slow = counting_verifier(tmp_path / "w.py", "time.sleep(0.3 * (RANK == '0'))")
    bar = stage("rollout.py", *flags, "--verifier", slow, "--out", tmp_path / "b", processes=2).stderr
    calls = collections.Counter((tmp_path / "w.py.log").read_text().split())
    assert sum(calls.values()) == 24  # nothing twice
    assert 2 <= calls["0"] < calls["1"]
    assert re.search(r"24/24 \[.*, pass [01]\.\d{3}\]", bar)  # rank 0's bar counts the work of both
    same_rollouts(tmp_path / "a" / "rollouts.jsonl", tmp_path / "b" / "rollouts.jsonl")


@pytest.mark.parametrize("point,processes", [(6, 1), (19, 1), (3, 2)])
def test_a_kill_loses_no_more_than_the_line_it_tore(tmp_path, model_dir, point, processes):
    """Also of a process that is not there any more."""
    flags = ["--model", model_dir, "--data", write_problems(tmp_path / "d.jsonl", 4), "-n", 5, "--max-new-tokens", 40,
             "--device", "cpu", "--decode-rows", 3, "--decode-tokens", 600]
    verifier = counting_verifier(tmp_path / "v.py")
    stage("rollout.py", *flags, "--verifier", verifier, "--out", tmp_path / "a")
    stage("rollout.py", *flags, "--verifier", verifier, "--out", tmp_path / "b", kill_at=point, processes=processes)
    whole = {(r["id"], r["sample"]) for path in (tmp_path / "b").glob("rollouts*.*")
             for r in map(json.loads, re.findall(r".*\n", path.read_text()))}
    assert 0 < len(whole) < 20 or point > 10
    (tmp_path / "v.py.log").write_text("")
    stage("rollout.py", *flags, "--verifier", verifier, "--out", tmp_path / "b")
    assert (tmp_path / "v.py.log").read_text().count("\n") == 20 - len(whole)
    again = lambda: stage("rollout.py", *flags, "--verifier", verifier, "--out", tmp_path / "b")
    assert_same_sampling(tmp_path / "a", tmp_path / "b", again)
