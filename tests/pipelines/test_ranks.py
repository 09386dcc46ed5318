"""DeepSpeed on two ranks through the real `vapo run`: killed in the update, resumed, and near to what one makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.running import TINY, children, events, executed, folder_of, kill, marked, records, running, vapo

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="pip install 'vapo[deepspeed]'")
pytest.importorskip("torch")

TWO = ("--set", "train.engine=deepspeed", "--set", "train.ranks=2", "--set", "train.zero_stage=2")
# Without a critic only the update is launched: starting DeepSpeed is what takes time here.
ALONE = (*TINY, "--set", "advantages.estimator=group_centred", "--set", "value_pretraining.max_steps=0")


def test_a_run_on_two_ranks_is_killed_and_resumed(tmp_path: Path) -> None:
    """The stage is killed while its ranks run: none is left, and the same command goes on from there."""
    with running(tmp_path / "two", *ALONE, *TWO) as run:
        run.started("ppo_update")
        run.wait_for(lambda: sum("vapo.train.rank" in shown for shown in marked(run.mark).values()) == 3)
        worker = run.wait_for(run.worker)
        kill(children(worker)[0])
        status, _, err = run.end()
        assert status == 1, err
        assert not run.left(10.0)
    done = vapo("run", *ALONE, *TWO, "--workdir", tmp_path / "two")
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = executed(folder_of(done.stdout))
    assert found["ppo_update"] == 1
    assert found["rollout"] == 1  # the last evaluation's; the others were complete
    (updated,) = (record for record in records(tmp_path / "two").values() if record["stage"] == "ppo_update")
    assert updated["section"]["train"]["ranks"] == 2
    assert not [event for event in events(folder_of(done.stdout)) if event["vapo"] == "error"]
    alone = vapo("run", *ALONE, "--workdir", tmp_path / "one")
    assert alone.returncode == 0, (alone.stdout, alone.stderr)
    (expected,) = (record for record in records(tmp_path / "one").values() if record["stage"] == "ppo_update")
    assert "train" not in expected["section"]
    for name, value in expected["metrics"].items():
        assert updated["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert updated["inputs"]["experience"]["sha256"] == expected["inputs"]["experience"]["sha256"]
