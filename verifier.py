r"""Is the last boxed answer of a response the gold answer? Without a computer algebra system.

    verify(r"... so \boxed{\frac12}", "0.5") -> True

The reward of reinforcement learning is only as good as this function, so every rule refuses when in
doubt: a wrong acceptance is found and exploited by training, a wrong refusal costs one sample.
Read from top to bottom: 1. take the box, 2. one spelling for every way of writing, 3. arithmetic,
4. shapes (lists, tuples, unions, matrices), 5. comparison. Whatever no rule understands is right
only as the same text.

Contract: a plain bool for any two strings (None gives False); never raises, prints, evaluates text
or starts anything; keeps no state, so any thread may call it. Work is bounded by the `MAX_`
constants, not by a clock.

Command line (exit status 0 right, 1 wrong, 2 bad usage):
    python verifier.py --gold 1/2 'text with \boxed{\frac12}'
"""

import argparse
import math
import re
import zlib
from cmath import acos, asin, atan, cos, cosh, exp, isfinite, log, pi, sin, sinh, tan, tanh
from collections import Counter
from fractions import Fraction
from itertools import product
from typing import NamedTuple

Number = Fraction | complex

MAX_BOX = 20_000  # characters in a box; anything longer is not an answer
MAX_PARSED = 1_000  # characters read as mathematics; longer answers are compared as text
MAX_DEPTH = 30  # nesting of brackets and commands
MAX_BITS = 16_000  # size of an exact number; larger powers and factorials are compared as text
MAX_DIGITS = 4_000  # digits or decimal exponent of one literal; int() itself refuses over 4,300
MAX_NAMES = 8  # variables in an expression that is compared by value
MAX_UNIT = 100  # characters of a unit
MAX_UNPAIRED = 40  # members of a list that are not the same text as another one
POINTS = 3  # values given to the variables of an expression
LONG_DECIMAL = 9  # decimals after which a decimal number stands for the exact value it agrees with
CLOSE = 1e-9  # relative tolerance between two closed forms, both computed in doubles
CLOSE_TO_EXACT = 1e-12  # the same where one is an exact rational: rounding errors alone


# ---- 1. The box ----------------------------------------------------------------------------------
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*((?:\\[A-Za-z]+|[^\s{}$\\])(?:\\[A-Za-z]+|[^\s$\\}])*)")


def extract_boxed(response: str) -> str | None:
    r"""Content of the last `\boxed` or `\fbox` after the last `</think>`; None if there is none, or
    if it is empty or never closes (a cut-off response). Braces are balanced; `\{`, `\}` do not
    count. Of nested boxes the innermost counts. `\boxed 5` is 5."""
    text = response[response.rfind("</think>") + 1 :]
    start, command = max((text.rfind(r"\boxed"), r"\boxed"), (text.rfind(r"\fbox"), r"\fbox"))
    if start < 0 or text[start + len(command) : start + len(command) + 1].isalpha():
        return None
    text = text[start + len(command) : start + MAX_BOX].lstrip()
    if not text.startswith("{"):
        bare = _BARE_BOX.match(text)
        return bare[1] if bare else None
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[1 : brace.start()].strip() or None
    return None


# ---- 2. One spelling for every way of writing ----------------------------------------------------
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "＋": "+", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/",
     "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ",
     "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∈": r"\in ", "∅": r"\emptyset ",
     "°": r"\degree ", "²": "^2", "³": "^3", "½": r"\frac12 ",
     "，": ",", "；": ";", "（": "(", "）": ")", "：": ":",
     "\u2032": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "~": " "})

# LaTeX commands that are drawn the same, mean the same here, or only move things about. One pass
# over whole commands, so that the row break `\\` is never taken for a backslash before something.
_SPELLING = {
    r"\dollar": r"\$", r"\degree": r"\degree ", "%": r"\%", "*": r"\cdot \times \ast",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\emptyset": r"\varnothing",
    r"\le": r"\leq \leqslant", r"\ge": r"\geq \geqslant", r"\ne": r"\neq", "/": r"\div",
    ":": r"\colon", "<": r"\lt", ">": r"\gt", r"\{": r"\lbrace", r"\}": r"\rbrace",
    "'": r"\prime", r"\arcsin": r"\asin", r"\arctan": r"\atan",
    r"\text": r"\textbf \textit \textrm \textnormal \texttt \mathrm \mathbf \mathit \mathsf "
              r"\mathtt \mbox \hbox \operatorname \bf \bm \boldsymbol \rm",
    " ": r"\, \; \: \> \  \quad \qquad \enspace \thinspace",
    "": r"\! \left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr "
        r"\( \) \[ \] \displaystyle \textstyle \limits"}
