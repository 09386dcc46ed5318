"""Shapes, time, bytes, fits and the printed plan: known numbers, and what must hold whatever the assumptions are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.running import assert_refused, vapo
from vapo.errors import UserError
from vapo.plan.fit import advice, changed, choices, fits, positions_of, smallest_parallel, smallest_stage, trains
from vapo.plan.hardware import hardware, sources
from vapo.plan.memory import activations, kv_bytes, learner, sampler
from vapo.plan.models import PUBLISHED, shape_from, shape_of
from vapo.plan.store import checkpoint, iteration
from vapo.plan.text import as_json, plan, show
from vapo.plan.throughput import Lengths, forward_flops, lengths_of, sampling, through
from vapo.plan.time import times
from vapo.recipe import Recipe, Train, load_recipe

MACHINE = hardware()
LARGE = load_recipe("qwen2.5_32b_aime")
SHAPE = shape_of(LARGE)


def test_parameters_of_what_is_published() -> None:
    """The sums of the published checkpoints' tensors."""
    assert SHAPE.parameters() == 32_763_876_352
    assert shape_of(_with_model("models/Qwen2.5-0.5B")).parameters() == 494_032_768
    assert shape_of(_with_model("Qwen2.5-7B")).parameters() == 7_615_616_512
    assert SHAPE.parameters("critic") == SHAPE.parameters() - SHAPE.embedding + SHAPE.hidden + 1
    assert len(PUBLISHED) == 7


def _with_model(path: str) -> Recipe:
    return Recipe.model_validate({"problems": {"source": "file", "path": "x"}, "base_model": {"path": path}})


def test_a_folder_says_more_than_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10, "model_type": "llama"}))
    assert shape_of(_with_model(str(folder))).parameters() == 2 * 80 + 4 * 64 + 3 * 32 + 16 + 8
    with pytest.raises(UserError, match=r"no config.json.*Qwen2.5-32B.*give the folder"):
        shape_of(_with_model("models/Unheard-Of"))
    with pytest.raises(UserError, match="'mixtral' is none of"):
        shape_from({"model_type": "mixtral"}, "it")


def test_zero_shares_what_its_paper_says() -> None:
    """ZeRO (arXiv 1910.02054, section 3): 2 + 2 + 12 bytes for a parameter; gradients here are summed in float32."""
    n, ranks = SHAPE.parameters(), 32
    train = changed(LARGE, activation_checkpointing=True).train
    of = {s: learner(SHAPE, "policy", train.model_copy(update={"zero_stage": s}), ranks, 1000) for s in (1, 2, 3)}
    assert of[1].optimizer == of[2].optimizer == of[3].optimizer == pytest.approx(12 * n / ranks)
    assert of[2].gradients == of[3].gradients == pytest.approx(4 * n / ranks)
    assert of[1].weights == of[2].weights == 2 * n
    assert of[3].weights == pytest.approx(2 * n / ranks, rel=0.01)
    offloaded = learner(SHAPE, "policy", train.model_copy(update={"offload": "cpu"}), ranks, 1000)
    assert offloaded.optimizer == 0
    assert offloaded.host >= 12 * n / ranks


def test_kv_cache_of_the_published_model() -> None:
    """64 layers x 8 heads x 128 numbers x (key, value) x 2 bytes."""
    assert kv_bytes(SHAPE) == 262_144
    found = sampler(SHAPE, 4, 2, 80e9, 0.9, 4e9)
    assert found.peak == pytest.approx(72e9)
    assert sampler(SHAPE, 1, 2, 80e9, 0.9, 4e9).kv_cache == pytest.approx(72e9 - 4e9 - 65.53e9, rel=0.01)


def test_activations_grow_with_positions_and_shrink_with_checkpointing() -> None:
    train, lean = (Train(activation_checkpointing=on) for on in (False, True))
    kept = [activations(SHAPE, "critic", train, p)[0] for p in (1000, 2000)]
    assert kept[1] == pytest.approx(2 * kept[0])
    assert activations(SHAPE, "critic", lean, 1000)[0] < kept[0] / 10


def test_flops_are_two_for_each_number_in_a_matrix() -> None:
    n = SHAPE.parameters() - SHAPE.embedding  # the embedding is looked up
    assert forward_flops(SHAPE, "policy", 0) == pytest.approx(2 * n, rel=1e-3)
    assert forward_flops(SHAPE, "policy", 4096) - forward_flops(SHAPE, "policy", 0) == 4 * 64 * 5120 * 4096


def test_more_gpus_take_less_time_but_not_in_proportion() -> None:
    seconds = [found.days for found in choices(LARGE, SHAPE, MACHINE) if found.zero_stage is not None]
    shares = [found.orchestration for found in choices(LARGE, SHAPE, MACHINE) if found.zero_stage is not None]
    assert seconds == sorted(seconds, reverse=True)
    assert all(a < 2 * b for a, b in zip(seconds, seconds[1:], strict=False))
    assert shares == sorted(shares)


def test_a_stage_never_beats_the_hardware() -> None:
    found = times(LARGE, SHAPE, MACHINE)
    for stage in found.all:
        if "model FLOP utilisation" in stage.facts:
            assert 0 < stage.facts["model FLOP utilisation"] <= MACHINE.use.reading
    lengths = lengths_of(LARGE.rollout, MACHINE)
    work = sampling(SHAPE, LARGE.rollout, MACHINE, rows=8192, lengths=lengths, tensor_parallel=4)
    read = 8192 / work.together * lengths.mean * SHAPE.parameters() * 2
    assert work.seconds > read / (4 * MACHINE.gpu.bandwidth)
    assert found.seconds == pytest.approx(sum(s.times * (s.work + s.orchestration) for s in found.all))


