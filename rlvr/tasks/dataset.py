"""A task from rows: local jsonl files or a hub dataset, a prompt template, and the mathematical verifier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlvr.data import read_rows
from rlvr.rewards import Reward
from rlvr.rewards.math import MathReward
from rlvr.types import InputError, Prompt

# Yue et al. (arXiv 2504.13837), figure 27: the prompt of the six-algorithm study, training and evaluation alike.
THINK_ANSWER_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question}\nAssistant:"
)


@lru_cache(maxsize=4)
def _rows(path: str, split: str | None, subset: str | None) -> tuple[dict[str, Any], ...]:
    return tuple(read_rows(path, split, subset))


@dataclass(frozen=True)
class DatasetTask:
    """Questions and answer keys from rows; answers judged for mathematical equality.

    ``train`` and ``test`` are each a local ``.jsonl`` file or a hub id; for a hub id the split of that name is read.
    """

    name: str
    train: str
    test: str
    subset: str | None = None  # configuration name of a hub dataset
    question_field: str = "question"
    answer_field: str = "answer"
    gold_pattern: str = r"(.*)"  # its first group, searched for in the answer field, is the answer key
    template: str = THINK_ANSWER_TEMPLATE  # what the model reads; {question} stands for the question
    chat: bool = False  # put the filled template in the user's turn of the tokenizer's chat template
    system: str | None = None  # system turn, with chat only
    limit: int | None = None  # read only the first so many rows of a split
    timeout_s: float = 5.0  # limit of one symbolic comparison

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise InputError("template: expected {question} somewhere in it")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise InputError(f"name: got {self.name!r}, expected letters, digits, dot, dash and underscore only")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit: got {self.limit}, expected at least 1")
        self.reward()  # checks its own settings

    def prompts(self, split: str) -> list[Prompt]:
        sources = {"train": self.train, "test": self.test}
        if split not in sources:
            raise InputError(f"split: got {split!r}, expected train or test")
        rows = _rows(sources[split], None if sources[split].endswith(".jsonl") else split, self.subset)
        return [self._prompt(row, index, split) for index, row in enumerate(rows[: self.limit])]

    def _prompt(self, row: dict[str, Any], index: int, split: str) -> Prompt:
        for key, wanted in (("question_field", self.question_field), ("answer_field", self.answer_field)):
            if wanted not in row:
                raise InputError(
                    f"task.{key}: got {wanted!r}, but row {index} of {self.name}/{split} has the fields "
                    f"{', '.join(sorted(row))}"
                )
        answer = str(row[self.answer_field])
        found = re.search(self.gold_pattern, answer, re.DOTALL)
        if found is None:
            raise InputError(
                f"task.gold_pattern: got {self.gold_pattern!r}, which does not match the answer of row {index} of "
                f"{self.name}/{split}: {answer[-80:]!r}"
            )
        text = self.template.replace("{question}", str(row[self.question_field]))
        gold = found[1].strip()
        return Prompt(f"{split}-{index:05d}", text, gold, f"{self.name}/{split}", self.chat, self.system)

    def reward(self) -> Reward:
        return MathReward(timeout_s=self.timeout_s)
