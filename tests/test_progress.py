"""Progress: what is printed is parsed back, other output is not an event, and reports are rare and complete."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo import progress
from vapo.progress import Progress, emit, parse


def events(text: str) -> list[dict[str, Any]]:
    return [event for event in map(parse, text.splitlines()) if event is not None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at clock[0]."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_an_event_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    emit("error", message='a\nb 数 \u2028 "quoted"', seconds=0.5, user=True)
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert parse(text) == {"vapo": "error", "message": 'a\nb 数 \u2028 "quoted"', "seconds": 0.5, "user": True}


@pytest.mark.parametrize(
    "line", ["", "step 3", '{"loss": 1}', '{"vapo"', '{"vapo": "start"', '["vapo"]', 'x {"vapo": "start"}']
)
def test_other_output_is_not_an_event(line: str) -> None:
    assert parse(line) is None


@given(st.text(max_size=30))
def test_parse_never_fails(text: str) -> None:
    for line in (text, '{"vapo"' + text, '{"vapo": "start"' + text):
        event = parse(line)
        assert event is None or event["vapo"] == "start"


def test_reports_are_at_most_five_a_second_and_the_last_one_always_comes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Progress("responses", 1000)
    for done in range(1, 1001):
        clock[0] += 0.01  # 10 seconds in all
        report(done, 7, loss=0.123456789)
    found = events(capsys.readouterr().out)
    assert 40 <= len(found) <= 51
    assert found[-1] == {
        "vapo": "progress",
        "done": 1000,
        "total": 1000,
        "unit": "responses",
        "rate": 700.0,
        "rate_unit": "tokens/s",
        "metrics": {"loss": 0.12346},
    }
    assert [e["done"] for e in found] == sorted({e["done"] for e in found})


def test_work_between_reports_counts(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    report = Progress("steps", 3)
    report(1, 10, "examples")
    clock[0] += 2.0
    report(2, 30, "examples")
    (event,) = events(capsys.readouterr().out)
    assert (event["done"], event["rate"], event["rate_unit"]) == (2, 20.0, "examples/s")


def test_no_time_passed_is_no_division_by_zero(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    del clock
    Progress("steps", 1)(1)
    assert events(capsys.readouterr().out)[0]["rate"] == 0.0
