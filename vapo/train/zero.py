"""DeepSpeed: ZeRO 0 to 3, CPU offload and bfloat16 with float32 master weights, behind the engine's interface.

DeepSpeed averages gradients over ranks; our losses are shares of a sum, so they go in times the number of ranks. One
DeepSpeed "accumulation step" is one mini-batch, however many micro-batches that is: the last one is marked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vapo import recipe
from vapo.train.engine import Engine, Reader, Turn
from vapo.train.models import Forward
from vapo.train.optimizer import BETAS, MOMENTS, check_norm, warmed_up
from vapo.train.ranks import count, device, rank
from vapo.train.state import Fragment, State

BUCKET = 2**28  # elements that ranks exchange at once, at most
ALIGNED = 1024  # buckets are multiples of this
PERSISTENT = 100_000  # elements of a parameter that is not worth gathering with ZeRO-3, at most


class ZeroEngine(Engine):
    """A model that DeepSpeed trains."""

    def __init__(
        self,
        module: Forward,
        train: recipe.Train,
        *,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        max_grad_norm: float,
    ) -> None:
        super().__init__(module, train, in_step=True)
        self.stage, self.bf16 = train.zero_stage, train.dtype == "bf16"
        self.lr, self.warmup_steps, self.max_grad_norm = lr, warmup_steps, max_grad_norm
        self.steps = 0
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.adamw = torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
        config = {**_config(module, train), "gradient_clipping": max_grad_norm if self.stage else 0.0}
        self.module, *_ = _deepspeed().initialize(
            model=module, optimizer=self.adamw, config=config, dist_init_required=False
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The model's parameters by the names that the model gives them."""
        return dict(self.module.module.model.named_parameters())

    def backward(self, loss: Tensor, turn: Turn) -> None:
        """Add a loss's gradient; with the last turn it is added up over the ranks."""
        self.module.set_gradient_accumulation_boundary(turn.last)
        self.module.backward(loss * count(), scale_wrt_gas=False)

    def step(self, *, batch: str) -> float:
        """See Engine. The weights in memory are spoilt where the gradient is not finite; nothing is saved then."""
        for group in self.adamw.param_groups:
            group["lr"] = warmed_up(self.lr, self.steps, self.warmup_steps)
        norm = 0.0
        if not self.stage:  # DeepSpeed would clip, but does not tell the norm
            norm = float(nn.utils.clip_grad_norm_(self.adamw.param_groups[0]["params"], self.max_grad_norm))
            check_norm(norm, self.steps + 1, batch, self.lr)
        self.module.step()
        if self.stage:
            norm = float(self.module.get_global_grad_norm())
            check_norm(norm, self.steps + 1, batch, self.lr)
        self.steps += 1
        return norm

    def weights(self) -> dict[str, Tensor]:
        """See Engine; copies on the CPU."""
        import deepspeed

        found = {}
        for name, parameter in self.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if rank() == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found

    def fragments(self, *, weights: bool) -> Iterator[Fragment]:
        """This rank's shards; with ZeRO-0 every rank has all, and rank 0 tells it."""
        for name, start, flat, part in self._shards():
            tensors = {key: self.adamw.state[flat][key].flatten()[part] for key in MOMENTS}
            yield Fragment(
                name, start, {**tensors, **({"weight": flat.flatten()[part]} if weights or self.bf16 else {})}
            )

    def restore(self, state: State) -> None:
        """See Engine."""
        self.steps = int(state.facts["steps"])
        for name, start, flat, part in self._shards(everywhere=True):
            if flat not in self.adamw.state:
                moments = {key: torch.zeros_like(flat) for key in MOMENTS}
                self.adamw.state[flat] = {"step": torch.tensor(float(self.steps), device=flat.device), **moments}
            length = part.stop - part.start
            for key in MOMENTS:
                self.adamw.state[flat][key].view(-1)[part] = state.read(name, key, start, length).to(flat.device)
            if f"{name}/weight" in state:
                flat.data.view(-1)[part] = state.read(name, "weight", start, length).to(flat.device)

    def forget(self) -> None:
        """See Engine."""
        self.adamw.state.clear()
        self.steps = 0

    def close(self) -> None:
        """See Reader. DeepSpeed's optimiser outlives its engine: hooks in C++ hold it, so its buffers are emptied."""
        buffers = _tensors_in(vars(self.module.optimizer))
        self.module.destroy()
        self.adamw.state.clear()
        for tensor in buffers:
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)
        super().close()

    def _shards(self, *, everywhere: bool = False) -> Iterator[tuple[str, int, Any, slice]]:
        """This rank's part of each trained parameter: name, where it begins, the flat masters it is in, and where."""
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue
            if self.stage == 0:
                if rank() == 0 or everywhere:
                    yield name, 0, parameter, slice(0, parameter.numel())
            elif self.stage == 3:
                zero = self.module.optimizer
                group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = rank() * length
                real = min(length, parameter.ds_numel - start)  # the last shards are padded
                if real > 0:
                    yield name, start, zero.fp32_partitioned_groups_flat[group], slice(offset, offset + real)
            elif parameter._hp_mapping is not None:
                (flat,) = self.adamw.param_groups[0]["params"]
                own, master = (parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address)
                yield name, own.start, flat, slice(master.start, master.start + master.numel)


def _tensors_in(found: Any) -> list[Tensor]:
    """Every tensor in a value made of dictionaries and sequences."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [tensor for part in found for tensor in _tensors_in(part)]
    return [found] if isinstance(found, Tensor) else []


def zero_reader(module: Forward, train: recipe.Train) -> Reader:
    """A model that is only read: sharded with ZeRO-3, whole on every rank otherwise."""
    if train.dtype == "bf16":
        module.to(torch.bfloat16)
    if train.zero_stage < 3:
        return Reader(module.to(device()), train)
    reader = Reader(module, train, in_step=True)
    reader.module, *_ = _deepspeed().initialize(model=module, config=_config(module, train), dist_init_required=False)
    return reader


def _config(module: nn.Module, train: recipe.Train) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    elements = sum(parameter.numel() for parameter in module.parameters())
    bucket = min(BUCKET, -(-elements // ALIGNED) * ALIGNED)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": min(PERSISTENT, elements // 100),
    }
    if train.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if train.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _deepspeed() -> Any:
    """DeepSpeed, quiet, on the accelerator there is, and without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # On a CPU it would compile an exchange through shared memory at the first use (minutes, and a C++ compiler).
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed
