"""Boundary evaluation with a real model: counts, resuming after a kill, refusal of mixed stores, exact ground truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvr.backend import SingleBackend
from rlvr.boundary.evaluate import EvaluatedModel, evaluate, unique_names
from rlvr.boundary.exact import solve_probabilities
from rlvr.boundary.store import SampleStore
from rlvr.checkpoint import read_json
from rlvr.cli import main
from rlvr.config import BoundarySettings
from rlvr.model import load_policy, load_tokenizer
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.tasks.countdown import CountdownTask
from rlvr.types import InputError, Sampling

TASK = CountdownTask(train_problems=8, test_problems=6)


def measure(folder: Path, model: str, n: int = 4, temperature: float = 1.0) -> dict:
    settings = BoundarySettings(n=n, temperature=temperature, top_p=1.0)
    models = [EvaluatedModel("base", model), EvaluatedModel("again", model, 5)]
    backend = SingleBackend(use="cpu")
    backend.start()
    evaluate(folder, models, TASK, TransformersEngine(), settings, settings.sampling(Sampling(max_new_tokens=10)), backend)
    return read_json(folder / "boundary.json")


def test_counts_add_up_and_twins_are_equal(tiny_model: str, tmp_path: Path) -> None:
    result = measure(tmp_path, tiny_model)
    base, again = result["models"]
    assert result["k"] == [1, 2, 4]
    assert result["sampled_distinct"] is True
    for problem in base["problems"]:
        assert problem["n"] == 4 == sum(problem["status"].values())
    assert base["pass_at_k"] == again["pass_at_k"]
    assert result["comparisons"][0]["difference"]["1"] == [0.0, 0.0, 0.0]
    assert json.loads((tmp_path / "boundary.json").read_text()) == result


def test_a_killed_evaluation_continues_without_loss_or_repeat(tiny_model: str, tmp_path: Path) -> None:
    whole = measure(tmp_path / "whole", tiny_model)
    measure(tmp_path / "killed", tiny_model)
    file = tmp_path / "killed" / "samples" / "base" / "countdown.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])  # the kill came in the middle of a line
    assert measure(tmp_path / "killed", tiny_model) == whole
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len({(row["problem"], row["sample"]) for row in rows}) == 24
    untouched = [json.loads(line) for line in content.decode().splitlines()]
    key = lambda row: (row["problem"], row["sample"])  # noqa: E731
    assert sorted(rows, key=key) == sorted(untouched, key=key)


def test_more_samples_extend_the_store(tiny_model: str, tmp_path: Path) -> None:
    measure(tmp_path, tiny_model, n=2)
    first = (tmp_path / "samples" / "base" / "countdown.jsonl").read_text()
    measure(tmp_path, tiny_model, n=4)
    assert (tmp_path / "samples" / "base" / "countdown.jsonl").read_text().startswith(first)


def test_store_of_another_evaluation_is_refused(tiny_model: str, tmp_path: Path) -> None:
    measure(tmp_path, tiny_model)
    before = (tmp_path / "samples" / "base" / "countdown.jsonl").read_bytes()
    with pytest.raises(InputError, match="sampling: was"):
        measure(tmp_path, tiny_model, temperature=0.5)
    assert (tmp_path / "samples" / "base" / "countdown.jsonl").read_bytes() == before


def test_store_repairs_only_the_last_line(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, "m", "t", {})
    store.path.write_text('{"problem": "a", "sample": 0}\n{"problem": "a", "sam')
    assert SampleStore(tmp_path, "m", "t", {}).sample_ids() == {"a": {0}}


def test_exact_solve_probability_matches_direct_enumeration(tiny_model: str) -> None:
    """Sum over answers of the product of next-token probabilities, one token at a time, without batching."""
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    prompts = TASK.prompts("test")[:3]
    expected = []
    for prompt in prompts:
        question = tokenizer(prompt.text)["input_ids"]
        total = 0.0
        for answer in TASK.correct_answers(prompt):
            tokens = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([[*question, *tokens]])).logits[0].double()
            steps = [torch.log_softmax(logits[len(question) - 1 + i], -1)[token] for i, token in enumerate(tokens)]
            total += torch.stack(steps).sum().exp().item()
        expected.append(total)
    assert np.allclose(solve_probabilities(model, tokenizer, TASK, prompts), expected, rtol=1e-4, atol=0)


def test_boundary_verb(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"models=[{tiny_model}]", "n=2", "problems=3", "max_new_tokens=8", f"out={tmp_path / 'out'}"]
    assert main(["boundary", "task=countdown", *words]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert main(["report", str(tmp_path / "out")]) == 0


def test_names_of_models_are_short_and_unique() -> None:
    assert unique_names(["runs/a/checkpoints/step_000050", "runs/base"]) == ["step_000050", "base"]
    assert unique_names(["runs/a/step_000050", "runs/b/step_000050"]) == ["a-step_000050", "b-step_000050"]
    with pytest.raises(InputError, match="appears twice"):
        unique_names(["x", "x"])
