"""Seeded draws: the truncated distribution is the one drawn from, and each row depends on its own seed only."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor

from rlvr.rollout.engine import hash_seed
from rlvr.rollout.transformers_engine import SeededSampler, truncate
from rlvr.types import Sampling

TOY = [0.05, 0.4, 0.15, 0.3, 0.1]  # probabilities of five tokens


def draw(uniforms: Tensor, sampling: Sampling, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """One token a row from the toy distribution, and its log-prob."""
    count = len(uniforms)
    sampler = SeededSampler(uniforms[:, None], torch.full((count,), greedy), sampling, prompt_width=3)
    scores = sampler(torch.zeros((count, 3), dtype=torch.int64), torch.tensor(TOY).log().expand(count, 5) + 7.0)
    assert bool((torch.isfinite(scores).sum(1) == 1).all())
    return scores.argmax(1), sampler.logprobs[0]


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    "sampling, probabilities",
    [
        (Sampling(), TOY),
        (Sampling(temperature=0.5), normalised([p**2 for p in TOY])),
        (Sampling(temperature=2.0), normalised([math.sqrt(p) for p in TOY])),
        (Sampling(top_k=2), normalised([0, 0.4, 0, 0.3, 0])),
        (Sampling(top_k=9), TOY),
        (Sampling(top_p=0.6), normalised([0, 0.4, 0, 0.3, 0])),
        (Sampling(top_p=0.75), normalised([0, 0.4, 0.15, 0.3, 0])),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.8), normalised([0, 0.4, 0, 0.3, 0])),  # 0.7 / 0.85 is already above 0.8
        (Sampling(temperature=0.5, top_p=0.85), normalised([0, 0.16, 0, 0.09, 0])),  # 0.25 / 0.285 = 0.877
    ],
    ids=str,
)
def test_draws_follow_the_truncated_distribution(sampling: Sampling, probabilities: list[float]) -> None:
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs = draw(uniforms, sampling)
    counts = Counter(tokens.tolist())
    possible = [token for token, p in enumerate(probabilities) if p > 0]
    assert set(counts) == set(possible)
    expected = [20_000 * probabilities[token] for token in possible]
    if len(possible) > 1:
        assert stats.chisquare([counts[token] for token in possible], expected).pvalue > 1e-3
    wanted = torch.tensor([math.log(p) if p else -math.inf for p in probabilities])
    torch.testing.assert_close(logprobs, wanted[tokens])
    tempered = torch.log_softmax(torch.tensor([TOY]).log() / sampling.temperature, -1)
    torch.testing.assert_close(truncate(tempered, sampling)[0], wanted)


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(ends, Sampling())[0].tolist() == [0, 4]
    assert draw(ends, Sampling(top_k=2))[0].tolist() == [1, 3]


def test_a_row_depends_on_its_own_number_only() -> None:
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens, logprobs = draw(uniforms, Sampling(top_p=0.9))
    for row in range(50):
        alone = draw(uniforms[row : row + 1], Sampling(top_p=0.9))
        assert (alone[0].item(), alone[1].item()) == (tokens[row].item(), logprobs[row].item())
    backwards, _ = draw(uniforms.flip(0), Sampling(top_p=0.9))
    assert backwards.flip(0).tolist() == tokens.tolist()


def test_greedy_rows_take_the_likeliest_token_with_its_tempered_logprob() -> None:
    tokens, logprobs = draw(torch.rand(20, dtype=torch.float64), Sampling(temperature=0.5), greedy=True)
    assert tokens.tolist() == [1] * 20
    assert logprobs.tolist() == pytest.approx([math.log(0.16 / 0.285)] * 20, abs=1e-6)


def test_seeds_do_not_collide() -> None:
    seeds = {hash_seed(run, "rollout", step, sample) for run in range(10) for step in range(100) for sample in range(100)}
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert hash_seed("a", "b") == hash_seed("a", "b")
    assert len({hash_seed("a", "b"), hash_seed("ab"), hash_seed("b", "a"), hash_seed("a", "b", ""), hash_seed(1, 11)}) == 5
