r"""Properties of the verifier over generated answers, and over the golds of public problem sets where they are at hand.

The problem sets are looked for in the folder named by LATENTREVISE_DATA, by default ../shared/data beside the
repository: JSONL files with a field `answer`.
"""
import json
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_verifier import box

from verifier import extract_boxed, verify

DATA = Path(os.environ.get("LATENTREVISE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SETS = {"math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "minerva": 272, "olympiadbench": 674, "gsm8k": 1319,
        "dapo14k": 14_116}
some = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
few = settings(some, max_examples=25)


# --- generated answers ------------------------------------------------------------------------------------------------
integers = st.one_of(st.integers(-200, 200), st.integers(-(10**30), 10**30))
fractions = st.builds(Fraction, integers, st.integers(1, 5000))


def latex(value: Fraction) -> str:
    top, bottom = abs(value.numerator), value.denominator
    return ("-" if value < 0 else "") + (str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}")


@st.composite
def spelled(draw, values=fractions) -> tuple[Fraction, str]:
    """A rational number and one of the ways to write it."""
    value = draw(values)
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    k = draw(st.integers(1, 9))
    ways = [latex(value), f"{sign}{top}/{bottom}", rf"\dfrac{{{sign}{top * k}}}{{{bottom * k}}}",
        rf"\left({latex(value)}\right)"]
    if bottom == 1:
        ways += [f"{sign}{top:,}", f"{sign}{top}.0", f"{sign}{top:,}".replace(",", "{,}"), f"{sign}0{top}",
            sign + f"{top:,}".replace(",", r"\,")]
    elif top > bottom:
        ways += [rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}",
            f"{sign}{top // bottom} {top % bottom}/{bottom}"]
    return value, draw(st.sampled_from(ways))


numbers = spelled().map(lambda pair: pair[1])
radicals = st.builds(lambda a, b, c: rf"{a}+{b}\sqrt{{{c}}}", st.integers(-9, 9), st.integers(1, 9), st.integers(2, 99))
polynomials = st.builds(lambda a, b, c, x: rf"{a}{x}^2-{b}{x}+{c}", *[st.integers(2, 99)] * 3, st.sampled_from("xyznk"))
words = st.sampled_from(["Monday", r"\text{even}", "(B)", r"\text{(D)}", "No solution", r"\varnothing"])
leaves = st.one_of(numbers, radicals, polynomials, words)
lists = st.lists(st.one_of(fractions.map(latex), radicals), min_size=2, max_size=5, unique=True).map(", ".join)
tuples = st.lists(fractions.map(latex), min_size=2, max_size=4).map(lambda parts: f"({', '.join(parts)})")
golds = st.one_of(leaves, lists, tuples, st.builds(r"\{{{}\}}".format, lists), st.builds(r"{}\cup[7,\infty)".format,
    tuples))


@some
@given(golds)
def test_an_answer_is_its_own_gold(gold):
    assert verify(box(gold), gold) and verify(box(gold), f"${gold}$") and verify(box(f" {gold} "), box(gold))


@some
@given(spelled(), st.data())
def test_every_spelling_of_a_number_is_right_and_the_rule_is_symmetric(first, data):
    value, text = first
    _, other = data.draw(spelled(st.just(value)))
    assert verify(box(text), other) and verify(box(other), text)


@some
@given(spelled(), spelled())
def test_numbers_are_equal_exactly_when_their_values_are(first, second):
    assert verify(box(first[1]), second[1]) is (first[0] == second[0]) is verify(box(second[1]), first[1])


@some
@given(integers, st.integers(-3, 3))
def test_off_by_one_is_wrong_at_any_size(number, offset):
    assert verify(box(f"{number + offset:,}"), str(number)) is (offset == 0)


@some
@given(st.one_of(lists, tuples, radicals, polynomials, numbers), golds)
def test_the_verdict_does_not_depend_on_style(gold, answer):
    verdict = verify(box(answer), gold)
    spaced = re.sub(r"(?<!\\)([({])|(?<!\\)([)}])", r"\1 \2", answer) if r"\text" not in answer else answer
    for restyled in (
        answer.replace(r"\frac", r"\dfrac"), answer.replace(r"\frac", r"\tfrac"), spaced, f"{answer}.",
        answer.replace("(", r"\left(").replace(")", r"\right)"), answer.replace("+", " + ").replace("=", " = "),
        f"\n {answer} \t", f"${answer}$", rf"\({answer}\)", rf"\displaystyle {answer}",
    ):  # fmt: skip
        assert verify(box(restyled), gold) is verdict, restyled


@few
@given(golds, golds, st.sampled_from(["a $ b ", "{", "}", r"\boxed{1} ", "so ", r"\frac{", "\n", r"\begin{pmatrix}"]))
def test_the_verdict_does_not_depend_on_what_precedes_the_box(gold, answer, filler):
    verdict = verify(box(answer), gold)
    assert verify(filler * (100_000 // len(filler)) + box(answer), gold) is verdict
    assert verify("<think>" + box(gold) + "</think>" + box(answer), gold) is verdict


@some
@given(st.lists(fractions, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_are_equal_in_any_order_and_tuples_are_not(members, random):
    shuffled = members[:]
    random.shuffle(shuffled)
    gold, answer = (", ".join(map(latex, values)) for values in (members, shuffled))
    assert verify(box(answer), gold) and verify(box(rf"\{{{answer}\}}"), gold)
    assert verify(box(f"({answer})"), f"({gold})") is (shuffled == members)
    assert not verify(box(f"({gold})"), gold)
    assert not verify(box(", ".join(map(latex, members[1:]))), gold)
    assert not verify(box(gold + f", {latex(members[0])}"), gold)


PIECES = r"""\frac \sqrt \text{ \left( \right) \{ \} { } ( ) [ ] , ; ^ _ + - * / ! = $ % & \\ \pm \cup \in \le \pi
\infty \boxed{ \begin{pmatrix} \end{pmatrix} 0 1 23 4,567 .5 1e9 x y i e cm \degree \text{and} and or : ~ '
\sin \log \binom \approx"""
pieces = st.sampled_from([" ", *PIECES.split()])
soup = st.one_of(st.text(max_size=200), st.lists(pieces, max_size=60).map("".join), st.lists(pieces,
    max_size=60).map(" ".join))


@settings(some, max_examples=600)
@given(soup, soup)
def test_no_text_raises(answer, gold):
    for response in (answer, box(answer), r"\boxed{" + answer):
        for reference in (gold, answer, "5"):
            assert verify(response, reference) in (True, False)
    assert extract_boxed(answer) is None or extract_boxed(answer).strip()


@few
@given(st.lists(st.one_of(st.characters(), pieces), min_size=20, max_size=200), st.integers(20, 50))
def test_no_long_text_raises_or_hangs(characters, times):
    text = ("".join(characters) * times)[:10_000]
    start = time.monotonic()
    for response in (text, r"\boxed{" + text + "}", text + r"\boxed{5}"):
        verify(response, "5")
        verify(r"\boxed{5}", response)
    assert time.monotonic() - start < 2  # a hang, not a benchmark


@pytest.mark.parametrize("name", SETS)
def test_every_gold_is_right_against_itself(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set LATENTREVISE_DATA to a folder with {name}.jsonl")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf8").splitlines()]
    assert len(answers) == SETS[name]
    bare = lambda gold: re.sub(r"(?<!\\)\$", "", gold)
    assert not [gold for gold in answers if not (verify(box(gold), gold) and verify(box(bare(gold)), gold))]
    assert not [gold for gold in answers if verify(box(f"{gold}, 31415926"), gold) or verify(box("31415926"), gold)]
