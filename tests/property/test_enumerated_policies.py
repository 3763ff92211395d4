"""Expected gradients against exact ones, on a policy small enough to write out every response it can give.

The losses run as in training, on every update of n rows that can be drawn; nothing is sampled, so nothing is approximate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import pytest
import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.algos.ppo import PPO
from rlvr.algos.reinforce_pp import ReinforcePP
from rlvr.algos.remax import ReMax
from rlvr.algos.rloo import RLOO
from rlvr.rollout.batch import pad_rows
from rlvr.types import Batch, InputError

SYMBOLS, END = (0, 1), 2
BETA = 0.3
GREEDY = torch.tensor([0.7, -3.0, 0.1], dtype=torch.float64)  # scores of greedy responses: no baseline may bias ReMax
SUM, WIDE = "seq-mean-token-sum", {"clip_eps_low": 0.999, "clip_eps_high": 50.0}  # so wide that nothing is clipped


@dataclass(frozen=True)
class ToyPolicy:
    """A free table of logits: one row per unfinished response, over two symbols and the end; at most ``limit`` tokens.

    ``limit`` 1 is a single categorical of three symbols; 3 gives 15 responses of one, two and three tokens.
    """

    logits: Tensor  # [states, 3]
    limit: int

    @classmethod
    def draw(cls, limit: int, seed: int) -> ToyPolicy:
        return cls(numbers(2**limit - 1, 3, seed=seed).requires_grad_(), limit)

    @cached_property
    def states(self) -> list[tuple[int, ...]]:
        return [state for length in range(self.limit) for state in product(SYMBOLS, repeat=length)]

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        following = [(*state, token) for state in self.states for token in (*SYMBOLS, END)]
        return [response for response in following if response[-1] == END or len(response) == self.limit]

    @cached_property
    def rows(self) -> Batch:
        """Every response (R) as a row behind a prompt of one token."""
        return pad_rows([((0,), response) for response in self.responses], 0)

    @cached_property
    def visited(self) -> Tensor:
        """The state in which each token was drawn: ``[R, T]``, 0 outside the mask."""
        states = [self.states.index(response[:t]) for response in self.responses for t in range(len(response))]
        return torch.zeros_like(self.rows.tokens).masked_scatter(self.rows.response_mask, torch.tensor(states))

    def logprobs(self) -> Tensor:  # [R, T]
        return maths.where_mask(torch.log_softmax(self.logits, -1)[self.visited, self.rows.tokens], self.rows.response_mask)

    def chances(self) -> Tensor:  # [R]
        return maths.row_sum(self.logprobs(), self.rows.response_mask).exp()

    def visits(self) -> Tensor:
        """Probability of coming through each state: ``[states]``, detached."""
        mask = self.rows.response_mask
        passing = self.chances().detach()[:, None].expand(mask.shape)[mask]
        return torch.zeros(len(self.states), dtype=passing.dtype).index_add_(0, self.visited[mask], passing)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toys(limit: int) -> tuple[ToyPolicy, ToyPolicy]:
    """The policy in training and another one near it: the old policy, or the engine's."""
    policy = ToyPolicy.draw(limit, seed=limit)
    return policy, replace(policy, logits=(policy.logits + 0.4 * numbers(*policy.logits.shape, seed=9)).detach())


def batch_of(old: ToyPolicy, engine: ToyPolicy | None = None) -> Batch:
    """Every response once, with a reward of its own, a random reference and a random critic of the states."""
    count = len(old.responses)
    return replace(
        old.rows,
        rewards=numbers(count, seed=11),
        old_logprobs=old.logprobs().detach(),
        rollout_logprobs=(engine or old).logprobs().detach(),
        ref_logprobs=reference(old.limit).logprobs().detach(),
        values=numbers(len(old.states), seed=12)[old.visited],
    )


def reference(limit: int) -> ToyPolicy:
    return ToyPolicy.draw(limit, seed=20 + limit)


