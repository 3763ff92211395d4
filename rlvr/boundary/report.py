"""One self-contained HTML page of a run or of a boundary measurement, from what is on disk."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlvr.checkpoint import write_text
from rlvr.types import VERDICT_STATUSES, InputError

Json = dict[str, Any]

MAX_PROBLEMS = 40  # in the browser, per model or step
MAX_RESPONSES = 6  # in the browser, per problem
MAX_BROWSED = 1500  # responses in the browser, all models or steps together
MAX_TEXT = 4000  # characters kept of one prompt or response
MAX_STEPS_BROWSED = 8  # training rollout files in the browser
MAX_CURVES = 7  # pass@k curves drawn at first; the others wait in the legend
COLORS, DASHES, SYMBOLS = 6, ("solid", "dot", "dashdot"), ("circle", "square", "diamond", "triangle-up", "x", "star")

METRICS = {  # in order of preference, with the title of the chart
    "correct/mean": "correct, mean",
    "reward/mean": "reward, mean",
    "rollout/length_mean_tokens": "response length, mean (tokens)",
    "policy/entropy_nats": "policy entropy (nats)",
    "policy/grad_norm": "gradient norm",
    "policy/approx_kl_nats": "approximate KL per step (nats)",
    "mismatch/abs_diff_max": "engine and trainer log-probs, largest difference (nats)",
    "time/step_s": "time per step (s)",
}
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


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path.

    ``folder`` is a run folder or a boundary folder. Parts that are missing are left out with a sentence saying so.
    """
    folder = Path(folder)
    sources = _read(folder)
    here = Path(__file__).parent
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report_template.html.j2").render(_context(sources))
    target = folder / "report.html"
    # A lone surrogate in a response cannot be encoded.
    write_text(target, page.encode("utf-8", errors="replace").decode("utf-8"))
    return target


def _read(folder: Path) -> Sources:
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
    by_step = {row["step"]: row for row in _rows(folder / "metrics.jsonl") if isinstance(row.get("step"), int)}
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


def _rows(path: Path, wanted: dict[str, Picked] | None = None) -> Iterator[Json]:
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