def test_work_is_proportional_to_tokens() -> None:
    settings: dict[str, Any] = {"gpus": 32, "mini_batch": 512, "budget": 16384, "learns": 1}
    one, two = (
        through(SHAPE, "critic", LARGE.train, MACHINE, rows=rows, lengths=Lengths(150, 7000, 20480), **settings)
        for rows in (8192, 16384)
    )
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert one.communication < one.seconds


def test_bytes_in_the_store() -> None:
    n = SHAPE.parameters()
    saved = checkpoint(SHAPE, "policy", LARGE.train)
    assert (saved.model, saved.state) == (2 * n, 12 * n)
    assert checkpoint(SHAPE, "policy", Train()).total == 12 * n
    lora = checkpoint(SHAPE, "policy", Train(lora_rank=8))
    assert lora.state == 12 * SHAPE.adapter_parameters(8, Train().lora_targets)
    found = iteration(LARGE, SHAPE, lengths_of(LARGE.rollout, MACHINE), 4)
    assert found.total == pytest.approx(14 * (n + SHAPE.parameters("critic")), rel=0.01)
    assert found.models < found.total / 6


def test_the_published_run_fits_and_what_does_not_is_cured() -> None:
    assert trains(LARGE, SHAPE, MACHINE)
    assert smallest_stage(LARGE, SHAPE, MACHINE) == 3
    assert smallest_parallel(LARGE, SHAPE, MACHINE) == 2
    assert all(fit.fits for fit in fits(LARGE, SHAPE, MACHINE))
    small = changed(LARGE, nodes=1)
    assert not trains(small, SHAPE, MACHINE)
    (said, _) = advice(small, SHAPE, MACHINE)
    assert said.startswith("training does not fit on 1 x 8 GPUs; it fits with --set train.nodes=1 --set ")
    assert said.endswith("--set train.offload=cpu")
    settings = [part.removeprefix("train.") for part in said.split(" --set ")[1:]]
    cured = changed(small, **{key: _parsed(value) for key, _, value in (part.partition("=") for part in settings)})
    assert trains(cured, SHAPE, MACHINE)
    engine = LARGE.model_copy(update={"rollout": LARGE.rollout.model_copy(update={"tensor_parallel": 1})})
    assert "--set rollout.tensor_parallel=2" in advice(engine, SHAPE, MACHINE)[1]


def _parsed(value: str) -> Any:
    return int(value) if value.isdecimal() else {"True": True}.get(value, value)


def test_a_micro_batch_is_never_larger_than_its_rows() -> None:
    longest = LARGE.rollout.max_new_tokens + MACHINE.lengths.prompt
    assert positions_of(LARGE, 16384, 512, MACHINE) == longest
    assert positions_of(LARGE, 10**6, 4, MACHINE) == 4 * longest
    assert positions_of(LARGE, 10**6, 512, MACHINE) == 10**6


def test_every_assumption_has_a_source(tmp_path: Path) -> None:
    assert all(source for source in sources().values())
    assert {"gpu.bandwidth", "use.training", "lengths.response_share"} <= sources().keys()
    own = tmp_path / "mine.toml"
    own.write_text("[gpu]\nmemory = 141e9\n[use]\ntraining = {value = 0.4, source = 'measured'}\n")
    assert hardware(own).gpu.memory == 141e9
    assert hardware(own).use.training == 0.4
    assert hardware(own).gpu.bandwidth == MACHINE.gpu.bandwidth
    own.write_text("[gpu]\nmemroy = 1\n")
    with pytest.raises(UserError, match=r"gpu.memroy = 1: expected a number for one of .*memory"):
        hardware(own)
    own.write_text("memory = 1\n")
    with pytest.raises(UserError, match="cannot be read"):
        hardware(own)


def test_lines_are_at_most_100_characters_wide(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    show(plan(LARGE, MACHINE, [], 1, []), Console(width=100))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "orchestration" in printed
    assert "train.zero_stage 3 is the smallest that fits on 4 x 8 GPUs" in printed
    assert "…" not in printed


def test_json_holds_what_is_printed() -> None:
    found = as_json(plan(LARGE, MACHINE, [], 7, []))
    assert found["pods"] == 7
    assert found["orchestration"] == pytest.approx(times(LARGE, SHAPE, MACHINE).orchestration)
    assert {entry["stage"] for entry in found["memory"]} >= {"policy update", "critic update", "rollout"}
    assert json.loads(json.dumps(found)) == found


def test_the_command(tmp_path: Path) -> None:
    """It makes nothing, and answers for a laptop's recipe and for a wrong one."""
    done = vapo("plan", "demo", "--workdir", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    assert "tasks," in done.stdout
    assert not (tmp_path / "none").exists()
    assert_refused(vapo("plan", "demo", "--set", "rollout.prompts=0", "--workdir", tmp_path), "rollout.prompts")
    assert_refused(vapo("plan", "demo", "--hardware", tmp_path / "no.toml"), "--hardware", "no.toml")
