"""Advantages of every batch: padding is never read, rows have no order, groups mix only where that is the method."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from batches import (
    ALGORITHMS,
    BRIEF,
    CRITICS,
    EVERY_ALGORITHM,
    EVERY_CRITIC,
    GROUP_CENTRED,
    QUICK,
    WHITENED,
    algorithms,
    batches,
    current_logprobs,
    loss_and_gradient,
    spoiled,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.algos.ppo import PPO
from rlvr.algos.reinforce_pp import ReinforcePP
from rlvr.algos.rloo import RLOO
from rlvr.rollout.batch import length_penalty, pad_rows
from rlvr.types import Batch, Sampling, SamplingPlan

DTYPES = st.sampled_from([torch.float32, torch.float64])

# ---- what is read -----------------------------------------------------------------------------------------------------


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches(min_tokens=0))
def test_padding_is_never_read(algorithm: Algorithm, batch: Batch) -> None:
    assert torch.equal(algorithm.advantages(spoiled(batch)), algorithm.advantages(batch))
    if algorithm.needs_critic:
        assert torch.equal(algorithm.value_targets(spoiled(batch)), algorithm.value_targets(batch))


@EVERY_ALGORITHM
@BRIEF
@given(batch=DTYPES.flatmap(lambda dtype: batches(dtype=dtype)))
def test_advantages_keep_the_dtype_and_are_zero_outside_the_mask(algorithm: Algorithm, batch: Batch) -> None:
    results = [algorithm.advantages(batch)] + ([algorithm.value_targets(batch)] if algorithm.needs_critic else [])
    for values in results:
        assert values.dtype == batch.rewards.dtype and values.shape == batch.tokens.shape
        assert bool(values.isfinite().all() and (values[~batch.response_mask] == 0).all())


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches())
def test_only_what_is_declared_is_read(algorithm: Algorithm, batch: Batch) -> None:
    """The trainer computes no more than an algorithm asks for."""
    declared = replace(
        batch,
        old_logprobs=batch.old_logprobs if algorithm.needs_old_logprobs else None,
        ref_logprobs=batch.ref_logprobs if algorithm.needs_reference else None,
        values=batch.values if algorithm.needs_critic else None,
        greedy_rewards=batch.greedy_rewards if algorithm.needs_greedy else None,
    )
    assert torch.equal(algorithm.advantages(declared), algorithm.advantages(batch))


# ---- rows and groups --------------------------------------------------------------------------------------------------


@EVERY_ALGORITHM
@BRIEF
@given(batch=batches(), data=st.data())
def test_rows_have_no_order(algorithm: Algorithm, batch: Batch, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(batch)))))
    torch.testing.assert_close(algorithm.advantages(batch.select(order)), algorithm.advantages(batch)[order])
    if algorithm.needs_critic:
        torch.testing.assert_close(algorithm.value_targets(batch.select(order)), algorithm.value_targets(batch)[order])


@algorithms(*GROUP_CENTRED, "remax", "remax_kl_full_step", "remax_kl_one_step")
@QUICK
@given(batch=batches())
def test_a_prompt_changes_no_other_prompts_advantage(algorithm: Algorithm, batch: Batch) -> None:
    whole = algorithm.advantages(batch)
    for label in batch.groups.unique():
        rows = (batch.groups == label).nonzero().squeeze(1)
        torch.testing.assert_close(algorithm.advantages(batch.select(rows)), whole[rows])


@algorithms("batch_scale", *WHITENED)
@QUICK
@given(batch=batches())
def test_a_prompt_changes_other_prompts_advantages_where_the_scale_is_the_steps(algorithm: Algorithm, batch: Batch) -> None:
    """Two rows scored far above and below the others widen the deviation, so the advantages of the others shrink."""
    before = algorithm.advantages(batch)
    added = replace(batch.select(torch.tensor([0, 1])), groups=torch.tensor([99, 99]))
    added = replace(added, rewards=torch.tensor([20.0, -20.0], dtype=batch.rewards.dtype))
    joined = {name: torch.cat([getattr(batch, name), getattr(added, name)]) for name in vars(batch)}
    after = algorithm.advantages(Batch(**joined))[: len(batch)]
    spread = before[batch.response_mask]
    assume(len(spread) > 1 and float(spread.std()) > 1e-6)
    assert not torch.allclose(after, before, rtol=1e-3)
    assert float(after[batch.response_mask].std()) < float(spread.std())


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@QUICK
@given(batch=batches())
def test_rloo_is_the_centred_score_times_n_over_n_minus_one(kl_coef: float, batch: Batch) -> None:
    centred = GRPO(adv_scale="none", kl_coef=kl_coef, kl_placement="reward").advantages(batch)
    size = maths.group_size(batch.groups).double()[:, None]
    torch.testing.assert_close(RLOO(kl_coef=kl_coef).advantages(batch), centred * size / (size - 1), rtol=0, atol=1e-12)


# ---- the scores' unit and origin --------------------------------------------------------------------------------------


@algorithms("grpo", "dapo", "batch_scale", "reinforce_pp", "reinforce_pp_sequences", "reinforce_pp_baseline")
@QUICK
@given(batch=batches())
def test_the_scale_of_scores_is_not_seen(algorithm: Algorithm, batch: Batch) -> None:
    doubled = replace(batch, rewards=2 * batch.rewards - 1)
    torch.testing.assert_close(algorithm.advantages(doubled), algorithm.advantages(batch), rtol=1e-4, atol=1e-9)
    if isinstance(algorithm, GRPO):
        exactly = replace(algorithm, adv_eps=0.0)
        torch.testing.assert_close(exactly.advantages(doubled), exactly.advantages(batch))


@algorithms("dr_grpo", "rloo", "remax")
@QUICK
@given(batch=batches())
def test_advantages_that_are_not_normalised_keep_the_scale_of_scores(algorithm: Algorithm, batch: Batch) -> None:
    doubled = replace(batch, rewards=2 * batch.rewards - 1, greedy_rewards=2 * batch.greedy_rewards - 1)
    torch.testing.assert_close(algorithm.advantages(doubled), 2 * algorithm.advantages(batch), rtol=0, atol=1e-12)


@algorithms(*GROUP_CENTRED, "reinforce_pp_baseline", "reinforce_pp_baseline_kl", "remax")
@QUICK
@given(batch=batches(), constant=st.floats(-3, 3))
def test_a_constant_on_a_groups_rewards_changes_nothing(algorithm: Algorithm, batch: Batch, constant: float) -> None:
    first = batch.groups == batch.groups[0]
    moved = {name: getattr(batch, name) + constant * first for name in ("rewards", "greedy_rewards")}
    after = algorithm.advantages(replace(batch, **moved))
    torch.testing.assert_close(after, algorithm.advantages(batch), rtol=1e-6, atol=1e-9)


@algorithms("grpo", "dr_grpo", "batch_scale", "dapo", "rloo")
@pytest.mark.parametrize("score", [0.1, 1 / 3, -0.7])
@QUICK
@given(batch=DTYPES.flatmap(lambda dtype: batches(dtype=dtype)))
def test_flat_groups_are_exactly_zero(algorithm: Algorithm, score: float, batch: Batch) -> None:
    flat, dtype = batch.groups == batch.groups[0], batch.rewards.dtype
    rewards = torch.where(flat, torch.tensor(score, dtype=dtype), torch.arange(len(batch), dtype=dtype))
    advantages = algorithm.advantages(replace(batch, rewards=rewards))
    assert bool((advantages[flat] == 0).all() and (advantages[~flat] != 0).any())
    only_flat = replace(batch, rewards=torch.full_like(rewards, score))
    nothing = algorithm.advantages(only_flat)
    assert all(bool((v == 0).all()) for v in loss_and_gradient(algorithm, only_flat, current_logprobs(batch), nothing))


@algorithms(*[name for name in ALGORITHMS if name != "kl_correction"])  # k1 times the ratio: 0 in expectation, not per token
@QUICK
@given(batch=batches())
def test_a_step_that_teaches_nothing_gives_no_gradient(algorithm: Algorithm, batch: Batch) -> None:
    """One score everywhere, foreseen by the greedy response and the critic, and a policy that is its own reference.

    For PPO flat groups alone are not enough: it compares a score with the critic's values and not with other rows.
    """
    mask, rewards = batch.response_mask, torch.full_like(batch.rewards, 0.1)
    if isinstance(algorithm, ReinforcePP):  # discounting alone tells early tokens from late ones
        algorithm = replace(algorithm, gamma=1.0)
    if isinstance(algorithm, PPO):
        algorithm = replace(algorithm, truncation_bootstrap=False)
    foreseen = maths.reward_to_go(maths.token_rewards(rewards, mask), mask, getattr(algorithm, "gamma", 1.0))
    settled = replace(batch, rewards=rewards, greedy_rewards=rewards, values=foreseen, ref_logprobs=batch.old_logprobs)
    for found in loss_and_gradient(algorithm, settled, batch.old_logprobs, algorithm.advantages(settled)):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)


def test_eight_rewards_of_a_tenth() -> None:
    """In float32 their deviation is about 1e-8, not 0: the noise other codes divide by eps."""
    batch = replace(pad_rows([((1,), (2, 3))] * 8, 0), rewards=torch.full((8,), 0.1))
    for name in ("grpo", "dr_grpo", "batch_scale", "dapo", "rloo"):
        assert bool((ALGORITHMS[name].advantages(batch) == 0).all())


# ---- returns ----------------------------------------------------------------------------------------------------------


def rows_of(values: Tensor, mask: Tensor) -> list[list[float]]:
    """The masked-in numbers of each row, as lists."""
    return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float, final: float) -> list[float]:
    following = [*values, final][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, len(deltas))) for t in range(len(deltas))]


@QUICK
@given(batch=batches(min_tokens=0), gamma=st.floats(0, 1), lam=st.floats(0, 1), bootstrap=st.booleans())
def test_returns_and_gae_against_a_slow_loop(batch: Batch, gamma: float, lam: float, bootstrap: bool) -> None:
    """Observation tokens inside a response neither reset nor discount, and hold no value."""
    mask, rewards = batch.response_mask, batch.ref_logprobs  # any numbers
    final = batch.final_values if bootstrap else torch.zeros_like(batch.rewards)
    returns = maths.reward_to_go(rewards, mask, gamma)
    advantages = maths.gae(rewards, batch.values, mask, gamma, lam, batch.final_values if bootstrap else None)
    for row, (r, v) in enumerate(zip(rows_of(rewards, mask), rows_of(batch.values, mask), strict=True)):
        wanted = [sum(gamma ** (u - t) * r[u] for u in range(t, len(r))) for t in range(len(r))]
        assert returns[row][mask[row]].tolist() == pytest.approx(wanted, abs=1e-12)
        wanted = slow_gae(r, v, gamma, lam, float(final[row]))
        assert advantages[row][mask[row]].tolist() == pytest.approx(wanted, abs=1e-12)
    assert bool((returns[~mask] == 0).all() and (advantages[~mask] == 0).all())


@QUICK
@given(batch=batches(min_tokens=0))
def test_the_score_stands_on_the_last_token(batch: Batch) -> None:
    rewards = maths.token_rewards(batch.rewards, batch.response_mask)
    for got, score in zip(rows_of(rewards, batch.response_mask), batch.rewards.tolist(), strict=True):
        assert got == [0.0] * (len(got) - 1) + [score] * (len(got) > 0)
    assert bool((rewards[~batch.response_mask] == 0).all())


@EVERY_CRITIC
@QUICK
@given(batch=batches())
def test_gae_between_monte_carlo_and_one_step(algorithm: PPO, batch: Batch) -> None:
    """With gamma = lam = 1 the critic is fitted to the reward to go; with lam = 0 to the reward plus the next value."""
    mask, rewards = batch.response_mask, algorithm.shaped_rewards(batch)
    final = batch.final_values * batch.truncated * algorithm.truncation_bootstrap
    monte_carlo = replace(algorithm, gamma=1.0, lam=1.0)
    wanted = maths.where_mask(maths.reward_to_go(rewards, mask) + final[:, None], mask)
    torch.testing.assert_close(monte_carlo.value_targets(batch), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(monte_carlo.raw_advantages(batch), wanted - batch.values, rtol=0, atol=1e-12)
    one_step = replace(algorithm, lam=0.0).value_targets(batch)
    for row, (r, v) in enumerate(zip(rows_of(rewards, mask), rows_of(batch.values, mask), strict=True)):
        targets = [r[t] + algorithm.gamma * [*v, float(final[row])][t + 1] for t in range(len(r))]
        assert one_step[row][mask[row]].tolist() == pytest.approx(targets, abs=1e-12)


# ---- whitening --------------------------------------------------------------------------------------------------------


@algorithms(*WHITENED)
@QUICK
@given(batch=batches())
def test_whitened_advantages_have_mean_zero_and_variance_one(algorithm: PPO | ReinforcePP, batch: Batch) -> None:
    """Over all tokens of the step, or over its rows where each row counts once."""
    values, ddof = algorithm.advantages(batch)[batch.response_mask], algorithm.whiten_ddof
    if isinstance(algorithm, ReinforcePP) and algorithm.whiten_over == "sequences":
        values = maths.row_mean(algorithm.advantages(batch), batch.response_mask)
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-9)
    variance = float(values.var(correction=ddof))
    assert variance == pytest.approx(1.0, rel=1e-3) or bool((values.abs() < 1e-9).all())


@algorithms("reinforce_pp", "reinforce_pp_kl", *CRITICS)
@QUICK
@given(batch=batches())
def test_whitened_advantages_against_a_slow_loop(algorithm: PPO | ReinforcePP, batch: Batch) -> None:
    """From scores and log-probs on, with every discount; without a critic as with one that expects 0."""
    mask, critic = batch.response_mask, algorithm.needs_critic
    drift = algorithm.kl_coef * (batch.old_logprobs - batch.ref_logprobs)
    raw: list[float] = []
    for row, (kl, v) in enumerate(zip(rows_of(drift, mask), rows_of(batch.values, mask), strict=True)):
        rewards = [-x for x in kl[:-1]] + [float(batch.rewards[row]) - kl[-1]]
        final = float(batch.final_values[row]) if algorithm is ALGORITHMS["ppo_bootstrap"] and batch.truncated[row] else 0.0
        values, lam = (v, algorithm.lam) if critic else ([0.0] * len(v), 1.0)
        raw += slow_gae(rewards, values, algorithm.gamma, lam, final)
    mean = sum(raw) / len(raw)
    variance = sum((x - mean) ** 2 for x in raw) / (len(raw) - algorithm.whiten_ddof)
    wanted = [(x - mean) / math.sqrt(variance + 1e-8) for x in raw]
    assert algorithm.advantages(batch)[mask].tolist() == pytest.approx(wanted, abs=1e-8)


@QUICK
@given(batch=batches(), scale=st.sampled_from([-3.0, 0.5, 100.0]), shift=st.floats(-5, 5), ddof=st.sampled_from([0, 1]))
def test_whitening_does_not_see_an_affine_change(batch: Batch, scale: float, shift: float, ddof: int) -> None:
    white = maths.whiten(batch.values, batch.response_mask, ddof)
    moved = maths.whiten(scale * batch.values + shift, batch.response_mask, ddof)
    torch.testing.assert_close(moved, white if scale > 0 else -white, rtol=1e-5, atol=1e-5)


# ---- sampling plan ----------------------------------------------------------------------------------------------------


@QUICK
@given(limit=st.integers(1, 60), buffer=st.integers(1, 60), factor=st.sampled_from([0.25, 1.0, 2.0]))
def test_length_punishment_is_continuous_and_bounded(limit: int, buffer: int, factor: float) -> None:
    buffer = min(buffer, limit)
    plan, sampling = SamplingPlan(overlong_buffer_tokens=buffer, overlong_penalty_factor=factor), Sampling(max_new_tokens=limit)
    penalties = [length_penalty(length, plan, sampling) for length in range(2 * limit + 2)]
    assert penalties == [factor * maths.overlong_penalty(length, limit, buffer) for length in range(2 * limit + 2)]
    assert all(value == 0 for value in penalties[: limit - buffer + 1])
    assert all(value == -factor for value in penalties[limit:])
    inside = penalties[limit - buffer : limit + 1]  # from exactly 0 to exactly -factor in equal steps
    steps = [before - after for before, after in pairwise(inside)]
    assert steps == pytest.approx([factor / buffer] * buffer, abs=1e-12)


def test_no_length_punishment_without_a_buffer() -> None:
    assert [length_penalty(length, SamplingPlan(), Sampling(max_new_tokens=4)) for length in range(9)] == [0.0] * 9


@EVERY_ALGORITHM
@BRIEF
@given(correct=st.lists(st.booleans(), min_size=1, max_size=9))
def test_exactly_the_mixed_groups_are_kept(algorithm: Algorithm, correct: list[bool]) -> None:
    assert algorithm.keep(torch.tensor(correct)) is (True in correct and False in correct)
