"""The demo's problems: follow a digit through 5 to 40 operations modulo 10, writing every step down.

A prompt reads "start 7 #12 +3 #13 x7 ?" (labels run on from a random number, so that every label is seen early in
training). A response repeats label and operation, writes how it works ("=" with care, "~" quickly), the digit, and
sometimes a second look ("again" and a digit); it ends "answer 4". All operations are bijections: one uncorrected
slip makes the answer wrong, unless another slip undoes it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LABELS = 40
OPERATIONS = ("+1", "+2", "+3", "-1", "-2", "-3", "x3", "x7", "x9")

# How the writer of the worked examples works: what there is for reinforcement learning to find.
QUICK = {"+": 0.14, "-": 0.14, "x": 0.35}  # how often a step is done quickly, by kind of operation
QUICK_SLIPS = 0.6  # a quick step is wrong this often ...
AGAIN = 0.4  # ... and looked at again this often, right or wrong
CAREFUL_SLIPS = 0.005  # a careful step, or a second look, is wrong this often


@dataclass(frozen=True)
class Chain:
    """A start digit, operations, and the number of the first label; say Chain(7, ("+3", "x7"), 12)."""

    start: int
    operations: tuple[str, ...]
    first_label: int

    @property
    def prompt(self) -> str:
        """The text the policy sees; it holds no intermediate digit and no answer."""
        steps = (f"#{self.first_label + i} {op}" for i, op in enumerate(self.operations))
        return f"start {self.start} {' '.join(steps)} ?"

    @property
    def answer(self) -> int:
        """The digit after all operations."""
        digit = self.start
        for operation in self.operations:
            digit = apply(digit, operation)
        return digit


def apply(digit: int, operation: str) -> int:
    """One operation modulo 10, say apply(7, "+3") == 0."""
    amount = int(operation[1:])
    if operation[0] == "+":
        return (digit + amount) % 10
    if operation[0] == "-":
        return (digit - amount) % 10
    return (digit * amount) % 10


def draw(generator: random.Random, min_steps: int, max_steps: int) -> Chain:
    """A random chain with a uniform number of steps."""
    steps = generator.randint(min_steps, max_steps)
    return Chain(
        generator.randrange(10),
        tuple(generator.choices(OPERATIONS, k=steps)),
        generator.randint(1, LABELS - steps + 1),
    )


def worked_example(generator: random.Random, chain: Chain) -> str:
    """A response as the imperfect writer gives it: slips, second looks, and the answer it arrives at."""
    words = []
    digit = chain.start
    for i, operation in enumerate(chain.operations):
        right = apply(digit, operation)
        quick = generator.random() < QUICK[operation[0]]
        digit = _slip(generator, right, QUICK_SLIPS if quick else CAREFUL_SLIPS)
        words += [f"#{chain.first_label + i}", operation, "~" if quick else "=", str(digit)]
        if quick and generator.random() < AGAIN:
            digit = _slip(generator, right, CAREFUL_SLIPS)
            words += ["again", str(digit)]
    return f"{' '.join(words)} answer {digit}"


def _slip(generator: random.Random, right: int, probability: float) -> int:
    if generator.random() >= probability:
        return right
    return (right + generator.randrange(1, 10)) % 10