_SAME_COMMAND = {old: new for new, olds in _SPELLING.items()
                 for old in olds.replace("\\ ", "").split()} | {"\\ ": " "}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
# Thousands marks that can be nothing else: 1{,}234  1,\!234  1\,234  1 234, the same throughout
_GROUPS = re.compile(
    r"(?<![0-9.,])[0-9]{1,3}(?P<mark>\{,\}|, ?\\! ?| ?\\[,; ] ?| )[0-9]{3}"
    r"(?:(?P=mark)[0-9]{3})*(?!(?: *[/,])? *[0-9])")
_TEXT = re.compile(r"(?P<before>[0-9})/] ?)?\\text ?\{(?P<words>(?:[^{}]|\{[^{}]*\})*)\}")
_REWRITES = [  # applied in order, each on the output of the one before
    (re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))"), r"\\degree "),  # 45^{\circ}
    (re.compile(r"\^ ?\{ ?((?:' ?)+)\}|\^ ?(?=')"), r"\1"),  # x^{\prime} is x'
    (re.compile(r"' (?=')"), "'"),
    # v^2_0 is v_0^2
    (re.compile(r"(\^ ?(?:\{[^{}]*\}|[A-Za-z0-9])) ?(_ ?(?:\{[^{}]*\}|[A-Za-z0-9]))"), r"\2\1"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    # typed without a backslash
    (re.compile(r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|exp|pi)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![0-9A-Za-z})\]]) ?\+ ?(?=\\infty)"), ""),  # +\infty
    (re.compile(r"\{,\}"), ","),
    (re.compile(r" +"), " ")]
# One-letter units count only in upright type after a number: 5\mathrm{m}, 5\text{ m/s}
_LETTER_UNITS = re.compile(r"[mgshNJWVKL](?:[ /]*[mgsh]| ?\^ ?\{?-?[0-9]\}?)*")


def _plain_text(match: re.Match) -> str:
    r"""`\text{..}`: keep words (lower case, for units and word answers), unwrap mathematics."""
    words, before = " ".join(match["words"].split()), match["before"] or ""
    if words in _FUNCTIONS:
        return rf"{before}\{words} "
    if measure := re.fullmatch(r"(-?[0-9][0-9.,/]*) ([A-Za-z].*)", words):  # \text{5 cm}
        return rf"{before} {measure[1]} \text{{{re.sub('[{}]', '', measure[2]).lower()}}}"
    if (before and _LETTER_UNITS.fullmatch(words)) or re.search("[A-Za-z]{2}", words):
        return rf"{before}\text{{{re.sub('[{}]', '', words).lower()}}}"
    return f"{before} {words}"


def _clean(text: str) -> str:
    """Spell an answer in one way: no dollars or spacing commands, words in lower case."""
    text = " ".join(text.translate(_UNICODE).split())
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # doubly escaped LaTeX: \\sqrt
    text = _GROUPS.sub(lambda match: re.sub("[^0-9]", "", match[0]), text)
    text = _COMMAND.sub(lambda match: _SAME_COMMAND.get(match[0], match[0]), text).replace("$", "")
    text = _TEXT.sub(_plain_text, text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip().removesuffix(".").strip()


_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|(?<=[0-9]) (?=[0-9]))| ")


def _canonical(text: str) -> str:
    r"""Without the braces and spaces that change nothing: `1 2` is not `12`."""
    return _SPACE.sub(r"\1", re.sub(r"(?<=[\^_]) ?\{ ?([A-Za-z0-9]) ?\}", r"\1", text))


