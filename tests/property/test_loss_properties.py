"""Losses, gradients and weights of every batch: clips cut gradients, rows are treated alone, any split gives the same sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from batches import (
    ALGORITHMS,
    BRIEF,
    CRITICS,
    EVERY_ALGORITHM,
    QUICK,
    algorithms,
    algorithms_where,
    batches,
    current_logprobs,
    loss_and_gradient,
    noise,
    spoil,
    spoiled,
    value_loss_and_gradient,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.ppo import PPO
from rlvr.backend import SingleBackend
from rlvr.micro_batches import MicroBatcher
from rlvr.types import Batch

Compute = Callable[[Algorithm, Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
EVERY_MODE = pytest.mark.parametrize("mode", maths.LOSS_AGGREGATIONS)


def kl_in_the_loss(algorithm: Algorithm) -> bool:
    return algorithm.kl_coef > 0 and algorithm.kl_placement == "loss"


def bare(algorithm: Algorithm) -> bool:
    """Whether the loss is the surrogate of single tokens and nothing else."""
    return algorithm.ratio_level == "token" and algorithm.rollout_is == "none" and not kl_in_the_loss(algorithm)


# ---- padding ----------------------------------------------------------------------------------------------------------


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches(min_tokens=0))
def test_padding_is_never_read(algorithm: Algorithm, batch: Batch) -> None:
    mask, logprobs = batch.response_mask, current_logprobs(batch)
    advantages = algorithm.advantages(batch)
    clean = loss_and_gradient(algorithm, batch, logprobs, advantages)
    dirty = loss_and_gradient(algorithm, spoiled(batch), spoil(logprobs, mask), spoil(advantages, mask))
    for wanted, got in zip(clean, dirty, strict=True):
        assert torch.equal(got, wanted)
        assert bool((got[~mask] == 0).all())
    metrics = algorithm.token_metrics(batch, logprobs, advantages)
    for name, values in algorithm.token_metrics(spoiled(batch), spoil(logprobs, mask), spoil(advantages, mask)).items():
        assert torch.equal(values, metrics[name]), name


@algorithms("grpo", *CRITICS)
@QUICK
@given(batch=batches(min_tokens=0))
def test_padding_is_never_read_by_the_critic(algorithm: Algorithm, batch: Batch) -> None:
    mask, values, targets = batch.response_mask, batch.values + noise(batch), batch.values + noise(batch, 1)
    clean = value_loss_and_gradient(algorithm, batch, values, targets)
    dirty = value_loss_and_gradient(algorithm, spoiled(batch), spoil(values, mask), spoil(targets, mask))
    for wanted, got in zip(clean, dirty, strict=True):
        assert torch.equal(got, wanted)
        assert bool((got[~mask] == 0).all())
    metrics = algorithm.value_metrics(batch, values, targets)
    for name, found in algorithm.value_metrics(spoiled(batch), spoil(values, mask), spoil(targets, mask)).items():
        assert torch.equal(found, metrics[name]), name


@QUICK
@given(batch=batches())
def test_padding_is_never_read_by_the_mismatch_metrics(batch: Batch) -> None:
    dirty = spoiled(batch)
    wanted = maths.mismatch_metrics(batch.old_logprobs, batch.rollout_logprobs, batch.response_mask)
    assert maths.mismatch_metrics(dirty.old_logprobs, dirty.rollout_logprobs, batch.response_mask) == wanted
    for level in ("token", "sequence"):
        bounds = (batch.response_mask, level, "truncate", 0.0, 2.0)
        weights = maths.rollout_weights(dirty.old_logprobs, dirty.rollout_logprobs, *bounds)
        assert torch.equal(weights, maths.rollout_weights(batch.old_logprobs, batch.rollout_logprobs, *bounds))


# ---- rows -------------------------------------------------------------------------------------------------------------


def losses_and_gradients(algorithm: Algorithm, batch: Batch) -> list[tuple[Compute, tuple[Tensor, Tensor]]]:
    """The policy's loss and, where there is one, the critic's, with two tensors ``[B, T]`` to give to each."""
    policy = (loss_and_gradient, (current_logprobs(batch), algorithm.advantages(batch)))
    critic = (value_loss_and_gradient, (batch.values + noise(batch), batch.values + noise(batch, 1)))
    return [policy, critic] if algorithm.needs_critic else [policy]


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches(min_tokens=0), data=st.data())
def test_each_row_is_treated_alone(algorithm: Algorithm, batch: Batch, data: st.DataObject) -> None:
    """NaN in everything of one row leaves the losses and gradients of the others as they were, to the last bit."""
    others = torch.arange(len(batch)) != data.draw(st.integers(0, len(batch) - 1))
    numbers = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name).is_floating_point()}
    struck = replace(batch, **{n: spoil(v, others if v.ndim == 1 else others[:, None]) for n, v in numbers.items()})
    for compute, inputs in losses_and_gradients(algorithm, batch):
        clean = compute(algorithm, batch, *inputs)
        dirty = compute(algorithm, struck, *(spoil(x, others[:, None]) for x in inputs))
        for wanted, got in zip(clean, dirty, strict=True):
            assert torch.equal(got[others], wanted[others])


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches(min_tokens=0), data=st.data())
def test_any_selection_of_rows_has_the_losses_of_the_whole(algorithm: Algorithm, batch: Batch, data: st.DataObject) -> None:
    """In any order, a row twice, without the columns that none of them needs."""
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=len(batch))))
    part = batch.select(rows).trim()
    width = part.tokens.shape[1]
    for compute, inputs in losses_and_gradients(algorithm, batch):
        whole = compute(algorithm, batch, *inputs)
        for wanted, got in zip(whole, compute(algorithm, part, *(x[rows, :width] for x in inputs)), strict=True):
            torch.testing.assert_close(got, wanted[rows, :width], rtol=0, atol=1e-12)
            assert bool((wanted[rows, width:] == 0).all())


# ---- gradients --------------------------------------------------------------------------------------------------------


@algorithms_where(lambda algorithm: bare(algorithm) and algorithm.surrogate == "clip")
@QUICK
@given(batch=batches(), seed=st.integers(0, 10**6))
def test_gradient_of_a_token_is_minus_ratio_times_advantage_or_exactly_zero(
    algorithm: Algorithm, batch: Batch, seed: int
) -> None:
    logprobs = current_logprobs(batch, shift=0.6, seed=seed)
    advantages = maths.where_mask(noise(batch, seed + 1), batch.response_mask)
    ratio, (low, high) = (logprobs - batch.old_logprobs).exp(), algorithm.clip_range
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    if algorithm.dual_clip is not None:
        clipped |= (advantages < 0) & (ratio > algorithm.dual_clip)
    _, gradient = loss_and_gradient(algorithm, batch, logprobs, advantages)
    assert bool((gradient[clipped] == 0).all())
    wanted = torch.where(clipped | ~batch.response_mask, torch.zeros_like(ratio), -ratio * advantages)
    torch.testing.assert_close(gradient, wanted)
    found = algorithm.token_metrics(batch, logprobs, advantages)
    assert torch.equal(sum(found[f"policy/clip_{side}_fraction"] for side in ("high", "low", "dual")), clipped.double())


@algorithms_where(lambda algorithm: algorithm.surrogate == "cispo")
@QUICK
@given(batch=batches(), seed=st.integers(0, 10**6))
def test_cispo_bounds_the_ratio_and_cuts_no_gradient(algorithm: Algorithm, batch: Batch, seed: int) -> None:
    logprobs = current_logprobs(batch, shift=0.6, seed=seed)
    advantages = maths.where_mask(noise(batch, seed + 1), batch.response_mask)
    ratio, (low, high) = (logprobs - batch.old_logprobs).exp(), algorithm.clip_range
    bounded = ratio.clamp(max=1 + high) if low == 1 else ratio.clamp(1 - low, 1 + high)
    losses, gradient = loss_and_gradient(algorithm, batch, logprobs, advantages)
    torch.testing.assert_close(losses, -bounded * advantages * logprobs)
    torch.testing.assert_close(gradient, -bounded * advantages)
    found = algorithm.token_metrics(batch, logprobs, advantages)
    acting = sum(found[f"policy/clip_{side}_fraction"] for side in ("high", "low", "dual"))
    assert torch.equal(acting, (bounded != ratio).double())


@algorithms_where(bare)
@QUICK
@given(batch=batches())
def test_gradient_at_ratio_one_is_minus_the_advantage(algorithm: Algorithm, batch: Batch) -> None:
    advantages = algorithm.advantages(batch)
    losses, gradient = loss_and_gradient(algorithm, batch, batch.old_logprobs, advantages)
    assert torch.equal(gradient, -advantages)
    assert torch.equal(losses, -advantages * (1 if algorithm.surrogate == "clip" else batch.old_logprobs))


@algorithms("sequence", "sequence_mean")
@QUICK
@given(batch=batches())
def test_gradient_of_a_row_ratio_at_one(algorithm: Algorithm, batch: Batch) -> None:
    """Mean over rows of A times the row's ratio: each token gets A / N, divided by the length for the mean ratio."""
    leaf, advantages = batch.old_logprobs.clone().requires_grad_(), algorithm.advantages(batch)
    losses = maths.row_mean(algorithm.token_loss(batch, leaf, advantages), batch.response_mask).mean()
    (gradient,) = torch.autograd.grad(losses, leaf)
    lengths = batch.response_mask.sum(1, keepdim=True) if algorithm.ratio_level == "sequence_mean" else 1
    torch.testing.assert_close(gradient, -advantages / lengths / len(batch))


