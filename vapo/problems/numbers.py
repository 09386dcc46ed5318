"""An answer's text made plain, and compared exactly where it is a number.

Most answers in mathematics are integers: they are settled here, without a worker. Fractions, decimals, percent and
units are settled here too, because math-verify drops units and words ("7 million" is 7 to it) and adds "1 2" up to 3.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

LONGEST = 1000  # characters of a number; Python's int() refuses more than 4300 digits
CLOSE = Fraction(1, 10**6)  # a decimal for a fraction that has no finite one: 0.333333 is 1/3, 0.333 is not

MINUS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
SYMBOLS = {
    "π": r"\pi ",
    "∞": r"\infty ",
    "×": r"\times ",
    "·": r"\cdot ",
    "\u2044": "/",
    "，": ",",
    "．": ".",
    "％": "%",
}
MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words that stand for a unit without \text{}: no single letters, those are variables.
UNITS = frozenset(
    re.findall(
        r"\w+",
        "mm cm dm km nm in ft yd mi inch inches foot feet yard yards mile miles meter meters metre metres centimeters "
        "kilometers mg kg gram grams kilograms lb lbs oz pound pounds ounces ton tons ml cl liter liters litre litres "
        "gallon gallons sec second seconds min minute minutes hr hour hours day days week weeks month months year "
        "years mph kph kmh deg degree degrees rad radian radians percent dollar dollars cent cents euro euros unit "
        "units sq square cubic hz",
    )
)
# Words after a number, inside \text{}, that make it another answer than the number.
NOT_UNITS = frozenset(
    re.findall(r"\w+", "or and nor not to by minus plus times over divided squared cubed factorial mod base")
)

DROPPED = re.compile(r"\\[()\[\]]|\\displaystyle|\\textstyle|\\!|\\\$|[$]")
SPACE = re.compile(r"\\[,;: ]|~|\\q?quad|\s+")
WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}\\]*)\}|\*\*(.*)\*\*|\{([^{}]*)\}")
INTEGER = re.compile(r"[+-]?\d{1,1000}", re.ASCII)
WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
DECIMAL = re.compile(rf"([+-]?) ?({WHOLE}(?:\.\d*)?|\.\d+)", re.ASCII)
RATIO = re.compile(
    r"([+-]?) ?(?:\\frac ?(?:\{ ?([+-]?\d+) ?\} ?\{ ?([+-]?\d+) ?\}|(\d) ?(\d)(?!\d))|(\d+) ?/ ?(\d+))", re.ASCII
)
DEGREE = re.compile(r" ?(?:°|\^ ?\{? ?(?:\\circ|°) ?\}?|\\degrees?)(?: ?C| ?F)?")
TEXT_UNIT = re.compile(r" ?\\(?:text|mathrm|textrm|mbox|operatorname) ?\{([^{}\\]*)\}(?: ?\^ ?\{?[23]\}?)?")
WORDS = re.compile(r"[A-Za-z][A-Za-z/ .]*")
SEVERAL = re.compile(r"\d+(?: \d+)+", re.ASCII)


@dataclass(frozen=True)
class Number:
    """A rational number as written, say Number(Fraction(7), "cm", False)."""

    value: Fraction
    unit: str
    decimal: bool  # written with a decimal point


class _Plain(dict[int, str | None]):
    """For str.translate: digits of every script, minus signs, spaces and invisible characters, as ASCII."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        category = unicodedata.category(character)
        plain: str | None = SYMBOLS.get(character, character)
        if category == "Nd":  # not the superscripts: 2⁵ is not 25
            plain = str(unicodedata.decimal(character))
        elif character in MINUS:
            plain = "-"
        elif category == "Zs":
            plain = " "
        elif category == "Cf":
            plain = None
        self[code] = plain
        return plain


_PLAIN = _Plain({ord(character): character for character in map(chr, range(128))})


