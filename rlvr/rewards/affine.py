"""Another scale for a verifier's score: 0 and 1 become -1 and 1, say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlvr.rewards.base import Reward
from rlvr.types import InputError, Prompt, Rollout, Verdict


@dataclass(frozen=True)
class AffineReward:
    """``scale * score + shift``; ``correct`` and ``status`` stay the verifier's word.

    Every verdict alike, whatever its status: what could not be judged (crashed, timeout, unsupported) has the score of a
    wrong answer in the built-in verifiers, 0, and is trained on; it must not become worth more than one here. Its status
    is counted as before, and too many crashes stop the run. The length punishment of ``algo.plan`` is added afterwards.
    """

    verifier: Reward | None = None  # None: the task's own
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise InputError(f"scale: got {self.scale}, expected a finite value other than 0 (0 would forget the score)")
        if not math.isfinite(self.shift):
            raise InputError(f"shift: got {self.shift}, expected a finite value")

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        assert self.verifier is not None
        verdicts = self.verifier.judge(prompts, rollouts)
        return [replace(verdict, score=self.scale * verdict.score + self.shift) for verdict in verdicts]
