"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) in shards over the processes. arXiv 1910.02054."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlvr.backend.base import (
    OptimizerSettings,
    TrainedModel,
    check_norm,
    make_optimizer,
    make_schedule,
    parameter_groups,
    trains_by_recomputing,
)
from rlvr.backend.data_parallel import DataParallelBackend
from rlvr.types import InputError

OPTIMIZER_TAG = "zero"


@dataclass
class DeepSpeedBackend(DataParallelBackend):
    """Any number of processes under torchrun; each model (policy, critic) is an engine of its own.

    ``precision``: bf16 and fp16 keep float32 master weights in the optimizer; fp16 scales the loss dynamically.
    """

    zero_stage: int = 2  # 0: nothing in shards | 1: optimizer state | 2: and gradients | 3: and weights
    offload_optimizer: bool = False  # optimizer state and update on the host CPU (stages 1 to 3)
    offload_parameters: bool = False  # weights in host memory, fetched layer by layer (stage 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"zero_stage: got {self.zero_stage}, expected 0, 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise InputError(f"offload_parameters: got true with zero_stage={self.zero_stage}, expected zero_stage=3")
        if (self.offload_optimizer or self.offload_between_phases) and self.zero_stage == 0:
            raise InputError("offload_optimizer, offload_between_phases: got true with zero_stage=0, expected 1, 2 or 3")
        if self.offload_parameters and self.offload_between_phases:
            raise InputError(
                "offload_between_phases: got true with offload_parameters, where the weights are on the host anyway"
            )

    def _autocast(self) -> str:
        return "no"  # the engines hold the weights in the precision themselves

    def _check_device(self, on_cpu: bool) -> None:
        super()._check_device(on_cpu)
        for name in ("offload_optimizer", "offload_parameters"):
            if on_cpu and getattr(self, name):
                raise InputError(f"backend.{name}: got true on the CPU, where there is no device to unload; set it to false")

    def start(self) -> None:
        if find_spec("deepspeed") is None:
            raise InputError(
                "backend: got deepspeed, but it is not installed; pip install 'rlvr[deepspeed]' or use backend=ddp"
            )
        super().start()
        kind = "nccl" if self.device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it also without torchrun
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(kind, store=torch.distributed.HashStore(), rank=0, world_size=1)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch renames; nothing that a user of ours could change.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        deepspeed.init_distributed(dist_backend=kind, dist_init_required=False, verbose=False)

    def stop(self) -> None:
        super().stop()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings, total_updates: int) -> TrainedModel:
        return ShardedModel(self, model, optimizer, total_updates)

    def freeze(self, model: nn.Module) -> Any:
        model = model.eval().requires_grad_(False)
        if self.zero_stage < 3:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
            return model.to(self.device, dtype)
        import deepspeed

        return deepspeed.initialize(model=model, config=self.settings())[0].eval()

    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)

    def settings(self, max_grad_norm: float = 0.0) -> dict[str, Any]:
        """DeepSpeed's own configuration. Batch sizes are ours to count: every ``step`` ends an accumulation."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "gradient_clipping": max_grad_norm,
            "bf16": {"enabled": self.precision == "bf16"},
            "fp16": {"enabled": self.precision == "fp16"},
        }


class ShardedModel:
    """``TrainedModel`` as a DeepSpeed engine."""

    def __init__(self, backend: DeepSpeedBackend, scorer: Any, settings: OptimizerSettings, total_updates: int) -> None:
        import deepspeed

        self.backend, self.settings, self.model = backend, settings, scorer.model
        optimizer = make_optimizer(scorer, settings)
        if backend.offload_optimizer and settings.name == "adamw":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            betas = (settings.beta1, settings.beta2)
            optimizer = DeepSpeedCPUAdam(parameter_groups(scorer, settings), lr=settings.lr, betas=betas, eps=settings.eps)
        schedule = make_schedule(optimizer, settings, total_updates)
        self.module, _, _, self.schedule = deepspeed.initialize(
            model=scorer, optimizer=optimizer, lr_scheduler=schedule, config=backend.settings(settings.max_grad_norm)
        )
        self.module.train(trains_by_recomputing(scorer))
        self.module.clip_fp32_gradients = self._clip_whole

    def _clip_whole(self) -> None:
        """Stage 0 in float32 clips, and forgets the norm."""
        self.module._global_grad_norm = nn.utils.clip_grad_norm_(self.module.module.parameters(), self.settings.max_grad_norm)

    def backward(self, loss: Tensor) -> None:
        # The engine averages gradients over ranks (stage 3 cannot sum), our loss is a sum: the one place that undoes it.
        self.module.backward(loss * self.backend.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        return norm if self.backend.precision == "fp16" else check_norm(norm)

    @property
    def skipped_updates(self) -> int:
        return int(self.module.skipped_steps)

    @property
    def lr(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def save_state(self, folder: Path) -> None:
        self.module.save_checkpoint(str(folder), tag=OPTIMIZER_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load_state(self, folder: Path) -> None:
        check_shards(folder / OPTIMIZER_TAG, self.backend.world_size)
        self.module.load_checkpoint(str(folder), tag=OPTIMIZER_TAG, load_module_strict=False)

    def sleep(self) -> None:
        if self.backend.offload_between_phases:
            self.module.offload_states()

    def wake(self) -> None:
        if self.backend.offload_between_phases:
            self.module.reload_states()


def check_shards(folder: Path, processes: int) -> None:
    """Raise InputError for an optimizer that lies in the shards of another number of processes."""
    shards = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
    if shards not in (0, processes):  # 0: stage 0 keeps none
        raise InputError(
            f"run_dir: the optimizer in {folder} lies in the shards of {shards} processes, got {processes}; start {shards}"
        )
