"""Back ends in which every process holds the whole model: one process, or several under torchrun."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlvr.backend.base import (
    OptimizerSettings,
    TrainedModel,
    check_norm,
    make_optimizer,
    make_schedule,
    trains_by_recomputing,
)
from rlvr.types import InputError
from rlvr.watchdog import Watchdog, connect

T = TypeVar("T")
_groups = itertools.count()  # process groups made by this process; every rank makes as many, and each needs keys of its own
DEAD_AFTER_S = 10.0  # without a sign of life of a process; torchrun kills the survivors of a failure after 30 s
PRECISIONS = ("no", "bf16", "fp16")


@dataclass
class DataParallelBackend:
    """Any number of processes under torchrun, each with the whole model; their gradients are summed before each update."""

    use: str = "auto"  # auto (CUDA, then CPU) | cpu | cuda | mps
    precision: str = "no"  # autocast: no | bf16 | fp16 (with loss scaling; CUDA only)
    offload_between_phases: bool = False  # weights and optimizer go to host memory while the engine generates
    timeout_s: float = 1800.0  # a collective, or a phase without any progress, that takes longer ends the run

    def __post_init__(self) -> None:
        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")
        self._watchdog: Watchdog | None = None
        if self.precision not in PRECISIONS:
            raise InputError(f"precision: got {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.use not in ("auto", "cpu", "cuda", "mps"):
            raise InputError(f"use: got {self.use!r}, expected auto, cpu, cuda or mps")
        if not self.timeout_s > 0:
            raise InputError(f"timeout_s: got {self.timeout_s}, expected above 0")

    def start(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        cuda = torch.cuda.is_available()
        if self.use == "cuda" and not cuda:
            raise InputError("backend.use: got cuda, but torch sees no CUDA device here; use auto or cpu")
        on_cpu = self.use == "cpu" or (self.use == "auto" and not cuda)
        self._check_device(on_cpu)
        if self.use != "mps":  # accelerate imports DeepSpeed where it is installed, which would guess, and say so on every rank
            os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
        # Longer than the watchdog's limit, so that a rank that waits does not fail before the one that hangs is named.
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=1.5 * self.timeout_s + 60))
        self._join("gloo" if on_cpu else "nccl", group.timeout)
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision=self._autocast(), kwargs_handlers=[group])
        self.device = self._accelerator.device
        self.rank, self.world_size = self._accelerator.process_index, self._accelerator.num_processes
        self._watchdog = Watchdog(self.rank, self.world_size, self.timeout_s, min(DEAD_AFTER_S, self.timeout_s))
        self._watchdog.start()

    def _join(self, kind: str, timeout: timedelta) -> None:
        """Under torchrun, meet the other processes with keys of our own for each attempt.

        torchrun may keep one store for all attempts (``--max-restarts``), where a second attempt reads the addresses of the
        first: seen with torch 2.13, "Gloo connectFullMesh ... Connection refused".
        """
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1
        if launched and not torch.distributed.is_initialized():
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            torch.distributed.init_process_group(
                kind, store=connect(f"processes{next(_groups)}"), rank=rank, world_size=size, timeout=timeout
            )

    def _autocast(self) -> str:
        return self.precision

    def _check_device(self, on_cpu: bool) -> None:
        """Raise InputError for settings that need a device that is not there."""
        if on_cpu and self.precision == "fp16":
            raise InputError("backend.precision: got fp16 on the CPU, expected a CUDA device; use bf16 or no")
        if on_cpu and self.offload_between_phases:
            raise InputError(
                "backend.offload_between_phases: got true on the CPU, where there is no device memory to give back"
            )

    def stop(self) -> None:
        if self.world_size > 1:
            assert self._watchdog is not None
            self._watchdog.stop()
            self._accelerator.end_training()

    def prepare(self, model: nn.Module, optimizer: OptimizerSettings, total_updates: int) -> TrainedModel:
        return WholeModel(self._accelerator, model, optimizer, total_updates, self.offload_between_phases)

    def freeze(self, model: nn.Module) -> Any:
        return self._accelerator.prepare_model(model.eval().requires_grad_(False), evaluation_mode=True)  # device and autocast

    def gathered(self, parameters: Sequence[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
        return nullcontext()  # they always are

    def sum(self, values: Tensor) -> Tensor:
        return self._accelerator.reduce(values, "sum")

    def gather(self, value: T) -> list[T]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def main_first(self) -> AbstractContextManager[None]:
        return self._accelerator.main_process_first()

    def phase(self, name: str) -> None:
        if self._watchdog is not None:
            self._watchdog.phase(name)

    def failed(self, error: BaseException) -> None:
        if self._watchdog is not None:
            self._watchdog.__exit__(type(error), error, error.__traceback__)


@dataclass
class SingleBackend(DataParallelBackend):
    """One process, one device."""

    def start(self) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != 1:
            raise InputError(
                f"backend: got single under torchrun with {processes} processes, expected 1; use --nproc-per-node 1, "
                "backend=ddp or backend=deepspeed"
            )
        super().start()


class WholeModel:
    """``TrainedModel`` that every process holds whole.

    A loss is a sum over rows with weights fixed for the whole update, so the gradient of an update is the sum over its
    micro-batches and ranks: one all-reduce (SUM) before the step, no average to undo.
    """

    def __init__(
        self, accelerator: Any, scorer: Any, settings: OptimizerSettings, total_updates: int, offload: bool = False
    ) -> None:
        self.accelerator, self.settings, self._skipped = accelerator, settings, 0
        self.model, self._offload = scorer.model, offload
        self.module = accelerator.prepare_model(scorer, evaluation_mode=True)  # device and autocast, without a DDP wrapper
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(scorer, settings))
        self.schedule = make_schedule(self.optimizer, settings, total_updates)
        self.module.train(trains_by_recomputing(scorer))

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _sum_gradients(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # no row of this rank reached it
                parameter.grad = torch.zeros_like(parameter)
        pending = [torch.distributed.all_reduce(p.grad, async_op=True) for p in trained]
        for work in pending:
            work.wait()

    def step(self) -> float:
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.max_grad_norm))
        if self.accelerator.scaler is None:
            check_norm(norm)
        self.optimizer.step()  # with fp16 loss scaling, an overflow leaves the update out
        if self.optimizer.step_was_skipped:  # this model's own: the accelerator knows of the critic's, too
            self._skipped += 1
        else:
            self.schedule.step()
        self.optimizer.zero_grad()
        return norm

    @property
    def skipped_updates(self) -> int:
        return self._skipped

    @property
    def lr(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def save_state(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            scaler = self.accelerator.scaler
            state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            state["scaler"] = scaler.state_dict() if scaler is not None else {}
            torch.save(state, folder / "optimizer.pt")

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def sleep(self) -> None:
        if self._offload:
            self._move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self._offload:
            self._move(self.accelerator.device)

    def _move(self, device: torch.device) -> None:
        self.module.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # the step count stays where the optimizer wants it
                    state[name] = value.to(device)
