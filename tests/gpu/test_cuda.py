"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlvr.backend import SingleBackend
from rlvr.config import RunConfig
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("no", "float32", 1e-3), ("bf16", "bfloat16", 0.5)])
def test_engine_and_trainer_agree_on_cuda(
    run_config: Callable[..., RunConfig], precision: str, dtype: str, tolerance: float
) -> None:
    config = run_config(engine=TransformersEngine(dtype=dtype), backend=SingleBackend(precision=precision))
    trainer = Trainer(config)
    for _ in range(2):
        metrics = trainer.step()
    assert trainer.device.type == "cuda"
    assert metrics["mismatch/abs_diff_max"] < tolerance
    assert metrics["memory/peak_gib"] > 0