# ---- 3. Arithmetic: exact rationals where possible, else doubles ---------------------------------
# Variables have fixed pseudo-random values, at several points.
_FUNCTIONS = {
    "sin": sin, "cos": cos, "tan": tan, "sinh": sinh, "cosh": cosh, "tanh": tanh, "exp": exp,
    "ln": log, "log": log,
    "arcsin": asin, "arccos": acos, "arctan": atan,
    "cot": lambda x: 1 / tan(x), "sec": lambda x: 1 / cos(x), "csc": lambda x: 1 / sin(x)}
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|"
    "rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|"
    "Omega|hbar|ell|angle")
_LETTER = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![A-Za-z]))"
_SYMBOL = (  # x, \alpha, \dot{x}, x_0, x_{max}, x'
    rf"(?:\\(?:d?dot|hat|bar|vec|tilde) ?(?:\{{ ?{_LETTER} ?\}}|{_LETTER})|{_LETTER})"
    r"(?: ?_ ?(?:\{(?:[^{}]|\{[^{}]*\})*\}|[A-Za-z0-9]|\\[A-Za-z]+))?'*")
# A number, as one token: 12, 1,234.5, 3., .5, 6.02e23
_NUMBER = re.compile(
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?")
_TOKEN = re.compile(
    rf" ?(?:(?:{_NUMBER.pattern})|(?P<word>[A-Za-z]{{4}})"
    rf"|(?P<name>{_SYMBOL}(?:\((?:{_SYMBOL}|[0-9]+)\))?)"
    r"|\\[A-Za-z]+|[^ ])")
# A whole number right before a fraction of whole numbers, not the end of a number or an exponent
_MIXED = re.compile(
    r"(?<![0-9.,A-Za-z})^_/])(?<![0-9.,)}] )([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+) ?"
    r"(?:\\frac ?(?:\{ ?([0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))"
    r"|(?<= )([0-9]+) ?/ ?([0-9]+))")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _improper(match: re.Match) -> str:
    r"""Rule: a whole number before a proper fraction is added: 3\frac12 and 3 1/2 are 7/2."""
    whole, top, bottom = (int(group.replace(",", "")) for group in match.groups() if group)
    return f"({whole * bottom + top}/{bottom})" if 0 < top < bottom else "?"


def evaluate(text: str) -> tuple[frozenset[str], bool, list[Number]]:
    """The variables of an expression, whether it adds, and its value at each point (or one). Raises
    ValueError for what is no expression, ArithmeticError for no value within the bounds."""
    tokens = []
    for match in _TOKEN.finditer(_MIXED.sub(_improper, text)):
        if match["word"]:
            raise ValueError("four letters in a row are a word, not a product of variables")
        tokens.append(match[0].replace(" ", "") if match["name"] else match[0].strip())
    first = _Arithmetic(tokens, 0)
    values = [first.run()]
    if first.names:
        values += [_Arithmetic(tokens, point).run() for point in range(1, POINTS)]
    return frozenset(first.names), first.adds, values


class _Arithmetic:
    """Recursive descent: a sum of products of powers of atoms, evaluated while it is read. Two
    numbers side by side, a second sign, an empty argument and every unknown sign are errors."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.rest, self.point, self.depth = tokens[::-1], point, 0  # the next token is the last
        self.names: set[str] = set()
        self.adds = False  # a binary plus or minus was met
        self.after_power = False  # the last factor had an exponent, so a number may follow: 2^6 3^5

    def run(self) -> Number:
        value = self.sum()
        if self.rest or len(self.names) > MAX_NAMES:
            raise ValueError("not an expression")
        return value

    def take(self, *wanted: str) -> str:
        """The next token if it is one of these, else nothing."""
        return self.rest.pop() if self.rest and self.rest[-1] in wanted else ""

    def sum(self) -> Number:
        value = -self.product() if self.take("+", "-") == "-" else self.product()
        while sign := self.take("+", "-"):
            self.adds = True
            value = _bounded(value + self.product() if sign == "+" else value - self.product())
        return value

    def product(self) -> Number:
        value = self.power()
        while True:
            if operator := self.take("*", "/"):
                value = _bounded(value * self.power() if operator == "*" else value / self.power())
            elif self.factor_follows():
                value = _bounded(value * self.power())
            else:
                return value

    def factor_follows(self) -> bool:
        token = self.rest[-1] if self.rest else ")"
        return token[0] not in ")]}+-*/^!" and (self.after_power or not _NUMBER.match(token))

    def power(self) -> Number:
        value, self.after_power = self.atom(), False
        while mark := self.take("!", "^"):
            if mark == "!":
                value = Fraction(math.factorial(_small(value)))
            elif self.after_power:
                raise ValueError("two exponents")
            else:  # 2^10 means 2^{10} and 2^-1 means 2^{-1}, as people type them
                value = _power(value, -self.atom() if self.take("-") else self.atom())
                self.after_power = True
        return value

    def atom(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        value = self.value_of(self.rest.pop() if self.rest else "")
        self.depth -= 1
        return value

    def value_of(self, token: str) -> Number:
        if token in _CLOSING:
            value = self.sum()
            if not self.take(_CLOSING[token]):
                raise ValueError("brackets do not match")
            return value
        if number := _NUMBER.fullmatch(token):
            return _literal(number)
        command = token[1:] if token.startswith("\\") else ""
        if command == "pi":
            return complex(pi)
        if command == "frac":
            return _bounded(self.argument() / self.argument())
        if command == "binom":
            return Fraction(math.comb(_small(self.argument()), _small(self.argument())))
        if command == "sqrt":
            index = self.atom() if self.rest and self.rest[-1] == "[" else 2
            return _power(self.argument(), 1 / Fraction(_small(index)))
        if command in _FUNCTIONS:
            return self.function(command)
        return self.variable(token)

    def argument(self) -> Number:
        r"""One LaTeX argument: a group, or the next atom, which is a single digit in \frac12."""
        if self.rest and self.rest[-1].isdigit() and len(self.rest[-1]) > 1:
            digits = self.rest.pop()
            self.rest += [digits[1:], digits[0]]
        return self.atom()

    def function(self, name: str) -> Number:
        r"""\sin x, \sin 2t, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 8, \log x."""
        apply, exponent, base = _FUNCTIONS[name], 1, 1
        if name == "log":  # a base nobody states is some number: \log and \ln do not agree
            base = log(complex(self.argument() if self.take("_") else variable("log", self.point)))
        if self.take("^"):
            exponent = self.atom()
            if exponent == -1:
                apply, exponent = _FUNCTIONS["arc" + name], 1
        if self.rest and self.rest[-1] in _CLOSING:
            value = self.atom()
        else:  # the argument is the run of factors up to the next sign, slash or function
            value = self.power()
            while self.factor_follows() and self.rest[-1][1:] not in _FUNCTIONS:
                value = value * self.power()
        value = _bounded(apply(complex(value)) / base)
        return value if exponent == 1 else _power(value, exponent)

    def variable(self, token: str) -> Number:
        """e and i are constants; any other symbol is a variable; so is x(t) as a whole."""
        if token in ("e", "i"):
            return complex(math.e) if token == "e" else 1j
        symbol = _TOKEN.fullmatch(token)
        if not symbol or not symbol["name"]:
            raise ValueError("not an expression")
        name = re.sub("[{}]", "", token)
        self.names.add(name)
        return variable(name, self.point)


def variable(name: str, point: int) -> Fraction:
    """Value of a variable at a point: a rational between 0.6 and 2.6, a function of these two."""
    return Fraction(300 + zlib.crc32(f"{point}{name}".encode("utf8", "replace")) % 997, 499)


def _bounded(value: Number) -> Number:
    """Refuse huge exact numbers, and doubles that overflowed or are not a number."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
            raise OverflowError("exact number too large")
    elif not isfinite(value):
        raise OverflowError("not finite")
    return value


def _literal(number: re.Match) -> Fraction:
    digits, power = number[1].replace(",", ""), number[2] or "0"
    if len(digits) > MAX_DIGITS or len(power) > 6 or abs(int(power)) > MAX_DIGITS:
        raise OverflowError("literal too long")
    return Fraction(digits) * Fraction(10) ** int(power)


def _small(value: Number) -> int:
    if not isinstance(value, int | Fraction) or value != int(value) or not 0 <= value <= 1000:
        raise ValueError("not a small whole number")
    return int(value)


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent: exact for whole exponents within MAX_BITS and for exact roots."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        top, index = exponent.numerator, exponent.denominator
        if base < 0 and index % 2 and index > 1:  # the real root of a negative number
            return _power(-base, exponent) * (-1) ** (top % 2)
        roots = [_exact_root(part, index) for part in (base.numerator, base.denominator)]
        if None not in roots:
            bits = abs(top) * sum(root.bit_length() for root in roots)
            if bits > MAX_BITS or (base == 0 and top <= 0):
                raise OverflowError("power over the bit budget, or of zero")
            return Fraction(*roots) ** top
    value = _bounded(complex(base) ** complex(exponent))
    if value == 0 and base != 0:
        raise OverflowError("underflow")
    return value


def _exact_root(number: int, index: int) -> int | None:
    if index == 1 or number in (0, 1):
        return number
    if number < 0 or index > 64 or number.bit_length() > 1000:
        return None
    root = math.isqrt(number) if index == 2 else round(number ** (1 / index))
    return root if root**index == number else None


# ---- 4. Shapes: what an answer is made of --------------------------------------------------------
class Answer(NamedTuple):
    """One answer, or one part of it. `text` decides where no other rule applies."""

    kind: str  # "list" and "union": order free; "row": ordered; "leaf"
    text: str
    label: str = ""  # x of x=5, f(x) of f(x)=2x, (x,y) of (x,y)=(1,2)
    brackets: str = ""  # of a row: "()", "[)", ..., "=" for the sides of an equation, "matrix 2x3"
    parts: tuple["Answer", ...] = ()
    values: tuple[Number, ...] = ()  # of an expression, at each point; one if it has no variable
    names: frozenset[str] = frozenset()  # its variables
    adds: bool = False  # it holds a sum that could be carried out
    unit: str = ""  # "%", "cm^2", "m/s"; "?edges" for a counting noun; "" for none
    decimals: int = 0  # digits after the point, if the leaf is one decimal number


# Units of measurement: name, then the ways to write it (plural -s is understood).
_UNITS = """% percent percentage pct|deg degree|rad radian|$ dollar usd|cent|euro
|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre
|in inch inches|ft foot feet|yd yard|mi mile|mi/h mph|kg kilogram|g gram|mg milligram|lb pound
|oz ounce|ton|l liter litre|ml milliliter|gal gallon|s sec second|ms millisecond|min minute
|h hr hour|day|week|month|yr year|j joule|n newton|w watt|kw kilowatt|v volt|k kelvin
|c celsius|f fahrenheit|hz hertz|pa pascal|ev|mol mole|arcsec"""
_UNIT_OF = {word: line.split()[0] for line in _UNITS.split("|") for word in line.split()}
_UNIT_OF |= {word + "s": unit for word, unit in _UNIT_OF.items() if len(word) > 1}
# Words after a number that change what it says: 5 or more, 5 million, 5 thirds.
_NOT_A_UNIT = re.compile(
    r"\b(?:or|and|not?|nor|but|if|when|where|unless|except|mod(?:ulo)?|base|more|less|fewer|most|"
    r"least|about|between|from|to|than|hal(?:f|ves)|thirds?|quarters?|twice|plus|minus|squared|all|"
    r"cubed|(?:fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|over|into|none|point|one|two|three|"
    r"four|five|six|seven|eight|nine|ten|(?:hundred|thousand|(?:m|b|tr)illion|dozen)s?)\b")
# Bare units are safe without \text; shorter ones (m, s, mg, in) could be products of variables.
_BARE_UNITS = [word for word in _UNIT_OF if len(word) > 2 or word in ("cm", "km", "kg", "ft", "lb")]
_BARE_UNIT = rf"(?<![A-Za-z\\])(?:units?|per|square|sq|cubic|{'|'.join(_BARE_UNITS)})(?![A-Za-z])"
_UNIT_TAIL = re.compile(
    rf"(?<=[^ ]) ?((?:(?:%|''|\\degree(?: ?[CF])?|\\dollar|\\text\{{[^{{}}]*\}}|{_BARE_UNIT})"
    r"(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|[0-9]))?(?: ?[/*](?! ?$))? ?)+)$")
_MONEY = re.compile(r"(-? ?)\\dollar ?")


def _splitter(separator: str, atom: str = "(?!)") -> re.Pattern:
    return re.compile(rf"{atom}|(?P<separator>{separator})|\\[{{}}]|[()\[\]{{}}]")


_AND = r"(?:\\text\{,? ?(?:and|or)\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"
_THOUSANDS = r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])"
# 1,234,567 is one number in a list. Inside brackets it never is: (100,200) is a pair.
_LIST = _splitter(rf"[,;] ?{_AND}?|{_AND}", _THOUSANDS)
_COMMA, _CUP, _EQUALS = _splitter("[,;]"), _splitter(r"\\cup(?![A-Za-z])"), _splitter("=")
_APPROXIMATELY = re.compile(r"(?<=.)\\approx(?![A-Za-z])")
_LABEL = re.compile(
    rf"({_SYMBOL}(?: ?\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})* ?\))?|\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})+ ?\))"
    r" ?(?:=|\\(?:in|approx)(?![A-Za-z])) ?(?=.)")
