r"""The second toy world: word problems in which a word is misread. Made, trained and measured by sums.py's code.

A problem introduces people one after the other, each beside the one before:

    Ann has 52 apples. Bob has 5 more than Ann. Carl has 8 fewer than Bob. How many does Carl have?

and a response reasons about every person: `Ann 52; Bob 52+5=57; Carl 57-8=49. So the answer is \boxed{49}.` In the
base model's training text a first pass reads `fewer` as `more` with probability 0.8 (`Carl 57+8=65`). So, unlike the
slip of sums.py, the failure is one of comprehension: every sum that is written is right. Misreadings cannot cancel; the
number of sentences with `fewer` is the difficulty, and problems with 4 or more are almost all zero-hit at N = 32.
Self-correction is as in sums.py: 40 % of the texts carry a request to check and show a second pass that reads the
problem rightly; 0.3 % of the others show one unasked.

    python -m toy.words data --out DIR                 four .jsonl: "id", "problem", "answer", "fewer"
    python -m toy.words train --out toy/words_model     the base model, from nothing
    python -m toy.words check --model toy/words_model   measures what it does; prints one JSON object

The shipped model (run.json; 200 prompts a set, 32 samples): with 4 or more `fewer` accuracy 0.50 % and 86 % zero-hit
(90 % of the first 150 of hard.jsonl), without any 99.9 % right; unasked reflection 0.37 %. Asked to check, it starts a
second pass 98.8 % of the time, and the box is right in 94 % and the whole pass in 92 %.

Tried before: sentences in which the new person comes last (`Bob has 8 fewer than Carl`), read by their word with
probability 0.8, as people do (Lewis and Mayer, J. Educ. Psychol. 79, 1987). With numbers that have tokens of their own
after a space the loss stood at 1.7 for 230 steps, and the run was stopped. With one token a number, 2000 steps gave
93 % zero-hit, but the model had hardly learned which sentences are reversed: 84 % of them were read by the word, and so
were 95 % of the others; asked to check it was right in 7 %. So the misreading became one that a single word shows.
"""
import argparse
import random
import re
import sys

from helpers import common
from toy import sums as toy
from toy.sums import TEMPLATE, has_reflection  # noqa: F401 (part of this world too)

THIS = sys.modules[__name__]  # the world, as sums.py takes it
MISREAD = 0.80  # probability that a first pass reads `fewer` as `more`
FIRST_PASS = (MISREAD,)
RELATIONS = (2, 5)  # fewest and most relations of a problem
DIFFICULTY = "fewer"  # field of the records that says how hard a problem is
HARD = 4  # sentences with `fewer` from which a problem counts as hard
TRAINING = {"steps": 2000, "batch": 32, "lr": 2e-3}  # defaults of `train`

NAMES = ("Ann", "Bob", "Carl", "Dora", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon")
THINGS = ("apples", "books", "coins", "pears", "shells", "stamps")
RELATION = re.compile(r" ([A-Z][a-z]+) has (\d{1,9}) (more|fewer) than ([A-Z][a-z]+)\.")
PROBLEM = re.compile(rf"\s*([A-Z][a-z]+) has (\d{{1,9}}) [a-z]+\.((?:{RELATION.pattern.replace('(', '(?:')})+)"
                     r" How many does ([A-Z][a-z]+) have\?")
STEP = re.compile(r"(?<![\w+=-])([A-Z][a-z]+) (?:(\d{1,9})([+-])(\d{1,9})=)?(\d{1,9})(?![\w+=-])")
JOIN = re.compile("; ")
PHRASES = [*NAMES, *(f" {word}" for word in (*NAMES, *THINGS, "has more fewer than How many does have")), "-"]


# --- reading texts ---------------------------------------------------------------------------------------------------
def parts(problem: str) -> list[tuple[str, int]]:
    """(person, how many more than the one before) per person of a problem text, the first beside nobody; [] when it
    is not a problem. Anything after the question mark is ignored."""
    found = PROBLEM.match(problem)
    if not found:
        return []
    people = [(found[1], int(found[2]))]
    for name, n, word, before in RELATION.findall(found[3]):
        if before != people[-1][0] or name == before:
            return []
        people.append((name, int(n) if word == "more" else -int(n)))
    return people if people[-1][0] == found[4] else []


def facts(problem: str) -> dict:
    """What the record of a problem says beside its text: the gold answer and the number of sentences with `fewer`."""
    people = parts(problem)
    return {"answer": str(sum(n for _, n in people)), "fewer": sum(n < 0 for _, n in people)}


def is_sound(problem: str, response: str) -> bool:
    """Is the last pass of the response a complete, right chain over every person, in order, to the boxed answer?"""
    people, found = parts(problem), toy.passes(response, THIS)
    if not people or not found:
        return False
    chain, total = write_pass(random.Random(0), people)  # no misreading: the generator is not used
    tail = toy.TAIL.fullmatch(response, found[-1][-1].end())
    return "; ".join(m[0] for m in found[-1]) == chain and tail is not None and int(tail[1]) == total


# --- writing texts ---------------------------------------------------------------------------------------------------
def draw_problem(rng: random.Random, split: str) -> str:
    """A problem of one hash class. However it is read, all numbers stay between 1 and 99."""
    while True:
        names = rng.sample(NAMES, rng.randint(*RELATIONS) + 1)
        sizes = [rng.randint(1, 9) for _ in names[1:]]
        problem = f"{names[0]} has {rng.randint(1 + sum(sizes), 99 - sum(sizes))} {rng.choice(THINGS)}."
        for before, name, n in zip(names, names[1:], sizes):
            problem += f" {name} has {n} {rng.choice(('more', 'fewer'))} than {before}."
        problem += f" How many does {names[-1]} have?"
        if toy.split_of(problem) == split:
            return problem


def write_pass(rng: random.Random, people: list[tuple[str, int]], misread: float = 0.0) -> tuple[str, int]:
    """One pass over the people, `Ann 52; Bob 52+5=57`, and the last one's number. `fewer` is read as `more` with
    probability `misread`."""
    text, total = f"{people[0][0]} {people[0][1]}", people[0][1]
    for name, n in people[1:]:
        if n < 0 and rng.random() < misread:
            n = -n
        text += f"; {name} {total}{n:+d}={total + n}"
        total += n
    return text, total


# --- run -------------------------------------------------------------------------------------------------------------
def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    return toy.get_args(argv, THIS)


def main(args: argparse.Namespace) -> None:
    toy.main(args, THIS)


if __name__ == "__main__":
    common.run_script(get_args, main)
