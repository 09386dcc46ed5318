"""A training stage that is killed goes on from its last whole part, and what it leaves is what it would have left."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vapo.partial import PLACE
from vapo.recipe import Advantages, BaseModelSection, PpoUpdate, Train, ValuePretraining
from vapo.schemas import EXAMPLES
from vapo.stage import Job, execute
from vapo.tables import write_table
from vapo.train import parts, ranks
from vapo.train.advantages import advantages
from vapo.train.base_model import base_model
from vapo.train.parts import Parts
from vapo.train.ppo_update import ppo_update
from vapo.train.value_pretraining import value_pretraining

from .conftest import World

ALWAYS = 1e-9  # seconds: a part after every optimiser step
Stage = Callable[[str, Path | None], dict[str, Any]]  # (name of its outputs, partial) -> metrics


def pretrain(world: World, train: Train, **changed: Any) -> Stage:
    """Three steps as a reward model, then six; the best critic is kept from a step in between."""
    settings: dict[str, Any] = {"reward_model_steps": 3, "min_steps": 6, "max_steps": 6, "measure_every": 2}
    settings |= {"mini_batch": 6, "heldout_share": 0.25, "lr": 0.3, "must_beat_mean": False, **changed}

    def run(name: str, partial: Path | None) -> dict[str, Any]:
        return value_pretraining(
            ValuePretraining(**settings, train=train),
            rollouts=world.rollouts,
            rewards=world.rewards,
            policy=world.policy,
            critic=world.root / f"{name}-critic",
            pretraining=world.root / f"{name}-table",
            partial=partial,
            seed=0,
            store=world.objects,
        )

    return run


def update(world: World, train: Train, **changed: Any) -> Stage:
    """Four steps of the actor, four of the critic."""
    settings: dict[str, Any] = {"epochs": 2, "mini_batch": 6, "actor_lr": 1e-2, "critic_lr": 1e-2, "warmup_steps": 3}
    section = PpoUpdate(**{**settings, "kl_coef": 0.1, "entropy_coef": 0.01, **changed}, train=train)
    advantages(
        Advantages(alpha=0.3),
        rollouts=world.rollouts,
        rewards=world.rewards,
        critic=world.critic,
        experience=world.experience,
        iteration=1,
    )

    def run(name: str, partial: Path | None) -> dict[str, Any]:
        return ppo_update(
            section,
            rollouts=world.rollouts,
            rewards=world.rewards,
            experience=world.experience,
            policy=world.policy,
            reference=world.policy,
            critic=world.critic,
            new_policy=world.root / f"{name}-policy",
            new_critic=world.root / f"{name}-critic",
            partial=partial,
            iteration=1,
            seed=0,
            store=world.objects,
        )

    return run


def learn(world: World, train: Train, **changed: Any) -> Stage:
    """Twelve steps of a base model, with a curriculum."""
    rows = [(f"say {word}", " ".join([word] * n), n) for n in range(1, 7) for word in "abcd"]
    columns = map(list, zip(*rows, strict=True))
    write_table(world.root / "examples", EXAMPLES, dict(zip(EXAMPLES.names, columns, strict=True)))
    settings: dict[str, Any] = {"hidden_size": 16, "feed_forward": 32, "layers": 1, "max_positions": 64, "steps": 12}
    settings |= {"batch_tokens": 300, "curriculum_loss": 100.0, "part_seconds": train.part_seconds, **changed}

    def run(name: str, partial: Path | None) -> dict[str, Any]:
        return base_model(
            BaseModelSection(**settings),
            examples=world.root / "examples",
            policy=world.root / f"{name}-policy",
            partial=partial,
            seed=0,
            store=world.objects,
        )

    return run


MAKERS: dict[str, Callable[..., Stage]] = {"value_pretraining": pretrain, "ppo_update": update, "base_model": learn}
PARTS = {"value_pretraining": 9, "ppo_update": 8, "base_model": 12}  # one for each optimiser step


def outputs(world: World, name: str) -> dict[str, bytes]:
    """Manifests, with the digest of every file of weights and training state, and tables."""
    return {path.name.removeprefix(name): path.read_bytes() for path in world.root.glob(f"{name}-*")}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(number: int, *, writing: bool = False) -> Callable[[], None]:
    """Lets this process die after it left so many parts, or in the middle of the next one."""

    def prepare() -> None:
        add, flush = Parts.add, parts._flush

        def add_and_die(self: Parts, *given: Any) -> None:
            if writing and self.number == number:
                parts._flush = die if ranks.rank() == 0 else flush  # type: ignore[assignment]
            add(self, *given)
            if self.number == number and not writing:
                die()

        Parts.add = add_and_die  # type: ignore[method-assign,assignment]

    return prepare


def nothing() -> None:
    """The work is not disturbed."""


def apart(folder: Path, work: Callable[[], Any], prepare: Callable[[], None] = nothing, count: int = 1) -> Any:
    """Do the work in forked processes, the ranks of one node; what rank 0 got, None if they were killed.

    Whoever is not killed tells how many parts it found and how many steps it took, too.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    pids = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                tempfile.tempdir = str(folder)
                os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
                prepare()
                if count > 1:
                    with ranks.joined():
                        made = work()
                else:
                    made = work()
                if number == 0:
                    result.write_text(json.dumps(made))
                status = 0
            except BaseException:  # noqa: BLE001 - this process is about to end
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    ends = [_end(pid) for pid in pids]
    if prepare is nothing:
        assert set(ends) == {0}
    else:
        assert -signal.SIGKILL in ends
    return json.loads(result.read_text()) if result.is_file() else None