_MATRIX = re.compile(
    r"[\[(]? ?\\begin\{(?:[pb]?matrix|array)\} ?(?:\{[clr| ]*\})?"
    r"((?:(?!\\begin).)*)\\end\{(?:[pb]?matrix|array)\} ?[\])]?")
_WORDS = re.compile(r"[A-Za-z]{2}[A-Za-z .'-]*")


def _split(text: str, splitter: re.Pattern) -> list[str]:
    """Parts of the text between separators outside all brackets; none if brackets do not pair."""
    parts, start, depth = [], 0, 0
    for token in splitter.finditer(text):
        if token["separator"] and not depth:
            parts.append(text[start : token.start()].strip())
            start = token.end()
        depth += (token[0] in ("(", "[", "{", r"\{")) - (token[0] in (")", "]", "}", r"\}"))
        if depth < 0:
            return []
    return [] if depth else [*parts, text[start:].strip()]


def _several(text: str, splitter: re.Pattern) -> list[str]:
    """The parts, if there are several and none is empty."""
    parts = _split(text, splitter)
    return parts if len(parts) > 1 and all(parts) else []


def _inner(text: str, opening: str, closing: str) -> str:
    """What stands between a pair of brackets around the whole text, or nothing."""
    inner = text[len(opening) : len(text) - len(closing)].strip()
    whole = text.startswith(opening) and text.endswith(closing) and _split(inner, _COMMA)
    return inner if whole else ""


