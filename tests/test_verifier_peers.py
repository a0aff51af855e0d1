r"""Where math-verify, which stands on a computer algebra system, disagrees with the rows of test_verifier, and why.

A development extra: skipped without math-verify. Every disagreement is listed with the rule that decides it, so that a
new one, on either side, is looked at by a person: the test fails until it is listed, or the list is shortened.
"""

import pytest

math_verify = pytest.importorskip("math_verify", reason="the comparison needs math-verify, a development extra")

from test_verifier import ROWS, box

DISAGREEMENTS: dict[str, dict[str, list[str]]] = {  # reason -> gold -> answers; ours is the verdict of the table
    "groups of three digits are one number, whatever thin space parts them": {
        "7654321": [r"7\,654\,321", "7 654 321", r"7\ 654\ 321", r"7\;654\;321"], "32349": ["32 349"],
    },
    "a second sign is a slip, not a value": {"-8": ["-+8"]},
    "a ratio is not a fraction": {r"\frac{5}{8}": ["5:8"], "5:3": ["5/3", r"\frac53"]},
    "a rounding, or a value near the answer, is not the exact answer": {
        r"\frac{5}{8}": ["0.6250001"], "1/3": ["0.333333"],
        r"\frac{1}{7}": ["0.142857", "0.14285714", "0.142857143857"], r"\pi": ["3.14159265", "3.141592658"],
        "3.5": ["3.49999999999999"],
    },
    "mixed numbers and a point without decimals are ways to write a fraction": {
        r"-\frac{9}{4}": ["-2 1/4"], r"5\frac{2}{3}": ["5 2/3"], "-3./4": ["-3/4", "-0.75"],
        r"\frac{2469}{2}": [r"1,234\frac12"],
    },
    "a sum that could be carried out is not its value": {
        r"-\frac{9}{4}": [r"-2-\frac14"], "4": ["2+2", "3+1", "5-1", "1+1+1+1", r"\frac{3+5}{2}"],
        r"\frac{7}{6}": [r"\frac12+\frac23", "1/2+2/3"],
    },
    "two numbers side by side are not a product": {"4": ["2 2"]},
    "a decimal comma reads as a list": {"0.264": ["0,264"]},
    "the percent sign is optional": {r"12.5\%": ["12.5"]},
    "units, degrees and money signs are optional, in words and in unicode too": {
        "12": [r"\text{12 cm}", r"\text{12 square feet}", r"12~\mathrm{cm}"],
        "45": ["45°", "45 cm^2", "45 dollars", "45 meters per second"], r"60^\circ": ["60°"],
        r"1300^\circ C": ["1300", r"1300^\circ\text{C}"],
    },
    r"words after a number that change it, counted things without \text, and products with a letter are no unit": {
        "45": [r"45\text{ and }45", r"45\text{ or less}", r"45\text{ not}", r"45\text{ million}",
         r"45\text{ thousand}", r"45\text{ hundredths}", r"45\text{ dozen}", "45m", "45 apples", r"45\text{ or so}"],
    },
    "two different units, or words that differ, are two different answers": {
        r"6\text{ cm}": [r"6\text{ m}", r"6\text{ mm}", r"6\text{ cm}^2", "6 inches", r"6\text{ hours}"],
        r"30\mbox{ inches}^2": [r"30\text{ inches}", r"30\text{ cm}^2"],
        r"90\text{ miles per hour}": [r"90\text{ km/h}", r"90\text{ miles}"],
        r"60^\circ": [r"60\text{ radians}", "60'"], r"\$27.40": [r"27.40\text{ cents}"],
        r"5\text{ steps left}": [r"5\text{ steps right}"],
    },
    "e-notation and powers of ten are the same numbers": {
        "4.2e9": [r"4.2\times10^{9}", r"4.2\cdot10^9", "4.2E+9", "4.2 * 10^9", "4200000000", "4,200,000,000",
         r"42\times10^8", r"4.2 \times 10^(9)"],
        "2.5e-3": ["0.0025", r"2.5\times10^{-3}", r"\frac{1}{400}", r"2.5 \times 10^-3"],
        "1e-2": ["10^{-2}", "0.01", r"1\times10^{-2}"], r"6.02\times 10^{23}": ["6.02e23", "602000000000000000000000"],
    },
    "upright or unicode letters are the same symbols": {
        r"3\sqrt{5}": ["3√5"], "2-5i": [r"2-5\mathrm{i}"], "e^2": [r"\mathrm{e}^2"],
    },
    "a power beyond the bit budget equals only the same text": {"2^{1000000}": ["4^{500000}"]},
    "the real cube root": {"-2": [r"\sqrt[3]{-8}"]},
    "unicode and sized brackets are the same signs": {
        "(3,-4)": [r"\bigl(3,-4\bigr)"], r"(-\infty,4]": ["(-∞, 4]"], r"\infty": ["∞"],
        r"(45^\circ, 60^\circ)": ["(45°, 60°)"], r"(-\infty,1)\cup(4,\infty)": ["(-∞,1)∪(4,∞)"],
    },
    "brackets say what an answer is: tuple, interval, set and list differ": {
        "(3,-4)": ["3,-4", "[3,-4]", r"\{3,-4\}"], "2,-5": ["(2,-5)", "[2,-5]"], r"\{1,2,3\}": ["(1,2,3)", "[1,2,3]"],
        "(1,2),(3,4)": ["((1,2),(3,4))"],
    },
    "lists are compared as multisets, so a padded list is another list": {
        "2,-5": ["2,-5,-5"], r"\{1,2,3\}": ["1,2,2,3"], "5": ["5,5"], "1,1,2": ["1,2,2", "1.0,2.0,2", "1,2"],
    },
    "two names of the empty set": {r"\emptyset": [r"\varnothing"]},
    "case and a full stop do not change a word": {"(C)": ["C."], "True": ["true"]},
    "words are not anagrams": {"no": ["on"]},
    "the base is part of the number": {"342_7": ["342", "342_8"]},
    "a clock time is text: a.m. is not p.m., and dots and case do not count": {
        r"4:30\text{ p.m.}": [r"\text{4:30 p.m.}", "4:30 PM", r"4:30\text{ a.m.}", "4:30am"],
    },
    "letters of different case are different variables": {"x^2+4x+3": ["x^2+4X+3"]},
    "y= and f(x)= both name the function": {"f(n)=n": ["y=n"], "y = 3x - 1": ["f(x)=3x-1"]},
    "an equation or relation is not one of its sides, nor another equation that follows from it": {
        "y = 3x - 1": ["3x-y=1", "2y=6x-2"], "x=9": ["9=x+0"], "9": ["x+y=9", "2x=9", "x+1=9", r"\ge 9"],
        "2a + 3b = 7": ["2a+3b-7=0", "4a+6b=14"], "MR=MC": ["MC"],
    },
    "text that no rule understands equals only itself": {
        r"x \leq 3": [r"(-\infty,3]"], r"\int_0^1 x\,dx": [r"\frac12"],
    },
}


def theirs(answer: str, gold: str) -> bool:
    return bool(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(box(answer))))


def test_every_disagreement_is_listed_with_its_reason():
    listed = {(gold, answer) for golds in DISAGREEMENTS.values() for gold in golds for answer in golds[gold]}
    found = {(gold, answer) for _, gold, answer, right in ROWS if theirs(answer, gold) is not right}
    assert found - listed == set(), "not listed"
    assert listed - found == set(), "listed, but both agree"
