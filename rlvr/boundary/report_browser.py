"""Example responses with their verdicts for a report: a bounded sample of what is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlvr.boundary.report_sources import MAX_RESPONSES, Json, Picked, Sources, json_rows

MAX_PROBLEMS = 40  # in the browser, per model or step
MAX_BROWSED = 1500  # responses in the browser, all models or steps together
MAX_TEXT = 4000  # characters kept of one prompt or response
MAX_STEPS_BROWSED = 8  # training rollout files in the browser


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
    for row in json_rows(path, picks if chosen else None):
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


def browser_data(sources: Sources) -> Json | None:
    """What the browser of responses shows: boundary samples, or else training rollouts by step."""
    boundary, samples, prompts = sources.boundary, sources.measured / "samples", dict[str, Json]()
    if models := boundary.get("models"):
        files = [(model["name"], samples / model["name"] / f"{boundary['task']}.jsonl") for model in models]
    else:
        files = [(path.parent.name, path) for path in sorted(samples.glob("*/*.jsonl"))]
    if groups := _groups(files, "problem", boundary, prompts):
        used = {problem["id"] for group in groups for problem in group["problems"]}
        for row in json_rows(sources.measured / "problems.jsonl"):
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