@algorithms("sequence", "sequence_mean")
@QUICK
@given(batch=batches(), seed=st.integers(0, 10**6))
def test_a_row_is_clipped_as_a_whole(algorithm: Algorithm, batch: Batch, seed: int) -> None:
    mask, logprobs = batch.response_mask, current_logprobs(batch, seed=seed)
    scores = noise(batch, seed + 1)[:, 0]
    advantages = maths.where_mask(scores[:, None].expand(mask.shape), mask)
    lengths = mask.sum(1) if algorithm.ratio_level == "sequence_mean" else torch.ones(len(batch))
    ratio = (maths.row_sum(logprobs - batch.old_logprobs, mask) / lengths).exp()
    clipped = ((scores > 0) & (ratio > 1.2)) | ((scores < 0) & (ratio < 0.8))
    leaf = logprobs.requires_grad_()
    maths.row_mean(algorithm.token_loss(batch, leaf, advantages), mask).sum().backward()
    assert bool((leaf.grad[clipped] == 0).all())
    wanted = maths.where_mask((-ratio * scores / lengths)[:, None].expand(mask.shape), mask & ~clipped[:, None])
    torch.testing.assert_close(leaf.grad, wanted)


@algorithms_where(lambda algorithm: algorithm.rollout_is != "none")
@QUICK
@given(batch=batches())
def test_the_engines_correction_multiplies_loss_and_gradient(algorithm: Algorithm, batch: Batch) -> None:
    log_weight = batch.old_logprobs - batch.rollout_logprobs
    if algorithm.rollout_is == "sequence":
        log_weight = log_weight.sum(1, keepdim=True).expand_as(log_weight)
    weight, low, high = log_weight.exp(), algorithm.rollout_is_min, algorithm.rollout_is_max
    inside = (weight >= low) & (weight <= high)
    weight = weight.clamp(low, high) if algorithm.rollout_is_mode == "truncate" else weight * inside
    inputs = (batch, current_logprobs(batch), algorithm.advantages(batch))
    plain = loss_and_gradient(replace(algorithm, rollout_is="none"), *inputs)
    for got, without in zip(loss_and_gradient(algorithm, *inputs), plain, strict=True):
        torch.testing.assert_close(got, without * weight)


