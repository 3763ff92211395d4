"""The Task protocol: problems, how they are put to the model, and who judges the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rlvr.rewards import Reward
from rlvr.types import Prompt


@runtime_checkable
class Task(Protocol):
    """What users plug in with ``task._target_=my_module.MyTask``.

    A class whose constructor takes its settings (a dataclass gets them type-checked).

    ``name``: short, used in file names.
    ``prompts(split) -> Sequence[Prompt]``: all prompts of ``"train"`` or ``"test"``, always the same in the same order, ids
    unique. The same prompt text serves training and evaluation. Shuffling is the trainer's business.
    ``reward() -> Reward``: the verifier of this task. Boundary evaluation always uses it, training unless ``reward=`` says
    otherwise.
    """

    @property
    def name(self) -> str: ...

    def prompts(self, split: str) -> Sequence[Prompt]: ...

    def reward(self) -> Reward: ...
