"""What is wrong with the inputs is said before any work, and what to lower when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate, Train, TrainingSection, ValuePretraining
from vapo.train import installed
from vapo.train.checks import check_critic, check_fits, memory_advice
from vapo.train.installed import check_installed
from vapo.train.models import Checkpoint, save_model

from .conftest import World


def test_a_text_beyond_the_models_positions_is_named(world: World) -> None:
    """The model has 64; the second response makes 65 with its prompt of 2."""
    world.write_rollouts([62, 63, 3])
    for kind in ("policy", "critic"):
        with (
            Checkpoint(world.root / kind, kind) as source,
            pytest.raises(UserError, match=rf"up to 65 tokens long, the {kind} has 64 positions: rollouts 1/p0/1;"),
        ):
            check_fits(world.data, source)
    world.write_rollouts([62, 62, 3])
    with Checkpoint(world.policy, "policy") as source:
        check_fits(world.data, source)


def test_a_token_beyond_the_vocabulary_is_named(world: World) -> None:
    world.new_policy("small", 0, ["w0", "w1"])  # with the special tokens 5
    with (
        Checkpoint(world.small, "policy") as source,
        pytest.raises(UserError, match=r"token 19 is beyond the policy's vocabulary of 5: rollouts 1/p0/0, .*another"),
    ):
        check_fits(world.data, source)


def test_vocabularies_must_be_the_same(world: World) -> None:
    """The same tokenizer, but the critic's embedding has more rows."""
    critic: Any = world.model("critic")
    critic.resize_token_embeddings(24)
    with Checkpoint(world.policy, "policy") as policy:
        facts = {"policy": policy.manifest.digest}
        place = world.root / "large_critic"
        save_model(critic, place, kind="critic", store=world.objects, tokenizer=policy.folder, facts=facts)
        with Checkpoint(world.critic, "critic") as own:
            check_critic(policy, own)
        with (
            Checkpoint(place, "critic") as other,
            pytest.raises(UserError, match="the policy has a vocabulary of 20, the critic of 24: pretrain the critic"),
        ):
            check_critic(policy, other)


@pytest.mark.parametrize(
    ("section", "name", "cures"),
    [
        (
            PpoUpdate(token_budget=77),
            "ppo_update",
            [
                "lower ppo_update.token_budget (now 77)",
                "set train.activation_checkpointing to true",
                "set train.engine to 'deepspeed' with train.zero_stage 3",
            ],
        ),
        (
            ValuePretraining(train=Train(engine="deepspeed", zero_stage=1, activation_checkpointing=True)),
            "value_pretraining",
            [
                "lower value_pretraining.token_budget (now 16384)",
                "raise train.zero_stage (now 1)",
                "set train.offload to 'cpu'",
            ],
        ),
        (
            Advantages(train=Train(engine="deepspeed", zero_stage=3, offload="cpu", activation_checkpointing=True)),
            "advantages",
            ["lower advantages.token_budget (now 32768)"],
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(section: TrainingSection, name: str, cures: list[str]) -> None:
    """A real allocation that no machine can serve, and every cure that is still open."""
    with pytest.raises(UserError) as raised, memory_advice(name, section):
        torch.empty(2**56, dtype=torch.uint8)
    assert str(raised.value) == f"{name}: the machine is out of memory: {', or '.join(cures)}"


def test_other_errors_are_not_memorys() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), memory_advice("ppo_update", PpoUpdate()):
        torch.ones(2) + torch.ones(3)


def test_what_is_not_installed_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(Train())
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train.engine 'deepspeed': it is not installed: .*'vapo\[deepspeed\]'"):
        check_installed(Train(engine="deepspeed"))
    with pytest.raises(UserError, match=r"train.lora_rank 8: peft is not installed: pip install 'vapo\[lora\]'"):
        check_installed(Train(lora_rank=8))
    check_installed(Train())