@algorithms_where(kl_in_the_loss)
@QUICK
@given(batch=batches())
def test_the_kl_loss_is_added_with_its_coefficient(algorithm: Algorithm, batch: Batch) -> None:
    inputs = (batch, current_logprobs(batch), algorithm.advantages(batch))
    leaf = inputs[1].clone().requires_grad_()
    kl = maths.where_mask(algorithm.kl_loss(batch, leaf), batch.response_mask)
    (slope,) = torch.autograd.grad(kl.sum(), leaf)
    plain = loss_and_gradient(replace(algorithm, kl_coef=0.0), *inputs)
    for got, without, part in zip(loss_and_gradient(algorithm, *inputs), plain, (kl.detach(), slope), strict=True):
        torch.testing.assert_close(got, without + algorithm.kl_coef * part, rtol=0, atol=1e-12)


# ---- critic -----------------------------------------------------------------------------------------------------------


@QUICK
@given(batch=batches(), clip=st.sampled_from([0.25, 0.5, 1.0]), seed=st.integers(0, 10**6))
def test_the_value_clip_only_raises_the_loss(batch: Batch, clip: float, seed: int) -> None:
    """Where it decides the gradient is exactly 0, elsewhere nothing changes. In multiples of 1/64, so without rounding."""
    old, values, targets = ((64 * noise(batch, seed + i)).round() / 64 for i in range(3))
    batch, mask = replace(batch, values=old), batch.response_mask
    held = old + (values - old).clamp(-clip, clip)
    decides = mask & ((held - targets).abs() > (values - targets).abs())
    assert not bool((decides & ((values - old).abs() <= clip)).any())
    plain_loss, plain_gradient = value_loss_and_gradient(PPO(value_clip=None), batch, values, targets)
    assert torch.equal(plain_loss, maths.where_mask((values - targets).square(), mask))
    assert torch.equal(plain_gradient, maths.where_mask(2 * (values - targets), mask))
    loss, gradient = value_loss_and_gradient(PPO(value_clip=clip), batch, values, targets)
    assert bool((loss >= plain_loss).all())
    assert torch.equal(loss, torch.where(decides, (held - targets).square(), plain_loss))
    untied = (held == values) | ((held - targets).abs() != (values - targets).abs())
    assert torch.equal(gradient[untied], plain_gradient.masked_fill(decides, 0.0)[untied])
    assert torch.equal(PPO(value_clip=clip).value_metrics(batch, values, targets)["critic/clip_fraction"], decides.double())


