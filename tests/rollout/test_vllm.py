"""The real vLLM against transformers: the same distribution, the same ends, seeds that hold, and errors with a cure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.running import ROOT, environment, marked, vllm_wants
from vapo.recipe import Rollout

from .conftest import EOS
from .policies import execute_to_end, executing, make_place, make_policy, parts_in, ragged_texts, rollout_job

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_wants()), reason=vllm_wants()),
]

SECTION = Rollout(engine="vllm", samples=4, max_new_tokens=24, batch_size=64)
LENGTHS = (1, 5, 17, 130, 3, 40, *[200] * 12)  # 2400 tokens in the last ones: more than vLLM reads in one step
PROMPTS = [[2 + (7 * i + k * (i + 3)) % 20 for k in range(n)] for i, n in enumerate(LENGTHS)]
SEEDS = np.random.default_rng(1).integers(0, 2**64, size=4 * len(PROMPTS), dtype=np.uint64)


def session(folder: Path, scratch: Path, section: Rollout = SECTION, **calls: dict[str, Any]) -> dict[str, list[Any]]:
    """Responses of each call to one engine."""
    plain = {"prompts": PROMPTS, "seeds": SEEDS.tolist(), "temperature": 1.0, "top_p": 1.0}
    asked = {
        "folder": str(folder),
        "section": section.model_dump(),
        "max_length": 256,
        "stop_token": EOS,
        "calls": [{**plain, **call} for call in calls.values()],
    }
    (scratch / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tests.rollout.vllm_session", scratch / "asked.json", scratch / "answers.json"]
    environ = {**environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=300)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-5000:])
    return dict(zip(calls, json.loads((scratch / "answers.json").read_text()), strict=True))


def gap(folder: Path, responses: list[Any], prompts: list[list[int]] = PROMPTS) -> float:
    """The largest difference to the logprobs of transformers' float32 forward, which knows nothing of top_p."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    with torch.inference_mode():
        for row, response in enumerate(responses):
            prompt, tokens = prompts[row // (len(responses) // len(prompts))], response["tokens"]
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            worst = max(worst, float((expected - torch.tensor(response["logprobs"])).abs().max()))
    return worst


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_policy("llama", folder)
    return folder


@pytest.fixture(scope="module")
def sampled(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What one float32 engine answers."""
    few = {"prompts": PROMPTS[2:4], "seeds": SEEDS[8:16].tolist()}
    calls = {"first": {}, "few": few, "again": {}, "other": {"seeds": (SEEDS + np.uint64(2)).tolist()}}
    greedy = {"greedy": {"temperature": 0.0}, "nucleus": {"top_p": 0.5}, "warm": {"temperature": 2.0}}
    return session(policy, tmp_path_factory.mktemp("session"), **calls, **greedy)


def test_logprobs_are_those_of_transformers(policy: Path, sampled: dict[str, list[Any]]) -> None:
    """float32, whatever temperature and top_p choose from: the model's own distribution."""
    for call in ("first", "greedy", "nucleus", "warm"):
        assert gap(policy, sampled[call]) < 1e-4, call


def test_responses_end_as_they_say(sampled: dict[str, list[Any]]) -> None:
    """The stop token is the last one of a response that stopped, and stands nowhere else."""
    reasons = {"stop": 0, "length": 0}
    for response in (*sampled["first"], *sampled["other"]):
        tokens = response["tokens"]
        reasons[response["finish_reason"]] += 1
        assert len(tokens) == len(response["logprobs"])
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (response["finish_reason"] == "stop")
        assert len(tokens) == 24 or tokens[-1] == EOS
    assert min(reasons.values()) > 10, reasons


def test_a_seed_is_a_response(sampled: dict[str, list[Any]]) -> None:
    """The same requests give the same bits; one seed gives the same tokens in other company, another seed others."""
    assert sampled["again"] == sampled["first"]
    for alone, among in zip(sampled["few"], sampled["first"][8:16], strict=True):
        assert alone["tokens"] == among["tokens"]
        np.testing.assert_allclose(alone["logprobs"], among["logprobs"], atol=1e-5)
    tokens = [tuple(r["tokens"]) for r in (*sampled["first"], *sampled["other"])]
    long = [t for t in tokens if len(t) > 8]
    assert len(set(long)) == len(long) > 50


def test_greedy_and_top_p(policy: Path, sampled: dict[str, list[Any]]) -> None:
    """Temperature 0 takes the most likely token; top_p 0.5 only tokens from the most likely half of the mass."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    for row, response in enumerate(sampled["greedy"]):
        assert response["tokens"] == sampled["greedy"][row // 4 * 4]["tokens"]
    outside = {"nucleus": 0, "first": 0}
    with torch.inference_mode():
        for row in range(len(SEEDS)):
            prompt = PROMPTS[row // 4]
            tokens = torch.tensor(sampled["greedy"][row]["tokens"])
            logits = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(-1, tokens[:, None])[:, 0]
            assert (logits.max(-1).values - chosen < 1e-4).all()
            for call in outside:
                tokens = torch.tensor(sampled[call][row]["tokens"])
                logits = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
                p = logits.softmax(-1)
                above = torch.where(p > p.gather(-1, tokens[:, None]), p, 0.0).sum(-1)
                outside[call] += int((above > 0.5 + 1e-4).sum())
    assert outside["nucleus"] == 0
    assert outside["first"] > 100


def test_samples_follow_the_distribution(policy: Path, sampled: dict[str, list[Any]]) -> None:
    """The mean logprob of the sampled tokens is minus the mean entropy, within five standard errors."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    surplus = []
    with torch.inference_mode():
        for row, response in enumerate(sampled["first"]):
            prompt = PROMPTS[row // 4]
            logits = model(torch.tensor([prompt + response["tokens"]])).logits[0, len(prompt) - 1 : -1]
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            surplus.append(torch.tensor(response["logprobs"]) + entropy)
    values = torch.cat(surplus)
    assert abs(values.mean()) < 5 * values.std() / len(values) ** 0.5


def test_bfloat16_and_tied_embeddings(tmp_path: Path) -> None:
    """A Qwen2 checkpoint with grouped heads: the gap is that of the dtype, and it is there."""
    make_policy("qwen2", tmp_path / "model")
    section = SECTION.model_copy(update={"dtype": "bfloat16"})
    found = session(tmp_path / "model", tmp_path, section, first={})
    assert 1e-4 < gap(tmp_path / "model", found["first"]) < 0.25


def test_resume_after_kill(policy: Path, tmp_path: Path) -> None:
    """kill -9 of a stage between its parts: the table is byte for byte that of an undisturbed one."""
    place = make_place(policy, tmp_path / "place", ragged_texts(64))
    section = Rollout(engine="vllm", prompts=64, samples=4, max_new_tokens=100, batch_size=16, record_batch=16)
    execute_to_end(rollout_job(place, "undisturbed", section), tmp_path / "other")
    partial = tmp_path / "partial"
    with executing(rollout_job(place, "killed", section), partial) as process:
        while len(parts_in(partial)) < 3:
            assert process.poll() is None, (place / "killed/log.txt").read_text()[-3000:]
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not marked(process.mark)
    assert 3 <= len(parts_in(partial)) < 16
    execute_to_end(rollout_job(place, "resumed", section), partial)
    assert (place / "resumed/rollouts").read_bytes() == (place / "undisturbed/rollouts").read_bytes()
    assert not list(partial.iterdir())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tensor_parallel": 3}, r"heads \(2\) must be divisible .*: lower rollout.tensor_parallel"),
        ({"gpu_memory": 1.0}, r"less than desired .*: lower rollout.gpu_memory"),
    ],
)
def test_an_engine_that_cannot_start(policy: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    place = make_place(policy, tmp_path / "place", ragged_texts(4))
    section = SECTION.model_copy(update={"prompts": 4, **changed})
    with executing(rollout_job(place, "refused", section), tmp_path / "partial") as process:
        assert process.wait(timeout=300) != 0
    errors = [json.loads(line) for line in (place / "refused/log.txt").read_text().splitlines() if '"error"' in line]
    assert errors[0]["user"]
    assert re.search(words, errors[0]["message"])
    assert "\n" not in errors[0]["message"]
