"""Prompts to graded rollouts: carry out an algorithm's sampling plan with an engine and a reward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rlvr.algos import Algorithm
from rlvr.backend import Backend
from rlvr.data import PromptStream
from rlvr.model import encode_prompt
from rlvr.rewards import Reward
from rlvr.rollout.engine import Engine, hash_seed, in_order, stream
from rlvr.rollout.grading import Grader
from rlvr.rollout.shares import Shares
from rlvr.types import Completion, InputError, Prompt, Request, Rollout, Sampling, StepData

TRIAL_PROMPTS, TRIAL_TOKENS = 4, 64
T = TypeVar("T")
Group = tuple[list[Rollout], list[Rollout]]  # the sampled responses to a prompt, and the greedy one when there is one


def draw(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    policy_step: int,
    sample_indices: Sequence[Sequence[int]] | None = None,
    with_greedy: bool = False,
) -> Iterator[tuple[int, Group]]:
    """``len(seeds[p])`` responses to each prompt p, and one greedy response each when asked for, in one engine call.

    Yields (p, its responses) as they finish; ``in_order`` puts them in the order of the prompts. ``sample_indices[p]`` numbers
    the responses to prompt p; 0, 1, 2 ... when not given.
    """
    numbers = sample_indices or [range(len(own)) for own in seeds]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    requests = [Request(tokens, tuple(own)) for tokens, own in zip(encoded, seeds, strict=True)]
    greedy_seeds = [hash_seed("greedy", *own) for own in seeds] if with_greedy else []  # not drawn from: they tell rows apart
    requests += [Request(tokens, (seed,), greedy=True) for tokens, seed in zip(encoded, greedy_seeds, strict=False)]

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

    halves: dict[int, list[list[Completion]]] = {}  # of a prompt with a greedy row: what came of the two requests
    for index, completions in stream(engine, requests, sampling):
        place = index % len(prompts)
        parts = halves.setdefault(place, [[], []])
        parts[index // len(prompts)] = completions
        if with_greedy and not all(parts):
            continue
        sampled = [rollout(place, numbers[place][i], seeds[place][i], c, False) for i, c in enumerate(parts[0])]
        yield place, (sampled, [rollout(place, 0, greedy_seeds[place], c, True) for c in parts[1]])


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
        self.shares = Shares(engine, backend)

    def collect(self, algorithm: Algorithm, policy_step: int) -> StepData:
        """One step's rollouts. Every generation batch of a step is drawn with the same weights."""
        plan, wanted = algorithm.plan, self.prompts_per_step
        batch_size = (plan.gen_batch_prompts or wanted) if plan.dynamic else wanted
        kept: list[tuple[Prompt, list[Rollout], list[Rollout]]] = []
        sampled: list[Rollout] = []
        timings: dict[str, float] = {}
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
        drawn = self.shares.drawn(self.stream.take(size))
        graded = self.shares.graded(len(drawn))
        prompts = [prompt for _, prompt in drawn]
        per_prompt = range(self.responses_per_prompt)
        seeds = [[hash_seed(self.seed, "train", position, index) for index in per_prompt] for position, _ in drawn]
        start = time.perf_counter()
        self.backend.phase(f"step {policy_step + 1}: generate")
        with Grader(self.reward) as grader:
            for place, (rows, greedy) in draw(
                self.engine, self.tokenizer, prompts, seeds, self.sampling, policy_step, None, with_greedy
            ):
                if place in graded:
                    grader.submit(place, prompts[place], rows + greedy)
            generated = time.perf_counter()
            self.backend.phase(f"step {policy_step + 1}: verify")
        self.backend.phase(f"step {policy_step + 1}: gather")
        done, count = time.perf_counter(), self.responses_per_prompt
        own = [(prompts[p], grader.graded[p][:count], grader.graded[p][count:]) for p in graded]
        everything = self.shares.gather(own, size)
        spent = {
            "generate": generated - start,
            "verify": done - generated,  # what generation did not hide
            "verify_work": grader.busy_s,
            "gather": time.perf_counter() - done,
        }
        for name, seconds in spent.items():
            timings[f"time/{name}_s"] = timings.get(f"time/{name}_s", 0.0) + seconds
        return everything

    def trial(self) -> list[Rollout]:
        """One short response of every engine to a few prompts, on every rank. Nothing is taken from the stream."""
        prompts = list(self.stream.prompts[:TRIAL_PROMPTS])
        seeds = [[hash_seed(self.seed, "trial", index)] for index in range(len(prompts))]
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, TRIAL_TOKENS))
        drawn = in_order(draw(self.engine, self.tokenizer, prompts, seeds, sampling, 0), len(prompts))
        return [row for rank in self.backend.gather(drawn) for rows, _ in rank for row in rows]

    def _exhausted(self, kept: int, drawn: int, batches: int) -> str:
        return (
            f"algo.plan.max_gen_batches: {batches} generation batches gave {kept} of {self.prompts_per_step} groups that pass "
            f"the filter ({kept} of {drawn} prompts kept, keep rate {kept / drawn:.3f}); raise algo.plan.max_gen_batches or "
            "algo.plan.gen_batch_prompts, use problems of another difficulty, or set algo.plan.on_exhausted=train_partial"
        )
