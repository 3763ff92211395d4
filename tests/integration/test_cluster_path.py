"""The cluster path on a CPU: torchrun, two processes, DeepSpeed ZeRO-3 and a vLLM engine in each, through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlvr.checkpoint import read_json
from rlvr.log import read_metrics
from rlvr.model import load_tokenizer
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.types import Request, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
SETTINGS = """model=tiny task=countdown algo=grpo algo.kl_coef=0.01 backend=deepspeed backend.zero_stage=3 backend.use=cpu
trainer.steps=5 trainer.prompts_per_step=6 trainer.responses_per_prompt=8 trainer.minibatch_prompts=3 optimizer.lr=1e-3
trainer.checkpoint_every=2 trainer.save_rollouts_every=0 sampling.max_new_tokens=16 engine.dtype=float32""".split()


def run(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlvr", "train"]
    command += [*SETTINGS, f"run_dir={folder}", *settings]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=folder.parent)


def test_five_steps_of_zero_3_with_vllm_in_each_process(tmp_path: Path) -> None:
    """Every step's responses come from the weights of the sync before it; then base and checkpoints are evaluated."""
    done = run(tmp_path / "run", "engine=vllm", "boundary.n=4", "boundary.problems=5", "reward=random")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["mismatch/abs_diff_max"] < 1e-4 for row in rows)
    boundary = read_json(tmp_path / "run" / "boundary" / "boundary.json")
    assert [model["step"] for model in boundary["models"]] == [0, 2, 4, 5]
    assert boundary["sampled_distinct"]
    assert all(len(model["problems"]) == 5 and model["problems"][0]["n"] == 4 for model in boundary["models"])
    folder = tmp_path / "run" / "checkpoints" / "step_000005"
    first, last = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run" / "base", folder))
    moved = [not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True)]
    assert any(moved)
    engine, tokenizer = TransformersEngine(device="cpu"), load_tokenizer(str(folder))
    engine.load(str(folder), [tokenizer.eos_token_id])
    assert engine.generate([Request(tuple(tokenizer("1 2 3:6?")["input_ids"]), (1, 2))], Sampling(max_new_tokens=4))


def test_a_run_whose_engine_got_a_wrong_tensor_stops(tmp_path: Path) -> None:
    settings = ("engine=custom", "engine._target_=cluster_parts.CorruptedVllm", "boundary.every=0", "reward=random")
    done = run(tmp_path / "run", *settings)
    assert done.returncode != 0
    message = "in the responses of step 4, log-probs of engine and trainer differ by"
    assert message in done.stderr, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]  # step 4 used the spoilt engine and is not recorded
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000002\n"
