"""Settings of the back ends that cannot work here are refused with what to change, before any process group is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rlvr.backend.deepspeed as deepspeed_backend
from rlvr.backend import DataParallelBackend, DeepSpeedBackend, OptimizerSettings
from rlvr.backend.base import make_optimizer
from rlvr.backend.deepspeed import check_shards
from rlvr.types import InputError

needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is refused without a device")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision: got 'fp8', expected one of no, bf16, fp16"),
        ({"timeout_s": 0.0}, "timeout_s: got 0.0, expected above 0"),
        ({"zero_stage": 4}, "zero_stage: got 4, expected 0, 1, 2 or 3"),
        ({"offload_parameters": True}, "offload_parameters: got true with zero_stage=2, expected zero_stage=3"),
        ({"offload_optimizer": True, "zero_stage": 0}, "got true with zero_stage=0, expected 1, 2 or 3"),
        (
            {"offload_parameters": True, "offload_between_phases": True, "zero_stage": 3},
            "offload_between_phases: got true with offload_parameters",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        DeepSpeedBackend(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (DataParallelBackend(use="cpu", precision="fp16"), "backend.precision: got fp16 on the CPU, expected a CUDA device"),
        (DeepSpeedBackend(use="cpu", precision="fp16"), "backend.precision: got fp16 on the CPU, expected a CUDA device"),
        (DataParallelBackend(use="cpu", offload_between_phases=True), "backend.offload_between_phases: got true on the CPU"),
        (DeepSpeedBackend(use="cpu", offload_optimizer=True), "backend.offload_optimizer: got true on the CPU"),
        (DeepSpeedBackend(use="cpu", zero_stage=3, offload_parameters=True), "backend.offload_parameters: got true on the CPU"),
        pytest.param(DataParallelBackend(use="cuda"), "backend.use: got cuda, but torch sees no CUDA", marks=needs_no_device),
    ],
)
def test_settings_that_need_a_device(backend: DataParallelBackend, message: str) -> None:
    with pytest.raises(InputError) as error:
        backend.start()
    assert str(error.value).startswith(message)
    assert not torch.distributed.is_initialized()


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_backend, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"backend: got deepspeed, but it is not installed; pip install 'rlvr\[deepspeed\]'"):
        DeepSpeedBackend(use="cpu").start()


def test_shards_of_another_number_of_processes(tmp_path: Path) -> None:
    check_shards(tmp_path, 3)
    for rank in range(2):
        (tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_shards(tmp_path, 2)
    with pytest.raises(InputError, match=r"run_dir: the optimizer in .* lies in the shards of 2 processes, got 3; start 2"):
        check_shards(tmp_path, 3)


def test_optimizers_decay_matrices_only_and_skip_frozen_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[1].bias.requires_grad_(False)
    for name, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        optimizer = make_optimizer(model, OptimizerSettings(name=name, lr=0.5, weight_decay=0.1))
        assert isinstance(optimizer, kind)
        decayed, others = optimizer.param_groups
        assert decayed["params"] == [model[0].weight] and others["params"] == [model[0].bias, model[1].weight]
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    with pytest.raises(InputError, match="name: got 'lion', expected one of adamw, sgd"):
        OptimizerSettings(name="lion")
