"""The graders by name: what each settles itself, and what it asks a worker; and that ground truths can be graded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from vapo import recipe
from vapo.errors import UserError
from vapo.problems.extraction import extract
from vapo.problems.grading import Verdict, answer_line
from vapo.problems.numbers import canonical, decide, number, plain
from vapo.problems.pool import Job, Outcome, Pool, PoolRefused

DEEPEST = 60  # braces within braces that an answer may have
SHOWN = 200  # characters of an answer that is too long


class Row(NamedTuple):
    """What is graded: the response alone, without its prompt."""

    response: str
    truth: str
    finish_reason: str


@dataclass(frozen=True)
class Question:
    """What only a worker can settle, and the answer it is about."""

    job: Job
    extracted: str


def grade(
    section: recipe.Verification, rows: Sequence[Row], truths: Mapping[str, str], report: Callable[[int], None]
) -> tuple[list[Verdict], list[bool], list[str]]:
    """(verdict [B], whether the format was right [B], what went wrong in words) of every row.

    Equal questions are asked once, and workers are started only if there is a question.

    Args:
        section: which grader, and its limits.
        rows: [B].
        truths: prompt_id to ground truth, of the prompts that occur.
        report: called with the number of rows done.

    Raises:
        UserError: a ground truth that the grader cannot read, a custom grader that is not there, or a library missing.
    """
    with ExitStack() as stack:
        try:
            pool = _Pool(section, stack, truths)
            _check(section, truths, pool)
            settled = [_settle(section, row) for row in rows]
            questions = list(dict.fromkeys(s.job for s in settled if isinstance(s, Question)))
            answers: dict[Job, Outcome] = {}
            before = len(rows) - sum(isinstance(s, Question) for s in settled)
            report(before)
            for done, (job, outcome) in enumerate(pool.ask(questions), start=1):
                answers[job] = outcome
                if done % 100 == 0:
                    report(before + (len(rows) - before) * done // len(questions))
            verdicts = [s if isinstance(s, Verdict) else _judge(section, s, answers[s.job]) for s in settled]
            formats = _formats(section, rows, pool)
        except PoolRefused as error:
            raise UserError(str(error)) if str(error).startswith("verification.") else error from None
    report(len(rows))
    said = [outcome.detail for outcome in answers.values() if outcome.failure == "error"]
    return verdicts, formats, said


def check_ground_truth(grader: str, truth: str) -> str | None:
    """What is wrong with a ground truth as far as can be said without algebra: None if nothing, or not yet known."""
    if not truth.strip():
        return "is empty"
    if grader == "math" and len(truth) > recipe.Verification().max_answer_chars:
        return f"is {len(truth)} characters long"
    if grader != "reasoning_gym":
        return None
    try:
        found = json.loads(truth)
    except ValueError:
        return "is not JSON"
    entry = found.get("entry") if isinstance(found, dict) else None
    if not isinstance(entry, dict) or "answer" not in entry or not isinstance(found.get("dataset"), str):
        return 'is no {"dataset": name, "entry": {"question", "answer", "metadata"}}'
    return None


def _check(section: recipe.Verification, truths: Mapping[str, str], pool: _Pool) -> None:
    """Every ground truth must be one that the grader can read: otherwise its prompt is never right."""
    complaints = {prompt: check_ground_truth(section.grader, truth) for prompt, truth in truths.items()}
    asked = {prompt: job for prompt, truth in truths.items() if (job := _doubt(section, truth))}
    if not any(complaints.values()) and asked:
        answers = dict(pool.ask(list(dict.fromkeys(asked.values()))))
        for prompt, job in asked.items():
            outcome = answers[job]
            complaints[prompt] = outcome.value or (outcome.failure and f"ends in {outcome.failure} ({outcome.detail})")
    for prompt, complaint in complaints.items():
        if complaint:
            raise UserError(
                f"prompt_id {prompt!r}: ground_truth {truths[prompt][:SHOWN]!r} {complaint}: correct it or leave the "
                f"problem out, or set verification.grader to another than {section.grader!r}"
            )


def _doubt(section: recipe.Verification, truth: str) -> Job | None:
    """What a worker must say about a ground truth, or None."""
    if section.grader == "math" and number(plain_truth(truth)) is None:
        return Job("vapo.problems.symbolic:check", (plain_truth(truth),))
    return Job("vapo.problems.gym:check", (truth,)) if section.grader == "reasoning_gym" else None


def _settle(section: recipe.Verification, row: Row) -> Verdict | Question:
    if section.grader == "answer_line":
        return answer_line(row.response, row.truth, row.finish_reason)
    if row.finish_reason == "length":  # whatever it contains: terminal, no bootstrap
        return Verdict(False, "", "truncated")
    if section.grader == "custom":
        if len(row.response) > section.max_response_chars:
            return Verdict(False, "", "unparseable")
        return Question(Job("vapo.problems.custom:judge", (section.custom, row.response, row.truth)), "")
    answer = extract(row.response, section.answer_in)
    if answer is None:
        return Verdict(False, "", "no_answer")
    if len(answer) > section.max_answer_chars:
        return Verdict(False, answer[:SHOWN], "unparseable")
    if section.grader == "exact":
        return _verdict(answer == row.truth.strip(), answer)
    if section.grader == "reasoning_gym":
        return Question(Job("vapo.problems.gym:judge", (row.truth, answer)), answer)
    return _math(row.truth, answer)


def _math(truth: str, answer: str) -> Verdict | Question:
    wanted, given = plain_truth(truth), plain(answer)
    if not given:
        return Verdict(False, "", "no_answer")
    same = decide(wanted, given)
    if same is not None:
        return _verdict(same, canonical(given))
    if _depth(given) > DEEPEST:
        return Verdict(False, given[:SHOWN], "unparseable")
    return Question(Job("vapo.problems.symbolic:compare", (wanted, given)), given)


def _judge(section: recipe.Verification, question: Question, outcome: Outcome) -> Verdict:
    """The verdict that follows from what a worker said: a why, a score, or all of a custom grader's Verdict."""
    if outcome.failure:
        return Verdict(False, question.extracted, outcome.failure)
    said: Any = outcome.value
    if isinstance(said, str):
        return Verdict(said == "matched", question.extracted, said)
    if isinstance(said, dict):
        return Verdict(**{**said, "extracted": said["extracted"][: section.max_answer_chars]})
    if said >= section.min_score:
        return Verdict(True, question.extracted, "matched")
    return Verdict(False, question.extracted, "different", said if section.partial_scores else 0.0)


