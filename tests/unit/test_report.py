"""The report page: numbers, missing parts, untrusted text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlvr.boundary import report, report_browser, report_figures
from rlvr.types import InputError

HOSTILE = "</script><b>bold</b><!-- & \u2028 <img src=x onerror=alert(1)>"


def _model(name: str, step: int, low: float, high: float) -> dict[str, Any]:
    ks = (1, 2, 4, 8, 16)
    values = [low + (high - low) * i / 4 for i in range(5)]
    return {
        "name": name,
        "path": f"models/{name}",
        "step": step,
        "pass_at_k": {str(k): value for k, value in zip(ks, values, strict=True)},
        "ci95": {str(k): [value - 0.02, value + 0.02] for k, value in zip(ks, values, strict=True)},
        "problems": [{"id": f"p{i}", "n": 16, "correct": 4 * i, "status": {"graded": 15, "truncated": 1}} for i in range(5)],
    }


def _boundary() -> dict[str, Any]:
    names = ("base", "step_000010", "step_000020")
    models = [_model(name, 10 * i, 0.10 + 0.05 * i, 0.70 - 0.02 * i) for i, name in enumerate(names)]
    crossover = {"undecided_k": [[4, 8]], "open_above": False, "base_above_from": 16, "model_above_to": 2}
    comparison = {
        "base": "base",
        "model": "step_000020",
        "difference": {"1": [0.1, 0.06, 0.14], "16": [-0.04, -0.07, 0.01]},
        "crossover": crossover,
        "delta_se": {"k": 16, "value": 0.5, "ci95": [0.45, 0.55]},
        "solvable": {"both": 3, "base_only": 1, "model_only": 0, "undecided": 1, "neither": 0},
    }
    return {
        "task": "countdown",
        "n": 16,
        "k": [1, 2, 4, 8, 16],
        "sampling": {"temperature": 1.0, "top_p": 1.0},
        "models": models,
        "estimand": "population",
        "sampled_distinct": True,
        "comparisons": [comparison],
    }


def _write_boundary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    boundary = _boundary()
    (folder / "boundary.json").write_text(json.dumps(boundary))
    problems = [{"id": f"p{i}", "text": f"Problem {i} {HOSTILE}", "gold": {"target": i}} for i in range(5)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for model in boundary["models"]:
        path = folder / "samples" / model["name"] / "countdown.jsonl"
        path.parent.mkdir(parents=True)
        lines = []
        for problem in model["problems"]:
            for sample in range(16):
                correct = sample >= 16 - problem["correct"]
                row = {"problem": problem["id"], "sample": sample, "seed": 2**62 + sample, "tokens": [1, 2, 3]}
                row |= {"text": f"{HOSTILE} {sample}", "score": float(correct), "correct": correct, "status": "graded"}
                row |= {"finish_reason": "stop", "extracted": "1+2", "detail": HOSTILE}
                lines.append(json.dumps(row) + "\n")
        path.write_text("".join(lines) + '{"problem": "p0", "sample": 16, "te')  # a writer was interrupted here


def _write_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 7\nalgo: {_target_: rlvr.algos.GRPO}\nmodel: {path: tiny/model}\n")
    (folder / "environment.json").write_text(json.dumps({"git_commit": "abcdef0123456789", "hardware": {"gpu": "x"}}))
    rows = [{"step": i, "reward/mean": 0.1 * i, "correct/mean": 0.1 * i, "policy/grad_norm": float("nan")} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "rew')
    (folder / "rollouts").mkdir()
    row = {"prompt_id": "t1", "prompt": "Add.", "response": f"an attempt {HOSTILE}", "score": 0.0, "correct": False}
    row |= {"status": "truncated", "finish_reason": "length", "num_tokens": 9}
    (folder / "rollouts" / "step_000002.jsonl").write_text(json.dumps(row) + "\n")


def _data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_run_with_boundary_shows_numbers_and_words(tmp_path: Path) -> None:
    run = tmp_path / "my_run"
    _write_run(run)
    _write_boundary(run / "boundary")
    path = report.write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".report*"))
    page = path.read_text(encoding="utf-8")
    for expected in (
        "pass@1 goes from 0.100 [0.080, 0.120] to 0.200 [0.180, 0.220]",
        "pass@16 goes from 0.700 [0.680, 0.720] to 0.660 [0.640, 0.680]",
        "over the population of problems like these 5",
        "at k = 1 it is +0.100 [+0.060, +0.140], so step_000020 is above base (the interval excludes 0)",
        "at k = 16 it is -0.040 [-0.070, +0.010], so the direction is not established (the interval includes 0)",
        "model above to k = 2; undecided at k = 4 to 8; base above from k = 16",
        "0.500 [0.450, 0.550] (k = 16)",
        "my_run", "GRPO", "tiny/model", "abcdef012345", "countdown",
    ):  # fmt: skip
        assert expected in page
    cells = re.findall(r"<tr><th scope=\"row\">base</th>(.*?)</tr>", page)
    assert "<td>75</td><td>0</td><td>5</td>" in cells[1]  # graded, unparsed, truncated
    names = [figure["name"] for figure in _data(page)["figures"]]
    assert names == ["pass_at_k", "by_step", "correct-mean", "reward-mean"]  # a metric that is all NaN has no chart


def test_untrusted_text_stays_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    _write_run(tmp_path)
    _write_boundary(tmp_path / "boundary")
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<b>bold" not in page and "<img src=x" not in page and "\u2028" not in page.split("plotly.js v")[0]
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"\b(?:src|href)\s*=|url\(|@import", markup)  # no resource at all, so none from the network
    assert "default-src 'none'" in page
    browser = _data(page)["browser"]
    assert browser["prompts"]["p1"]["text"] == f"Problem 1 {HOSTILE}"
    assert browser["groups"][0]["problems"][0]["responses"][0]["detail"] == HOSTILE


def test_responses_are_a_bounded_mix_and_a_cut_off_line_is_skipped(tmp_path: Path) -> None:
    _write_boundary(tmp_path)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    groups = _data(page)["browser"]["groups"]
    assert [group["name"] for group in groups] == ["base", "step_000010", "step_000020"]
    picked = {p["id"]: [r["correct"] for r in p["responses"]] for p in groups[0]["problems"]}
    assert sorted(picked) == ["p0", "p1", "p2", "p3", "p4"]
    assert picked["p0"] == [False] * 6 and picked["p1"] == [True] * 3 + [False] * 3 and picked["p4"] == [True] * 6
    assert groups[0]["problems"][0]["responses"][0]["seed"] == str(2**62)
    assert "Left out: there is no metrics.jsonl" in page and "There is no config.yaml" in page


def test_broken_line_inside_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:1"):
        report.write_report(tmp_path)


def test_run_without_boundary_says_so_and_shows_training_rollouts(tmp_path: Path) -> None:
    _write_run(tmp_path)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "There is no boundary measurement here" in page
    browser = _data(page)["browser"]
    assert browser["label"] == "Step" and browser["groups"][0]["name"] == "step_000002"
    assert browser["groups"][0]["problems"][0]["responses"][0]["status"] == "truncated"
    assert browser["prompts"]["t1"]["text"] == "Add."


def test_one_model_and_many_models(tmp_path: Path) -> None:
    boundary = _boundary() | {"comparisons": [], "estimand": "these_problems"}
    path = tmp_path / "boundary.json"
    path.write_text(json.dumps(boundary | {"models": boundary["models"][:1]}))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "no other model was measured" in page and "over these 5 problems only" in page
    assert "fewer than two of the measured models have a training step" in page
    models = [_model(f"step_{i:06d}", i, 0.1, 0.5) for i in range(20)]
    path.write_text(json.dumps(boundary | {"models": models}))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    traces = _data(page)["figures"][0]["traces"]
    shown = [t["name"] for t in traces if "name" in t and t["visible"] is True]
    assert len(shown) <= report_figures.MAX_CURVES and {"step_000000", "step_000019"} <= set(shown)
    assert "no paired comparison" in page


def test_long_text_keeps_its_end(tmp_path: Path) -> None:
    long = "a" * 3000 + "b" * 3000 + " the answer"
    short = report_browser._shortened(long)
    assert short.endswith(" the answer") and short.startswith("aaa") and "2,011 characters left out" in short


def test_folder_without_known_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither metrics\.jsonl nor boundary\.json"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())
