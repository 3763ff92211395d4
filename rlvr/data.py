"""From dataset files to an endless, resumable stream of prompts."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlvr.types import InputError, Prompt


def read_rows(path: str, split: str | None = None, subset: str | None = None) -> list[dict[str, Any]]:
    """Rows of a local ``.jsonl`` file, or of ``split`` of a hub dataset such as ``openai/gsm8k``.

    Raises InputError for a missing file, a line that is not a JSON object, and an empty dataset.
    """
    rows = _read_jsonl(Path(path)) if path.endswith(".jsonl") else _read_hub(path, split, subset)
    if not rows:
        raise InputError(f"task: {path} ({split or 'all'}) has no rows; expected at least one")
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"task: {path} does not exist; give a .jsonl file or a hub id such as openai/gsm8k")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except UnicodeDecodeError as error:
        raise InputError(f"task: {path} is not UTF-8 text (byte {error.start}); convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"task: {path}, line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise InputError(f"task: {path}, line {number} is a {type(row).__name__}, expected an object with fields")
        rows.append(row)
    return rows


def _read_hub(path: str, split: str | None, subset: str | None) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [dict(row) for row in datasets.load_dataset(path, subset, split=split)]
    except (FileNotFoundError, ConnectionError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"task: could not load the hub dataset {path!r}, split {split!r}: {reason}") from error


class PromptStream:
    """Prompts in a fixed random order, epoch after epoch; its whole state is how many were taken."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, taken: int = 0) -> None:
        if not prompts:
            raise InputError("task: the training set is empty; expected at least one prompt")
        self.prompts, self.seed, self.taken = prompts, seed, taken

    @property
    def epoch(self) -> float:
        return self.taken / len(self.prompts)

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next ``count`` prompts, each with its position in the stream (unique over the run)."""
        positions = range(self.taken, self.taken + count)
        self.taken += count
        size = len(self.prompts)
        return [(p, self.prompts[_order(self.seed, p // size, size)[p % size]]) for p in positions]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"prompt order {seed} {epoch}").shuffle(order)
    return tuple(order)


@runtime_checkable
class Pairs(Protocol):
    """A source of training pairs: iterating gives (prompt text, response text), the same in the same order each time."""

    def __iter__(self) -> Iterator[tuple[str, str]]: ...


@dataclass(frozen=True)
class PairsFile:
    """Pairs from the rows of a local jsonl file or a hub dataset, over and over."""

    path: str
    split: str | None = None
    prompt_field: str = "prompt"
    response_field: str = "response"

    def __iter__(self) -> Iterator[tuple[str, str]]:
        rows = read_rows(self.path, self.split)
        for key, wanted in (("prompt_field", self.prompt_field), ("response_field", self.response_field)):
            for index, row in enumerate(rows):
                if wanted not in row:
                    found = ", ".join(sorted(row))
                    raise InputError(f"data.{key}: got {wanted!r}, but row {index} of {self.path} has the fields {found}")
        return itertools.cycle((str(row[self.prompt_field]), str(row[self.response_field])) for row in rows)
