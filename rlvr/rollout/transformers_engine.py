"""The embedded engine: ``generate`` of transformers, in this process, on any device. The default on a laptop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlvr.model import load_policy
from rlvr.rollout.engine import in_order
from rlvr.types import Completion, InputError, Request, Sampling


class SeededSampler(LogitsProcessor):
    """Draws each row's next token from the row's own random numbers and leaves only that token to ``generate``.

    transformers samples all rows from one global generator, so a row's tokens would depend on the rows beside it. Here row
    b uses the uniform number ``uniforms[b, step]`` on the inverse cumulative distribution of its tempered (and truncated)
    probabilities; ``generate`` then runs greedily over scores in which only the drawn token is finite.
    """

    def __init__(self, uniforms: Tensor, greedy: Tensor, sampling: Sampling, prompt_width: int) -> None:
        self.uniforms = uniforms  # [rows, max_new_tokens] float64 in [0, 1)
        self.greedy = greedy  # [rows] bool
        self.sampling = sampling
        self.prompt_width = prompt_width
        self.logprobs: list[Tensor] = []  # per step [rows]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_width
        logprobs = torch.log_softmax(scores.float() / self.sampling.temperature, -1)  # [rows, V]
        logprobs = truncate(logprobs, self.sampling)
        # Cumulative sums in float64: with a large vocabulary float32 would round small probabilities away.
        cumulative = logprobs.double().exp().cumsum(-1)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)  # [rows, 1]
        chosen = torch.where(self.greedy[:, None], logprobs.argmax(-1, keepdim=True), drawn)
        self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1))
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, chosen, 0.0)  # type: ignore[return-value]


def truncate(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs after top-k and top-p, renormalised; what is cut is -inf. ``[rows, V] -> [rows, V]``."""
    if sampling.top_k:
        smallest_kept = logprobs.topk(min(sampling.top_k, logprobs.shape[-1]), -1).values[:, -1:]
        logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < smallest_kept, -torch.inf), -1)
    if sampling.top_p < 1:
        ordered, order = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the strictly more likely tokens
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logprobs = torch.log_softmax(logprobs.masked_fill(cut, -torch.inf), -1)
    return logprobs


@dataclass
class TransformersEngine:
    """Batched ``generate`` with left-padded prompts; its own copy of the weights, replaced by ``update_weights``."""

    max_rows: int = 512  # responses drawn at a time
    dtype: str = "float32"  # of the engine's weights: float32 | bfloat16
    device: str = "auto"  # auto | cpu | cuda | mps
    _model: Any = field(default=None, init=False, repr=False)
    _stop: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"max_rows: got {self.max_rows}, expected at least 1")

    def load(self, path: str, stop_token_ids: Sequence[int]) -> None:
        self._stop = tuple(stop_token_ids)
        self._model = load_policy(path, self.dtype).to(pick_device(self.device)).eval()
        self._model.requires_grad_(False)
        # The folder's own generation settings (a repetition penalty, say) would bend what Sampling asks for.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return in_order(self.stream(requests, sampling), len(requests))

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        rows = [(index, seed) for index, request in enumerate(requests) for seed in request.seeds]
        # Alike lengths together waste the least padding; seeds belong to rows, so the order changes no response.
        rows.sort(key=lambda row: len(requests[row[0]].prompt_tokens))
        done: dict[int, list[Completion]] = {index: [] for index in range(len(requests))}
        for start in range(0, len(rows), self.max_rows):
            chunk = rows[start : start + self.max_rows]
            drawn = self._generate_rows([(requests[index], seed) for index, seed in chunk], sampling)
            for (index, _), completion in zip(chunk, drawn, strict=True):
                done[index].append(completion)
            finished = [index for index, own in done.items() if len(own) == len(requests[index].seeds)]
            yield from [(index, done.pop(index)) for index in finished]

    @torch.inference_mode()
    def _generate_rows(self, rows: Sequence[tuple[Request, int]], sampling: Sampling) -> list[Completion]:
        device = self._model.device
        pad = self._stop[0]
        width = max(len(request.prompt_tokens) for request, _ in rows)
        prompts = [list(request.prompt_tokens) for request, _ in rows]
        input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        uniforms = torch.stack([_uniforms(seed, sampling.max_new_tokens) for _, seed in rows]).to(device)
        greedy = torch.tensor([request.greedy for request, _ in rows], device=device)
        sampler = SeededSampler(uniforms, greedy, sampling, width)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=list(self._stop), pad_token_id=pad
            ),
        )[:, width:]
        tokens, logprobs = output.tolist(), torch.stack(sampler.logprobs, 1).tolist()
        return [_completion(t, lp, set(self._stop)) for t, lp in zip(tokens, logprobs, strict=True)]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def sleep(self) -> None:
        """Nothing to give back: the weights stay where they are."""

    def wake(self) -> None:
        """The counterpart of ``sleep``."""

    def close(self) -> None:
        self._model = None


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _completion(tokens: list[int], logprobs: list[float], stop: set[int]) -> Completion:
    """Cut a row of ``generate`` after its first stop token."""
    for index, token in enumerate(tokens):
        if token in stop:
            return Completion(tuple(tokens[: index + 1]), tuple(logprobs[: index + 1]), "stop")
    return Completion(tuple(tokens), tuple(logprobs), "length")


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA when there is one, else the CPU (MPS only when asked for: float64 sampling is not available there)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: got cuda, but torch sees no CUDA device here; use device=auto or cpu")
    return torch.device(name)
