"""The figures of a report, as plain plotly traces and layouts."""

from __future__ import annotations

import math
from typing import Any

from rlvr.boundary.report_sources import Json
from rlvr.boundary.report_words import ends, with_interval

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
        "customdata": [with_interval(*both) for both in zip(y, intervals, strict=True)],
        "hovertemplate": "%{customdata}", "meta": {"color": color},
    }  # fmt: skip
    return [band, line]


def pass_figure(boundary: Json) -> Json:
    base, last, _ = ends(boundary)
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


def steps_figure(boundary: Json) -> Json | None:
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


def training_figures(metrics: list[Json]) -> list[tuple[str, Json]]:
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
