"""The pages of docs/algorithms against the code: fields, defaults, overrides, commands, metrics, equations, links."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.build import from_mapping
from rlvr.compose import compose, recipes_dir
from rlvr.config import RunConfig
from rlvr.log import METRICS
from rlvr.model import ModelSettings
from rlvr.tasks.countdown import CountdownTask
from rlvr.types import VERDICT_STATUSES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "algorithms"
MODULES = sorted(p.stem for p in (ROOT / "rlvr" / "algos").glob("*.py") if p.stem not in ("__init__", "base"))
PAGES = ["README", *MODULES]


@cache
def text_of(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text()


def class_of(page: str) -> type[Algorithm]:
    """The algorithm that a page is about; the base class for the page of what they share."""
    if page == "README":
        return Algorithm
    module = importlib.import_module(f"rlvr.algos.{page}")
    (cls,) = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return cls


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """What stands between single backticks, line breaks taken out."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def overrides(page: str) -> list[list[str]]:
    """Spans made of ``key=value`` words only. A capital NAME is a placeholder."""
    words = [span.split() for span in spans(page)]
    return [span for span in words if all(re.fullmatch(r"[\w.@]+=\S+", word) and "NAME" not in word for word in span)]


def commands(page: str) -> list[list[str]]:
    return [line.split() for line in re.findall(r"^.*\brlvr train (.*)$", text_of(page), flags=re.MULTILINE)]


def settings_table(page: str) -> dict[str, str]:
    """Setting -> default, as written in the page's table of settings."""
    table = text_of(page).partition("| setting | default |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    found = {}
    for setting, default, *_ in rows:
        name, value = re.fullmatch(r"`(\S+)`", setting), re.fullmatch(r"`(\S+)`", default)
        assert name and value, f"{page}: {setting} | {default}"
        found[name[1]] = value[1]
    assert found, f"{page} has no table of settings"
    return found


def value_of(written: str) -> Any:
    words = {"null": None, "true": True, "false": False}
    if written in words:
        return words[written]
    for number in (int, float):
        try:
            return number(written)
        except ValueError:
            pass
    return written


def flat_defaults(instance: Any, prefix: str) -> dict[str, Any]:
    found = {}
    for item in fields(instance):
        value = getattr(instance, item.name)
        found |= flat_defaults(value, f"{prefix}.{item.name}") if is_dataclass(value) else {f"{prefix}.{item.name}": value}
    return found


def build(words: list[str]) -> RunConfig:
    return from_mapping(RunConfig, compose("train", words))


def test_every_algorithm_has_a_page_and_the_index_links_it() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*PAGES, "measured"}
    assert "](measured.md)" in text_of("README")
    assert MODULES == ["dapo", "grpo", "ppo", "reinforce_pp", "remax", "rloo"]
    for page in MODULES:
        assert f"]({page}.md)" in text_of("README") and "](README.md)" in text_of(page)