# ---- weights ----------------------------------------------------------------------------------------------------------


@EVERY_MODE
@QUICK
@given(batch=batches(min_tokens=0))
def test_weights_against_a_slow_loop(mode: str, batch: Batch) -> None:
    mask, groups = batch.response_mask, batch.groups
    weights = maths.token_weights(mask, mode, groups=groups, constant=7.0)
    lengths = mask.sum(1).tolist()
    rows = max(sum(length > 0 for length in lengths), 1)
    tokens = {label: sum(n for n, g in zip(lengths, groups.tolist(), strict=True) if g == label) for label in groups.tolist()}
    filled = max(sum(count > 0 for count in tokens.values()), 1)
    for row, (length, label) in enumerate(zip(lengths, groups.tolist(), strict=True)):
        wanted = {
            "token-mean": 1 / max(sum(lengths), 1),
            "seq-mean-token-mean": 1 / (rows * max(length, 1)),
            "seq-mean-token-sum": 1 / rows,
            "seq-mean-token-sum-const": 1 / (rows * 7.0),
            "group-mean-token-mean": 1 / (filled * max(tokens[label], 1)),
        }[mode]
        assert weights[row][mask[row]].tolist() == pytest.approx([wanted] * length, rel=1e-6)
    assert bool((weights[~mask] == 0).all())
    if mode.endswith("token-mean") and any(lengths):
        assert float(weights.double().sum()) == pytest.approx(1.0, abs=1e-6)


@EVERY_MODE
@QUICK
@given(batch=batches(), extra=st.integers(1, 3))
def test_empty_rows_do_not_count(mode: str, batch: Batch, extra: int) -> None:
    wanted = maths.token_weights(batch.response_mask, mode, groups=batch.groups, constant=7.0)
    mask = torch.cat([torch.zeros((extra, batch.tokens.shape[1]), dtype=torch.bool), batch.response_mask])
    groups = torch.cat([torch.arange(1000, 1000 + extra), batch.groups])
    got = maths.token_weights(mask, mode, groups=groups, constant=7.0)
    assert torch.equal(got[extra:], wanted)
    assert bool((got[:extra] == 0).all())


@EVERY_MODE
@QUICK
@given(batch=batches(min_tokens=0), budget=st.integers(1, 60))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(mode: str, batch: Batch, budget: int) -> None:
    algorithm, logprobs = ALGORITHMS["kl_k3"], current_logprobs(batch)
    advantages = algorithm.advantages(batch)
    weights = maths.token_weights(batch.response_mask, mode, groups=batch.groups, constant=7.0)

    def total(parts: list[Tensor]) -> tuple[float, Tensor]:
        leaf, value = logprobs.clone().requires_grad_(), 0.0
        for rows in parts:
            part = batch.select(rows).trim()
            width = part.tokens.shape[1]
            loss = algorithm.token_loss(part, leaf[rows, :width], advantages[rows, :width])
            (loss * weights[rows, :width]).sum().backward()
            value += float((loss * weights[rows, :width]).sum().detach())
        return value, leaf.grad

    rows = torch.arange(len(batch))
    whole_value, whole_gradient = total([rows])
    value, gradient = total([numbers for numbers, _ in MicroBatcher(SingleBackend(), budget).parts(batch)])
    assert value == pytest.approx(whole_value, abs=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-14)
