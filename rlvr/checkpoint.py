"""Files of a run that must never be seen half written: checkpoints, settings, the state to resume from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlvr.backend import Backend

STATE_FOLDER = "trainer_state"  # inside a checkpoint
STATE_FILE = f"{STATE_FOLDER}/state.pt"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return run_dir / "checkpoints" / step_name(step)


def save(run_dir: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], backend: Backend) -> Path:
    """``checkpoints/step_N``: what ``write(folder)`` puts there, on every rank, and ``state``; then ``latest`` names it."""
    checkpoints, folder = run_dir / "checkpoints", step_folder(run_dir, step)
    partial = checkpoints / f".{folder.name}.partial"
    if backend.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed while saving
        (partial / STATE_FILE).parent.mkdir(parents=True)
    backend.gather(None)  # the folder is there before any rank writes into it
    write(partial)
    backend.gather(None)  # and complete before it gets its name
    if backend.rank == 0:
        torch.save({"step": step, **state}, partial / STATE_FILE)
        if folder.exists():  # the same step again after a resume: same weights, newer files
            shutil.rmtree(folder)
        os.replace(partial, folder)
        write_text(checkpoints / "latest", folder.name + "\n")
    return folder


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if any."""
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def load_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
