"""Run under torchrun by test_vllm_engine.py: ``vllm_worker.py FOLDER OTHER NARROW OUT MODE``, two gloo processes.

MODE check: one engine per process, then one over both, each with a weight update; rank r writes OUT.r (JSON).
MODE die: load one engine over both processes and get killed in the middle of the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

from rlvr.model import load_policy
from rlvr.rollout.vllm_engine import VllmEngine
from rlvr.types import InputError, Request, Sampling

SAMPLING = Sampling(max_new_tokens=8, temperature=0.8)
REQUESTS = [Request(tuple(range(3, 5 + length)), tuple(range(100 * length, 100 * length + 6))) for length in range(4)]


def draw(engine: VllmEngine, requests: list[Request]) -> list[list[list[object]]]:
    return [[[c.tokens, c.logprobs] for c in group] for group in engine.generate(requests, SAMPLING)]


def main(folder: str, other: str, narrow: str, out: str, mode: str) -> None:
    distributed.init_process_group("gloo")
    rank, stop = distributed.get_rank(), [1]
    if mode == "die":
        VllmEngine(tensor_parallel_size=2, dtype="float32").load(folder, stop)
        distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    result: dict[str, object] = {}
    changed = load_policy(other)
    for name, size, own in (("separate", 1, REQUESTS[rank::2]), ("shared", 2, REQUESTS)):
        engine = VllmEngine(tensor_parallel_size=size, dtype="float32")
        engine.load(folder, stop)
        result[name] = draw(engine, own)
        engine.update_weights(changed.named_parameters())
        result[f"{name} updated"] = draw(engine, own)
        if size == 2:
            try:
                draw(engine, REQUESTS[rank:])
            except RuntimeError as error:
                result["different requests"] = str(error)
        engine.close()
        total = torch.ones(1)
        distributed.all_reduce(total)  # the trainer's group outlives the engine
        result[f"{name} ranks after close"] = int(total)
    for key, settings, path in (("three ways", 3, folder), ("three heads", 2, narrow)):
        try:
            VllmEngine(tensor_parallel_size=settings).load(path, stop)
        except InputError as error:
            result[key] = str(error)
    Path(f"{out}.{rank}").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
