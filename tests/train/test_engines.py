"""Every engine takes the same steps: alone, on two ranks, at every ZeRO stage, off-loaded, resumed, cut anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.running import ROOT
from vapo.recipe import Advantages, PpoUpdate, Train, ValuePretraining
from vapo.schemas import EXPERIENCE, PRETRAINING
from vapo.store import open_checkpoint
from vapo.tables import ragged, read_table, write_table
from vapo.train.advantages import advantages
from vapo.train.ppo_update import ppo_update
from vapo.train.value_pretraining import value_pretraining

from .conftest import World

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="pip install 'vapo[deepspeed]'")
pytest.importorskip("peft", reason="pip install 'vapo[lora]'")

ZERO: dict[str, dict[str, Any]] = {f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}
FP32: dict[str, dict[str, Any]] = {
    "torch": {},
    **ZERO,
    "offload2": {**ZERO["zero2"], "offload": "cpu"},
    "offload3": {**ZERO["zero3"], "offload": "cpu"},
    "checkpointing3": {**ZERO["zero3"], "activation_checkpointing": True},
}
BF16 = {f"bf16-{stage}": {**ZERO[f"zero{stage}"], "dtype": "bf16"} for stage in (1, 2, 3)}
RESUMED = {"torch": {}, "zero2": ZERO["zero2"], "zero3": ZERO["zero3"], "bf16-2": BF16["bf16-2"]}
LORA = {"lora_rank": 2, "lora_alpha": 8}
# Three steps of 5, 5 and 2 rows, ragged, in up to five micro-batches each: the ranks have different numbers of them.
SEVERAL: dict[str, Any] = {"mini_batch": 5, "warmup_steps": 2, "token_budget": 60, "value_clip": 0.2, "kl_coef": 0.1}
AT_ONCE: dict[str, Any] = {"mini_batch": 12, "warmup_steps": 0, "token_budget": 60}  # one step
# No advantages, so that old logprobs play no part and two epochs are two updates; the order is by length alone.
LM_ONLY: dict[str, Any] = {"mini_batch": 12, "warmup_steps": 3, "token_budget": 60, "positive_lm_coef": 1.0}
DISTINCT = [7, 1, 12, 3, 5, 15, 9, 2, 20, 4, 17, 24]  # with the prompts no two rows are equally long
METRICS = ("actor_grad_norm", "critic_grad_norm", "policy_loss", "positive_lm_loss", "value_loss", "kl_loss", "entropy")
PRETRAIN: dict[str, Any] = {
    "init": "reward_model",
    "reward_model_steps": 2,
    "min_steps": 4,
    "max_steps": 4,
    "must_beat_mean": False,
    "mini_batch": 7,
    "measure_every": 2,
    "heldout_share": 0.25,
    "lr": 1e-2,
    "token_budget": 60,
}


class Bench:
    """A world of one's own, calls that run on two ranks, and what they left."""

    def __init__(self, root: Path) -> None:
        self.world = World(root)
        self.world.new_policy("policy", 0)
        self.world.new_critic("critic", "policy")
        for name, lengths in (("ragged", None), ("distinct", DISTINCT)):
            self.world.write_rollouts(*([lengths] if lengths else []))
            self.estimate(name, without_advantages=name == "distinct")
            for table in ("rollouts", "rewards"):
                shutil.move(root / table, root / f"{name}-{table}")
        self.calls: list[dict[str, Any]] = []

    def tables(self, name: str) -> dict[str, Path]:
        return {table: self.world.root / f"{name}-{table}" for table in ("rollouts", "rewards")}

    def estimate(self, name: str, *, without_advantages: bool) -> None:
        """EXPERIENCE of the world's rollouts."""
        tables = {table: self.world.root / table for table in ("rollouts", "rewards")}
        path = self.world.root / f"{name}-experience"
        advantages(Advantages(alpha=0.3), **tables, critic=self.world.critic, experience=path, iteration=1)
        if without_advantages:
            table = read_table(path, EXPERIENCE)
            columns: dict[str, Any] = {column: table[column] for column in table.column_names}
            values, offsets = ragged(table, "advantages")
            write_table(path, EXPERIENCE, {**columns, "advantages": (np.zeros_like(values), offsets)})

    def update(
        self, name: str, train: dict[str, Any], settings: dict[str, Any], *, after: str = "", alone: bool = False
    ) -> None:
        """An update called `name`, of the models that the one called `after` left; on two ranks unless `alone`."""
        of, root = "distinct" if "positive_lm_coef" in settings else "ragged", self.world.root
        ranks = {} if alone else {"ranks": 2}
        section = PpoUpdate(actor_lr=1e-2, critic_lr=1e-2, train=Train(**train, **ranks), **settings)
        source = {kind: root / (f"{after}-{kind}" if after else kind) for kind in ("policy", "critic")}
        paths = {
            **self.tables(of),
            **source,
            "experience": root / f"{of}-experience",
            "reference": self.world.policy,
            "new_policy": root / f"{name}-policy",
            "new_critic": root / f"{name}-critic",
        }
        parameters = {"iteration": 2 if after else 1, "seed": 0, "store": self.world.objects}
        if alone:
            found = ppo_update(section, **paths, **parameters)
            (root / f"{name}.json").write_text(json.dumps(found))
        else:
            self.call(name, "ppo_update", section, paths, parameters)

    def call(self, name: str, stage: str, section: Any, paths: dict[str, Path], parameters: dict[str, Any]) -> None:
        """Have a stage run on two ranks."""
        places = {key: str(path) for key, path in paths.items()}
        data = {"name": name, "stage": stage, "section": section.model_dump(mode="json"), "paths": places}
        self.calls.append({**data, "parameters": parameters})

    def run(self) -> None:
        """Do all calls, one after the other, in the same two processes."""
        job = self.world.root / "JOB.json"
        job.write_text(json.dumps(self.calls))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [*torchrun, "--nproc-per-node", "2", str(Path(__file__).parent / "on_ranks.py"), str(job)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600)
        assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-6000:])

    def metrics(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.world.root / f"{name}.json").read_text())
        return found

    def weights(self, name: str) -> torch.Tensor:
        """All parameters of a checkpoint, one after the other."""
        parameters = self.world.model(name).state_dict()
        return torch.cat([parameters[key].float().flatten() for key in sorted(parameters)])

    def files(self, name: str) -> dict[str, str]:
        """Path -> sha256 of a checkpoint's files."""
        return {file.path: file.sha256 for file in self.world.manifest(name).files}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Everything that these tests look at, from one start of two processes."""
    bench = Bench(tmp_path_factory.mktemp("engines"))
    bench.update("alone", {}, SEVERAL, alone=True)
    for name, train in FP32.items():
        bench.update(f"several-{name}", train, SEVERAL)
    for name, train in BF16.items():
        bench.update(f"first-ratio-{name}", train, AT_ONCE)
    bench.update("first-ratio-alone", {}, AT_ONCE, alone=True)
    for name, train in RESUMED.items():
        bench.update(f"whole-{name}", train, {**LM_ONLY, "epochs": 2})
        bench.update(f"begun-{name}", train, LM_ONLY)
        bench.update(f"resumed-{name}", train, LM_ONLY, after=f"begun-{name}")
    bench.update("begun-alone", {}, LM_ONLY, alone=True)
    for name in ("zero2", "zero3"):
        bench.update(f"sharded-{name}", ZERO[name], LM_ONLY, after="begun-alone")
    bench.update("lora-alone", LORA, SEVERAL, alone=True)
    bench.update("lora-torch", LORA, SEVERAL)
    bench.update("lora-zero3", {**LORA, **ZERO["zero3"]}, SEVERAL)
    root, parameters = bench.world.root, {"seed": 0, "store": bench.world.objects}
    for name, train in (("torch", {}), ("zero1", ZERO["zero1"]), ("zero3", ZERO["zero3"])):
        paths = {"policy": bench.world.policy, "critic": root / f"pretrained-{name}-critic"}
        paths |= {**bench.tables("ragged"), "pretraining": root / f"pretrained-{name}-table"}
        section = ValuePretraining(**PRETRAIN, train=Train(**train, ranks=2))
        bench.call(f"pretrained-{name}", "value_pretraining", section, paths, parameters)
        paths = {**bench.tables("ragged"), "critic": bench.world.critic, "experience": root / f"{name}-experience"}
        estimated = Advantages(alpha=0.3, token_budget=60, train=Train(**train, ranks=2))
        bench.call(f"estimated-{name}", "advantages", estimated, paths, {"iteration": 1})
    bench.run()
    yield bench
    shutil.rmtree(root)


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_take_the_steps_of_one(bench: Bench, name: str) -> None:
    """Three steps of actor and critic on ragged rows: the same parameters to 1e-5, and the same norms and losses."""
    alone, found = bench.metrics("alone"), bench.metrics(f"several-{name}")
    assert found["steps"] == alone["steps"] == 3
    for metric in METRICS:
        assert found[metric] == pytest.approx(alone[metric], rel=1e-5, abs=1e-6), metric
    assert alone["actor_grad_norm"] > 1.05  # some are clipped
    for kind in ("policy", "critic"):
        whole = bench.weights(f"alone-{kind}")
        assert (whole - bench.weights(kind)).abs().max() > 1e-2
        torch.testing.assert_close(bench.weights(f"several-{name}-{kind}"), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BF16)
def test_bf16_begins_with_a_ratio_of_1_and_keeps_float32_masters(bench: Bench, name: str) -> None:
    """The step goes where float32's goes; the checkpoint is bfloat16, the masters beside it round to it."""
    found, alone = bench.metrics(f"first-ratio-{name}"), bench.metrics("first-ratio-alone")
    assert found["approx_kl"] == 0.0
    assert found["clip_fraction_low"] == found["clip_fraction_high"] == 0.0
    for norm in ("actor_grad_norm", "critic_grad_norm"):
        assert found[norm] == pytest.approx(alone[norm], rel=0.05)
    for kind in ("policy", "critic"):
        new, of_alone, before = (
            bench.weights(f"{run}{kind}") for run in (f"first-ratio-{name}-", "first-ratio-alone-", "")
        )
        moves = torch.stack([new - before, of_alone - before])
        assert torch.corrcoef(moves)[0, 1] > 0.9
        folder = open_checkpoint(
            bench.world.manifest(f"first-ratio-{name}-{kind}"), bench.world.root / f"{name}-{kind}"
        )
        weights = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        parts: dict[str, list[torch.Tensor]] = {}
        for path in sorted((folder / "optimizer").glob("*.safetensors")):
            for entry, tensor in load_file(path).items():
                assert tensor.dtype == torch.float32
                parts.setdefault(entry, []).append(tensor)
        masters = {name: torch.cat(parts[f"{name}/weight"]) for name in weights}
        assert any((master != master.bfloat16().float()).any() for master in masters.values())
        for entry, tensor in weights.items():
            assert torch.equal(masters[entry].bfloat16(), tensor.flatten())


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_uninterrupted_to_the_bit(bench: Bench, name: str) -> None:
    """Two steps in one update, or one, a checkpoint, and one more: every file is the same but the cursor's."""
    assert bench.metrics(f"resumed-{name}")["steps"] == 2
    for kind in ("policy", "critic"):
        whole, resumed = (bench.files(f"{run}-{name}-{kind}") for run in ("whole", "resumed"))
        cursors = {files.pop("optimizer/state.json") for files in (whole, resumed)}
        assert len(cursors) == 2
        assert resumed == whole
        assert bench.files(f"begun-{name}-{kind}")["model.safetensors"] != whole["model.safetensors"]
        ranks = [path for path in whole if path.startswith("optimizer/rank-")]
        assert len(ranks) == (1 if name == "torch" else 2)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_another_number_of_ranks_goes_on_from_the_state(bench: Bench, name: str) -> None:
    """From one rank to two, and from two to one: the moments are cut anew."""
    bench.update(f"gathered-{name}", {}, LM_ONLY, after=f"begun-{name}", alone=True)
    for kind in ("policy", "critic"):
        expected = bench.weights(f"whole-torch-{kind}")
        for way in ("sharded", "gathered"):
            assert bench.metrics(f"{way}-{name}")["steps"] == 2
            torch.testing.assert_close(bench.weights(f"{way}-{name}-{kind}"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lora-torch", "lora-zero3"])
def test_adapters_on_two_ranks_are_those_of_one(bench: Bench, name: str) -> None:
    for kind in ("policy", "critic"):
        alone, before = bench.weights(f"lora-alone-{kind}"), bench.weights(kind)
        assert (alone - before).abs().max() > 1e-3
        torch.testing.assert_close(bench.weights(f"{name}-{kind}"), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "zero1", "zero3"])
def test_value_pretraining_on_two_ranks_is_that_of_one(bench: Bench, name: str) -> None:
    root = bench.world.root
    places = {"critic": root / "pretrained-alone-critic", "pretraining": root / "pretrained-alone-table"}
    tables = bench.tables("ragged")
    section = ValuePretraining(**PRETRAIN)
    alone = value_pretraining(section, **tables, policy=bench.world.policy, **places, seed=0, store=bench.world.objects)
    found = bench.metrics(f"pretrained-{name}")
    assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(
        bench.weights(f"pretrained-{name}-critic"), bench.weights("pretrained-alone-critic"), rtol=0, atol=1e-5
    )
    rows = [read_table(root / f"pretrained-{run}-table", PRETRAINING).to_pylist() for run in ("alone", name)]
    assert [(row["step"], row["rows"]) for row in rows[0]] == [(row["step"], row["rows"]) for row in rows[1]]
    losses = [[row["value_loss"] for row in table] for table in rows]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "zero1", "zero3"])
def test_values_on_two_ranks_are_those_of_one(bench: Bench, name: str) -> None:
    root = bench.world.root
    for column in ("values", "advantages", "value_targets"):
        found, expected = (
            ragged(read_table(root / f"{run}-experience", EXPERIENCE), column)[0] for run in (name, "ragged")
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.std(found) > 0.1
