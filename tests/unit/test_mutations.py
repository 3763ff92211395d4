"""The list of mutations stays in step with the code; ``scripts/mutations.py`` runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MUTATIONS = load().MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_the_text_of_a_mutation_occurs_once(mutation: object) -> None:
    text = (ROOT / "rlvr" / mutation.file).read_text()  # type: ignore[attr-defined]
    assert text.count(mutation.old) == 1  # type: ignore[attr-defined]
    assert mutation.old != mutation.new  # type: ignore[attr-defined]
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")  # type: ignore[attr-defined]


def test_every_algorithm_file_and_the_loop_are_mutated() -> None:
    files = {mutation.file for mutation in MUTATIONS}
    algorithms = {f"algos/{path.name}" for path in (ROOT / "rlvr" / "algos").glob("*.py") if path.stem != "__init__"}
    assert {
        "maths.py",
        "update.py",
        "backend/data_parallel.py",
        "backend/deepspeed.py",
        "scoring.py",
        "micro_batches.py",
        "rollout/collect.py",
        *algorithms,
    } <= files