def gradient(objective: Tensor, policy: ToyPolicy) -> Tensor:
    return torch.autograd.grad(objective, policy.logits, retain_graph=True)[0]


def policy_gradient(policy: ToyPolicy, beta: float = 0.0) -> Tensor:
    """Exact gradient of E[reward] - beta * KL(policy || reference), both over whole responses: ``[states, 3]``."""
    batch = batch_of(policy)
    log_ratio = maths.row_sum(policy.logprobs() - batch.ref_logprobs, batch.response_mask)
    return gradient((policy.chances() * (batch.rewards - beta * log_ratio)).sum(), policy)


def expected_gradient(
    algorithm: Algorithm, policy: ToyPolicy, n: int = 2, old: ToyPolicy | None = None, engine: ToyPolicy | None = None
) -> Tensor:
    """Gradient of the loss of one update on n responses to one prompt, expected over all the engine can draw."""
    batch, logprobs = batch_of(old or policy, engine), policy.logprobs()
    chances = (engine or old or policy).chances().detach()
    settings = {"mode": algorithm.loss_agg, "constant": algorithm.loss_agg_const, "dtype": torch.float64}
    expected = torch.zeros((), dtype=torch.float64)
    for choice in product(range(len(batch)), repeat=n):
        rows = torch.tensor(choice)
        update = replace(batch.select(rows), greedy_rewards=GREEDY[:n])
        losses = algorithm.token_loss(update, logprobs[rows], algorithm.advantages(update))
        expected = expected + chances[rows].prod() * (losses * maths.token_weights(update.response_mask, **settings)).sum()
    return gradient(expected, policy)


def same(got: Tensor, wanted: Tensor) -> None:
    assert float(wanted.abs().max()) > 1e-3, "nothing to compare"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def differ(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) > 1e-3


def test_the_responses_are_all_there_are() -> None:
    policy = toys(3)[0]
    assert sorted(len(r) for r in policy.responses) == [1, 2, 2] + [3] * 12
    assert float(policy.chances().detach().sum()) == pytest.approx(1.0, abs=1e-12)
    first = torch.softmax(policy.logits, -1)[0]
    torch.testing.assert_close(policy.visits()[:3], torch.stack([first.sum(), first[0], first[1]]))


# ---- the policy gradient ----------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Algorithm, int, float]] = {  # algorithm, rows of an update, multiple of the exact gradient
    "rloo-2": (RLOO(loss_agg=SUM), 2, 1),
    "rloo-3": (RLOO(loss_agg=SUM), 3, 1),
    "rloo-kl-2": (RLOO(loss_agg=SUM, kl_coef=BETA), 2, 1),
    "rloo-kl-3": (RLOO(loss_agg=SUM, kl_coef=BETA), 3, 1),
    "rloo-kl-late": (RLOO(loss_agg=SUM, kl_coef=BETA, kl_before_baseline=False), 2, 1),
    "cispo": (RLOO(loss_agg=SUM, surrogate="cispo"), 2, 1),
    "group-mean-2": (GRPO(adv_scale="none", loss_agg=SUM), 2, 1 / 2),
    "group-mean-3": (GRPO(adv_scale="none", loss_agg=SUM), 3, 2 / 3),
    "dr_grpo": (GRPO(adv_scale="none", loss_agg="seq-mean-token-sum-const", loss_agg_const=5), 2, 1 / 2 / 5),
    "ppo": (PPO(loss_agg=SUM, kl_coef=BETA), 1, 1),
    "reinforce_pp": (ReinforcePP(loss_agg=SUM, kl_coef=BETA), 1, 1),
    "reinforce_pp-baseline": (ReinforcePP(loss_agg=SUM, baseline="group"), 2, 1 / 2),
    "reinforce_pp-sequences": (ReinforcePP(loss_agg=SUM, whiten_over="sequences"), 1, 1),
    "remax-1": (ReMax(loss_agg=SUM), 1, 1),
    "remax-2": (ReMax(loss_agg=SUM), 2, 1),
    "remax-kl": (ReMax(loss_agg=SUM, kl_coef=BETA), 1, 1),
}


@pytest.mark.parametrize(("algorithm", "n", "factor"), CASES.values(), ids=list(CASES))
def test_before_whitening_the_expected_update_is_the_policy_gradient(
    algorithm: Algorithm, n: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of E[reward] or, with KL in the reward, of E[reward] - beta KL(policy || reference) of whole responses."""
    monkeypatch.setattr(maths, "whiten", lambda values, mask, ddof: values)
    policy = toys(2 if n == 3 else 3)[0]
    same(expected_gradient(algorithm, policy, n), -factor * policy_gradient(policy, algorithm.kl_coef))


@pytest.mark.parametrize(("make", "loss_agg"), [(RLOO, "seq-mean-token-mean"), (RLOO, "token-mean"), (GRPO, SUM)])
def test_dividing_by_lengths_or_deviations_turns_the_gradient(make: type[Algorithm], loss_agg: str) -> None:
    policy, algorithm = toys(3)[0], make(loss_agg=loss_agg)
    found, wanted = expected_gradient(algorithm, policy).flatten(), -policy_gradient(policy).flatten()
    assert 0 < float(torch.cosine_similarity(found, wanted, dim=0)) < 0.999


def test_one_step_kl_is_the_k2_loss_and_not_the_kl_of_whole_responses() -> None:
    policy = toys(3)[0]
    one_step = expected_gradient(ReMax(loss_agg=SUM, kl_coef=BETA, remax_kl="one_step"), policy, 1)
    as_loss = ReMax(loss_agg=SUM, kl_coef=BETA, kl_placement="loss", kl_estimator="k2")
    same(expected_gradient(as_loss, policy, 1), one_step)
    differ(one_step, -policy_gradient(policy, BETA))


# ---- responses of another policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "level"), [(3, "sequence"), (1, "token")])
def test_a_row_ratio_corrects_for_an_older_policy(limit: int, level: str) -> None:
    """Unclipped, it gives the gradient of the policy in training from the responses of the old one."""
    policy, old = toys(limit)
    algorithm = ReMax(ratio_level=level, loss_agg="seq-mean-token-mean", **WIDE)
    same(expected_gradient(algorithm, policy, 1, old=old), -policy_gradient(policy))


@pytest.mark.parametrize("make", [RLOO, ReMax])
def test_a_row_weight_corrects_for_the_engine_and_token_weights_do_not(make: type[Algorithm]) -> None:
    policy, engine = toys(3)
    none, token, sequence = (
        expected_gradient(make(loss_agg=SUM, rollout_is=level, rollout_is_max=1e9), policy, engine=engine)
        for level in ("none", "token", "sequence")
    )
    same(sequence, -policy_gradient(policy))
    differ(token, -policy_gradient(policy))
    differ(none, -policy_gradient(policy))


def test_the_mean_ratio_flows_to_every_token_of_its_row() -> None:
    """GSPO: ratio * A * mean_t grad lp, from the row's ratio itself or from a detached one on each token."""
    policy, old = toys(3)
    batch, logprobs, mask = batch_of(old), policy.logprobs(), policy.rows.response_mask
    algorithm = GRPO(ratio_level="sequence_mean", loss_agg="seq-mean-token-mean", **WIDE)
    advantages = maths.where_mask(batch.rewards[:, None].expand(mask.shape), mask)
    ratio = maths.row_mean(logprobs - batch.old_logprobs, mask).exp().detach()
    weights = maths.token_weights(mask, algorithm.loss_agg, dtype=torch.float64)
    found = gradient((algorithm.token_loss(batch, logprobs, advantages) * weights).sum(), policy)
    same(found, gradient(-(ratio * batch.rewards * maths.row_mean(logprobs, mask)).mean(), policy))
    token_ratio = ratio[:, None] * (logprobs - logprobs.detach()).exp()
    same(found, gradient(-maths.row_mean(token_ratio * advantages, mask).mean(), policy))


# ---- KL as a loss -----------------------------------------------------------------------------------------------------


def expected_kl_gradient(policy: ToyPolicy, drawn_by: ToyPolicy, estimator: str, correction: bool = False) -> Tensor:
    batch = batch_of(drawn_by)
    kl = GRPO(kl_estimator=estimator, kl_is_correction=correction, kl_clamp=False).kl_loss(batch, policy.logprobs())
    return gradient((drawn_by.chances().detach() * maths.row_sum(kl, batch.response_mask)).sum(), policy)


def divergence_gradient(policy: ToyPolicy, drawn_by: ToyPolicy, direction: str) -> Tensor:
    """Exact gradient of the next token's KL against the reference, states weighted as ``drawn_by`` comes through them."""
    p, q = torch.log_softmax(policy.logits, -1), torch.log_softmax(reference(policy.limit).logits, -1).detach()
    per_state = (p.exp() * (p - q) if direction == "reverse" else q.exp() * (q - p)).sum(-1)
    return gradient((drawn_by.visits() * per_state).sum(), policy)


LENGTHS = pytest.mark.parametrize("limit", [1, 3], ids=["categorical", "responses"])


@LENGTHS
def test_k1_as_a_loss_does_nothing(limit: int) -> None:
    policy = toys(limit)[0]
    torch.testing.assert_close(expected_kl_gradient(policy, policy, "k1"), torch.zeros_like(policy.logits), rtol=0, atol=1e-12)


@LENGTHS
@pytest.mark.parametrize(("estimator", "direction"), [("k2", "reverse"), ("k3", "forward"), ("k3+k2grad", "reverse")])
def test_the_divergence_of_a_kl_loss(limit: int, estimator: str, direction: str) -> None:
    policy = toys(limit)[0]
    same(expected_kl_gradient(policy, policy, estimator), divergence_gradient(policy, policy, direction))


@LENGTHS
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("stale", [False, True], ids=["on-policy", "off-policy"])
def test_the_ratio_as_a_factor_makes_it_the_reverse_kl(limit: int, estimator: str, stale: bool) -> None:
    """Of the policy in training, also when an older one drew the responses; without the factor it is not."""
    policy, old = toys(limit)
    drawn_by = old if stale else policy
    wanted = divergence_gradient(policy, drawn_by, "reverse")
    same(expected_kl_gradient(policy, drawn_by, estimator, correction=True), wanted)
    differ(expected_kl_gradient(policy, drawn_by, estimator), wanted)


def test_straight_through_has_the_value_of_k3() -> None:
    batch, logprobs = batch_of(toys(3)[1]), toys(3)[0].logprobs()
    straight, k3 = (GRPO(kl_estimator=name).kl_loss(batch, logprobs) for name in ("k3+k2grad", "k3"))
    torch.testing.assert_close(straight, k3, rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [{"kl_estimator": "k2", "kl_is_correction": True}, {"kl_estimator": "k1"}], ids=str)
def test_losses_that_are_no_divergence_are_refused(settings: dict) -> None:
    with pytest.raises(InputError, match="kl_estimator"):
        GRPO(kl_coef=BETA, **settings)


@LENGTHS
def test_the_logged_kl_is_that_of_whole_responses(limit: int) -> None:
    policy, batch = toys(limit)[0], batch_of(toys(limit)[0])
    chances, mask = policy.chances().detach(), batch.response_mask
    exact = (chances * maths.row_sum(batch.old_logprobs - batch.ref_logprobs, mask)).sum()
    metrics = GRPO().token_metrics(batch, policy.logprobs(), torch.zeros_like(batch.old_logprobs))
    for name in ("policy/ref_kl_k1_nats", "policy/ref_kl_k3_nats"):
        torch.testing.assert_close((chances * maths.row_sum(metrics[name], mask)).sum(), exact, rtol=0, atol=1e-12)
    assert bool((metrics["policy/ref_kl_k3_nats"] >= 0).all())
    assert bool((metrics["policy/ref_kl_k1_nats"] < 0).any())
