"""Shared fixtures: a tiny Countdown model on disk, and run settings that train it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvr.algos.grpo import GRPO
from rlvr.config import BoundarySettings, RunConfig, TrainerSettings
from rlvr.model import ModelSettings, TinyModel, make_tiny
from rlvr.tasks.countdown import CountdownTask
from rlvr.types import Sampling

TINY = TinyModel(hidden_size=32, num_layers=2, intermediate_size=64)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer Countdown model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(TINY, folder, seed=0)
    return str(folder)


@pytest.fixture
def run_config(tiny_model: str, tmp_path: Path) -> Callable[..., RunConfig]:
    """A small training run; keyword arguments replace its parts."""

    def make(**parts: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "algo": GRPO(),
            "task": CountdownTask(train_problems=64, test_problems=8),
            "model": ModelSettings(path=tiny_model),
            "sampling": Sampling(max_new_tokens=12),
            "trainer": TrainerSettings(steps=3, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=2),
            "boundary": BoundarySettings(n=4, temperature=1.0, top_p=1.0),
        }
        return RunConfig(**{**settings, **parts})

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Benchmark files beside the repository; tests that read them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the benchmark files are not at {folder}")
    return folder
