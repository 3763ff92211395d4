"""The vLLM engine: inside the training processes, on the trainer's devices. With ``vllm_setup`` the only importer of vllm.

What this file leans on inside vLLM moves with its releases, so the window it was tested with is written down
(``vllm_setup.TESTED_RELEASES``) and another release warns. Where vLLM would disturb the process it lives in, it is held back
(``VllmEngine._visit``): random states, default dtype, threads and the trainer's process group stay as they were.
"""

from __future__ import annotations

import copy
import gc
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import AutoConfig

from rlvr.lora import base_of, is_adapter
from rlvr.model import load_policy
from rlvr.rollout.engine import hash_seed, in_order
from rlvr.rollout.vllm_setup import check_head_size, import_vllm, remove_leftovers
from rlvr.types import Completion, InputError, Request, Sampling

DTYPES = ("float32", "bfloat16", "float16")
COLDEST = 0.01  # vLLM raises temperatures below this to it
OUTPUT_LAYER = "lm_head.weight"
_active: VllmEngine | None = None  # vLLM keeps its groups in module globals, so a process can hold one engine


@dataclass
class VllmEngine:
    """Seeded sampling with vLLM. Under torchrun every rank calls every method, in the same order.

    With ``tensor_parallel_size`` k, ranks ``k * i`` to ``k * i + k - 1`` share engine i and must be given the same requests in
    the same order; generation refuses anything else. The log-probs of a greedy request are those at the sampling
    temperature without top-p and top-k.
    """

    tensor_parallel_size: int = 1  # consecutive ranks that share one engine
    memory_share: float = 0.4  # of the device's memory, for weights and key-value cache; the trainer needs the rest
    dtype: str = "bfloat16"  # of the engine's weights: float32 | bfloat16 | float16
    max_model_len: int | None = None  # prompt and response, in tokens; None: what the model and the memory allow
    max_rows: int = 512  # responses drawn at a time (vLLM: max_num_seqs)
    enforce_eager: bool | None = None  # no CUDA graphs: slower, but ready in seconds. None: on a CPU only
    prefix_caching: bool = True  # the prompt's keys and values are computed once for all its responses
    seeded: bool = True  # false: rows draw from one stream, so a response depends on its neighbours and does not come again
    float32_head: bool = False  # the output layer in float32, as in the trainer, under half-precision weights
    batch_invariant: bool = False  # vLLM's kernels whose results do not depend on the batch (CUDA only; slower)
    cpu_cache_gib: float = 1.0  # key-value cache on a CPU, where memory_share is not used
    seed: int = 0  # of the stream of rows without a seed of their own; alike on all ranks
    _llm: Any = field(default=None, init=False, repr=False)
    _stop: tuple[int, ...] = field(default=(), init=False, repr=False)
    _path: str = field(default="", init=False, repr=False)
    _shape: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _updated: bool = field(default=False, init=False, repr=False)  # weights differ from the folder's
    _asleep: set[str] = field(default_factory=set, init=False, repr=False)  # "weights", "kv_cache"
    _random: Any = field(default=None, init=False, repr=False)  # vLLM's own state of the global generators
    _owns_group: bool = field(default=False, init=False, repr=False)  # vLLM started torch.distributed

    def __post_init__(self) -> None:
        for name, least in (("tensor_parallel_size", 1), ("max_rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not 0 < self.memory_share <= 1:
            raise InputError(f"memory_share: got {self.memory_share}, expected a value in (0, 1]")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InputError(f"max_model_len: got {self.max_model_len}, expected at least 2 (null: fit to the model)")
        if not self.cpu_cache_gib > 0:
            raise InputError(f"cpu_cache_gib: got {self.cpu_cache_gib}, expected above 0")

    def load(self, path: str, stop_token_ids: Sequence[int]) -> None:
        """As in the protocol. A model of the loaded one's shape only replaces its weights, which takes seconds less."""
        base = base_of(path) if is_adapter(path) else path  # it gives the engine its shape
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: could not load {base!r}: {str(error).splitlines()[0]}") from error
        shape = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
        self._stop = tuple(stop_token_ids)
        reuse = self._llm is not None and shape == self._shape
        if not reuse:
            self.close()
            self._build(base, config)
            self._shape = shape
        if reuse or base != path:
            self.update_weights(self._model_weights(path))
        self._path, self._updated = path, False
        self.wake()

    def _build(self, path: str, config: Any) -> None:
        global _active
        if _active is not None:
            raise InputError("engine: another vLLM engine is loaded in this process; close() it first")
        rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        self._check_split(config, ranks)
        platform = import_vllm(self.batch_invariant, self.float32_head)
        on_cpu, engine_index = platform.is_cpu(), rank // self.tensor_parallel_size
        options: dict[str, Any] = {"dtype": self.dtype}
        if on_cpu:
            check_head_size(config)
            options["kv_cache_memory_bytes"] = int(self.cpu_cache_gib * 2**30)
            options["enable_chunked_prefill"] = False  # vLLM cannot set the generator of a half-read seeded row back there
            first = engine_index * self.tensor_parallel_size
            if rank == first and self.tensor_parallel_size > 1:
                remove_leftovers(range(first, first + self.tensor_parallel_size))
        if ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"
        if self.float32_head:
            options["hf_overrides"] = {"head_dtype": "float32"}
        self._owns_group, self._random = not distributed.is_initialized(), None
        with self._visit(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own use of torch
            from vllm import LLM
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            try:
                self._llm = LLM(
                    model=path,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # not the folder's: a repetition penalty would bend what Sampling asks for
                    seed=self.seed + engine_index,
                    tensor_parallel_size=self.tensor_parallel_size,
                    gpu_memory_utilization=self.memory_share,
                    max_model_len=self.max_model_len or -1,
                    max_num_seqs=self.max_rows,
                    enforce_eager=on_cpu if self.enforce_eager is None else self.enforce_eager,
                    enable_prefix_caching=self.prefix_caching,
                    enable_sleep_mode=platform.is_cuda(),
                    logprobs_mode="processed_logprobs",
                    logits_processors=[_greedy_temperature()],
                    use_tqdm_on_load=False,
                    **options,
                )
            except (ValueError, torch.OutOfMemoryError) as error:
                cleanup_dist_env_and_memory()
                raise InputError(self._explain(error)) from error
        _active = self

    def _check_split(self, config: Any, ranks: int) -> None:
        size, heads = self.tensor_parallel_size, config.get_text_config().num_attention_heads
        if ranks % size:
            raise InputError(
                f"engine.tensor_parallel_size: got {size}, expected a divisor of the {ranks} processes; start a multiple of "
                f"{size} with torchrun --nproc-per-node, or lower it"
            )
        if heads % size:
            raise InputError(f"engine.tensor_parallel_size: got {size}, expected a divisor of the {heads} attention heads")

    def _explain(self, error: Exception) -> str:
        """One line that names the setting behind vLLM's refusal."""
        words = " ".join(str(error).split())
        if "derived max_model_len" in words:
            return f"engine.max_model_len: got {self.max_model_len}, expected at most the model's own limit; vLLM: {words}"
        if "memory" in words.lower():
            return (
                f"engine.memory_share: got {self.memory_share} (on a CPU, cpu_cache_gib {self.cpu_cache_gib}) and the model "
                "does not fit; raise it, free memory on the device, lower engine.max_model_len, or raise "
                f"engine.tensor_parallel_size; vLLM: {words}"
            )
        return f"engine: vLLM refused the model or the settings: {words}"

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._awaken("weights")
        with self._visit(), torch.no_grad():
            # reload_weights, not the model's load_weights: vLLM repacks layers after loading and has to undo that first.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._complete(weights)})
            if not self._llm.reset_prefix_cache():
                raise RuntimeError(
                    "vLLM kept its prefix cache, which belongs to the old weights; is generation still going on?"
                )
        self._updated = True

    def _complete(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream, with the output layer where tied embeddings left it out: vLLM may hold a repacked copy of its own."""
        tied, embedding = self._llm.model_config.hf_text_config.tie_word_embeddings, None
        for name, tensor in weights:
            if name == OUTPUT_LAYER:
                tied = False
            if name.endswith("embed_tokens.weight"):
                embedding = tensor.detach()
            yield name, tensor.detach()
        if tied and embedding is not None:
            yield OUTPUT_LAYER, embedding

    def _model_weights(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of a folder or hub id. The one place that knows of adapter folders: ``load_policy`` merges them."""
        if is_adapter(path):
            dtype = "float32" if self.dtype == "float32" else "bfloat16"
            yield from load_policy(path, dtype).named_parameters(remove_duplicate=False)
            return
        from vllm.model_executor.model_loader import get_model_loader

        config = copy.copy(self._llm.model_config)
        config.model, config.model_weights, config.revision = path, "", None
        model = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        loader: Any = get_model_loader(self._llm.llm_engine.vllm_config.load_config)
        yield from loader.get_all_weights(config, model)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return in_order(self.stream(requests, sampling), len(requests))

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """``generate``, one (index of the request, its completions) at a time, as soon as the request's last row is done.

        The caller works between two of them while the other rows wait: vLLM runs in this process, step by step.
        """
        assert self._llm is not None and not self._asleep, "generation needs a loaded engine that is awake"
        self._check(requests, sampling)
        engine = self._llm.llm_engine
        finished: list[dict[int, Completion]] = [{} for _ in requests]
        rows: dict[str, tuple[int, Sequence[int]]] = {}  # vLLM's request -> (our request, places of its responses)
        try:
            with self._visit():
                for index, request in enumerate(requests):
                    prompt = {"prompt_token_ids": list(request.prompt_tokens)}
                    for places, params in self._split(request, sampling):
                        name = f"{index}.{places[0]}"
                        rows[name] = (index, places)
                        engine.add_request(name, prompt, params)
            yield from ((index, []) for index, request in enumerate(requests) if not request.seeds)
            while rows:
                with self._visit():
                    outputs = engine.step()
                for output in outputs:
                    if not output.finished:
                        continue
                    index, places = rows.pop(output.request_id)
                    drawn = [self._completion(row) for row in sorted(output.outputs, key=lambda row: row.index)]
                    drawn *= len(places) // len(drawn)  # a greedy row answers all seeds of its request
                    finished[index].update(zip(places, drawn, strict=True))
                    if len(finished[index]) == len(requests[index].seeds):
                        yield index, [finished[index][place] for place in range(len(requests[index].seeds))]
        finally:  # the caller may leave early
            if rows:
                with self._visit():
                    engine.abort_request(list(rows))

    def _split(self, request: Request, sampling: Sampling) -> Iterator[tuple[Sequence[int], Any]]:
        """vLLM's requests for one of ours, as (places of the responses, SamplingParams).

        One per seed, never n responses under one seed: vLLM then seeds them seed, seed + 1, ..., and requests with
        neighbouring seeds would repeat each other's samples.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(**own: Any) -> Any:
            return SamplingParams(
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self._stop),
                ignore_eos=True,  # the folder's; the stop tokens are the caller's
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **own,
            )

        places = range(len(request.seeds))
        warm: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if request.greedy and places:
            yield places, params(temperature=0.0, extra_args={"greedy_temperature": sampling.temperature})
        elif self.seeded:
            for place in places:
                yield (place,), params(seed=request.seeds[place], **warm)
        elif places:
            yield places, params(n=len(places), **warm)

    def _completion(self, row: Any) -> Completion:
        assert row.finish_reason in ("stop", "length"), f"vLLM ended a response with {row.finish_reason!r}"
        tokens, logprobs = tuple(row.token_ids), tuple(row.logprobs.logprobs)
        assert len(tokens) == len(logprobs)
        return Completion(tokens, logprobs, "stop" if tokens[-1] in self._stop else "length")

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        limit = self._llm.model_config.max_model_len
        longest = max((len(request.prompt_tokens) for request in requests), default=0)
        if longest + sampling.max_new_tokens > limit:
            raise InputError(
                f"engine.max_model_len: got {limit} (set, or what model and memory allow), expected at least the longest "
                f"prompt's {longest} tokens + sampling.max_new_tokens {sampling.max_new_tokens}; raise it or lower those"
            )
        if sampling.temperature < COLDEST:
            raise InputError(f"sampling.temperature: got {sampling.temperature}, expected at least {COLDEST} with vLLM")
        if self.tensor_parallel_size > 1:
            from vllm.distributed.parallel_state import get_tp_group

            digests: list[Any] = [None] * self.tensor_parallel_size
            distributed.all_gather_object(digests, hash_seed(requests, sampling), group=get_tp_group().cpu_group)
            if len(set(digests)) > 1:  # they would drift apart and hang
                raise RuntimeError("the ranks of one engine (engine.tensor_parallel_size) were given different requests")

    def sleep(self) -> None:
        """Give weights and cache back; on a CPU nothing. The weights are dropped, not moved to the host: an update follows."""
        if self._llm.model_config.enable_sleep_mode and not self._asleep:
            with self._visit():
                self._llm.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        if "weights" in self._asleep:  # no update came
            if self._updated:
                raise RuntimeError("the engine gave its weights back in sleep(); call update_weights before wake()")
            self.update_weights(self._model_weights(self._path))
            self._updated = False
        self._awaken("kv_cache")

    def _awaken(self, tag: str) -> None:
        if tag in self._asleep:
            with self._visit():
                self._llm.wake_up(tags=[tag])
            self._asleep.remove(tag)

    def close(self) -> None:
        global _active
        if self._llm is None:
            return
        with self._visit():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._asleep, _active = set(), None

    @contextmanager
    def _visit(self) -> Iterator[None]:
        """vLLM at work in the trainer's process; what it does to the state of the process does not stay.

        Its global generators are swapped in and out rather than restored: rows without a seed must go on in their stream.
        """
        dtype, threads, set_threads = torch.get_default_dtype(), torch.get_num_threads(), torch.set_num_threads
        destroy, outer = distributed.destroy_process_group, _random_state()
        if self._random is not None:
            _set_random_state(self._random)
        if not self._owns_group:  # vLLM's shutdown destroys the default group, whoever made it
            distributed.destroy_process_group = lambda group=None: None if group is None else destroy(group)
        try:
            yield
        finally:
            distributed.destroy_process_group = destroy
            self._random = _random_state()
            _set_random_state(outer)
            torch.set_default_dtype(dtype)
            torch.set_num_threads = set_threads  # vLLM's CPU worker replaces the function itself
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


def _random_state() -> tuple[Any, ...]:
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


@cache
def _greedy_temperature() -> type:
    """A logits processor class that divides the logits of greedy rows by the sampling temperature.

    vLLM reads temperature 0 as 1 when it computes log-probs. Dividing before the argmax does not change it. The class
    speaks both of vLLM's interfaces, one per generation of its model runner.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as BatchProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor

    def temperature(params: Any) -> float | None:
        return (params.extra_args or {}).get("greedy_temperature")

    class GreedyTemperature(BatchProcessor, SlotProcessor):
        def __init__(self, vllm_config: Any, *device_or_slots: Any) -> None:
            self.temperatures: dict[int, float] = {}  # of greedy rows, by row of the batch or by slot

        def is_argmax_invariant(self) -> bool:
            return False  # it is, but vLLM skips those for greedy rows

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self.temperatures, batch_update, lambda params, prompt, output: temperature(params))

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            own = temperature(sampling_params)
            self.temperatures.pop(req_idx, None)
            if own is not None:
                self.temperatures[req_idx] = own
            return own is not None

        def apply(self, logits: Tensor, slots: Any = None) -> Tensor:
            rows = range(len(logits)) if slots is None else slots.idx_mapping_np.tolist()  # one per row: nothing is speculated
            if self.temperatures.keys().isdisjoint(rows):  # slots of finished rows stay until they are taken again
                return logits
            divisors = torch.tensor([self.temperatures.get(row, 1.0) for row in rows], device=logits.device)
            return logits.div_(divisors[:, None])

    return GreedyTemperature
