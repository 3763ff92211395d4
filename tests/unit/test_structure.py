"""The house rules that a machine can check: floors, isolation of imports, sizes, no algorithm names outside algos."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlvr"
# Who may import whom: the same floor or below.
FLOORS = {
    "__init__": 0,
    "errors": 0,
    "types": 0,
    "maths": 0,
    "math_worker": 0,
    "algos": 1,
    "rewards": 1,
    "data": 1,
    "tasks": 1,
    "model": 2,
    "rollout": 2,
    "weights": 2,
    "watchdog": 2,
    "lora": 2,
    "scoring": 2,
    "micro_batches": 2,
    "backend": 2,
    "checkpoint": 2,
    "log": 2,
    "interrupt": 2,
    "build": 3,
    "config": 3,
    "learner": 3,
    "runs": 3,
    "update": 3,
    "boundary": 4,
    "trainer": 4,
    "sft": 4,
    "compose": 5,
    "cli": 5,
    "doctor": 5,
    "__main__": 5,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rlvr":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rlvr.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    above = {part for part in imported_parts(ast.parse(path.read_text())) if FLOORS[part] > FLOORS[part_of(path)]}
    assert not above, f"{path.name} (floor {FLOORS[part_of(path)]}) imports {above}"


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path.name}: {node.name}"


def test_no_algorithm_is_named_outside_algos() -> None:
    names = {
        node.name
        for path in (PACKAGE / "algos").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name != "Algorithm"
    }
    assert names
    for path in FILES:
        if part_of(path) != "algos":
            used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not used & names, f"{path.name} names {used & names}"


def loaded_by(statement: str, modules: tuple[str, ...]) -> set[str]:
    code = f"import sys\n{statement}\nprint(*(m for m in {modules!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_algorithms_load_without_engines_and_loggers() -> None:
    heavy = ("vllm", "deepspeed", "transformers", "hydra", "wandb")
    assert loaded_by("import rlvr.algos.grpo", heavy) == set()


def test_help_loads_neither_torch_nor_hydra() -> None:
    statement = "from rlvr.cli import main\nassert main(['train', '--help']) == 0"
    code = f"import sys, io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n    exec({statement!r})"
    assert loaded_by(code, ("torch", "transformers", "hydra", "omegaconf", "numpy")) == set()
