"""One batch, one gradient: whatever the micro-batches, the order of the rows, the padding and the number of processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_worker import (
    CUTS,
    RUNS,
    SHARDED,
    WIDE,
    algorithms,
    gradients,
    make,
    measure,
    pairs,
    ragged_batch,
    run_settings,
    train,
    train_once,
    updated,
    widened,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlvr.algos import Algorithm
from rlvr.backend import SingleBackend
from rlvr.checkpoint import read_json
from rlvr.config import check_processes
from rlvr.log import read_metrics
from rlvr.types import Batch, InputError

CASES = algorithms()
BOUND = 1e-5  # |g1 - g2| / |g1| over the whole vector, float32
Gradients = dict[str, list[Tensor]]


def distance(one: Gradients, other: Gradients) -> float:
    """The largest relative distance between the gradients of corresponding updates."""
    assert one.keys() == other.keys()
    pairs = [pair for part in one for pair in zip(one[part], other[part], strict=True)]
    assert all(bool(torch.isfinite(a).all()) and float(a.norm()) > 0 for a, _ in pairs)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


@pytest.fixture(scope="module")
def backend() -> SingleBackend:
    single = SingleBackend(use="cpu")
    single.start()
    return single


def variants() -> dict[str, tuple[Batch, int]]:
    batch = ragged_batch()
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    return {
        "one row at a time": (batch, 1),
        "packed to 40 tokens": (batch, 40),
        "other order": (batch.select(order), WIDE),
        "other order, packed": (batch.select(order.flip(0)), 25),
        "more padding": (widened(batch, 5), WIDE),
    }


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_any_split_order_and_padding(name: str, backend: SingleBackend, tiny_model: str) -> None:
    whole = gradients(CASES[name], tiny_model, backend, ragged_batch())
    for variant, (batch, budget) in variants().items():
        assert distance(whole, gradients(CASES[name], tiny_model, backend, batch, budget)) < BOUND, variant
    packed = gradients(CASES[name], tiny_model, backend, ragged_batch(), 40, packing=True)
    assert distance(whole, packed) < BOUND, "rows one after another"


def test_the_comparison_sees_a_wrong_denominator(backend: SingleBackend, tiny_model: str) -> None:
    """A mean of the means of two parts, the bug that this file is about, is far outside the bound."""
    algorithm, batch = CASES["grpo token-mean"], ragged_batch()
    advantages = algorithm.advantages(batch)
    whole = gradients(algorithm, tiny_model, backend, batch, advantages=advantages)
    halves = [
        gradients(algorithm, tiny_model, backend, batch.select(rows), advantages=advantages[rows])
        for rows in torch.arange(len(batch)).split(6)
    ]
    mean = [(first + second) / 2 for first, second in zip(*(half["policy"] for half in halves), strict=True)]
    assert distance(whole, {"policy": mean}) > 1e-2


def test_pretraining_term_adds_its_weight_times_the_gradient_of_the_pairs(backend: SingleBackend, tiny_model: str) -> None:
    """Mean over the pairs' own tokens, whatever the rollouts weigh; computed here row by row without the package."""
    batch, weight = ragged_batch(), CASES["pretraining term"].c_ptx
    without = gradients(replace(CASES["pretraining term"], c_ptx=0.0), tiny_model, backend, batch)["policy"][0]
    with_term = gradients(CASES["pretraining term"], tiny_model, backend, batch)["policy"][0]
    model, loss, text = AutoModelForCausalLM.from_pretrained(tiny_model), torch.zeros(()), pairs()
    for tokens, mask in zip(text.tokens, text.response_mask, strict=True):
        logprobs = torch.log_softmax(model(input_ids=tokens[None]).logits[0].float(), -1)
        for place in mask.nonzero().flatten().tolist():
            loss = loss - logprobs[place - 1, tokens[place]]
    (loss / text.response_mask.sum()).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float((with_term - without - weight * wanted).norm() / (weight * wanted).norm()) < 1e-4


