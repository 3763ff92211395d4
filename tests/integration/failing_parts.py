"""Components that misbehave once on rank 1, in the runs of test_failures.py; named on the command line by dotted paths."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rlvr import watchdog
from rlvr.errors import InputError
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.tasks.countdown import CountdownTask
from rlvr.types import Prompt, Rollout, Verdict


def first_time(folder: str, deed: str) -> bool:
    """Whether this is rank 1 and ``deed`` was not done before; then the file of that name says it is done now."""
    if os.environ["RANK"] != "1" or (Path(folder) / deed).exists():
        return False
    (Path(folder) / deed).touch()
    return True


@dataclass(frozen=True)
class Grudge:
    """A reward that all can earn, by length. ``deeds[n]`` is done once in step n + 1."""

    folder: str
    deeds: list[str] = field(default_factory=list)  # kill | hang | raise | stop | anything else: nothing

    def __post_init__(self) -> None:
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1:  # stands in for two machines: no rank can look at the other's process
            watchdog._machine = lambda: f"host {os.environ['RANK']}"

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        deed = dict(enumerate(self.deeds)).get(rollouts[0].policy_step, "")
        if deed in ("kill", "hang", "raise", "stop") and first_time(self.folder, deed):
            if deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if deed == "raise":
                raise RuntimeError("no verifier answers")
            time.sleep(1000 if deed == "hang" else 2)  # stop: time for the test to send its signals within the step
        return [Verdict(float(len(rollout.text) % 3), False, "graded") for rollout in rollouts]


@dataclass
class DyingEngine(TransformersEngine):
    """Killed in the weight sync of step 2, while the others gather the weights with this rank."""

    folder: str = ""
    _syncs: int = field(default=0, init=False, repr=False)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._syncs += 1
        if self._syncs == 2 and first_time(self.folder, "kill"):
            next(iter(weights))
            os.kill(os.getpid(), signal.SIGKILL)
        super().update_weights(weights)


@dataclass(frozen=True)
class HalfTask(CountdownTask):
    """Rank 1 finds its file missing: when the settings are read (``settings``) or when the prompts are (``prompts``)."""

    folder: str = ""
    missing_in: str = "prompts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._find("settings")

    def prompts(self, split: str) -> list[Prompt]:
        self._find("prompts")
        return super().prompts(split)

    def _find(self, moment: str) -> None:
        if moment == self.missing_in and first_time(self.folder, moment):
            raise InputError("no train.jsonl here; copy it to every machine")
