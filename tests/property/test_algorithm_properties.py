"""What holds for every batch: padding is never read, rows have no order, groups do not mix, clips cut gradients.

Batches are random in shape (ragged prompts and responses, uneven groups, labels and rows in any order) and in value.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr import maths
from rlvr.algos.grpo import GRPO
from rlvr.rollout.batch import pad_rows
from rlvr.types import Batch
from rlvr.update import micro_batches

QUICK = settings(max_examples=25, deadline=None)

ALGORITHMS = {
    "grpo": GRPO(),
    "dr_grpo": GRPO(adv_scale="none"),
    "batch_scale": GRPO(adv_scale="batch"),
    "kl_reward": GRPO(kl_coef=0.1, kl_placement="reward"),
    "kl_k3": GRPO(kl_coef=0.1, kl_estimator="k3"),
    "kl_k2": GRPO(kl_coef=0.1, kl_estimator="k2"),
    "kl_straight_through": GRPO(kl_coef=0.1, kl_estimator="k3+k2grad"),
    "kl_correction": GRPO(kl_coef=0.1, kl_estimator="k1", kl_is_correction=True),
    "dual_clip": GRPO(clip_eps_high=0.28, dual_clip=3.0),
    "sequence": GRPO(ratio_level="sequence", loss_agg="seq-mean-token-mean"),
    "sequence_mean": GRPO(ratio_level="sequence_mean", loss_agg="seq-mean-token-mean"),
    "token_correction": GRPO(rollout_is="token"),
    "sequence_correction": GRPO(rollout_is="sequence", rollout_is_mode="mask", rollout_is_min=0.5),
}
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
EVERY_MODE = pytest.mark.parametrize("mode", maths.LOSS_AGGREGATIONS)


@st.composite
def batches(draw: st.DrawFn, min_tokens: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Two to four prompts with two to four responses each, of ``min_tokens`` to five tokens, rows shuffled."""
    labels = draw(st.lists(st.integers(-50, 50), min_size=2, max_size=4, unique=True))
    groups = draw(st.permutations([label for label in labels for _ in range(draw(st.integers(2, 4)))]))
    count = len(groups)
    prompts = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    responses = draw(st.lists(st.integers(min_tokens, 5), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    width = max(p + r for p, r in zip(prompts, responses, strict=True)) + draw(st.integers(0, 2))
    columns, start = torch.arange(width), torch.tensor(prompts)[:, None]
    mask = (columns >= start) & (columns < start + torch.tensor(responses)[:, None])

    def normal(scale: float) -> Tensor:
        return torch.randn((count, width), generator=generator, dtype=dtype) * scale

    old = maths.where_mask(-normal(1.0).abs(), mask)
    scores = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.5]), min_size=count, max_size=count))
    return Batch(
        tokens=torch.randint(0, 9, (count, width), generator=generator),
        response_mask=mask,
        groups=torch.tensor(groups),
        rewards=torch.tensor(scores, dtype=dtype),
        correct=torch.tensor(scores) > 0.4,
        truncated=torch.tensor(responses) == 5,
        rollout_logprobs=maths.where_mask(old + normal(0.3), mask),
        old_logprobs=old,
        ref_logprobs=maths.where_mask(old + normal(0.5), mask),
    )


def current_logprobs(batch: Batch, shift: float = 0.3, seed: int = 0) -> Tensor:
    """Log-probs a little away from the old ones, 0 outside the mask."""
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=batch.rewards.dtype)
    return maths.where_mask(batch.old_logprobs + shift * noise, batch.response_mask)


def spoil(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, torch.nan)


def spoiled(batch: Batch) -> Batch:
    """The same batch with NaN in every padded position of every float tensor."""
    wide = {f.name: getattr(batch, f.name) for f in fields(batch)}
    spoilt = {n: v for n, v in wide.items() if v is not None and v.ndim == 2 and v.is_floating_point()}
    return replace(batch, **{name: spoil(value, batch.response_mask) for name, value in spoilt.items()})


def loss_and_gradient(algorithm: GRPO, batch: Batch, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logprobs.detach().clone().requires_grad_()
    losses = algorithm.token_loss(batch, leaf, advantages)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


# ---- padding ----------------------------------------------------------------------------------------------------------


@EVERY_ALGORITHM
@QUICK
@given(batch=batches())
def test_padding_is_never_read(algorithm: GRPO, batch: Batch) -> None:
    mask, logprobs = batch.response_mask, current_logprobs(batch)
    advantages = algorithm.advantages(batch)
    assert torch.equal(algorithm.advantages(spoiled(batch)), advantages)
    clean = loss_and_gradient(algorithm, batch, logprobs, advantages)
    dirty = loss_and_gradient(algorithm, spoiled(batch), spoil(logprobs, mask), spoil(advantages, mask))
    for wanted, got in zip(clean, dirty, strict=True):
        assert torch.equal(got, wanted)
        assert bool((got[~mask] == 0).all())
    metrics = algorithm.token_metrics(batch, logprobs, advantages)
    for name, values in algorithm.token_metrics(spoiled(batch), spoil(logprobs, mask), spoil(advantages, mask)).items():
        assert torch.equal(values, metrics[name]), name


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


# ---- groups -----------------------------------------------------------------------------------------------------------


@EVERY_ALGORITHM
@QUICK
@given(batch=batches(), data=st.data())
def test_rows_have_no_order(algorithm: GRPO, batch: Batch, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))))
    torch.testing.assert_close(algorithm.advantages(batch.select(order)), algorithm.advantages(batch)[order])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "kl_reward"])
