"""Exact solve probabilities, without sampling, for tasks that can list every right answer (Countdown).

A model's chance of solving a problem in one answer is the sum over all correct answer strings of the probability of
drawing that string and then the end-of-sequence token. Each is one teacher-forced pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlvr.maths import row_sum
from rlvr.model import encode_prompt
from rlvr.rollout.batch import pad_rows
from rlvr.scoring import PolicyScorer
from rlvr.types import Prompt


class EnumerableTask(Protocol):
    """A task that knows every right answer."""

    def correct_answers(self, prompt: Prompt) -> Sequence[str]: ...


@torch.inference_mode()
def solve_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EnumerableTask,
    prompts: Sequence[Prompt],
    temperature: float = 1.0,
    rows_per_pass: int = 1024,
) -> list[float]:
    """Probability that one sampled response (top_p 1, no length limit in reach) is correct, per prompt."""
    rows: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for index, prompt in enumerate(prompts):
        question = encode_prompt(tokenizer, prompt)
        for answer in task.correct_answers(prompt):
            rows.append((index, question, (*tokenizer(answer)["input_ids"], tokenizer.eos_token_id)))
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    probabilities = [0.0] * len(prompts)
    scorer, device = PolicyScorer(model), next(model.parameters()).device
    for start in range(0, len(rows), rows_per_pass):
        part = rows[start : start + rows_per_pass]
        batch = pad_rows([(question, answer) for _, question, answer in part], tokenizer.pad_token_id).to(device)
        logprobs, _ = scorer(batch.tokens, batch.response_mask, temperature)
        for (index, _, _), logprob in zip(part, row_sum(logprobs, batch.response_mask).tolist(), strict=True):
            probabilities[index] += torch.tensor(logprob, dtype=torch.float64).exp().item()
    return probabilities
