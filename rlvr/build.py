"""Settings to objects and back: typed, all problems at once, with the nearest name for a misspelt key.

Components (algorithm, task, reward, engine, back end, pairs) are dataclasses named by a dotted path:
``{"_target_": "my_algo.X", "scale": 0.5}``. The class is its own schema: fields are settings, ``__post_init__`` checks ranges.
"""

from __future__ import annotations

import difflib
import importlib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from rlvr.algos import Algorithm
from rlvr.backend import Backend
from rlvr.data import Pairs
from rlvr.rewards import Reward
from rlvr.rollout import Engine
from rlvr.tasks import Task
from rlvr.types import InputError

COMPONENTS = (Algorithm, Task, Reward, Engine, Backend, Pairs)


def from_mapping(cls: type, node: Any, key: str = "") -> Any:
    """An instance of the dataclass ``cls`` from a mapping, nested. All problems are reported in one InputError."""
    problems: list[str] = []
    instance = _read(cls, node, key, problems)
    if problems:
        raise InputError("\n".join(problems))
    return instance


def _read(cls: type, node: Any, key: str, problems: list[str], start: Any = None) -> Any:
    """An instance of ``cls`` from a mapping; what the mapping leaves out is as in ``start``, or the class's default."""
    if not isinstance(node, Mapping):
        problems.append(f"{key}: got {node!r}, expected settings of {cls.__name__} ({', '.join(_setting_types(cls))})")
        return None
    settings = _setting_types(cls)
    before = len(problems)
    values = {}
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            continue
        if name not in settings:
            problems.append(_unknown(path, str(name), cls, settings))
        else:
            values[name] = _convert(settings[name], value, path, problems, _default(start or cls, name))
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    for name in required if start is None else ():
        if name not in values:
            problems.append(f"{key + '.' if key else ''}{name}: not given; {cls.__name__} needs it")
    if len(problems) > before:
        return None
    try:
        return cls(**values) if start is None else replace(start, **values)
    except ValueError as error:
        prefix = f"{key}." if key else ""
        problems.extend(prefix + line for line in str(error).splitlines())
        return None


def _default(owner: Any, name: str) -> Any:
    """What the field ``name`` holds when nothing is said: of an instance its value, of a class its default, if any."""
    if not isinstance(owner, type):
        return getattr(owner, name)
    (item,) = (f for f in fields(owner) if f.name == name)
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def _setting_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _unknown(path: str, name: str, cls: type, settings: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    hint = f"did you mean {path.removesuffix(name)}{near[0]}?" if near else f"it has {', '.join(settings) or 'none'}"
    return f"{path}: {cls.__module__}.{cls.__qualname__} has no setting {name!r}; {hint}"


def _convert(annotation: Any, value: Any, path: str, problems: list[str], default: Any = None) -> Any:
    """``value`` as the annotated type; a problem is noted when it does not fit. Nested settings start from ``default``."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if value is None and type(None) in options:
        return None
    if value == "???":
        problems.append(f"{path}: not given, and there is no default for it")
        return None
    for option in options:
        if option in COMPONENTS:
            return build(option, value, path, problems)
        if is_dataclass(option) and isinstance(option, type):
            return _read(option, value, path, problems, default if type(default) is option else None)
        origin = typing.get_origin(option) or option
        if option is Any or (origin in (list, tuple) and isinstance(value, list | tuple)):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    wanted = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    problems.append(f"{path}: got {value!r} ({type(value).__name__}), expected {wanted}")
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def build(base: type, node: Any, key: str, problems: list[str]) -> Any:
    """The component a mapping with ``_target_`` describes; ``base`` is the class or protocol it must be."""
    if is_dataclass(node) and isinstance(node, base):
        return node
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        problems.append(
            f"{key}._target_: got {target!r}, expected the dotted path of a class ({base.__name__}), as in my_module.MyClass"
        )
        return None
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        problems.append(f"{key}._target_: got {target!r}, but there is no module {error.name!r} on the import path")
        return None
    except AttributeError:
        near = difflib.get_close_matches(class_name, vars(importlib.import_module(module_name)), n=1)
        hint = f"; did you mean {module_name}.{near[0]}?" if near else ""
        problems.append(f"{key}._target_: got {target!r}, but {module_name} has no {class_name}{hint}")
        return None
    if not (isinstance(cls, type) and "__dataclass_fields__" in vars(cls)):  # inherited ones would lose its own fields
        problems.append(
            f"{key}._target_: {target} is not a dataclass; put @dataclass above it, so that its settings can be checked and "
            "written to config.yaml"
        )
        return None
    instance = _read(cls, node, key, problems)
    if instance is not None and not isinstance(instance, base):
        members = [*vars(base), *base.__annotations__]
        wanted = [name for name in members if not name.startswith("_") and not hasattr(instance, name)]
        lacks = f"; it lacks {', '.join(wanted)}" if wanted else ""
        problems.append(f"{key}._target_: {target} is not a {base.__name__} ({base.__module__}){lacks}")
        return None
    return instance


def to_mapping(value: Any) -> Any:
    """The inverse of ``from_mapping``: plain data with every default filled in; components carry their ``_target_``."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_mapping(getattr(value, f.name)) for f in fields(value) if f.init}
        if isinstance(value, COMPONENTS):
            return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
        return plain
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    return [to_mapping(item) for item in value] if isinstance(value, list | tuple) else value