def _number(value: Any, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if isinstance(value, int | float) and math.isfinite(value) else "n/a"


def _with_interval(value: Any, interval: Any, sign: str = "") -> str:
    if not interval or len(interval) != 2:
        return _number(value, sign)
    return f"{_number(value, sign)} [{_number(interval[0], sign)}, {_number(interval[1], sign)}]"


def _pass(model: Json, k: int) -> str:
    return _with_interval(model.get("pass_at_k", {}).get(str(k)), model.get("ci95", {}).get(str(k)))


def _difference(comparison: Json, k: int) -> str:
    """Model minus base at ``k``, with signs."""
    value, *interval = comparison["difference"].get(str(k)) or [None]
    return _with_interval(value, interval, "+")


def _script_json(data: Any) -> Markup:
    """JSON that is safe inside a script element: no character in it can end the element or a JavaScript line."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _ends(boundary: Json) -> tuple[Json, Json, Json]:
    """The base model, the last model, and the comparison of the two (each may be empty)."""
    models, comparisons = boundary.get("models") or [], boundary.get("comparisons") or []
    if not models:
        return {}, {}, {}
    base_name = comparisons[0]["base"] if comparisons else models[0]["name"]
    base = next((m for m in models if m["name"] == base_name), models[0])
    others = [m for m in models if m is not base]
    if not others:
        return base, {}, {}
    steps = [m for m in others if m.get("step") is not None]
    last = max(steps, key=lambda m: m["step"]) if len(steps) == len(others) else others[-1]
    pair = (c for c in comparisons if c["base"] == base["name"] and c["model"] == last["name"])
    return base, last, next(pair, {})


def _summary(boundary: Json) -> list[str]:
    """The result in words: levels of both models, then what the paired differences establish."""
    base, last, comparison = _ends(boundary)
    if not base:
        return []
    ks = sorted({1, max(boundary["k"])} & set(boundary["k"]))
    estimand = boundary.get("estimand", "population")
    over = f"over {'the population of problems like ' if estimand == 'population' else ''}these {len(base['problems'])}"
    over += "" if estimand == "population" else f" problems only, estimand: {estimand}"
    if not last:
        levels = " and ".join(f"pass@{k} is {_pass(base, k)}" for k in ks)
        return [f"For {base['name']}, {levels} ({over}; 95 % intervals in brackets); no other model was measured."]
    levels = " and ".join(f"pass@{k} goes from {_pass(base, k)} to {_pass(last, k)}" for k in ks)
    words = [f"From {base['name']} to {last['name']}, {levels} ({over}; 95 % intervals in brackets)."]
    if not comparison:
        return [*words, "boundary.json holds no paired comparison of these two models, so no direction is established."]
    parts = []
    for k in (k for k in ks if str(k) in comparison["difference"]):
        _, lower, upper = comparison["difference"][str(k)]
        where = f"at k = {k} it is {_difference(comparison, k)}"
        if lower > 0 or upper < 0:
            direction = "above" if lower > 0 else "below"
            parts.append(f"{where}, so {last['name']} is {direction} {base['name']} (the interval excludes 0)")
        else:
            parts.append(f"{where}, so the direction is not established (the interval includes 0)")
    return [*words, f"The paired difference, {last['name']} minus {base['name']}: {'; '.join(parts)}."]


def _crossover(comparison: Json) -> str:
    """Which curve is above at which k, as far as the paired intervals tell."""
    crossover, parts = comparison.get("crossover") or {}, []
    if (upto := crossover.get("model_above_to")) is not None:
        parts.append(f"model above to k = {upto}")
    if spans := crossover.get("undecided_k"):
        named = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in spans)
        parts.append(f"undecided at k = {named}{' and possibly beyond' if crossover.get('open_above') else ''}")
    if (start := crossover.get("base_above_from")) is not None:
        parts.append(f"base above from k = {start}")
    return "; ".join(parts) or "n/a"


def _facts(sources: Sources) -> list[tuple[str, str]]:
    config, boundary, base = sources.config, sources.boundary, _ends(sources.boundary)[0]
    algorithm = config.get("algo", {}).get("_target_")
    facts = [
        ("task", boundary.get("task") or config.get("task", {}).get("_target_")),
        ("base model", config.get("model", {}).get("path") or base.get("path")),
        ("algorithm", algorithm.rsplit(".", 1)[-1] if algorithm else None),
        ("learning rate", config.get("optimizer", {}).get("lr")),
        ("reward", (config.get("reward") or {}).get("_target_")),  # only when it is not the task's own
        ("seed", config.get("seed")),
        ("commit", str(sources.environment.get("git_commit") or "")[:12] or None),
        ("started", sources.environment.get("started")),
        ("steps in metrics.jsonl", sources.metrics[-1]["step"] if sources.metrics else None),
        ("responses per problem (n)", boundary.get("n")),
        ("sampling", ", ".join(f"{k} {v}" for k, v in (boundary.get("sampling") or {}).items()) or None),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _table_ks(ks: list[int]) -> list[int]:
    """1, the largest, and up to three between them, evenly spread on the log axis."""
    targets = [max(ks) ** (i / 4) for i in range(5)]
    return sorted({min(ks, key=lambda k: abs(math.log(k / target))) for target in targets})


def _tables(boundary: Json) -> list[Json]:
    ks = _table_ks(boundary["k"])
    levels, totals = [], []
    for model in boundary["models"]:
        total = Counter[str]()
        for problem in model["problems"]:
            total.update(problem.get("status", {}))
        levels.append([model["name"], *(_pass(model, k) for k in ks)])
        totals.append([model["name"], *(f"{total[status]:,}" for status in VERDICT_STATUSES)])
    tables = [
        {"title": "pass@k, 95 % intervals in brackets", "head": ["model", *(f"pass@{k}" for k in ks)], "rows": levels},
        {"title": "Responses by status", "head": ["model", *VERDICT_STATUSES], "rows": totals},
    ]
    comparisons = boundary.get("comparisons") or []
    if not comparisons:
        return tables
    kinds = ("both", "base_only", "model_only", "undecided", "neither")
    pairs, solved = [], []
    for c in comparisons:
        name, gap, sets = f"{c['model']} - {c['base']}", c.get("delta_se") or {}, c.get("solvable") or {}
        gap_text = f"{_with_interval(gap.get('value'), gap.get('ci95'))} (k = {gap.get('k')})" if gap else "n/a"
        pairs.append([name, *(_difference(c, k) for k in (1, max(ks))), _crossover(c), gap_text])
        solved.append([name, *(str(sets.get(kind, "n/a")) for kind in kinds)])
    head = ["pair", "difference at k = 1", f"difference at k = {max(ks)}", "crossover", "ΔSE"]
    tables.append({"title": "Paired differences, model minus base", "head": head, "rows": pairs})
    head = ["pair", *(kind.replace("_", " ") for kind in kinds)]
    return [*tables, {"title": "Problems by which of the two models solves them", "head": head, "rows": solved}]


def _figure(name: str, traces: list[Json], x: Json, y: str, height: int, legend: bool = True) -> Json:
    """A Plotly figure as data; the page adds what all figures share and the colours that ``meta`` of a trace names."""
    y_axis = {"title": {"text": y}, "rangemode": "tozero" if legend else "normal"}
    layout = {"height": height, "xaxis": x, "yaxis": y_axis, "showlegend": legend}
    return {"name": name, "traces": traces, "layout": layout}


def _banded(name: str, color: str, x: list[int], y: list[float], intervals: list[Any], **style: Any) -> list[Json]:
    """A line with its 95 % band; one entry of the legend switches both."""
    known = [(place, interval) for place, interval in zip(x, intervals, strict=True) if interval]
    common = {"legendgroup": name, "visible": style.pop("visible", True)}
    band = {
        **common, "x": [place for place, _ in known] + [place for place, _ in reversed(known)], "mode": "lines",
        "y": [i[0] for _, i in known] + [i[1] for _, i in reversed(known)], "line": {"width": 0}, "fill": "toself",
        "hoverinfo": "skip", "showlegend": False, "meta": {"color": color, "band": True},
    }  # fmt: skip
    line = {
        **common, "x": x, "y": y, "name": name, "mode": "lines+markers" if len(x) <= 16 else "lines", **style,
        "customdata": [_with_interval(*both) for both in zip(y, intervals, strict=True)],
        "hovertemplate": "%{customdata}", "meta": {"color": color},
    }  # fmt: skip
    return [band, line]


def _pass_figure(boundary: Json) -> Json:
    base, last, _ = _ends(boundary)
    ks, models = sorted(boundary["k"]), boundary["models"]
    others = [m for m in models if m is not base]
    every = max(1, math.ceil(len(others) / (MAX_CURVES - 1)))
    traces = []
    for model in models:
        values = [model["pass_at_k"][str(k)] for k in ks]
        intervals = [model.get("ci95", {}).get(str(k)) for k in ks]
        if model is base:
            look: Json = {"line": {"dash": "dash", "width": 2}, "marker": {"symbol": "circle-open", "size": 7}}
            traces += _banded(model["name"], "base", ks, values, intervals, **look)
            continue
        place = others.index(model)
        shown = model is last or (len(others) - 1 - place) % every == 0
        look = {"line": {"dash": DASHES[place // COLORS % len(DASHES)], "width": 2}}
        look |= {"marker": {"symbol": SYMBOLS[place % COLORS], "size": 6}, "visible": True if shown else "legendonly"}
        traces += _banded(model["name"], f"c{place % COLORS}", ks, values, intervals, **look)
    ticks = [2**i for i in range(int(math.log2(max(ks))) + 1)]
    axis = {"type": "log", "tickvals": ticks, "ticktext": [str(k) for k in ticks], "title": {"text": "k"}}
    return _figure("pass_at_k", traces, axis, "pass@k", 460)


def _steps_figure(boundary: Json) -> Json | None:
    models = sorted((m for m in boundary["models"] if m.get("step") is not None), key=lambda m: m["step"])
    if len(models) < 2:
        return None
    traces = []
    for place, k in enumerate(sorted({1, max(boundary["k"])} & set(boundary["k"]))):
        values = [m["pass_at_k"][str(k)] for m in models]
        intervals = [m.get("ci95", {}).get(str(k)) for m in models]
        look = {"marker": {"symbol": SYMBOLS[place], "size": 8}}
        traces += _banded(f"pass@{k}", f"c{3 + place}", [m["step"] for m in models], values, intervals, **look)
    return _figure("by_step", traces, {"title": {"text": "step"}}, "pass@k", 380)


def _training_figures(metrics: list[Json]) -> list[tuple[str, Json]]:
    """Title and figure of each preferred metric that the run has."""
    found = []
    for key, title in METRICS.items():
        points = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
        if not points:
            continue
        trace = {
            "name": key, "mode": "lines" if len(points) > 30 else "lines+markers", "x": [step for step, _ in points],
            "y": [value for _, value in points], "meta": {"color": "c0"}, "line": {"width": 1.5}, "marker": {"size": 4},
            "hovertemplate": "%{y:.4~g}<extra></extra>",
        }  # fmt: skip
        x_axis = {"title": {"text": "step"}}
        found.append((title, _figure(key.replace("/", "-"), [trace], x_axis, "", 220, legend=False)))
    return found


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_TEXT:
        return text
    head, left_out = MAX_TEXT // 3, len(text) - MAX_TEXT  # the answer is at the end, so more is kept of it
    return f"{text[:head]}\n[... {left_out:,} characters left out ...]\n{text[head + left_out :]}"


def _response(row: Json) -> Json:
    kept: Json = {key: row.get(key) for key in ("score", "correct", "status", "finish_reason", "sample")}
    kept |= {key: _shortened(row[key]) for key in ("extracted", "detail") if row.get(key) not in (None, "")}
    if "seed" in row:
        kept["seed"] = str(row["seed"])  # seeds go to 2**63, past what a JavaScript number holds exactly
    length = row["num_tokens"] if "num_tokens" in row else len(row["tokens"]) if "tokens" in row else None
    return {**kept, "num_tokens": length, "text": _shortened(row.get("text", row.get("response")))}


def _chosen(boundary: Json, limit: int) -> list[str]:
    """Problems for the browser: those with both correct and other responses first, evenly spread over their order."""
    mixed: dict[str, bool] = {}
    for model in boundary.get("models", []):
        for problem in model["problems"]:
            mixed[problem["id"]] = mixed.get(problem["id"], False) or 0 < problem["correct"] < problem["n"]
    chosen: set[str] = set()
    for wanted in (True, False):
        ids = [name for name, both in mixed.items() if both is wanted]
        room = min(limit - len(chosen), len(ids))
        chosen.update(ids[i * len(ids) // room] for i in range(room))
    return [name for name in mixed if name in chosen]


def _collect(path: Path, key: str, chosen: list[str], limit: int, prompts: Json) -> list[Json]:
    """Up to ``limit`` problems of a rows file with their picked responses; ``chosen`` empty: the first ones met."""
    picks = {name: Picked() for name in chosen}
    for row in _rows(path, picks if chosen else None):
        name = str(row.get(key))
        if not chosen and len(picks) < limit:
            picks.setdefault(name, Picked())
        if name in picks:
            picks[name].add(_response(row))
            if "prompt" in row:
                prompts.setdefault(name, {"text": _shortened(row["prompt"])})
    return [{"id": name, "responses": rows} for name, pick in picks.items() if (rows := pick.rows())]


def _groups(files: list[tuple[str, Path]], key: str, boundary: Json, prompts: Json) -> list[Json]:
    """One entry per model or step: its problems with a bounded number of responses."""
    limit = max(5, min(MAX_PROBLEMS, MAX_BROWSED // (MAX_RESPONSES * max(1, len(files)))))
    chosen = _chosen(boundary, limit)
    groups = [{"name": name, "problems": _collect(path, key, chosen, limit, prompts)} for name, path in files]
    return [group for group in groups if group["problems"]]


def _browser(sources: Sources) -> Json | None:
    """What the browser of responses shows: boundary samples, or else training rollouts by step."""
    boundary, samples, prompts = sources.boundary, sources.measured / "samples", dict[str, Json]()
    if models := boundary.get("models"):
        files = [(model["name"], samples / model["name"] / f"{boundary['task']}.jsonl") for model in models]
    else:
        files = [(path.parent.name, path) for path in sorted(samples.glob("*/*.jsonl"))]
    if groups := _groups(files, "problem", boundary, prompts):
        used = {problem["id"] for group in groups for problem in group["problems"]}
        for row in _rows(sources.measured / "problems.jsonl"):
            if row.get("id") in used:
                prompts[row["id"]] = {"text": _shortened(row.get("text")), "gold": _shortened(row.get("gold"))}
        counts = {
            model["name"]: {p["id"]: [p["correct"], p["n"]] for p in model["problems"] if p["id"] in used}
            for model in models or []
        }
        return {"label": "Model", "groups": groups, "prompts": prompts, "counts": counts}
    steps = sorted((sources.folder / "rollouts").glob("step_*.jsonl"))
    if len(steps) > MAX_STEPS_BROWSED:
        steps = [steps[i * (len(steps) - 1) // (MAX_STEPS_BROWSED - 1)] for i in range(MAX_STEPS_BROWSED)]
    groups = _groups([(path.stem, path) for path in steps], "prompt_id", {}, prompts)
    return {"label": "Step", "groups": groups, "prompts": prompts, "counts": {}} if groups else None


def _context(sources: Sources) -> Json:
    """Everything the template reads."""
    boundary = sources.boundary if sources.boundary.get("models") and sources.boundary.get("k") else {}
    by_step = _steps_figure(boundary) if boundary else None
    training = _training_figures(sources.metrics)
    browser = _browser(sources)
    pass_figure = _pass_figure(boundary) if boundary else None
    figures = [f for f in (pass_figure, by_step, *(figure for _, figure in training)) if f]
    return {
        "name": sources.folder.resolve().name,
        "facts": _facts(sources),
        "summary": _summary(boundary),
        "pass_figure": pass_figure,
        "hidden_curves": any(t.get("visible") == "legendonly" for t in (pass_figure or {}).get("traces", [])),
        "by_step": by_step,
        "tables": _tables(boundary) if boundary else [],
        "has_boundary": bool(boundary),
        "has_metrics": bool(sources.metrics),
        "training": training,
        "browser": browser,
        "max_responses": MAX_RESPONSES,
        "config_text": sources.config_text,
        "environment": json.dumps(sources.environment, indent=2, ensure_ascii=False) if sources.environment else "",
        "plotly_js": Markup(get_plotlyjs()) if figures else "",
        "data": _script_json({"figures": figures, "browser": browser}),
    }
