"""Processes, devices and optimizer steps: the one place that knows how gradients are gathered and scaled.

The only importer of accelerate (and of deepspeed, once that back end exists).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from rlvr.types import InputError

SCHEDULES = ("constant", "linear", "cosine")
T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-6
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "constant"  # after the warm-up: constant | linear | cosine, the last two down to 0
    warmup_updates: int = 0  # optimizer updates over which the rate rises linearly from 0

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise InputError(f"lr: got {self.lr}, expected 0 or more")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm: got {self.max_grad_norm}, expected above 0")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.warmup_updates < 0:
            raise InputError(f"warmup_updates: got {self.warmup_updates}, expected 0 or more")


class TrainedModel(Protocol):
    """A model with its optimizer, wrapped for the back end."""

    module: nn.Module  # call it for the forward pass

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a *sum* over rows: after all rows of all ranks, the sum is what ``step`` uses."""
        ...

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        ...

    @property
    def lr(self) -> float: ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of every parameter, tied names included."""
        ...

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a plain Hugging Face folder."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and schedule, for resuming."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """What users plug in with ``backend._target_=...``: a dataclass of settings with these methods.

    ``start()`` joins the processes; ``rank`` and ``world_size`` are known afterwards; ``device`` is this rank's. ``stop()``
    parts them. ``prepare`` wraps a model with a new optimizer for ``total_updates`` updates; ``freeze`` puts a model that is
    only evaluated on the device. Every rank calls ``sum``, ``gather`` and ``main_first`` in the same order.
    """

    rank: int
    world_size: int
    device: torch.device

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings, total_updates: int) -> TrainedModel: ...

    def freeze(self, model: nn.Module) -> nn.Module: ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value in the order of the ranks, on every rank. Any picklable value."""
        ...

    def main_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 leaves before the others enter it."""
        ...


@dataclass
class DataParallelBackend:
    """Any number of processes under torchrun, each with the whole model; their gradients are summed before each update."""

    use: str = "auto"  # auto (CUDA, then CPU) | cpu | cuda | mps
    precision: str = "no"  # autocast: no | bf16

    def __post_init__(self) -> None:
        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")
        if self.precision not in ("no", "bf16"):
            raise InputError(f"precision: got {self.precision!r}, expected no or bf16")
        if self.use not in ("auto", "cpu", "cuda", "mps"):
            raise InputError(f"use: got {self.use!r}, expected auto, cpu, cuda or mps")

    def start(self) -> None:
        from accelerate import Accelerator

        if self.use == "cuda" and not torch.cuda.is_available():
            raise InputError("backend.use: got cuda, but torch sees no CUDA device here; use auto or cpu")
        on_cpu = self.use == "cpu" or (self.use == "auto" and not torch.cuda.is_available())
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision=self.precision)
        self.device = self._accelerator.device
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes

    def stop(self) -> None:
        if self.world_size > 1:
            self._accelerator.end_training()

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings, total_updates: int) -> TrainedModel:
        return WholeModel(self._accelerator, model, optimizer, total_updates)

    def freeze(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).eval().requires_grad_(False)

    def sum(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, "sum")

    def gather(self, value: T) -> list[T]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def main_first(self) -> AbstractContextManager[None]:
        return self._accelerator.main_process_first()


@dataclass
class SingleBackend(DataParallelBackend):
    """One process, one device."""

    def start(self) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != 1:
            raise InputError(
                f"backend: got single under torchrun with {processes} processes, expected 1; use --nproc-per-node 1 or "
                "backend=ddp"
            )
        super().start()


class WholeModel:
    """``TrainedModel`` that every process holds whole.

    A loss is a sum over rows with weights fixed for the whole update, so the gradient of an update is the sum over its
    micro-batches and ranks: one all-reduce (SUM) before the step, no average to undo, and ranks may have any number of rows.
    """

    def __init__(self, accelerator: Any, model: nn.Module, settings: OptimizerSettings, total_updates: int) -> None:
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (settings.beta1, settings.beta2)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
        self.accelerator, self.settings = accelerator, settings
        self.module = accelerator.prepare_model(model, evaluation_mode=True)  # device and autocast, without a DDP wrapper
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.schedule = get_scheduler(name, self.optimizer, settings.warmup_updates, total_updates)
        self.module.eval()  # dropout stays off in training: it would make the ratio differ from 1 before the first update

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _sum_gradients(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # this rank had no row in the update
                parameter.grad = torch.zeros_like(parameter)
        pending = [torch.distributed.all_reduce(p.grad, async_op=True) for p in trained]
        for work in pending:
            work.wait()

    def step(self) -> float:
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"the gradient norm is {float(norm)}; the run stops before the update, the last checkpoint is sound"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(norm)

    @property
    def lr(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._unwrapped().named_parameters(remove_duplicate=False)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._unwrapped().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.module)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
