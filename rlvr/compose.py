"""Hydra composition: recipes and command-line overrides to plain settings. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr.errors import InputError


def recipes_dir() -> Path:
    """The recipes: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).parent
    for candidate in (package / "recipes", package.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"no recipes folder in {package} or beside it; the installation is incomplete")


def config_groups(folders: Sequence[Path]) -> set[str]:
    """Names of config groups: the folders of the recipes and of the user's own config folders."""
    return {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}


def compose(primary: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of ``recipes/PRIMARY.yaml`` under these overrides, resolved, with the experiment's name.

    A value override needs no ``+``: whether a key exists is for the classes that own the settings to say, and they name
    the nearest one.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recipes = recipes_dir().resolve()
    own = [Path(folder).resolve() for folder in config_dirs]
    for folder in own:
        if not folder.is_dir():
            raise InputError(f"--config-dir: {folder} is not a folder; expected one with config groups such as algo/NAME.yaml")
    groups = config_groups([recipes, *own])
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(f"cannot read an override: {str(error).splitlines()[0]}; expected key=value") from error
    adjusted = []
    for text, override in zip(overrides, parsed, strict=True):
        is_choice = override.key_or_group in groups and not isinstance(override.value(), dict)
        adjusted.append(text if is_choice or text.startswith(("~", "++")) else f"++{text.removeprefix('+')}")
    for override in parsed:
        if override.key_or_group in groups and isinstance(override.value(), str):
            _check_choice(override.key_or_group, str(override.value()), [recipes, *own])
    if own:
        adjusted.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]")
    try:
        with initialize_config_dir(str(recipes), version_base="1.3"):
            config = hydra_compose(primary, adjusted)
        settings = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        if "No match in the defaults list" in reason:
            reason += f" Is the experiment made for another verb than rlvr {primary}?"
        raise InputError(f"cannot compose the settings: {reason}") from error
    assert isinstance(settings, dict)
    chosen = [str(override.value()) for override in parsed if override.key_or_group == "experiment"]
    experiment = chosen[-1] if chosen else None
    named: dict[str, Any] = {str(key): value for key, value in settings.items()}
    if "run_dir" in named:  # a verb that has a run: its folder is named after the experiment unless it is given
        named["experiment"] = experiment
        named["run_dir"] = named["run_dir"] or f"runs/{experiment or primary}"
    return named


def _check_choice(group: str, choice: str, folders: Sequence[Path]) -> None:
    files = [(folder / group, path) for folder in folders for path in (folder / group).rglob("*.yaml")]
    names = sorted(str(path.relative_to(top).with_suffix("")) for top, path in files if not path.name.startswith("_"))
    if choice not in names:  # a name with an underscore in front is a part that others include
        near = difflib.get_close_matches(choice, names, n=1)
        hint = f"did you mean {group}={near[0]}?" if near else ""
        raise InputError(f"{group}: got {choice!r}, expected one of {', '.join(names)}. {hint}".rstrip(". "))
