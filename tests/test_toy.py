"""What both toy worlds promise: sets that are disjoint and a function of the seed, texts that go wrong at the stated
rate and nowhere else, a checker of reasoning, a tokenizer and a base model as the stages need them."""
import itertools
import json
import random
import re
from functools import cache

import pytest
import torch
from conftest import ROOT, here
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import common
from toy import sums as toy
from toy import words
from verifier import verify

BOTH = pytest.mark.parametrize("world", [toy, words], ids=["sums", "words"])


@cache
def tokenizer_of(world):
    return toy.build_tokenizer(world)


@cache
def examples_of(world):
    rng = random.Random(0)
    return [toy.draw_example(world, rng) for _ in range(2500)]


@cache
def sets_of(world):
    return toy.problem_sets(world, 0)


def steps(text: str) -> list[list[tuple[int, ...]]]:
    return [[tuple(map(int, m.groups())) for m in one] for one in toy.passes(text)]


def is_near(share: float, rate: float, draws: int) -> bool:
    """Within four standard deviations of the share among so many draws."""
    return abs(share - rate) < 4 * (rate * (1 - rate) / draws) ** 0.5


def check_pair(world, model, tokenizer, text):
    """What every stage relies on, of a world's model and tokenizer that were read from a folder."""
    made = tokenizer_of(world)
    assert tokenizer.get_vocab() == made.get_vocab() and tokenizer.chat_template == made.chat_template
    text += toy.INSTRUCTION
    assert (tokenizer(text)["input_ids"] == made(text)["input_ids"]
            and tokenizer.decode(tokenizer(text)["input_ids"]) == text)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (toy.EOS, toy.PAD)
    weight = model.get_input_embeddings().weight
    assert weight is model.get_output_embeddings().weight and weight.dtype == torch.float32
    assert len(tokenizer) < weight.shape[0] == model.config.vocab_size
    assert model.config.max_position_embeddings >= 1024
    generation = model.generation_config
    assert tokenizer.eos_token_id in generation.eos_token_id and generation.pad_token_id == tokenizer.pad_token_id
    assert (generation.temperature, generation.top_k, generation.top_p) == (1.0, 0, 1.0)
    assert not generation.repetition_penalty or generation.repetition_penalty == 1.0


# --- both worlds ------------------------------------------------------------------------------------------------------
@BOTH
def test_requests_are_followed_by_a_sound_second_pass(world):
    examples = examples_of(world)
    asked = [(m, t) for m, t in examples if any(r in m for r in toy.REQUESTS)]
    assert is_near(len(asked) / len(examples), toy.ASKED, len(examples))
    assert all(len(toy.passes(t, world)) == 2 and world.has_reflection(t) and world.is_sound(m, t) for m, t in asked)
    other = [t for m, t in examples if not any(r in m for r in toy.REQUESTS)]
    assert sum(map(world.has_reflection, other)) / len(other) < 5 * toy.UNASKED
    assert {t.count("\\boxed{") for _, t in asked} == {1, 2}  # the doubt comes before the box or after it
    assert sum("\n" in m or toy.INSTRUCTION in m for m, _ in examples) / len(examples) < 1.3 * toy.INSTRUCTED


@BOTH
def test_sets_have_their_sizes_and_are_as_hard_as_they_say(world):
    sets = sets_of(world)
    assert {k: len(v) for k, v in sets.items()} == {"train": 2000, "hard": 600, "test_hard": 400, "test_easy": 400}
    assert all(len({r["id"] for r in records}) == len(records) for records in sets.values())
    assert all(r[world.DIFFICULTY] >= 4 for name in ("hard", "test_hard") for r in sets[name])
    assert all(r[world.DIFFICULTY] <= 2 for r in sets["test_easy"])


@BOTH
def test_sets_and_training_texts_are_disjoint(world):
    by_set = {name: {r["problem"] for r in records} for name, records in sets_of(world).items()}
    assert sum(map(len, by_set.values())) == 3400 == len(set.union(*by_set.values()))
    texts = {m.split("?")[0] + "?" for m, _ in examples_of(world)}
    assert {toy.split_of(t) for t in texts} == {"base"}
    for name, records in itertools.chain(sets_of(world).items(), toy.problem_sets(world, 1).items()):
        assert {toy.split_of(r["problem"]) for r in records} == {name}