def _open_signs(text: str) -> list[str]:
    r"""Rule: a \pm b is two answers; several \pm are independent, a \mp goes against its \pm."""
    first, *rest = re.split(r"\\pm(?![A-Za-z]) ?", text)  # at most three, which make eight answers
    if not 0 < len(rest) <= 3:
        return [text]
    if r"\mp" in text:
        return [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in ("+-", "-+")]
    several = product("+-", repeat=len(rest))
    return [first + "".join(map("".join, zip(signs, rest))) for signs in several]


def _read(text: str, depth: int = 0) -> Answer:
    """A list of answers, or the one answer there is."""
    text = _inner(text, "{", "}") or text
    members = _split(text, _LIST) if len(text) <= MAX_PARSED else []
    if not members or not all(members):
        return Answer("leaf", _canonical(text))
    answers = tuple(_read_one(opened, depth)
                    for member in members for opened in _open_signs(member))
    return answers[0] if len(answers) == 1 else Answer("list", _canonical(text), parts=answers)


def _read_one(text: str, depth: int) -> Answer:
    label = ""
    while found := _LABEL.match(text):  # rule: x=y=5 is 5, x\in[0,1] is [0,1]
        label, text = label or re.sub("[ {}]", "", found[1]), text[found.end() :]
    text = _inner(text, "{", "}") or text
    text = _APPROXIMATELY.split(text, 1)[0].strip()  # rule: the value before an approximate one
    answer = Answer("leaf", _canonical(text), label)
    if depth > MAX_DEPTH:
        return answer
    if parts := _several(text, _CUP):
        parts = tuple(_read_one(part, depth + 1) for part in parts)
        return answer._replace(kind="union", parts=parts)
    if matrix := _MATRIX.fullmatch(text):
        return _read_matrix(matrix[1], answer)
    if inner := _inner(text, r"\{", r"\}"):  # rule: a set is a list
        return _read(inner, depth + 1)._replace(label=label)
    for opening, closing in product("([", ")]"):
        if inner := _inner(text, opening, closing):
            if parts := _several(inner, _COMMA):
                parts = tuple(_read_one(part, depth + 1) for part in parts)
                return answer._replace(kind="row", brackets=opening + closing, parts=parts)
            if opening + closing == "()":  # rule: (5) is 5 and (A) is A
                return _read_one(inner, depth + 1)._replace(label=label)
    if sides := _several(text, _EQUALS):
        parts = tuple(_read_leaf(side) for side in sides)
        return answer._replace(kind="row", brackets="=", parts=parts)
    return _read_leaf(text)._replace(label=label)