def launch(processes: int, what: str, model: str, out: Path) -> None:
    """The worker under torchrun, with its output in the failure message."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = [str(Path(__file__).with_name("parallel_worker.py")), what, model, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("processes", [2, 4])
def test_gradient_of_any_number_of_processes(processes: int, backend: SingleBackend, tiny_model: str, tmp_path: Path) -> None:
    launch(processes, "gradients", tiny_model, tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    far = {}
    for name, algorithm in CASES.items():
        for minibatch, _ in CUTS[processes]:
            alone = gradients(algorithm, tiny_model, backend, ragged_batch(), WIDE, minibatch)
            gap = distance(alone, found[f"{name}, {minibatch} prompts"])
            if gap >= BOUND:
                far[f"{name}, {minibatch} prompts"] = gap
    assert len(found) == len(CUTS[processes]) * len(CASES)
    assert not far


def test_updates_of_every_zero_stage(backend: SingleBackend, tiny_model: str, tmp_path: Path) -> None:
    """One process, two under DDP, ZeRO 0 to 3: the same gradients and, after three SGD updates, the same parameters."""
    pytest.importorskip("deepspeed")
    launch(2, "stages", tiny_model, tmp_path / "stages.pt")
    found = torch.load(tmp_path / "stages.pt", weights_only=True)
    assert len(found) == 10
    alone = {name: updated(make(name), tiny_model, backend) for name in ("grpo", "ppo")}
    start = [torch.cat([p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()])]
    for name, parts in found.items():
        single = alone[name.rpartition(" ")[2]]
        assert distance({"policy weights": start}, {"policy weights": parts["policy weights"]}) > 1e-3  # they moved
        assert distance(single, parts) < BOUND, name


def test_a_run_of_two_processes_is_the_run_of_one(tiny_model: str, tmp_path: Path) -> None:
    """Critic, greedy rows, dynamic sampling, KL, pretraining term: the same prompts, responses, metrics and weights."""
    launch(2, "runs", tiny_model, tmp_path / "two")
    for name in RUNS:
        train(name, tiny_model, tmp_path / "one")
        one, two = (read_metrics(tmp_path / which / name / "metrics.jsonl") for which in ("one", "two"))
        assert len(one) == len(two) == 3
        for ours, theirs in zip(one, two, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                if not key.startswith(("time/", "perf/")):
                    assert math.isclose(value, theirs[key], rel_tol=1e-3, abs_tol=1e-5), (name, key, value, theirs[key])
        last = "checkpoints/step_000003"
        weights = [AutoModelForCausalLM.from_pretrained(tmp_path / w / name / last).state_dict() for w in ("one", "two")]
        for parameter, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][parameter], rtol=1e-3, atol=1e-5, msg=f"{name}: {parameter}")
    measure(tiny_model, tmp_path / "one")
    boundaries = [read_json(tmp_path / who / "boundary" / "boundary.json") for who in ("one", "two")]
    assert boundaries[0] == boundaries[1] and len(boundaries[0]["models"][0]["problems"]) == 7
    stores = [(tmp_path / who / "boundary/samples/base/countdown.jsonl").read_text().splitlines() for who in ("one", "two")]
    assert sorted(stores[0]) == sorted(stores[1]) and len(stores[0]) == 35


def test_a_sharded_run_in_two_sittings_is_the_run_in_one(tiny_model: str, tmp_path: Path) -> None:
    """ZeRO 1 to 3, float32 and bfloat16 (whose float32 master weights must survive): bitwise. ZeRO-3 equals one process."""
    pytest.importorskip("deepspeed")
    launch(2, "resumes", tiny_model, tmp_path)
    last = Path("checkpoints/step_000003")
    for name in SHARDED:
        parts = [tmp_path / name / sitting / "ppo" for sitting in ("once", "twice")]
        rows = [[steady(row) for row in read_metrics(part / "metrics.jsonl")] for part in parts]
        assert rows[0] == rows[1], name
        for folder in (last, last / "trainer_state" / "critic_model"):
            one, two = (load_file(part / folder / "model.safetensors") for part in parts)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), (name, folder)
    config = run_settings("ppo", tiny_model, tmp_path / "alone")
    train_once(replace(config, trainer=replace(config.trainer, reset_reference_every=2)))
    alone, sharded = (load_file(tmp_path / part / "ppo" / last / "model.safetensors") for part in ("alone", "zero_3/once"))
    assert alone.keys() == sharded.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(tensor, sharded[key], rtol=1e-3, atol=1e-5, msg=key)


def steady(row: dict[str, float]) -> dict[str, float]:
    """A line of metrics without what may differ between two runs from one seed."""
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/", "memory/"))}


def test_settings_that_do_not_fit_the_processes_are_refused(tiny_model: str, tmp_path: Path) -> None:
    config = run_settings("grpo", tiny_model, tmp_path)
    config.backend.world_size = 8
    with pytest.raises(InputError, match=r"trainer\.prompts_per_step: got 5 under 8 processes"):
        check_processes(config)
    plan = replace(config.algo.plan, dynamic=True, gen_batch_prompts=2)
    algo: Algorithm = replace(config.algo, plan=plan)
    config = replace(config, algo=algo)
    config.backend.world_size = 3
    with pytest.raises(InputError, match=r"algo\.plan\.gen_batch_prompts: got 2 under 3 processes"):
        check_processes(config)