def _formats(section: recipe.Verification, rows: Sequence[Row], pool: _Pool) -> list[bool]:
    """Whether each response has the format; nothing is asked when it has no reward."""
    if not section.format_reward:
        return [False] * len(rows)
    jobs = {
        row.response: Job("vapo.problems.patterns:matches", (section.format_pattern, row.response))
        for row in rows
        if len(row.response) <= section.max_response_chars
    }
    found = dict(zip(jobs, (outcome for _, outcome in pool.ask(list(jobs.values()))), strict=True))
    late = sum(outcome.failure != "" for outcome in found.values())
    if late > section.max_error_share * len(rows):
        raise UserError(
            f"verification.format_pattern {section.format_pattern!r}: on {late} of {len(rows)} responses it did not "
            f"end within {section.time_limit:g} s: write it without nested repetitions such as (a+)+"
        )
    return [bool(outcome and outcome.value) for outcome in (found.get(row.response) for row in rows)]


class _Pool:
    """The workers that this section's questions need, started at the first one."""

    def __init__(self, section: recipe.Verification, stack: ExitStack, truths: Mapping[str, str]) -> None:
        self.section, self.stack, self.truths = section, stack, truths
        self.pool: Pool | None = None
        if section.grader == "custom":  # one that is not there is refused before anything is graded
            next(self._started().map([Job("vapo.problems.custom:ready")]))

    def ask(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Every job with its outcome."""
        if jobs:
            yield from zip(jobs, self._started().map(jobs), strict=True)

    def _started(self) -> Pool:
        if self.pool is None:
            prepare, setup = self._needs()
            self.pool = self.stack.enter_context(
                Pool(
                    workers=self.section.workers,
                    cpu=self.section.time_limit,
                    memory=self.section.memory_limit << 20,
                    prepare=prepare,
                    setup=setup,
                )
            )
        return self.pool

    def _needs(self) -> tuple[list[Job], list[Job]]:
        if self.section.grader == "math":
            _installed("math_verify", "math-verify", self.section)
            return [Job("vapo.problems.symbolic:prepare")], []
        if self.section.grader == "reasoning_gym":
            _installed("reasoning_gym", "reasoning-gym", self.section)
            scorers = {
                (found["dataset"], json.dumps(found.get("config", {}), sort_keys=True))
                for found in map(json.loads, self.truths.values())
            }
            return [Job("vapo.problems.gym:prepare", (sorted(scorers),))], []
        if self.section.grader == "custom":
            return [], [Job("vapo.problems.custom:load", (self.section.custom,))]
        return [], []


def _installed(module: str, package: str, section: recipe.Verification) -> None:
    if importlib.util.find_spec(module) is None:  # imported in the workers alone
        raise UserError(f"verification.grader {section.grader!r} needs the package {package!r}: pip install {package}")


def _verdict(correct: bool, extracted: str) -> Verdict:
    return Verdict(correct, extracted, "matched" if correct else "different")


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=1 << 14)  # a prompt's ground truth is compared with each of its responses
def plain_truth(truth: str) -> str:
    """A ground truth as `plain` text; some data sets keep it in its box."""
    return plain(extract(truth, ("boxed",)) or truth)