def plain(text: str) -> str:
    r"""The text without what only sets it: $, \(, \,, \text{} around all of it, Unicode digits and spaces."""
    if not text.isascii():
        text = text.translate(_PLAIN)
    if INTEGER.fullmatch(text):
        return text
    text = DROPPED.sub("", text).replace("{,}", ",").replace(r"\%", "%").replace(r"\dfrac", r"\frac")
    text = SPACE.sub(" ", text.replace(r"\tfrac", r"\frac")).strip()
    for _ in range(3):
        wrapped = WRAPPED.fullmatch(text)
        if not wrapped:
            break
        text = next(group for group in wrapped.groups() if group is not None).strip()
    return text[:-1].rstrip() if text.endswith(".") else text


@lru_cache(maxsize=1 << 14)  # a prompt's ground truth is compared with each of its responses
def number(text: str) -> Number | None:
    """The number that a plain text is, or None; nothing is evaluated."""
    if len(text) > LONGEST:
        return None
    if INTEGER.fullmatch(text):
        return Number(Fraction(int(text)), "", False)
    found = RATIO.match(text)
    if found:
        sign, *parts = found.groups()
        above, below = (int(part) for part in parts if part is not None)
        if below == 0:
            return None
        value, decimal = Fraction(above, below), False
    elif found := DECIMAL.match(text):
        sign, digits = found.groups()
        value, decimal = Fraction(re.sub("[, ]", "", digits).rstrip(".")), "." in digits.rstrip(".0")
    else:
        return None
    unit = _unit(text[found.end() :])
    if unit is None:
        return None
    value *= MULTIPLES.get(unit, 1)
    return Number(-value if sign == "-" else value, "" if unit in MULTIPLES else unit, decimal)


def decide(truth: str, answer: str) -> bool | None:
    """Whether the plain answer is the plain truth, as far as that can be said without algebra; None: it cannot.

    Two numbers are compared exactly. A unit that only one of them has is ignored, two different ones differ, and
    50% is 50 as well as 0.5. A decimal with six right digits stands for a fraction without a finite decimal.
    """
    wanted, given = number(truth), number(answer)
    if wanted and given:
        if wanted.unit and given.unit and wanted.unit != given.unit and "%" not in (wanted.unit, given.unit):
            return False
        one_percent = (wanted.unit == "%") != (given.unit == "%")
        return any(
            _same(replaced, given.value, given.decimal)
            for replaced in (
                (wanted.value, wanted.value / 100, wanted.value * 100)
                if one_percent and wanted.unit == "%"
                else (wanted.value, wanted.value * 100)
                if one_percent
                else (wanted.value,)
            )
        )
    if truth == answer:
        return True
    return False if SEVERAL.fullmatch(answer) else None


def canonical(text: str) -> str:
    """A plain text by which equal numbers are equal texts: 16 for 016, 1/2 for 0.5."""
    found = number(text)
    return str(found.value) if found else text


def _same(wanted: Fraction, given: Fraction, decimal: bool) -> bool:
    if wanted == given:
        return True
    return decimal and not _finite(wanted.denominator) and abs(wanted - given) <= CLOSE * abs(wanted)


def _finite(denominator: int) -> bool:
    """Whether 1/denominator has a finite decimal: no prime factors but 2 and 5."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _unit(rest: str) -> str | None:
    """The unit that follows a number, "" for none; None: what follows is no unit."""
    rest = rest.strip()
    if not rest:
        return ""
    if rest == "%" or rest.lower() == "percent":
        return "%"
    if DEGREE.fullmatch(" " + rest):
        return "°"
    in_text = TEXT_UNIT.fullmatch(rest)
    words = (in_text.group(1) if in_text else rest).strip().strip(".")
    if not WORDS.fullmatch(words):
        return None
    parts = words.lower().replace("/", " ").split()
    if len(parts) == 1 and parts[0] in MULTIPLES:
        return parts[0]
    if not in_text and not all(part in UNITS for part in parts):
        return None
    if any(part in NOT_UNITS or part in MULTIPLES for part in parts):
        return None
    if parts in (["degree"], ["degrees"], ["deg"]):
        return "°"
    if parts == ["percent"]:
        return "%"
    return "".join(parts) + rest[rest.rfind("}") - 1 :].strip("{}^ ") if in_text and "^" in rest else "".join(parts)
