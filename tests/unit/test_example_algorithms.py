"""The algorithms of docs/examples: numbers by hand, every set of k written out, expected gradients, two steps of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.build import build
from rlvr.config import RunConfig, TrainerSettings
from rlvr.trainer import Trainer
from rlvr.types import Batch, InputError, Prompt, Rollout, SamplingPlan, Verdict

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TARGETS = {"pass_at_k": "pass_at_k_training.PassAtKTraining", "maxrl": "maxrl.MaxRL"}
Example = Callable[..., Algorithm]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Example:
    """An algorithm of docs/examples by its dotted path, as the command line builds it."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def make(name: str, **settings: Any) -> Algorithm:
        problems: list[str] = []
        algorithm = build(Algorithm, {"_target_": TARGETS[name], **settings}, "algo", problems)
        if problems:
            raise InputError("\n".join(problems))
        return algorithm

    return make


def rows(correct: list[int], groups: list[int] | None = None, width: int = 3) -> Batch:
    """Rows of one prompt token and one or two response tokens; rewards are 1 for right and 0 for wrong."""
    count = len(correct)
    mask = torch.zeros(count, width, dtype=torch.bool)
    mask[:, 1] = True
    mask[::2, 2:] = True
    return Batch(
        tokens=torch.zeros(count, width, dtype=torch.int64),
        response_mask=mask,
        groups=torch.tensor(groups or [0] * count),
        rewards=torch.tensor(correct, dtype=torch.float64),
        correct=torch.tensor(correct, dtype=torch.bool),
        truncated=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs=torch.zeros(count, width, dtype=torch.float64),
    )


def per_row(algorithm: Algorithm, batch: Batch) -> list[float]:
    """The advantage of each row, after checking that all its response tokens have it and the others have 0."""
    advantages = algorithm.advantages(batch)
    first = advantages[:, 1]
    assert torch.equal(advantages, torch.where(batch.response_mask, first[:, None], torch.zeros_like(advantages)))
    return first.tolist()


# ---- numbers by hand --------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand(example: Example) -> None:
    """Sets of 2 of 4. Two wrong: one set of six fails, sigma = sqrt(5)/6. Three wrong: three of six fail, sigma = 1/2."""
    algorithm = example("pass_at_k", k=2)
    root = 5**-0.5
    assert per_row(algorithm, rows([1, 0, 1, 0])) == pytest.approx([root, -root, root, -root])
    assert per_row(algorithm, rows([0, 0, 1, 0])) == pytest.approx([-1 / 3, -1 / 3, 1.0, -1 / 3])


def test_maxrl_by_hand(example: Example) -> None:
    algorithm = example("maxrl")
    assert per_row(algorithm, rows([0, 1, 0, 0])) == [-1.0, 3.0, -1.0, -1.0]
    assert per_row(algorithm, rows([1, 1, 0, 1])) == pytest.approx([1 / 3, 1 / 3, -1.0, 1 / 3])
    partial = replace(rows([0, 0, 0, 0]), rewards=torch.tensor([0.1, 0.5, 0.2, 0.0], dtype=torch.float64))
    assert per_row(algorithm, partial) == pytest.approx([-0.5, 1.5, 0.0, -1.0])


@pytest.mark.parametrize("name", TARGETS)
def test_groups_without_a_contrast_get_exactly_zero(example: Example, name: str) -> None:
    """All right, none right; for pass@k with k = 2 also one wrong of four, where every set passes."""
    algorithm = example(name, **({"k": 2} if name == "pass_at_k" else {}))
    flat = [[1, 1, 1, 1], [0, 0, 0, 0]] + ([[1, 1, 0, 1]] if name == "pass_at_k" else [])
    for correct in flat:
        assert per_row(algorithm, rows(correct)) == [0.0] * 4
    thirds = replace(rows([1, 1, 1]), rewards=torch.full((3,), 0.1))
    assert per_row(algorithm, thirds) == [0.0] * 3


@pytest.mark.parametrize("name", TARGETS)
def test_groups_are_labels_and_rows_may_come_in_any_order(example: Example, name: str) -> None:
    algorithm = example(name, **({"k": 2} if name == "pass_at_k" else {}))
    one, other = [1, 0, 0, 0], [1, 1, 0, 0, 0]
    together = per_row(algorithm, rows([*one, *other], [7] * 4 + [3] * 5))
    assert together == pytest.approx(per_row(algorithm, rows(one)) + per_row(algorithm, rows(other)))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = rows([[*one, *other][i] for i in order], [([7] * 4 + [3] * 5)[i] for i in order])
    assert per_row(algorithm, mixed) == pytest.approx([together[i] for i in order])


# ---- every set of k ---------------------------------------------------------------------------------------------------


def advantage_over_all_sets(correct: list[int], k: int) -> tuple[list[float], float]:
    """The mean standardised reward of the sets that hold each response, and the deviation; every set written out."""
    sets = list(combinations(range(len(correct)), k))
    rewards = [float(any(correct[i] for i in members)) for members in sets]
    mean, deviation = fmean(rewards), pstdev(rewards)
    if deviation == 0:
        return [0.0] * len(correct), 0.0
    holding = [[(r - mean) / deviation for s, r in zip(sets, rewards, strict=True) if i in s] for i in range(len(correct))]
    return [fmean(values) for values in holding], deviation


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("n", range(2, 9))
def test_pass_at_k_is_the_mean_over_all_sets(example: Example, n: int, k: int) -> None:
    for right in range(n + 1):
        correct = [1] * right + [0] * (n - right)
        expected, deviation = advantage_over_all_sets(correct, k) if k <= n else ([], 0.0)
        if k >= n:
            assert not any(expected)  # one set only: nothing to learn, and refused
            with pytest.raises(InputError, match=r"algo\.k: got .*raise trainer\.responses_per_prompt"):
                example("pass_at_k", k=k).advantages(rows(correct))
            continue
        got = per_row(example("pass_at_k", k=k), rows(correct))
        assert got == pytest.approx(expected, abs=1e-12)
        assert (deviation == 0) == (got == [0.0] * n)
        assert sum(got) == pytest.approx(0.0, abs=1e-12)
        assert example("pass_at_k", k=k).keep(torch.tensor(correct, dtype=torch.bool)) == (deviation > 0)


def test_pass_at_1_is_grpo(example: Example) -> None:
    batch = rows([1, 0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1])
    plain = GRPO(adv_std_ddof=0, adv_eps=0.0)
    torch.testing.assert_close(example("pass_at_k", k=1).advantages(batch), plain.advantages(batch), atol=1e-12, rtol=0)


def test_pass_at_k_reads_correct_and_maxrl_rewards(example: Example) -> None:
    right = rows([1, 0, 0, 0])
    shaped = replace(right, rewards=torch.tensor([0.2, 0.9, 0.4, 0.0], dtype=torch.float64))
    assert per_row(example("pass_at_k", k=2), shaped) == per_row(example("pass_at_k", k=2), right)
    assert per_row(example("maxrl"), shaped) != per_row(example("maxrl"), right)


# ---- expected gradients -----------------------------------------------------------------------------------------------

THETA = (-0.4, 0.7)  # logits of the two tokens of a response; it is right when both are 1
Reweigh = Callable[[Batch, Tensor], Tensor]


def success(theta: Tensor) -> Tensor:
    return torch.sigmoid(theta).prod()


def expected_gradient(algorithm: Algorithm, n: int, reweigh: Reweigh | None = None) -> Tensor:
    """Of minus the loss, over every group of n responses that the policy can give: ``[2]``, exact."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(2, dtype=torch.float64)
    for drawn in product(product((0, 1), repeat=2), repeat=n):
        signs = 2.0 * torch.tensor(drawn, dtype=torch.float64) - 1  # [n, 2]
        logprobs = torch.nn.functional.pad(torch.nn.functional.logsigmoid(signs * theta), (1, 0))  # [n, 3], prompt first
        batch = rows([a * b for a, b in drawn])
        mask = torch.tensor([[False, True, True]]).expand(n, 3)
        batch = replace(batch, response_mask=mask, old_logprobs=logprobs.detach())
        advantages = algorithm.advantages(batch)
        advantages = advantages if reweigh is None else maths.where_mask(reweigh(batch, advantages), mask)
        weights = maths.token_weights(mask, algorithm.loss_agg, dtype=torch.float64)
        loss = (algorithm.token_loss(batch, logprobs, advantages) * weights).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        total -= logprobs.detach().sum().exp() * gradient
    return total


def truncated_likelihood_gradient(order: int) -> Tensor:
    """Of the sum of pass@k / k for k = 1 ... order."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    objective = sum((1 - (1 - success(theta)) ** k) / k for k in range(1, order + 1))
    (gradient,) = torch.autograd.grad(objective, theta)
    return gradient


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_ascends_the_truncated_likelihood_of_order_n_minus_1(example: Example, n: int) -> None:
    got = expected_gradient(example("maxrl", loss_agg="seq-mean-token-sum"), n)
    torch.testing.assert_close(got, truncated_likelihood_gradient(n - 1), atol=1e-12, rtol=0)
    assert float((got - truncated_likelihood_gradient(n)).norm()) > 0.01


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_has_order_n_without_the_baseline_or_with_it_everywhere(example: Example, n: int) -> None:
    """The paper's eq. 9 and 10, made from the algorithm's advantages."""

    def has_success(batch: Batch) -> Tensor:
        return batch.correct.any().expand(batch.tokens.shape)

    algorithm = example("maxrl", loss_agg="seq-mean-token-sum")
    without = expected_gradient(algorithm, n, lambda batch, a: torch.where(has_success(batch), a + 1, a))
    everywhere = expected_gradient(algorithm, n, lambda batch, a: torch.where(has_success(batch), a, a - 1))
    torch.testing.assert_close(without, truncated_likelihood_gradient(n), atol=1e-12, rtol=0)
    torch.testing.assert_close(everywhere, truncated_likelihood_gradient(n), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 2), (4, 2), (4, 3)])
def test_pass_at_k_before_its_division_ascends_pass_at_k(example: Example, n: int, k: int) -> None:
    def undivided(batch: Batch, advantages: Tensor) -> Tensor:
        return advantages * advantage_over_all_sets(batch.correct.int().tolist(), k)[1]

    got = expected_gradient(example("pass_at_k", k=k, loss_agg="seq-mean-token-sum"), n, undivided)
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(1 - (1 - success(theta)) ** k, theta)
    torch.testing.assert_close(got, (1 / k - 1 / n) * gradient, atol=1e-12, rtol=0)


# ---- settings and training --------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused(example: Example) -> None:
    with pytest.raises(InputError, match=r"algo\.k: got 0, expected at least 1"):
        example("pass_at_k", k=0)
    for name in TARGETS:
        with pytest.raises(InputError, match=r"algo\.kl_placement"):
            example(name, kl_coef=0.1, kl_placement="reward")
        assert example(name, kl_coef=0.1).needs_reference
    with pytest.raises(InputError, match=r"plan\.overlong_buffer_tokens"):
        example("pass_at_k", plan={"overlong_buffer_tokens": 4})
    negative = replace(rows([1, 0, 0, 0]), rewards=torch.tensor([1.0, -0.5, 0.0, 0.0]))
    with pytest.raises(InputError, match=r"reward: got a score of -0\.5, expected 0 or more"):
        example("maxrl").advantages(negative)


@pytest.mark.parametrize(("name", "settings", "least"), [("pass_at_k", {"k": 6}, 7), ("maxrl", {}, 2)])
def test_too_few_responses_are_refused_before_training(
    example: Example, run_config: Callable[..., RunConfig], name: str, settings: dict[str, int], least: int
) -> None:
    enough = TrainerSettings(responses_per_prompt=least)
    run_config(algo=example(name, **settings), trainer=enough)
    with pytest.raises(InputError, match=rf"trainer\.responses_per_prompt: got {least - 1}.*at least {least}"):
        run_config(algo=example(name, **settings), trainer=replace(enough, responses_per_prompt=least - 1))


@dataclass(frozen=True)
class EvenLength:
    """Correct when the response has an even number of characters: a random model gets mixed groups."""

    def judge(self, prompts: list[Prompt], rollouts: list[Rollout]) -> list[Verdict]:
        even = [len(rollout.text) % 2 == 0 for rollout in rollouts]
        return [Verdict(float(good), good, "graded") for good in even]


@pytest.mark.parametrize("plan", [SamplingPlan(), SamplingPlan(dynamic=True)], ids=["plain", "dynamic"])
@pytest.mark.parametrize(("name", "settings"), [("pass_at_k", {"k": 3}), ("maxrl", {})])
def test_two_steps_of_training(
    example: Example, run_config: Callable[..., RunConfig], name: str, settings: dict[str, int], plan: SamplingPlan
) -> None:
    sizes = TrainerSettings(steps=2, prompts_per_step=4, responses_per_prompt=6)
    algorithm = replace(example(name, **settings), plan=plan)
    trainer = Trainer(run_config(algo=algorithm, reward=EvenLength(), trainer=sizes))
    before = {key: tensor.clone() for key, tensor in trainer.learner.weights()}
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["policy/grad_norm"] > 0
        assert metrics["advantage/min"] < 0 < metrics["advantage/max"]
        assert metrics["advantage/zero_fraction"] == 0 or not plan.dynamic
    assert any(not torch.equal(before[key], tensor) for key, tensor in trainer.learner.weights())