@QUICK
@given(batch=batches())
def test_a_prompt_changes_no_other_prompts_advantage(name: str, batch: Batch) -> None:
    whole = ALGORITHMS[name].advantages(batch)
    for label in batch.groups.unique():
        rows = (batch.groups == label).nonzero().squeeze(1)
        torch.testing.assert_close(ALGORITHMS[name].advantages(batch.select(rows)), whole[rows])


@QUICK
@given(batch=batches())
def test_grpo_does_not_see_the_scale_of_scores(batch: Batch) -> None:
    doubled = replace(batch, rewards=2 * batch.rewards - 1)
    torch.testing.assert_close(GRPO(adv_eps=0.0).advantages(doubled), GRPO(adv_eps=0.0).advantages(batch))
    torch.testing.assert_close(GRPO().advantages(doubled), GRPO().advantages(batch), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "kl_reward"])
@QUICK
@given(batch=batches(), constant=st.floats(-3, 3))
def test_a_constant_on_a_groups_rewards_changes_nothing(name: str, batch: Batch, constant: float) -> None:
    shifted = torch.where(batch.groups == batch.groups[0], batch.rewards + constant, batch.rewards)
    after = ALGORITHMS[name].advantages(replace(batch, rewards=shifted))
    torch.testing.assert_close(after, ALGORITHMS[name].advantages(batch), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "batch_scale"])
@pytest.mark.parametrize("score", [0.1, 1 / 3, -0.7])
@QUICK
@given(batch=batches(dtype=torch.float32) | batches(dtype=torch.float64))
def test_flat_groups_are_exactly_zero(name: str, score: float, batch: Batch) -> None:
    flat, dtype = batch.groups == batch.groups[0], batch.rewards.dtype
    rewards = torch.where(flat, torch.tensor(score, dtype=dtype), torch.arange(len(batch), dtype=dtype))
    advantages = ALGORITHMS[name].advantages(replace(batch, rewards=rewards))
    assert bool((advantages[flat] == 0).all() and (advantages[~flat] != 0).any())
    only_flat = replace(batch, rewards=torch.full_like(rewards, score))
    nothing = ALGORITHMS[name].advantages(only_flat)
    assert all(bool((v == 0).all()) for v in loss_and_gradient(ALGORITHMS[name], only_flat, current_logprobs(batch), nothing))


def test_eight_rewards_of_a_tenth() -> None:
    """In float32 their deviation is about 1e-8, not 0: the noise other codes divide by eps."""
    batch = replace(pad_rows([((1,), (2, 3))] * 8, 0), rewards=torch.full((8,), 0.1))
    for scale in ("group", "batch", "none"):
        assert bool((GRPO(adv_scale=scale).advantages(batch) == 0).all())


# ---- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@QUICK
@given(batch=batches(), seed=st.integers(0, 10**6))
def test_gradient_of_a_token_is_minus_ratio_times_advantage_or_exactly_zero(
    dual_clip: float | None, batch: Batch, seed: int
) -> None:
    algorithm = GRPO(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=dual_clip)
    logprobs = current_logprobs(batch, shift=0.6, seed=seed)
    advantages = maths.where_mask(
        torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), batch.response_mask
    )
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8))
    if dual_clip is not None:
        clipped |= (advantages < 0) & (ratio > dual_clip)
    _, gradient = loss_and_gradient(algorithm, batch, logprobs, advantages)
    assert bool((gradient[clipped] == 0).all())
    wanted = torch.where(clipped | ~batch.response_mask, torch.zeros_like(ratio), -ratio * advantages)
    torch.testing.assert_close(gradient, wanted)
    found = algorithm.token_metrics(batch, logprobs, advantages)
    assert torch.equal(sum(found[f"policy/clip_{side}_fraction"] for side in ("high", "low", "dual")), clipped.double())


@pytest.mark.parametrize("name", ["grpo", "dual_clip", "kl_reward"])
@QUICK
@given(batch=batches())
def test_gradient_at_ratio_one_is_minus_the_advantage(name: str, batch: Batch) -> None:
    advantages = ALGORITHMS[name].advantages(batch)
    losses, gradient = loss_and_gradient(ALGORITHMS[name], batch, batch.old_logprobs, advantages)
    assert torch.equal(gradient, -advantages)
    assert torch.equal(losses, -advantages)


@pytest.mark.parametrize("level", ["sequence", "sequence_mean"])
@QUICK
@given(batch=batches())
def test_gradient_of_a_row_ratio_at_one(level: str, batch: Batch) -> None:
    """Mean over rows of A times the row's ratio: each token gets A / N, divided by the length for the mean ratio."""
    algorithm = GRPO(ratio_level=level, loss_agg="seq-mean-token-mean")
    leaf, advantages = batch.old_logprobs.clone().requires_grad_(), algorithm.advantages(batch)
    losses = maths.row_mean(algorithm.token_loss(batch, leaf, advantages), batch.response_mask).mean()
    (gradient,) = torch.autograd.grad(losses, leaf)
    lengths = batch.response_mask.sum(1, keepdim=True) if level == "sequence_mean" else 1
    torch.testing.assert_close(gradient, -advantages / lengths / len(batch))


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
    value, gradient = total(list(micro_batches(batch.response_mask, rows, budget)))
    assert value == pytest.approx(whole_value, abs=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-14)
