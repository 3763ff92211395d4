"""ZeRO stages and vLLM on CUDA devices: agreement with one process, memory given back, weights that arrive.

Not seen to run yet: the machines this was written on have no GPU. The same comparisons run on CPUs in tests/integration.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlvr.log import read_metrics
from rlvr.model import TinyModel, load_policy, make_tiny
from rlvr.types import Completion, Request, Sampling

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = (
    "task.train_problems=64 task.test_problems=8 sampling.max_new_tokens=12 trainer.steps=3 trainer.prompts_per_step=8 "
    "trainer.responses_per_prompt=4 optimizer.lr=1e-3 boundary.every=0 model.make=null reward=random"
)
GIB = 2**30


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model with attention heads of a size that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    make_tiny(TinyModel(hidden_size=128, num_heads=2, num_layers=2), folder, seed=0)
    return str(folder)


def train(model: str, run: Path, processes: int, *settings: str) -> Path:
    """A short run as users start it, in processes of its own; returns its last checkpoint."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *torchrun, "-m", "rlvr", "train", "experiment=quickstart", f"model.path={model}"]
    done = subprocess.run([*command, f"run_dir={run}", *SMALL.split(), *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run / "checkpoints" / "step_000003"


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage_trains_as_one_process_does(stage: int, tiny_model: str, tmp_path: Path) -> None:
    """float32, three steps, one or two devices: what training changed, as one vector, agrees to a hundredth of its length."""
    alone = train(tiny_model, tmp_path / "alone", 0, "backend=single")
    shards = min(torch.cuda.device_count(), 2)
    sharded = train(tiny_model, tmp_path / "zero", shards, "backend=deepspeed", f"backend.zero_stage={stage}")
    start, one, many = (load_file(folder / "model.safetensors") for folder in (Path(tiny_model), alone, sharded))
    assert one.keys() == many.keys()
    change = torch.cat([(one[name] - start[name]).flatten() for name in one])
    gap = torch.cat([(many[name] - one[name]).flatten() for name in one])
    assert float(change.norm()) > 1e-3 and float(gap.norm() / change.norm()) < 1e-2


def gaps(model: torch.nn.Module, request: Request, completions: list[Completion]) -> torch.Tensor:
    """|log-prob of the engine - log-prob of the model| per token of the responses, teacher forcing."""
    found = []
    for completion in completions:
        tokens = torch.tensor([[*request.prompt_tokens, *completion.tokens]], device="cuda")
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)
        places = range(len(request.prompt_tokens) - 1, tokens.shape[1] - 1)
        own = torch.stack([logprobs[place, tokens[0, place + 1]] for place in places])
        found.append((own.cpu() - torch.tensor(completion.logprobs)).abs())
    return torch.cat(found)


@needs_vllm
def test_vllm_gives_memory_back_and_takes_new_weights(wide_model: str) -> None:
    from rlvr.rollout.vllm_engine import VllmEngine

    request, sampling = Request((5, 6, 7), tuple(range(8))), Sampling(max_new_tokens=12)
    policy = load_policy(wide_model).cuda()
    engine = VllmEngine(dtype="float32", memory_share=0.3, enforce_eager=True)
    engine.load(wide_model, [1])
    try:
        assert float(gaps(policy, request, engine.generate([request], sampling)[0]).max()) < 1e-2
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        assert asleep - awake > GIB  # the cache alone is most of the share
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        engine.update_weights(policy.named_parameters(remove_duplicate=False))
        engine.wake()
        assert asleep - torch.cuda.mem_get_info()[0] > GIB
        fresh = engine.generate([request], sampling)[0]
        assert float(gaps(policy, request, fresh).max()) < 1e-2
        assert float(gaps(load_policy(wide_model).cuda(), request, fresh).max()) > 5e-2  # the comparison sees old weights
    finally:
        engine.close()


@needs_vllm
def test_mismatch_of_bf16_engine_and_trainer(wide_model: str, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: a logit of size 1 is off by up to 2**-8, log-probs by a few of those. A stale layer is off by more."""
    run = tmp_path / "run"
    train(wide_model, run, 0, "backend=single", "backend.precision=bf16", "engine=vllm", "engine.memory_share=0.3")
    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["mismatch/abs_diff_mean"] < 0.02 and row["mismatch/abs_diff_max"] < 0.2, row