@pytest.mark.parametrize("page", [*PAGES, "measured"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        headings = re.findall(r"^#+ (.*)$", (FOLDER / (name or f"{page}.md")).read_text(), flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_fields_named_are_fields_of_the_class(page: str) -> None:
    known = set(flat_defaults(class_of(page)(), "algo")) | {"algo.plan"}
    if page == "README":
        known |= {name for module in MODULES for name in flat_defaults(class_of(module)(), "algo")}
    named = {name for name in re.findall(r"\balgo\.[a-z_.]*[a-z_]", text_of(page)) if not name.endswith("_")}
    assert named - known - {"algo._target_"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_overrides_build(page: str) -> None:
    found = overrides(page)
    assert len(found) > 5
    for words in {tuple(words): words for words in found}.values():
        chosen = [] if any(word.startswith("algo=") for word in words) else [f"algo={page if page in MODULES else 'grpo'}"]
        build(["model.path=x", "sampling.max_new_tokens=20480", *chosen, *words])  # room for any length punishment


@pytest.mark.parametrize("page", PAGES)
def test_commands_build(page: str) -> None:
    found = commands(page)
    assert found
    for words in found:
        config = build(words)
        assert page == "README" or isinstance(config.algo, class_of(page)), words
    folders = [build(words).run_dir for words in found]
    assert len(set(folders)) == len(folders), f"two commands write to one folder: {folders}"


@pytest.mark.parametrize("page", PAGES)
def test_recipes_named_exist(page: str) -> None:
    recipes = {str(p.relative_to(recipes_dir() / "algo").with_suffix("")) for p in (recipes_dir() / "algo").rglob("*.yaml")}
    named = set(re.findall(r"\balgo=([\w/]+)", text_of(page)))
    assert named - recipes - {"NAME", "paper/NAME"} == set()
    if page == "README":
        assert recipes - named == {"custom"}, "a recipe that the index does not name"


@pytest.mark.parametrize("page", PAGES)
def test_defaults_in_the_table_are_those_of_the_class(page: str) -> None:
    config = RunConfig(run_dir="x", algo=GRPO(), task=CountdownTask(), model=ModelSettings(path="x"))
    algo = SimpleNamespace(algo=class_of(page)())
    for setting, written in settings_table(page).items():
        default, value = attrgetter(setting)(algo if setting.startswith("algo.") else config), value_of(written)
        assert value == default and isinstance(value, bool) == isinstance(default, bool), (
            f"{setting}: {written}, is {default!r}"
        )


@pytest.mark.parametrize("page", PAGES)
def test_the_table_has_every_setting_of_its_own(page: str) -> None:
    """The index lists all shared fields, a page those that its class adds and those whose default it changes."""
    shared, own = flat_defaults(Algorithm(), "algo"), flat_defaults(class_of(page)(), "algo")
    expected = shared if page == "README" else {name for name in own if name not in shared or own[name] != shared[name]}
    assert set(expected) - set(settings_table(page)) == set()


def wildcard_names() -> set[str]:
    """The names behind the wildcards of METRICS that pages may use, from what writes them."""
    some = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-0.4, -1.5]])
    mismatch = maths.mismatch_metrics(*some, torch.ones(1, 2, dtype=torch.bool))
    written = "".join(
        (ROOT / "rlvr" / name).read_text() for name in ("update.py", "algos/ppo.py", "trainer.py", "rollout/collect.py")
    )
    literals = set(re.findall(r'"((?:critic|time|perf)/\w+)"', written))
    return {*mismatch, *literals, *(f"status/{status}" for status in VERDICT_STATUSES)}


@pytest.mark.parametrize("page", PAGES)
def test_metrics_named_are_written(page: str) -> None:
    prefixes = {name.partition("/")[0] for name in METRICS}
    named = {span for span in spans(page) if re.fullmatch(r"\w+/[\w*]+", span) and span.partition("/")[0] in prefixes}
    assert len(named) > 3
    for name in named:
        assert any(fnmatch(name, known) for known in METRICS), name
        assert name in METRICS or name in wildcard_names(), f"{name} matches a wildcard, but nothing writes it"


@pytest.mark.parametrize("page", MODULES)
def test_equation_and_sources_are_those_of_the_module(page: str) -> None:
    docstring = inspect.getdoc(importlib.import_module(f"rlvr.algos.{page}")) or ""
    text = " ".join(text_of(page).split())
    equations = [line for line in docstring.splitlines() if line.startswith("    ")]
    assert equations
    for line in equations:
        assert " ".join(line.split()) in text, line
    for number in re.findall(r"arXiv (\d{4}\.\d{5})", docstring):
        assert number in text, number


@pytest.mark.parametrize("page", [*PAGES, "measured"])
def test_lines_stay_short(page: str) -> None:
    assert max(len(line) for line in text_of(page).splitlines()) <= 125
