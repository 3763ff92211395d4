"""Log-probs and values stand where the batch says: at the token, of the state before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlvr.model import load_critic, load_policy
from rlvr.rollout.batch import pad_rows
from rlvr.scoring import CriticScorer, PolicyScorer
from rlvr.types import Batch

ROWS = [((3, 4, 5), (6, 7, 8)), ((9,), (2, 3, 4, 5, 1)), ((2, 2), (7,))]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return pad_rows(ROWS, 0)


@pytest.fixture(scope="module")
def critic(tiny_model: str) -> nn.Module:
    critic = load_critic(tiny_model)
    assert torch.count_nonzero(critic.score.weight) == 0  # type: ignore[union-attr, arg-type]
    nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
    return critic.eval()


@torch.no_grad()
def test_values_are_those_of_the_state_before_each_token(critic: nn.Module, batch: Batch) -> None:
    values, final = CriticScorer(critic)(batch.tokens, batch.response_mask)
    for row, (prompt, response) in enumerate(ROWS):
        for place in range(len(response)):
            before = torch.tensor([[*prompt, *response[:place]]])
            wanted = float(critic(input_ids=before).logits[0, -1, 0])
            assert float(values[row, len(prompt) + place]) == pytest.approx(wanted, abs=1e-5)
        after = float(critic(input_ids=torch.tensor([[*prompt, *response]])).logits[0, -1, 0])
        assert float(final[row]) == pytest.approx(after, abs=1e-5)
    assert not bool(values[~batch.response_mask].any())


@torch.no_grad()
def test_logprobs_are_those_of_the_token_after_what_stands_before_it(tiny_model: str, batch: Batch) -> None:
    policy = load_policy(tiny_model)
    logprobs, entropies = PolicyScorer(policy)(batch.tokens, batch.response_mask, 0.7)
    for row, (prompt, response) in enumerate(ROWS):
        for place, token in enumerate(response):
            logits = policy(input_ids=torch.tensor([[*prompt, *response[:place]]])).logits[0, -1] / 0.7
            wanted = torch.log_softmax(logits, -1)
            column = len(prompt) + place
            assert float(logprobs[row, column]) == pytest.approx(float(wanted[token]), abs=1e-5)
            assert float(entropies[row, column]) == pytest.approx(float(-(wanted.exp() * wanted).sum()), abs=1e-5)
    assert not bool(logprobs[~batch.response_mask].any())


@torch.no_grad()
def test_a_row_without_a_token_has_no_score(tiny_model: str, critic: nn.Module, batch: Batch) -> None:
    mask = batch.response_mask.clone()
    mask[1] = False
    empty = replace(batch, response_mask=mask)
    values, final = CriticScorer(critic)(empty.tokens, empty.response_mask)
    logprobs, _ = PolicyScorer(load_policy(tiny_model))(empty.tokens, empty.response_mask, 1.0)
    assert not bool(values[1].any() or logprobs[1].any()) and float(final[1]) == 0.0
