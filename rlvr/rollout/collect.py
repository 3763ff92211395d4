"""Prompts to graded rollouts: carry out an algorithm's sampling plan with an engine and a reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rlvr.algos import Algorithm
from rlvr.backend import Backend
from rlvr.data import PromptStream
from rlvr.model import encode_prompt
from rlvr.rewards import Reward, grade
from rlvr.rollout.engine import Engine, hash_seed
from rlvr.types import Completion, InputError, Prompt, Request, Rollout, Sampling, StepData


def draw(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    policy_step: int,
    sample_indices: Sequence[Sequence[int]] | None = None,
    with_greedy: bool = False,
) -> tuple[list[list[Rollout]], list[Rollout]]:
    """``len(seeds[p])`` responses to each prompt, and one greedy response each when asked for, in one engine call.

    ``sample_indices[p]`` numbers the responses to prompt p; 0, 1, 2 ... when not given.
    """
    numbers = sample_indices or [range(len(own)) for own in seeds]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    requests = [Request(tokens, tuple(own)) for tokens, own in zip(encoded, seeds, strict=True)]
    greedy_seeds = [hash_seed("greedy", *own) for own in seeds] if with_greedy else []  # not drawn from: they tell rows apart
    requests += [Request(tokens, (seed,), greedy=True) for tokens, seed in zip(encoded, greedy_seeds, strict=False)]
    completions = engine.generate(requests, sampling)

    def rollout(place: int, index: int, seed: int, completion: Completion, greedy: bool) -> Rollout:
        return Rollout(
            prompt_id=prompts[place].id,
            sample_index=index,
            seed=seed,
            prompt_tokens=encoded[place],
            tokens=completion.tokens,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            text=tokenizer.decode(completion.tokens, skip_special_tokens=True),
            policy_step=policy_step,
            greedy=greedy,
        )

    sampled = [
        [rollout(p, numbers[p][i], seeds[p][i], c, False) for i, c in enumerate(completions[p])] for p in range(len(prompts))
    ]
    greedy = [rollout(p, 0, seed, completions[len(prompts) + p][0], True) for p, seed in enumerate(greedy_seeds)]
    return sampled, greedy


class Collector:
    """Draws, grades and selects the rollouts of one step: each rank a share of the prompts, then every rank holds them all."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        stream: PromptStream,
        sampling: Sampling,
        prompts_per_step: int,
        responses_per_prompt: int,
        seed: int,
        backend: Backend,
    ) -> None:
        self.backend = backend
        self.engine, self.tokenizer, self.reward, self.stream = engine, tokenizer, reward, stream
        self.sampling, self.seed = sampling, seed
        self.prompts_per_step, self.responses_per_prompt = prompts_per_step, responses_per_prompt

    def collect(self, algorithm: Algorithm, policy_step: int) -> StepData:
        """One step's rollouts. Every generation batch of a step is drawn with the same weights."""
        plan, wanted = algorithm.plan, self.prompts_per_step
        batch_size = (plan.gen_batch_prompts or wanted) if plan.dynamic else wanted
        kept: list[tuple[Prompt, list[Rollout], list[Rollout]]] = []
        sampled: list[Rollout] = []
        timings = {"time/generate_s": 0.0, "time/verify_s": 0.0}
        batches = 0
        while len(kept) < wanted and batches < (plan.max_gen_batches if plan.dynamic else 1):
            groups = self._generation_batch(batch_size, plan.greedy, policy_step, timings)
            batches += 1
            for prompt, rows, greedy in groups:
                sampled.extend(rows)
                correct = torch.tensor([row.verdict is not None and row.verdict.correct for row in rows])
                if not plan.dynamic or algorithm.keep(correct):
                    kept.append((prompt, rows, greedy))
        if len(kept) < wanted and (plan.on_exhausted == "error" or not kept):
            raise InputError(self._exhausted(len(kept), len(sampled) // self.responses_per_prompt, batches))
        kept = kept[:wanted]  # in dataset order: taking whichever finish first would select short responses
        return StepData(
            prompts=tuple(prompt for prompt, _, _ in kept),
            rollouts=tuple(row for _, rows, _ in kept for row in rows),
            greedy=tuple(row for _, _, greedy in kept for row in greedy),
            sampled=tuple(sampled),
            generation_batches=batches,
            timings_s=timings,
        )

    def _generation_batch(
        self, size: int, with_greedy: bool, policy_step: int, timings: dict[str, float]
    ) -> list[tuple[Prompt, list[Rollout], list[Rollout]]]:
        taken, (rank, ranks) = self.stream.take(size), (self.backend.rank, self.backend.world_size)
        own = taken[rank::ranks]
        prompts = [prompt for _, prompt in own]
        per_prompt = range(self.responses_per_prompt)
        seeds = [[hash_seed(self.seed, "train", position, index) for index in per_prompt] for position, _ in own]

        def generate() -> tuple[list[list[Rollout]], list[Rollout]]:
            return draw(self.engine, self.tokenizer, prompts, seeds, self.sampling, policy_step, None, with_greedy)

        sampled, greedy = timed(timings, "time/generate_s", generate)
        rows = [row for group in sampled for row in group] + greedy
        asked = [prompt for prompt in prompts for _ in per_prompt] + (prompts if greedy else [])
        graded = timed(timings, "time/verify_s", lambda: grade(self.reward, asked, rows))
        count = self.responses_per_prompt
        best = graded[len(prompts) * count :]
        groups = [
            (prompt, graded[place * count : (place + 1) * count], best[place : place + 1])
            for place, prompt in enumerate(prompts)
        ]
        shares = timed(timings, "time/gather_s", lambda: self.backend.gather(groups))
        return [shares[place % ranks][place // ranks] for place in range(size)]  # the order of the dataset

    def _exhausted(self, kept: int, drawn: int, batches: int) -> str:
        return (
            f"algo.plan.max_gen_batches: {batches} generation batches gave {kept} of {self.prompts_per_step} groups that pass "
            f"the filter ({kept} of {drawn} prompts kept, keep rate {kept / drawn:.3f}); raise algo.plan.max_gen_batches or "
            "algo.plan.gen_batch_prompts, use problems of another difficulty, or set algo.plan.on_exhausted=train_partial"
        )


T = TypeVar("T")


def timed(timings: dict[str, float], name: str, call: Callable[[], T]) -> T:
    """Run ``call`` and add its wall time to ``timings[name]``, in seconds."""
    start = time.perf_counter()
    result = call()
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
    return result