def _read_matrix(body: str, answer: Answer) -> Answer:
    r"""Rule: matrices in any brackets are equal if their entries and their shapes are."""
    rows = [row.split("&") for row in body.split(r"\\") if row.strip()]
    if len({len(row) for row in rows}) != 1:
        return answer
    entries = tuple(_read_leaf(entry.strip()) for row in rows for entry in row)
    return answer._replace(kind="row", brackets=f"matrix {len(rows)}x{len(rows[0])}", parts=entries)


def _read_leaf(text: str) -> Answer:
    """An expression with its values, or text without any: words, and whatever is not understood."""
    leaf = Answer("leaf", _canonical(text))
    core, unit = _take_unit(_inner(text, "{", "}") or text)
    if unit is None or not core or _WORDS.fullmatch(core):
        return leaf
    try:
        names, adds, values = evaluate(core)
    except (ValueError, ArithmeticError, LookupError):
        return leaf
    literal = _NUMBER.fullmatch(core.lstrip("+- "))
    decimals = len(literal[1].partition(".")[2]) - int(literal[2] or 0) if literal else 0
    return leaf._replace(values=tuple(values), names=names, adds=adds, unit=unit, decimals=decimals)


def _take_unit(text: str) -> tuple[str, str | None]:
    """The text without a trailing unit and a leading money sign, and the unit; None for no unit.
    Rule: square inches is in^2, meters per second is m/s; other words name what is counted."""
    money = _MONEY.match(text)
    text = money[1] + text[money.end() :] if money else text
    tail = _UNIT_TAIL.search(text, max(0, len(text) - MAX_UNIT))
    words = re.sub(r"\\text|[\\{}.]", " ", tail[1]).replace("''", "arcsec").lower() if tail else ""
    words = "dollar " * (money is not None and "dollar" not in words) + words
    if _NOT_A_UNIT.search(words) or not re.fullmatch(r"(?:[a-z %/*'-]|\^[ -]*[0-9])*", words):
        return text, None
    if "unit" in words:  # "square units" says nothing
        return text[: tail.start()].strip(), ""
    name, power, noun = "", "", ""
    for word in re.findall(r"[a-z]+|%|/|\^[ -]*[0-9]", words):
        if word in ("square", "sq", "cubic"):
            power = "^3" if word == "cubic" else "^2"
        elif word in ("/", "per") or word[0] == "^":
            name += "/" if word == "per" else word.replace(" ", "")
        elif word in _UNIT_OF:
            name, power = name.removesuffix("deg" * (word in "cf")) + _UNIT_OF[word] + power, ""
        else:
            noun = "?" + word.removesuffix("s")
    return text[: tail.start() if tail else None].strip(), noun or name


