"""The sample store: one append-only JSONL file per model and task, continued by a re-run, never mixed with another's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlvr.checkpoint import write_json, write_text
from rlvr.rollout.metrics import verdict_fields
from rlvr.types import InputError, Rollout


class SampleStore:
    """Samples of one model on one task at ``folder/samples/MODEL/TASK.jsonl``.

    ``identity`` says what the samples are of (model, task, sampling, seed, problems); a store with another one is refused.
    """

    def __init__(self, folder: Path, model: str, task: str, identity: Mapping[str, Any]) -> None:
        self.path = folder / "samples" / model / f"{task}.jsonl"
        described = self.path.with_suffix(".store.json")
        plain = json.loads(json.dumps(identity))
        if described.is_file():
            found = json.loads(described.read_text())
            if found != plain:
                differing = [k for k in sorted(found.keys() | plain.keys()) if found.get(k) != plain.get(k)]
                changes = "; ".join(f"{key}: was {found.get(key)!r}, now {plain.get(key)!r}" for key in differing)
                raise InputError(
                    f"{self.path} holds samples of another evaluation ({changes}); nothing was changed. Give another folder, "
                    "or take the change back"
                )
        else:
            write_json(described, plain)
        self._drop_partial_line()

    def _drop_partial_line(self) -> None:
        """A kill in the middle of a write leaves an unfinished last line: cut it, so that the next append starts clean."""
        if not self.path.is_file():
            write_text(self.path, "")
            return
        with self.path.open("rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                file.truncate(end)

    def append(self, rollouts: Iterable[Rollout]) -> None:
        rows = (
            {
                "problem": row.prompt_id,
                "sample": row.sample_index,
                "seed": row.seed,
                "tokens": list(row.tokens),
                "text": row.text,
                **verdict_fields(row),
            }
            for row in rollouts
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Rows in file order, one at a time."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def sample_ids(self) -> dict[str, set[int]]:
        """Sample indices at hand for each problem."""
        found: dict[str, set[int]] = {}
        for row in self:
            found.setdefault(row["problem"], set()).add(row["sample"])
        return found