def _end(pid: int) -> int:
    """How a process ended, or that it was killed since it did not within a minute."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it did not end")


def left(partial: Path) -> list[str]:
    """Names of the whole parts, and of what was kept for good."""
    return sorted(path.name for path in partial.iterdir() if not path.name.endswith(".new"))


def check(world: World, stage: str, number: int, capfd: Any, count: int = 1, writing: bool = False, **t: Any) -> None:
    """Kill it after so many parts; what is left then is what an undisturbed execution without parts leaves."""
    (partial := world.root / "partial").mkdir()
    off, on = (MAKERS[stage](world, Train(ranks=count, part_seconds=s, **t)) for s in (0, ALWAYS))
    undisturbed = apart(world.root, lambda: off("off", None), count=count)
    assert apart(world.root, lambda: on("on", partial), dying(number, writing=writing), count) is None
    assert not outputs(world, "on")
    critics = stage == "ppo_update" and number > 4
    assert left(partial) == [f"{number:06d}", *(["policy"] if critics else [])]
    capfd.readouterr()
    assert apart(world.root, lambda: on("on", partial), count=count) == undisturbed
    events = [json.loads(line) for line in capfd.readouterr()[0].splitlines() if '"vapo"' in line]
    assert [event["part"] for event in events if event["vapo"] == "resumed"] == [number] * count
    assert len([event for event in events if event["vapo"] == "part"]) == (PARTS[stage] - number) * count
    assert outputs(world, "on") == outputs(world, "off")
    assert outputs(world, "on")


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        *(("value_pretraining", number) for number in (1, 3, 4, 8)),  # a reward model until the third
        *(("ppo_update", number) for number in (1, 4, 5, 7)),  # the actor until the fourth
        *(("base_model", number) for number in (1, 7)),
    ],
)
def test_a_killed_stage_goes_on(world: World, stage: str, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    check(world, stage, number, capfd)


@pytest.mark.parametrize("stage", list(MAKERS))
def test_killed_while_it_writes_it_goes_on_from_the_part_before(
    world: World, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(world, stage, 2, capfd, writing=True)


@pytest.mark.parametrize(("stage", "number"), [("value_pretraining", 5), ("ppo_update", 2), ("ppo_update", 6)])
def test_on_two_ranks(world: World, stage: str, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    check(world, stage, number, capfd, count=2)


@pytest.mark.parametrize(("stage", "number"), [("value_pretraining", 2), ("ppo_update", 6)])
def test_with_adapters(world: World, stage: str, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Their base is not in the part: it lies where it came from."""
    pytest.importorskip("peft")
    check(world, stage, number, capfd, lora_rank=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "train"),
    [
        ("value_pretraining", 5, {"zero_stage": 3, "dtype": "bf16"}),
        ("ppo_update", 6, {"zero_stage": 2}),
    ],
)
def test_with_deepspeed_on_two_ranks(
    world: World, stage: str, number: int, train: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """What is gone on from are the float32 masters, each rank's own."""
    pytest.importorskip("deepspeed")
    check(world, stage, number, capfd, count=2, engine="deepspeed", **train)


def test_other_work_does_not_find_the_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage as its component runs it: the same work goes on, another seed, section or input begins anew."""
    partial = world.root / "partial"
    monkeypatch.setenv(PLACE, str(partial))
    add, steps = Parts.add, []

    def add_and_fail(self: Parts, *given: Any) -> None:
        steps.append(given[1]["step"])
        add(self, *given)
        raise ZeroDivisionError

    monkeypatch.setattr(Parts, "add", add_and_fail)

    def begun_at(seed: int = 0, **changed: Any) -> int:
        """The step that it had done when it failed: the first after what it found."""
        section = ValuePretraining(init="policy", heldout_share=0.25, train=Train(part_seconds=ALWAYS), **changed)
        inputs = {n: {"path": str(world.root / n), "sha256": ""} for n in ("rollouts", "rewards", "policy")}
        made = {n: str(world.root / "made" / n) for n in ("critic", "pretraining", "metrics")}
        parameters = {"seed": seed, "store": world.objects}
        with pytest.raises(ZeroDivisionError):
            execute(asdict(Job("value_pretraining", section.model_dump_json(), parameters, inputs, made, time.time())))
        return int(steps[-1])

    assert [begun_at(), begun_at(), begun_at()] == [1, 2, 3]
    assert [begun_at(1), begun_at(lr=1e-3), begun_at(), begun_at(1)] == [1, 1, 4, 2]
    world.write_rollouts(seed=1)
    assert begun_at() == 1


def test_without_a_place_nothing_is_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder that nobody would find again is filled."""
    monkeypatch.delenv(PLACE, raising=False)
    monkeypatch.setattr(parts, "_flush", die)
    assert not Parts(None, ALWAYS).lasting
    assert not Parts(world.root, 0).lasting
    update(world, Train(part_seconds=ALWAYS))("on", None)


def test_the_default_changes_no_section() -> None:
    """It is not written, so that what caches go by is what it was."""
    for section in (Train, BaseModelSection):
        assert "part_seconds" not in section().model_dump()
        assert section(part_seconds=5.0).model_dump()["part_seconds"] == 5.0
        assert section.model_validate(section(part_seconds=0.0).model_dump()).part_seconds == 0.0
