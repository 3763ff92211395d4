"""A reward that knows nothing: the control that tells learning from drift."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlvr.rewards.base import Reward
from rlvr.types import InputError, Prompt, Rollout, Verdict


@dataclass(frozen=True)
class RandomReward:
    """Score 1 with ``probability``, drawn per response; ``correct`` and ``status`` stay the verifier's word.

    The draw is a hash of the response's own seed, so it depends on neither text nor order and repeats with the run.
    """

    verifier: Reward | None = None  # None: the task's own
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise InputError(f"probability: got {self.probability}, expected a value in (0, 1)")

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        assert self.verifier is not None
        verdicts = self.verifier.judge(prompts, rollouts)
        return [replace(v, score=self._draw(r.seed)) for v, r in zip(verdicts, rollouts, strict=True)]

    def _draw(self, seed: int) -> float:
        digest = hashlib.blake2b(b"random reward" + seed.to_bytes(8, "little"), digest_size=8).digest()
        return float(int.from_bytes(digest, "little") < self.probability * 2**64)
