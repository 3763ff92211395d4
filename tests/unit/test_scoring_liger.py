"""Liger's kernel for the log-probs of the output layer, in Triton's interpreter: there is no GPU to compile it for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlvr.model import ModelSettings, load_policy
from rlvr.scoring import PolicyScorer
from rlvr.types import InputError

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

SCRIPT = """
import sys
import torch
from rlvr.model import load_policy
from rlvr.scoring import PolicyScorer

found = {}
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(2, 16, (3, 9), generator=generator)
mask = torch.arange(9).expand(3, 9) >= torch.tensor([[3], [5], [2]])
weight = torch.randn(3, 9, generator=generator)
for liger in (False, True):
    scorer = PolicyScorer(load_policy(sys.argv[1]), logits_per_chunk=40, liger=liger)
    logprobs, entropies = scorer(tokens, mask, 0.7)
    (logprobs * weight).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    found[liger] = (logprobs.detach(), entropies, gradient)
    assert not entropies.requires_grad and scorer(tokens, mask, 0.7, True)[1].requires_grad
for plain, kernel in zip(*found.values(), strict=True):
    assert float(plain.norm()) > 0.1 and float((plain - kernel).norm() / plain.norm()) < 1e-5, (plain, kernel)
print("the same")
"""


def test_liger_gives_the_log_probs_entropies_and_gradients_of_torch(tiny_model: str) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_model], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-3000:]


def test_liger_needs_a_device_and_a_known_name(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scorer = PolicyScorer(load_policy(tiny_model), liger=True)
    with pytest.raises(InputError, match=r"model\.head_kernel: got liger on the CPU, expected a CUDA device; use torch"):
        scorer(torch.tensor([[3, 4]]), torch.tensor([[False, True]]), 1.0)
    with pytest.raises(InputError, match="head_kernel: got 'apple', expected torch or liger"):
        ModelSettings(head_kernel="apple")
    monkeypatch.setattr("rlvr.model.find_spec", lambda name: None)
    with pytest.raises(InputError, match="head_kernel: got liger, but it is not installed"):
        ModelSettings(head_kernel="liger")
