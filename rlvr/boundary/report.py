"""One self-contained HTML page of a run or of a boundary measurement, from what is on disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlvr.boundary.report_browser import browser_data
from rlvr.boundary.report_figures import pass_figure, steps_figure, training_figures
from rlvr.boundary.report_sources import MAX_RESPONSES, Json, Sources, read_sources
from rlvr.boundary.report_words import crossover_words, difference_words, ends, pass_words, summary, with_interval
from rlvr.checkpoint import write_text
from rlvr.types import VERDICT_STATUSES


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` and return its path.

    ``folder`` is a run folder or a boundary folder. Parts that are missing are left out with a sentence saying so.
    """
    folder = Path(folder)
    sources = read_sources(folder)
    here = Path(__file__).parent
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report_template.html.j2").render(_context(sources))
    target = folder / "report.html"
    # A lone surrogate in a response cannot be encoded.
    write_text(target, page.encode("utf-8", errors="replace").decode("utf-8"))
    return target


def _script_json(data: Any) -> Markup:
    """JSON that is safe inside a script element: no character in it can end the element or a JavaScript line."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _facts(sources: Sources) -> list[tuple[str, str]]:
    config, boundary, base = sources.config, sources.boundary, ends(sources.boundary)[0]
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
        levels.append([model["name"], *(pass_words(model, k) for k in ks)])
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
        gap_text = f"{with_interval(gap.get('value'), gap.get('ci95'))} (k = {gap.get('k')})" if gap else "n/a"
        pairs.append([name, *(difference_words(c, k) for k in (1, max(ks))), crossover_words(c), gap_text])
        solved.append([name, *(str(sets.get(kind, "n/a")) for kind in kinds)])
    head = ["pair", "difference at k = 1", f"difference at k = {max(ks)}", "crossover", "ΔSE"]
    tables.append({"title": "Paired differences, model minus base", "head": head, "rows": pairs})
    head = ["pair", *(kind.replace("_", " ") for kind in kinds)]
    return [*tables, {"title": "Problems by which of the two models solves them", "head": head, "rows": solved}]


def _context(sources: Sources) -> Json:
    """Everything the template reads."""
    boundary = sources.boundary if sources.boundary.get("models") and sources.boundary.get("k") else {}
    by_step = steps_figure(boundary) if boundary else None
    training = training_figures(sources.metrics)
    browser = browser_data(sources)
    curves = pass_figure(boundary) if boundary else None
    figures = [f for f in (curves, by_step, *(figure for _, figure in training)) if f]
    return {
        "name": sources.folder.resolve().name,
        "facts": _facts(sources),
        "summary": summary(boundary),
        "pass_figure": curves,
        "hidden_curves": any(t.get("visible") == "legendonly" for t in (curves or {}).get("traces", [])),
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
