"""The Engine protocol: what draws responses. One implementation per file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from rlvr.types import Completion, Request, Sampling

T = TypeVar("T")


@runtime_checkable
class Engine(Protocol):
    """What users plug in with ``engine._target_=my_module.MyEngine``.

    A class whose constructor takes its settings (a dataclass gets them type-checked) and does no work; the model comes
    with ``load``.

    ``load(path, stop_token_ids)``
        Get the model in the Hugging Face folder or hub id ``path`` ready. A second call replaces the first model.
    ``generate(requests, sampling) -> list[list[Completion]]``
        ``len(request.seeds)`` responses to each request, in order. Prompts x n in one call; the engine cuts it into what
        fits its memory. A response ends with the first token of ``stop_token_ids`` (included, finish reason ``stop``) or
        after ``sampling.max_new_tokens`` tokens (``length``). ``logprobs`` are those of the distribution the token was
        drawn from, after temperature (for a greedy request: of the tempered distribution). The same weights, prompt and
        seed give the same response, whatever else is in the call, up to floating-point differences of batch shapes.
    ``update_weights(weights)``
        Replace the weights by this stream of (Hugging Face parameter name, tensor), every parameter once, tied names
        included. It comes while the engine sleeps: an engine that gave its weights back takes their memory first and
        leaves the rest (a key-value cache) to ``wake``.
    ``sleep()``, ``wake()``
        Give device memory back while the trainer works, and take it again. ``generate`` is only called awake; ``load``
        leaves the engine awake.
    ``close()``
        Free everything. The engine is not used afterwards.

    Two more are read where an engine has them:

    ``stream(requests, sampling) -> Iterator[tuple[int, list[Completion]]]``
        What ``generate`` gives, request by request as they finish, so that grading overlaps generation.
    ``tensor_parallel_size: int``
        So many consecutive ranks are one engine: they get the same requests in the same order.
    """

    def load(self, path: str, stop_token_ids: Sequence[int]) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]: ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def stream(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
    """(index of a request, its responses) as they finish, or all at the end with an engine that has no ``stream``."""
    own = getattr(engine, "stream", None)
    yield from own(requests, sampling) if own is not None else enumerate(engine.generate(requests, sampling))


def in_order(finished: Iterable[tuple[int, T]], count: int) -> list[T]:
    """The second parts of ``count`` (index, ...) pairs in the order of the first."""
    found = dict(finished)
    return [found[index] for index in range(count)]


def hash_seed(*parts: object) -> int:
    """A seed in [0, 2**63) from any labels. Hashed, so that neighbouring labels share nothing."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
