"""The second toy world: its texts misread and never miscount, its checker reads every person, its model is stuck."""
import itertools
import json
import re

import pytest
from conftest import ROOT
from test_toy import check_pair, examples_of, sets_of, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from helpers import common
from toy import sums as toy
from toy import words as toy_words
from verifier import verify

SHIPPED = ROOT / "toy/words_model"


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


def steps(chain: list[re.Match]) -> list[tuple[str, int]]:
    return [(m[1], int(m[5])) for m in chain]


# --- the texts -------------------------------------------------------------------------------------------------------
def test_first_pass_misreads_fewer_at_the_stated_rate_and_miscounts_never():
    misread = []
    for message, text in examples_of(toy_words):
        before, right = None, list(solve(message.split("?")[0] + "?").items())
        for i, m in enumerate(toy.passes(text, toy_words)[0]):
            assert m[1] == right[i][0]
            if i:
                difference = right[i][1] - right[i - 1][1]
                assert int(m[2]) == before and int(m[5]) == before + int(m[3] + m[4])  # what is written is right
                assert int(m[4]) == abs(difference)
                assert m[3] == "+" or difference < 0  # `more` is never misread
                misread += [m[3] == "+"] if difference < 0 else []
            before = int(m[5])
    assert len(misread) > 2000
    rate = sum(misread) / len(misread)
    assert abs(rate - toy_words.MISREAD) < 4 * (toy_words.MISREAD * (1 - toy_words.MISREAD) / len(misread)) ** 0.5


def test_the_second_pass_that_a_request_asks_for_is_right():
    for message, text in examples_of(toy_words):
        if any(r in message for r in toy.REQUESTS):
            assert steps(toy.passes(text, toy_words)[1]) == list(solve(message.split("?")[0] + "?").items())


# --- the problem sets ------------------------------------------------------------------------------------------------
def test_sets_are_right():
    for r in itertools.chain(*sets_of(toy_words).values()):
        assert r["answer"] == str(list(solve(r["problem"]).values())[-1])
        assert r["fewer"] == r["problem"].count(" fewer ")


def test_however_it_is_read_numbers_fit_and_only_the_right_reading_has_the_answer():
    for r in sets_of(toy_words)["train"][:300] + sets_of(toy_words)["hard"][:100]:
        people = toy_words.parts(r["problem"])
        for wrong in itertools.product(*[[False, True] if n < 0 else [False] for _, n in people]):
            sums = list(itertools.accumulate(-n if w else n for (_, n), w in zip(people, wrong, strict=True)))
            assert all(1 <= x <= 99 for x in sums)
            assert (str(sums[-1]) == r["answer"]) == (not any(wrong))


def test_names_numbers_and_the_template_are_whole_tokens():
    tokenizer = tokenizer_of(toy_words)

    def pieces(s):
        return tokenizer.convert_ids_to_tokens(tokenizer(s)["input_ids"])

    assert pieces("Ann 52; Bob 52-5=47") == ["Ann", " ", "52", ";", " Bob", " ", "52", "-", "5", "=", "47"]
    assert pieces(" Bob has 5 fewer than Ann.") == [" Bob", " has", " ", "5", " fewer", " than", " Ann", "."]
    assert pieces(toy_words.TEMPLATE + "47}.") == [" So", " the", " answer", " is", " \\boxed{", "47", "}."]


# --- reading responses -----------------------------------------------------------------------------------------------
P = "Ann has 52 apples. Bob has 5 more than Ann. Carl has 8 fewer than Bob. How many does Carl have?"
RIGHT = "Ann 52; Bob 52+5=57; Carl 57-8=49."
WRONG = "Ann 52; Bob 52+5=57; Carl 57+8=65."
SOUND = [
    RIGHT + " So the answer is \\boxed{49}.",
    RIGHT + "\nBased on my current reasoning process, the final answer is \\boxed{49}.",
    WRONG + " So it is \\boxed{65}. Hmm.\n" + RIGHT + " The answer is \\boxed{49}.",
    WRONG + " But let me make sure.\n" + RIGHT + " The total is \\boxed{49}.",
    "Ann 52; Bob 52+ Wait Gus =apples.\n" + RIGHT + " So the answer is \\boxed{49}.",
]
UNSOUND = [
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
]


@pytest.mark.parametrize("text", SOUND)
def test_sound_responses(text):
    assert toy_words.is_sound(P, text) is True
    assert toy_words.is_sound(P + " Check your work.\n" + toy.INSTRUCTION, text) is True
    assert toy_words.is_sound(P.replace("8", "7"), text) is False


@pytest.mark.parametrize("text", UNSOUND)
def test_unsound_responses(text):
    assert toy_words.is_sound(P, text) is False
    assert toy_words.is_sound("no problem at all", text) is False


@pytest.mark.parametrize("problem", [
    "", "Ann has 52 apples. How many does Ann have?", P.replace("does Carl", "does Bob"),
    P.replace("Bob has 5", "Dora has 5"), P.replace("than Ann", "than Bob"), P.replace("52", "x"),
    P.replace(" apples", ""), P[:-1]])
def test_other_texts_are_not_problems(problem):
    assert toy_words.parts(problem) == []


# --- the base model --------------------------------------------------------------------------------------------------
def test_shipped_model_is_stuck_on_hard_problems_and_rereads_when_asked(tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    check_pair(toy_words, model, tokenizer, SOUND[2])
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8e6
    measured = json.loads((SHIPPED / "run.json").read_text())["measured"]
    assert 0.85 <= measured["test_hard"]["zero_hit"] <= 0.97

    problems = toy.draw_problems(toy_words, 0, "hard", 24, toy_words.HARD, 99)
    (tmp_path / "hard.jsonl").write_text("".join(map(common.to_line, problems)))
    rollout.main(rollout.get_args([
        "--model", str(SHIPPED), "--data", str(tmp_path / "hard.jsonl"), "-n", "32", "--max-new-tokens", "160",
        "--instruction", "", "--decode-rows", "512", "--out", str(tmp_path / "out")]))
    zero_hit = len(common.read_jsonl(tmp_path / "out" / "zero_hit.jsonl"))
    share = measured["test_hard"]["zero_hit"]
    assert abs(zero_hit / 24 - share) < 4 * (share * (1 - share) / 24) ** 0.5

    messages = [p["problem"] + toy.REQUESTS[0] for p in problems]
    asked = [tokenizer.decode(ids) for ids in toy.respond(model, tokenizer, messages, 0)]
    plain = [r["response"] for r in common.read_jsonl(tmp_path / "out" / "rollouts.jsonl")]
    assert sum(map(toy_words.has_reflection, asked)) >= 22
    assert sum(map(toy_words.has_reflection, plain)) / len(plain) < 0.05
    assert sum(verify(text, p["answer"]) for text, p in zip(asked, problems, strict=True)) >= 12
