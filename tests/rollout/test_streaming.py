"""Rollouts on their way to disk: bounded memory, and a killed stage that goes on from what is complete."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, environment, events_in
from vapo.partial import PLACE
from vapo.recipe import Rollout
from vapo.rollout import streaming
from vapo.rollout.generate import rollout
from vapo.rollout.streaming import Parts
from vapo.schemas import ROLLOUTS
from vapo.stage import execute
from vapo.tables import read_table

from .policies import (
    add_words,
    execute_to_end,
    executing,
    make_place,
    make_policy,
    parts_in,
    ragged_texts,
    rollout_job,
    write_prompts,
)

SMALL = Rollout(prompts=2, samples=1, max_new_tokens=2)
SECTION = Rollout(prompts=40, samples=4, max_new_tokens=60, batch_size=8)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy("llama", folder)
    return add_words(folder)


@pytest.fixture
def place(policy: Path, tmp_path: Path) -> Path:
    return make_place(policy, tmp_path / "place", ragged_texts(40))


def sampled(place: Path, name: str, partial: Path | None, section: Rollout = SECTION) -> bytes:
    rollout(
        section,
        prompts=place / "prompts",
        policy=place / "policy.json",
        rollouts=place / name,
        partial=partial,
        iteration=1,
        draw=1,
        wanted_groups=0,
        purpose="training",
        seed=0,
    )
    return (place / name).read_bytes()


def test_kill_and_resume(place: Path, tmp_path: Path) -> None:
    """kill -9 after some parts: the next execution samples only the others, and the table is the undisturbed one."""
    execute_to_end(rollout_job(place, "undisturbed", SECTION), tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
    partial = tmp_path / "partial"
    with executing(rollout_job(place, "killed", SECTION), partial) as process:
        while len(parts_in(partial)) < 5:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
    parts = parts_in(partial)
    assert 5 <= len(parts) < 20
    log = execute_to_end(rollout_job(place, "resumed", SECTION), partial)
    assert (place / "resumed/rollouts").read_bytes() == (place / "undisturbed/rollouts").read_bytes()
    assert not list(partial.iterdir())  # nothing is left of a stage that ended

    reported = [event["done"] for event in events_in(log) if event["vapo"] == "progress"]
    assert reported[0] > 8 * len(parts)  # it began behind them


def test_other_work_does_not_find_the_parts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, iteration, draw, setting, input or version of vapo has a folder of its own."""
    monkeypatch.setenv(PLACE, str(tmp_path / "partial"))
    monkeypatch.setattr("vapo.rollout.generate.write_groups", lambda path, groups: next(iter(groups)) and 1 / 0)

    def folders_after(section: Rollout = SMALL, **changed: Any) -> int:
        with pytest.raises(ZeroDivisionError):
            execute(rollout_job(place, "out", section, **changed))
        return len(list((tmp_path / "partial").iterdir()))

    assert [folders_after(), folders_after()] == [1, 1]
    changes: tuple[dict[str, Any], ...] = ({"seed": 1}, {"iteration": 2}, {"purpose": "evaluation"}, {"draw": 2})
    assert [folders_after(**change) for change in changes] == [2, 3, 4, 5]
    assert folders_after(SMALL.model_copy(update={"top_p": 0.9})) == 6
    write_prompts(place / "prompts", [*ragged_texts(40), "w3"])
    assert folders_after() == 7
    monkeypatch.setattr("vapo.lineage.software.source_digest", lambda: "another")
    assert folders_after() == 8


def test_parts_are_not_sampled_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of them no engine is started; a spoilt one is made again."""
    whole = sampled(place, "whole", tmp_path)
    parts = sorted(tmp_path.glob("*.arrow"))
    assert len(parts) == 20
    (tmp_path / "000003.arrow").write_bytes(parts[4].read_bytes()[:500])
    assert sampled(place, "again", tmp_path) == whole

    def refuse(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("vapo.rollout.generate.open_engine", refuse)
    assert sampled(place, "once more", tmp_path) == whole


def test_larger_parts_give_the_same_table(place: Path, tmp_path: Path) -> None:
    """record_batch says when rows go to disk, not what is decoded together."""
    larger = SECTION.model_copy(update={"record_batch": 30})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sampled(place, "larger", tmp_path / "a", larger) == sampled(place, "smaller", tmp_path / "b")
    assert len(list((tmp_path / "a").iterdir())) == 7  # 24 responses each: three batches of 8


def test_record_batches_hold_whole_prompts_in_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(place, "one", None)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 500)
    monkeypatch.setattr(streaming, "MAX_OPEN", 2)
    sampled(place, "many", None)
    one, many = read_table(place / "one", ROLLOUTS), read_table(place / "many", ROLLOUTS)
    assert one["response"].num_chunks == 1
    assert many["response"].num_chunks > 5
    assert all(len(chunk) % 4 == 0 for chunk in many["response"].chunks)
    assert many.equals(one)
    assert many["prompt_id"].to_pylist() == [f"p{i}" for i in range(40) for _ in range(4)]


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    parts = Parts(tmp_path, ROLLOUTS)
    assert 0 not in parts
    with pytest.raises(ValueError, match="missing columns"):
        parts.add(0, {})
    assert 0 not in parts
    assert not list(tmp_path.iterdir())


MEMORY = """
import sys, threading, time
from pathlib import Path
from vapo.rollout import generate, streaming
from vapo.partial import PLACE
from vapo.recipe import Rollout
place, count = Path(sys.argv[1]), int(sys.argv[2])
streaming.BATCH_TOKENS = 20_000
generate.TOGETHER = 64

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

def run(prompts):
    section = Rollout(prompts=prompts, samples=2, max_new_tokens=24, batch_size=64)
    generate.rollout(section, prompts=place / "prompts", policy=place / "policy.json", rollouts=place / "r",
                     iteration=1, draw=1, wanted_groups=0, purpose="training", seed=0)

run(64)  # what libraries keep for themselves
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
run(count)
done.set()
print((peak[0] - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(policy: Path, tmp_path: Path) -> None:
    """Anonymous memory of the process beyond what 64 prompts need, MiB."""
    place = make_place(policy, tmp_path / "place", ragged_texts(6000))
    found = {}
    for count in (200, 6000):
        command = [sys.executable, "-c", MEMORY, str(place), str(count)]
        environ = {**environment(), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=300)
        assert done.returncode == 0, done.stderr
        found[count] = float(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert found[6000] < found[200] + 6, found