# ---- 5. Comparison -------------------------------------------------------------------------------
def _same(ours: Answer, gold: Answer) -> bool:
    """Is `ours` what `gold` says?"""
    if not gold.text or _labels_clash(ours.label, gold.label):
        return False
    if ours.text == gold.text:
        return True
    if (ours.kind, ours.brackets, len(ours.parts)) != (gold.kind, gold.brackets, len(gold.parts)):
        return False
    if ours.kind == "leaf":
        known = ours.values and gold.values
        return _same_expression(ours, gold) if known else _same_words(ours.text, gold.text)
    if ours.kind == "row":
        return all(map(_same, ours.parts, gold.parts))
    return _same_members(ours.parts, gold.parts)


def _labels_clash(ours: str, gold: str) -> bool:
    """Rule: a label may be missing on one side; y= and f(x)= go together, x= and y= do not."""
    return bool(ours and gold) and ours != gold and (ours.find("(") > 0) == (gold.find("(") > 0)


def _same_members(ours: tuple[Answer, ...], gold: tuple[Answer, ...]) -> bool:
    """Equal as multisets: the same label and text are paired first, the others one by one."""
    member = {(answer.label, answer.text): answer for answer in (*ours, *gold)}
    mine, theirs = (Counter((answer.label, answer.text) for answer in answers)
                    for answers in (ours, gold))
    left = list((theirs - mine).elements())
    if len(left) > MAX_UNPAIRED:
        return False
    for key in (mine - theirs).elements():
        match = next((other for other in left if _same(member[key], member[other])), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_words(ours: str, gold: str) -> bool:
    """Rule: words are equal whatever their case, font, spaces, and dots of clock times."""
    ours, gold = (re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip() for text in (ours, gold))
    if not re.match("[0-9]+:[0-9]", gold) and not _WORDS.fullmatch(gold):
        return ours == gold
    ours, gold = (re.sub("[ .]" if ":" in gold else " ", "", text.lower()) for text in (ours, gold))
    return ours == gold


def _same_expression(ours: Answer, gold: Answer) -> bool:
    """Rule: the same variables, and the same value at every point."""
    if ours.names != gold.names:
        return False
    counted = [answer.unit.startswith("?") for answer in (ours, gold)]
    if ours.unit and gold.unit and ours.unit != gold.unit and counted[0] == counted[1]:
        return False  # rule: a unit may be missing; cm and m clash, left and right clash
    if ours.adds and not (gold.adds or ours.names) and isinstance(ours.values[0], Fraction):
        return False  # rule: 2+3 is not an answer where 5 is asked for
    decimals = min((answer.decimals for answer in (ours, gold) if answer.decimals > 0), default=0)
    if all(_same_number(a, b, decimals) for a, b in zip(ours.values, gold.values)):
        return True
    if (ours.unit == "%") == (gold.unit == "%"):
        return False
    # rule: 50\% is also 0.5, if one side has the sign
    scale = Fraction(1, 100) if ours.unit == "%" else Fraction(100)
    return all(_same_number(a * scale, b, decimals) for a, b in zip(ours.values, gold.values))


def _same_number(ours: Number, gold: Number, decimals: int) -> bool:
    """Exact numbers are compared exactly, closed forms in doubles.

    Rule: a decimal number stands for another value only if it agrees with it to its last decimal
    and has LONG_DECIMAL of them: 0.0833333333333 is 1/12, while 0.0833, or 3.14 for pi, is not.
    """
    both_exact = isinstance(ours, Fraction) and isinstance(gold, Fraction)
    if both_exact and (ours == gold or decimals < LONG_DECIMAL):
        return ours == gold
    tolerance = CLOSE if isinstance(ours, complex) and isinstance(gold, complex) else CLOSE_TO_EXACT
    if not both_exact:
        ours, gold = complex(ours), complex(gold)
    if decimals > 0:
        last = Fraction(1, 10 ** min(decimals, 300)) + (0 if both_exact else 1e-13 * abs(gold))
        return decimals >= LONG_DECIMAL and abs(ours - gold) < min(last, abs(gold) / 10**6)
    return abs(ours - gold) <= tolerance * min(abs(ours), abs(gold))


def verify(response: str, gold: str) -> bool:
    r"""True if the last box holds the gold answer, which may be bare, in `$..$` or in `\boxed`."""
    if not isinstance(response, str) or not isinstance(gold, str):
        return False
    ours, gold = extract_boxed(response), extract_boxed(gold) or gold
    if ours is None or len(gold) > MAX_BOX:
        return False
    try:
        return _same(_read(_clean(ours)), _read(_clean(gold)))
    except OverflowError:  # 10^{400} beside a closed form, which is compared in doubles
        return False


# ---- Command line --------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 right, 1 wrong."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("response", help="text with a box")
    parser.add_argument("--gold", required=True, help="its gold answer")
    args = parser.parse_args(argv)
    right = verify(args.response, args.gold)
    box = extract_boxed(args.response)
    print(f"{'right' if right else 'wrong'}  box: {box}  gold: {args.gold}")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