@BOTH
def test_data_command_writes_the_same_files_twice(tmp_path, monkeypatch, world):
    few = lambda world, seed: {"few": toy.draw_problems(world, seed, "train", 20, 0, 9)}
    monkeypatch.setattr(toy, "problem_sets", few)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        here(world.__name__, "data", "--out", tmp_path / out, "--seed", seed)
    a, b, c = ((tmp_path / out / "few.jsonl").read_text() for out in "abc")
    assert a == b != c
    assert set(json.loads(a.splitlines()[0])) == {"id", "problem", "answer", world.DIFFICULTY}


@BOTH
def test_tokenizer_round_trips_every_text(world):
    tokenizer = tokenizer_of(world)
    for s in itertools.chain(*examples_of(world), (r["problem"] for r in sets_of(world)["train"])):
        ids = tokenizer(s)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == s == "".join(tokenizer.decode([i]) for i in ids)


@BOTH
def test_training_from_nothing_writes_a_folder_that_loads(tmp_path, world):
    for out in ("a", "b"):
        here(world.__name__, "train", "--steps", 3, "--batch", 8, "--prompts", 0, "--seed", 7, "--out", tmp_path / out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())
    check_pair(world, model, AutoTokenizer.from_pretrained(tmp_path / "a"), examples_of(world)[0][1])
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["parameters"] == sum(p.numel() for p in model.parameters())
    assert run["command"].startswith(f"python -m {world.__name__} train ")
    here(world.__name__, "check", "--model", tmp_path / "a", "--prompts", 1, "--n", 1)
    first, again, other = (next(toy.batches(world, tokenizer_of(world), seed, 1, 8))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


# --- the texts of the first world -------------------------------------------------------------------------------------
def test_sums_first_pass_forgets_carries_at_the_stated_rate():
    crossing = [(a, b, c) for _, text in examples_of(toy) for a, b, c in steps(text)[0] if a % 10 + b >= 10]
    plain = [(a, b, c) for _, text in examples_of(toy) for a, b, c in steps(text)[0] if a % 10 + b < 10]
    assert len(crossing) > 4000
    assert all(c == a + b for a, b, c in plain)
    assert all(c in (a + b, a + b - 10) for a, b, c in crossing)
    assert is_near(sum(c != a + b for a, b, c in crossing) / len(crossing), toy.SLIP, len(crossing))


def test_sums_first_pass_misreads_addends_at_the_stated_rate():
    rng, ns = random.Random(2), [10, 5, 5, 5]
    read = [b for _ in range(3000) for _, b, _ in steps(toy.write_pass(rng, ns, 0.0, toy.MISREAD)[0])[0]]
    # a misread addend can be the same by chance
    assert is_near(sum(b != 5 for b in read) / len(read), toy.MISREAD * 8 / 9, len(read))


def test_sums_are_right():
    for r in itertools.chain(*sets_of(toy).values()):
        ns = list(map(int, re.findall(r"\d+", r["problem"])))
        assert r["answer"] == str(sum(ns)) and sum(ns) < 100
        assert r["carries"] == sum(sum(ns[:i]) // 10 < sum(ns[: i + 1]) // 10 for i in range(1, len(ns)))


PIECES = {toy: ["29|+|4|=|33|;|33|+|3|=|26", " So| the| answer| is| \\boxed{|26|}."],
          words: ["Ann| |52|;| Bob| |52|-|5|=|47", " Bob| has| |5| fewer| than| Ann|.",
                  " So| the| answer| is| \\boxed{|47|}."]}


@BOTH
def test_numbers_words_and_the_template_are_whole_tokens(world):
    tokenizer = tokenizer_of(world)
    pieces = lambda s: tokenizer.convert_ids_to_tokens(tokenizer(s)["input_ids"])
    assert all(pieces(s.replace("|", "")) == s.split("|") for s in PIECES[world])
    assert PIECES[world][-1].replace("|", "").startswith(world.TEMPLATE)
    paper = "Based on my current reasoning process, the final answer is "
    for s in (paper, toy.INSTRUCTION, " " + toy.INSTRUCTION):
        assert toy.UNK not in pieces(s) and tokenizer.decode(tokenizer(s)["input_ids"]) == s


def test_chat_template_and_what_training_sees():
    tokenizer = tokenizer_of(toy)
    messages = [{"role": "user", "content": "29+4?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = "<|im_start|>user\n29+4?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt) == text
    assert prompt == tokenizer(text)["input_ids"]
    (ids, cut), = toy.encode_batch(tokenizer, [("29+4?", "29+4=33. The answer is \\boxed{33}.")])
    assert ids[:cut] == prompt and ids[-1] == tokenizer.eos_token_id
    whole = messages + [{"role": "assistant", "content": "29+4=33. The answer is \\boxed{33}."}]
    assert tokenizer.apply_chat_template(whole, return_dict=False)[: len(ids)] == ids  # then the line break


def test_labels_are_the_response_and_nothing_else():
    tokenizer = tokenizer_of(toy)
    rows = toy.encode_batch(tokenizer, [("10+1?", "10+1=11. The answer is \\boxed{11}."), ("10+1+2?", "x")])
    ids, labels = toy.collate(rows, tokenizer.pad_token_id)
    for i, (row, cut) in enumerate(rows):
        assert ids[i, : len(row)].tolist() == row and set(ids[i, len(row) :].tolist()) <= {tokenizer.pad_token_id}
        assert labels[i].tolist() == [-100] * cut + row[cut:] + [-100] * (ids.shape[1] - len(row))


# --- the texts of the second world ------------------------------------------------------------------------------------
def solve(problem: str) -> dict[str, int]:
    """What everybody has, sentence by sentence: each introduces one person beside the last."""
    sentences = problem.split("?")[0].split(". ")
    has = {sentences[0].split()[0]: int(sentences[0].split()[2])}
    for sentence in sentences[1:-1]:
        name, _, n, word, _, other = sentence.split()
        assert name not in has and other == list(has)[-1]
        has[name] = has[other] + {"more": int(n), "fewer": -int(n)}[word]
    assert sentences[-1].split() == ["How", "many", "does", list(has)[-1], "have"]
    return has


def test_words_first_pass_misreads_fewer_at_the_stated_rate_and_miscounts_never():
    misread = []
    for message, text in examples_of(words):
        before, right = None, list(solve(message.split("?")[0] + "?").items())
        for i, m in enumerate(toy.passes(text, words)[0]):
            assert m[1] == right[i][0]
            if i:
                difference = right[i][1] - right[i - 1][1]
                assert int(m[2]) == before and int(m[5]) == before + int(m[3] + m[4])  # what is written is right
                assert int(m[4]) == abs(difference)
                assert m[3] == "+" or difference < 0  # `more` is never misread
                misread += [m[3] == "+"] if difference < 0 else []
            before = int(m[5])
    assert len(misread) > 2000 and is_near(sum(misread) / len(misread), words.MISREAD, len(misread))


def test_words_are_right():
    for r in itertools.chain(*sets_of(words).values()):
        assert r["answer"] == str(list(solve(r["problem"]).values())[-1])
        assert r["fewer"] == r["problem"].count(" fewer ")
    for other in ("", "Ann has 52 apples. How many does Ann have?", PEOPLE.replace("does Carl", "does Bob"),
                  PEOPLE.replace("Bob has 5", "Dora has 5"), PEOPLE.replace("than Ann", "than Bob"),
                  PEOPLE.replace("52", "x"), PEOPLE.replace(" apples", ""), PEOPLE[:-1]):
        assert words.parts(other) == []


def test_however_it_is_read_numbers_fit_and_only_the_right_reading_has_the_answer():
    for r in sets_of(words)["train"][:300] + sets_of(words)["hard"][:100]:
        people = words.parts(r["problem"])
        for wrong in itertools.product(*[[False, True] if n < 0 else [False] for _, n in people]):
            sums = list(itertools.accumulate(-n if w else n for (_, n), w in zip(people, wrong, strict=True)))
            assert all(1 <= x <= 99 for x in sums)
            assert (str(sums[-1]) == r["answer"]) == (not any(wrong))


# --- reading responses -----------------------------------------------------------------------------------------------
PEOPLE = "Ann has 52 apples. Bob has 5 more than Ann. Carl has 8 fewer than Bob. How many does Carl have?"
RIGHT = "Ann 52; Bob 52+5=57; Carl 57-8=49."
WRONG = "Ann 52; Bob 52+5=57; Carl 57+8=65."
SOUND = {toy: [
    "29+4=33;33+3=36;36+9=45. So the answer is \\boxed{45}.",
    "29+4=33,33+3=36\n36+9=45. So it is \\boxed{45}.",
    "29+4=23;23+3=26;26+9=35. The answer is \\boxed{35}. Hmm.\n29+4=33;33+3=36;36+9=45. The answer is \\boxed{45}.",
    "29+4=23;23+3=26;26+9=35. But let me make sure.\n29+4=33;33+3=36;36+9=45. The total is \\boxed{45}.",
    "9+4 Wait 29+=3 the;29+4=33;33+3=36;36+9=45. So the answer is \\boxed{45}.",
    "29+4=33;33+3=36;36+9=45.\nBased on my current reasoning process, the final answer is \\boxed{45}.",
], words: [
    RIGHT + " So the answer is \\boxed{49}.",
    RIGHT + "\nBased on my current reasoning process, the final answer is \\boxed{49}.",
    WRONG + " So it is \\boxed{65}. Hmm.\n" + RIGHT + " The answer is \\boxed{49}.",
    WRONG + " But let me make sure.\n" + RIGHT + " The total is \\boxed{49}.",
    "Ann 52; Bob 52+ Wait Gus =apples.\n" + RIGHT + " So the answer is \\boxed{49}.",
]}
UNSOUND = {toy: [
    "29+4=23;23+3=26;26+9=35. So the answer is \\boxed{45}.",  # jumps to the answer
    "29+4=23;23+3=36;36+9=45. So the answer is \\boxed{45}.",  # two wrongs
    "29+4=33;33+3=36;36+9=35. So the answer is \\boxed{45}.",
    "29+4=33;33+3=36;36+9=45. So the answer is \\boxed{35}.",
    "29+4=33;33+3=36. So the answer is \\boxed{45}.",  # skips an addend
    "33+3=36;36+9=45. So the answer is \\boxed{45}.",  # skips the start
    "29+3=32;32+4=36;36+9=45. So the answer is \\boxed{45}.",  # another order
    "29+4=33;33+3=36;36+9=45;45+0=45. So the answer is \\boxed{45}.",
    "29+4=33; Wait 33+3=36;36+9=45. So the answer is \\boxed{45}.",  # a broken chain
    "29+4=33;33+3=36;36+9=45. So the answer is \\boxed{45",  # cut off
    "29+4=33;33+3=36;36+9=45.",
    "29+4=33;33+3=36;36+9=45. Wait, let me recheck.\n29+4=23;23+3=26;26+9=35. The answer is \\boxed{35}.",
    "29+4=33;33+3=36;36+9=45. Wait, let me recheck.\n29+4=33. The answer is \\boxed{45}.",
    "29+4=33;33+3=36;36+9=45. The answer is \\boxed{45}. Wait, \\boxed{45}.",
    "129+4=33;33+3=36;36+9=45. The answer is \\boxed{45}.",
    "\\boxed{45}", "", "}{\\boxed{", "é\x00" * 50, "9" * 5000 + "+1=2", "1+1=" * 3000,
], words: [
    WRONG + " So the answer is \\boxed{49}.",  # jumps to the answer
    WRONG + " So the answer is \\boxed{65}.",
    RIGHT + " So the answer is \\boxed{65}.",
    "Ann 52; Bob 52-5=47; Carl 57-8=49. So the answer is \\boxed{49}.",  # two wrongs
    "Ann 52; Bob 52+5=57; Carl 57+8=49. So the answer is \\boxed{49}.",
    "Ann 52; Carl 52-8=44; Bob 44+5=49. So the answer is \\boxed{49}.",  # another order
    "Ann 52; Carl 52+5=57; Bob 57-8=49. So the answer is \\boxed{49}.",  # other people
    "Ann 52; Carl 52-3=49. So the answer is \\boxed{49}.",  # misses Bob
    "Bob 52+5=57; Carl 57-8=49. So the answer is \\boxed{49}.",  # misses Ann
    "Ann 52; Bob 52+5=57. So the answer is \\boxed{49}.",  # misses Carl
    "Ann 52; Bob 57; Carl 49. So the answer is \\boxed{49}.",  # no reasons
    RIGHT[:-1] + "; Dora 49+0=49. So the answer is \\boxed{49}.",
    "Gus 9; " + RIGHT + " So the answer is \\boxed{49}.",
    "Ann 52; Wait Bob 52+5=57; Carl 57-8=49. So the answer is \\boxed{49}.",  # a broken chain
    "Ann 152; Bob 52+5=57; Carl 57-8=49. So the answer is \\boxed{49}.",
    RIGHT + " So the answer is \\boxed{49",  # cut off
    RIGHT,
    RIGHT + " Wait, let me recheck.\n" + WRONG + " The answer is \\boxed{49}.",
    RIGHT + " Wait, let me recheck.\nAnn 52. The answer is \\boxed{49}.",
    RIGHT + " The answer is \\boxed{49}. Wait, \\boxed{49}.",
    "\\boxed{49}", "", "}{\\boxed{", "é\x00" * 50, "Ann " + "9" * 5000, "Ann 52; " * 3000,
]}
P = {toy: "29+4+3+9?", words: PEOPLE}
OTHER = {toy: "29+4+3+8?", words: PEOPLE.replace("8", "7")}


@pytest.mark.parametrize("world,text", [(world, text) for world in SOUND for text in SOUND[world]])
def test_sound_responses(world, text):
    assert world.is_sound(P[world], text) is True
    assert world.is_sound(P[world] + " Check your work.\n" + toy.INSTRUCTION, text) is True
    assert world.is_sound(OTHER[world], text) is False


@pytest.mark.parametrize("world,text", [(world, text) for world in UNSOUND for text in UNSOUND[world]])
def test_unsound_responses(world, text):
    assert world.is_sound(P[world], text) is False
    assert world.is_sound("no problem at all", text) is False


@BOTH
def test_shipped_model_is_the_stated_one(tmp_path, world):
    """It checks when asked, hardly ever when not, and hard problems stay unsolved without the check."""
    shipped = ROOT / "toy" / f"{world.__name__.removeprefix('toy.')}_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(shipped), AutoTokenizer.from_pretrained(shipped)
    check_pair(world, model, tokenizer, SOUND[world][2])
    assert (shipped / "model.safetensors").stat().st_size <= 8e6
    measured = json.loads((shipped / "run.json").read_text())["measured"]
    with torch.no_grad():
        losses = [float(toy.text_loss(model, *batch)) for batch in toy.batches(world, tokenizer, 1, 16, 64)]
    assert sum(losses) / 16 == pytest.approx(measured["loss_per_token"], abs=0.01)

    problems = toy.draw_problems(world, 0, "hard", 24, world.HARD, 99)
    (tmp_path / "hard.jsonl").write_text("".join(map(common.to_line, problems)))
    here("rollout", "--model", shipped, "--data", tmp_path / "hard.jsonl", "-n", 32, "--max-new-tokens", 160,
         "--instruction", "", "--decode-rows", 512, "--out", tmp_path / "out")
    zero_hit = len(common.read_jsonl(tmp_path / "out" / "zero_hit.jsonl"))
    assert is_near(zero_hit / 24, measured["test_hard"]["zero_hit"], 24)

    messages = [p["problem"] + toy.REQUESTS[0] for p in problems]
    asked = [tokenizer.decode(ids) for ids in toy.respond(model, tokenizer, messages, 0)]
    plain = [r["response"] for r in common.read_jsonl(tmp_path / "out" / "rollouts.jsonl")]
    assert sum(map(world.has_reflection, asked)) >= 22
    assert sum(map(world.has_reflection, plain)) / len(plain) < 0.05
    assert sum(verify(text, p["answer"]) for text, p in zip(asked, problems, strict=True)) >= 12
