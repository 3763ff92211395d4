"""What a report is made from: the files of a run or a boundary folder, streamed where they may be large."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlvr.types import InputError

Json = dict[str, Any]

MAX_RESPONSES = 6  # in the browser, per problem
# A samples file has long token lists: the problem is read off the start of a line, and most lines need no parsing.
PROBLEM_FIRST = re.compile(rb'\s*\{\s*"problem"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class Sources:
    """What was found on disk; a part that is missing is empty."""

    folder: Path
    measured: Path  # the boundary folder, whether or not it exists
    config_text: str
    config: Json
    environment: Json
    metrics: list[Json]
    boundary: Json


@dataclass
class Picked:
    """The responses of one problem kept for the browser: correct ones and others in equal parts where both exist."""

    right: list[Json] = field(default_factory=list)
    other: list[Json] = field(default_factory=list)

    def full(self) -> bool:
        return min(len(self.right), len(self.other)) >= MAX_RESPONSES // 2

    def add(self, row: Json) -> None:
        side = self.right if row.get("correct") else self.other
        if len(side) < MAX_RESPONSES:
            side.append(row)

    def rows(self) -> list[Json]:
        kept = self.right[: max(MAX_RESPONSES // 2, MAX_RESPONSES - len(self.other))]
        return kept + self.other[: MAX_RESPONSES - len(kept)]


def read_sources(folder: Path) -> Sources:
    measured = folder if (folder / "boundary.json").is_file() else folder / "boundary"
    if not (folder / "metrics.jsonl").is_file() and not (measured / "boundary.json").is_file():
        raise InputError(f"{folder} holds neither metrics.jsonl nor boundary.json; expected a run folder or a boundary folder")
    config_path = folder / "config.yaml"
    text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{config_path}: not YAML: {error}") from error
    # A resumed run may repeat steps: the later row is the one the weights went through.
    by_step = {row["step"]: row for row in json_rows(folder / "metrics.jsonl") if isinstance(row.get("step"), int)}
    return Sources(
        folder=folder,
        measured=measured,
        config_text=text,
        config=config if isinstance(config, dict) else {},
        environment=_object(folder / "environment.json"),
        metrics=[by_step[step] for step in sorted(by_step)],
        boundary=_object(measured / "boundary.json"),
    )


def _parse(text: bytes) -> Any:
    """JSON with NaN and infinities as None: the page's JSON cannot hold them."""
    return json.loads(text, parse_constant=lambda _: None)


def _object(path: Path) -> Json:
    """The JSON object in a file; empty when the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = _parse(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


def json_rows(path: Path, wanted: dict[str, Picked] | None = None) -> Iterator[Json]:
    """Stream the objects of a JSON Lines file; with ``wanted``, lines of other or full problems are passed over.

    A last line cut off by an interrupted writer is skipped; a broken line elsewhere is an error.
    """
    if not path.is_file():
        return
    broken = ""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if broken:
                raise InputError(broken)
            if not line.strip():
                continue
            try:
                if wanted is not None and (start := PROBLEM_FIRST.match(line)):
                    picked = wanted.get(json.loads(start[1]))
                    if picked is None or picked.full():
                        continue
                row = _parse(line)
            except ValueError as error:
                broken = f"{path}:{number}: not JSON: {error}"
                continue
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: got {type(row).__name__}, expected a JSON object")
            yield row
