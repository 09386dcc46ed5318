"""The models: padded and joined rows give what each row gives alone, and a value stands before its token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vapo.errors import UserError
from vapo.train.batches import MicroBatch, micro_batches
from vapo.train.experience import Rollouts, values_of
from vapo.train.models import (
    Checkpoint,
    check_same_tokenizer,
    critic_from_policy,
    load_policy,
    response_logprobs,
    response_values,
    write_model,
)

from .conftest import World


def one_batch(data: Rollouts, budget: int = 10**6) -> MicroBatch:
    (batch,) = micro_batches(data.prompts, data.responses, np.arange(len(data)), budget)
    return batch


@torch.no_grad()
def test_logprobs_and_entropy_of_a_batch_are_those_of_each_row(world: World) -> None:
    policy, data = world.model("policy"), world.data
    batch = one_batch(data)
    logprobs, entropy = response_logprobs(policy, batch)
    at = 0
    for row in batch.rows:
        prompt, response = data.prompts[row], data.responses[row]
        logits = policy(torch.from_numpy(np.concatenate([prompt, response]))[None].long()).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        part = slice(at, at + len(response))
        chosen = expected.gather(-1, torch.tensor(response)[:, None].long())[:, 0]
        torch.testing.assert_close(logprobs[part], chosen, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy[part], -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)
        at += len(response)
    assert at == len(batch)


@torch.no_grad()
def test_values_of_a_batch_are_those_of_each_row(world: World) -> None:
    critic, data = world.model("critic"), world.data
    found = values_of(world.reader("critic"), data, np.arange(len(data)), 10**6)
    for row, values in enumerate(found):
        sequence = torch.from_numpy(np.concatenate([data.prompts[row], data.responses[row]]))[None].long()
        expected = critic(sequence).logits[0, len(data.prompts[row]) - 1 : -1, 0]
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert np.std(np.concatenate(found)) > 0.05


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_values_do_not_depend_on_the_budget(world: World, budget: int) -> None:
    critic, data = world.reader("critic"), world.data
    whole = values_of(critic, data, np.arange(len(data)), 200)
    for one, other in zip(values_of(critic, data, np.arange(len(data)), budget), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_values_of_some_rows_leave_the_others_empty(world: World) -> None:
    found = values_of(world.reader("critic"), world.data, np.array([8, 2]), 10**6)
    assert [len(v) for v in found] == [0, 0, 12, 0, 0, 0, 0, 0, 20, 0, 0, 0]


@torch.no_grad()
def test_a_value_does_not_know_the_token_it_stands_before(world: World) -> None:
    """values[t] is V before token t: changing tokens t and later leaves values up to t as they were."""
    critic, data = world.reader("critic"), world.data
    before = values_of(critic, data, np.array([8]), 10**6)[8]
    changed = data.responses[8].copy()
    changed[6:] = 21 - np.maximum(changed[6:], 2)  # another token everywhere
    assert (changed[6:] != data.responses[8][6:]).all()
    data.responses[8] = changed
    after = values_of(critic, data, np.array([8]), 10**6)[8]
    np.testing.assert_array_equal(after[:7], before[:7])
    assert (after[7:] != before[7:]).all()


@torch.no_grad()
def test_a_new_critic_is_the_policys_backbone_and_values_everything_at_0(world: World) -> None:
    with Checkpoint(world.policy, "policy") as source:
        critic: Any = critic_from_policy(source.folder)
    policy = world.model("policy")
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(critic.model.state_dict()[name], tensor)
    values = response_values(critic, one_batch(world.data))
    assert values.dtype == torch.float32
    assert not values.any()


def test_a_critic_comes_back_as_it_was_saved(world: World) -> None:
    with Checkpoint(world.policy, "policy") as source:
        fresh: Any = critic_from_policy(source.folder)
    loaded = world.model("zero_critic")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.score.weight.dtype == torch.float32


def test_a_saved_model_keeps_the_tokenizer_and_its_chat_template(world: World, tmp_path: Path) -> None:
    with Checkpoint(world.policy, "policy") as source:
        folder = Path(shutil.copytree(source.folder, tmp_path / "copy"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    model = load_policy(folder)
    write_model(model, tmp_path / "saved", weights=dict(model.named_parameters()), tokenizer=folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


@torch.no_grad()
def test_every_dropout_is_off(world: World, tmp_path: Path) -> None:
    """Also where the checkpoint's configuration asks for one: the first ratio must be exactly 1."""
    with Checkpoint(world.policy, "policy") as source:
        folder = Path(shutil.copytree(source.folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    dropouts = {"attention_dropout": 0.9, "classifier_dropout": 0.9, "hidden_dropout": 0.9}
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    batch = one_batch(world.data)
    policy, critic = load_policy(folder), critic_from_policy(folder)
    assert policy.config.attention_dropout == 0.9
    assert torch.equal(response_logprobs(policy, batch)[0], response_logprobs(policy, batch)[0])
    torch.nn.init.ones_(critic.score.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(response_values(critic, batch), response_values(critic, batch))
    assert not any(module.training for net in (policy, critic) for module in net.modules())


def test_tokenizers_must_be_the_same(world: World) -> None:
    world.new_policy("other", 0, ["w0", "another", "vocabulary"])
    world.new_critic("other_critic", "other")
    with Checkpoint(world.policy, "policy") as policy, Checkpoint(world.critic, "critic") as critic:
        check_same_tokenizer(policy, critic)
        with (
            Checkpoint(world.other_critic, "critic") as other,
            pytest.raises(UserError, match=r"different tokenizers .* pretrain the critic from this policy"),
        ):
            check_same_tokenizer(policy, other)


def test_a_checkpoints_folder_is_gone_afterwards(world: World) -> None:
    with Checkpoint(world.policy, "policy") as source:
        assert (source.folder / "model.safetensors").is_file()
    assert not source.folder.exists()
