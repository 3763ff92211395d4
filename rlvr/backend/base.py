"""What the loop asks of a back end, and the optimizer settings that all of them understand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from rlvr.types import InputError

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "sgd")
T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"  # adamw | sgd (without momentum; the two betas and eps are then unused)
    lr: float = 1e-6
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "constant"  # after the warm-up: constant | linear | cosine, the last two down to 0
    warmup_updates: int = 0  # optimizer updates over which the rate rises linearly from 0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise InputError(f"name: got {self.name!r}, expected one of {', '.join(OPTIMIZERS)}")
        if not self.lr >= 0:
            raise InputError(f"lr: got {self.lr}, expected 0 or more")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm: got {self.max_grad_norm}, expected above 0")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if self.warmup_updates < 0:
            raise InputError(f"warmup_updates: got {self.warmup_updates}, expected 0 or more")


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """The trained parameters; weight decay on matrices only, as is usual."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def make_schedule(optimizer: Any, settings: OptimizerSettings, total_updates: int) -> Any:
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(name, optimizer, settings.warmup_updates, total_updates)


def trains_by_recomputing(scorer: Any) -> bool:
    """Whether the module must be in training mode: transformers recomputes activations (gradient checkpointing) only there.

    Otherwise it stays in evaluation mode. Dropout is 0 either way: it would make the ratio differ from 1 before an update.
    """
    return bool(getattr(scorer.model, "is_gradient_checkpointing", False))


def check_norm(norm: float) -> float:
    """The gradient norm; stops the run when it is not finite."""
    if norm != norm or norm in (float("inf"), float("-inf")):
        raise RuntimeError(f"the gradient norm is {norm}; the run stops here, the last checkpoint is sound")
    return norm


class TrainedModel(Protocol):
    """A model with its optimizer, wrapped for the back end.

    Every rank calls every method in the same order, as often as the others: parameters may lie in shards over the ranks.
    """

    module: nn.Module  # the scorer (rlvr.scoring), wrapped: call it for the forward pass
    model: Any  # the Hugging Face or peft model inside it; ``Backend.gathered`` makes its parameters whole

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a *sum* over rows: after all rows of all ranks, the sum is what ``step`` uses."""
        ...

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        ...

    @property
    def lr(self) -> float: ...

    @property
    def skipped_updates(self) -> int:
        """Updates left out so far because fp16 gradients overflowed; the loss scale is lowered instead."""
        ...

    def save_state(self, folder: Path) -> None:
        """Write what resuming needs beside the weights of the model folder: optimizer, schedule, master weights."""
        ...

    def load_state(self, folder: Path) -> None: ...

    def sleep(self) -> None:
        """Give device memory back while the engine generates, where the settings ask for it."""
        ...

    def wake(self) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """What users plug in with ``backend._target_=...``: a dataclass of settings with these methods.

    ``start()`` joins the processes; ``rank`` and ``world_size`` are known afterwards; ``device`` is this rank's. ``stop()``
    parts them. ``prepare`` wraps a model with a new optimizer for ``total_updates`` updates; ``freeze`` puts a model that is
    only evaluated on the device and returns it ready to call. Both take a scorer (``rlvr.scoring``). Every rank calls all of
    these in the same order.
    """

    rank: int
    world_size: int
    device: torch.device

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings, total_updates: int) -> TrainedModel: ...

    def freeze(self, model: nn.Module) -> Any: ...

    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
        """These parameters whole, on every rank, while the block lasts; what rank ``writer`` writes into them stays."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value in the order of the ranks, on every rank. Any picklable value."""
        ...

    def main_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 leaves before the others enter it."""
        ...

    def phase(self, name: str) -> None:
        """Say what this rank does from now on; named when a rank dies or hangs."""
        ...

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks that an error ends this one. Does not return where another rank's end caused the error."""
        ...


@contextmanager
def reporting(backend: Backend) -> Iterator[None]:
    """Around the work of a rank: an error that leaves the block is told to the other ranks."""
    try:
        yield
    except BaseException as error:
        backend.failed(error)
        raise
