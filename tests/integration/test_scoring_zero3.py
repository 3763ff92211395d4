"""DeepSpeed ZeRO-3, where each use of a weight is a collective: ranks with different numbers of tokens and chunks agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scoring_worker import SHARES, loss_of, scorers


def test_gradients_are_those_of_one_process_with_whole_weights(tmp_path: Path) -> None:
    """Two processes; rank 1 has one token where rank 0 has twenty, then none. Padded and tied, packed and untied."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = [str(Path(__file__).with_name("scoring_worker.py")), str(tmp_path / "gradients.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found, compared = torch.load(tmp_path / "gradients.pt", weights_only=True), 0
    for packing, tied in ((False, True), (True, False)):
        for name, scorer in scorers(packing, tied).items():
            for share in SHARES:
                for lengths in share:
                    loss_of(name, scorer, lengths).backward()
            for key, parameter in scorer.named_parameters():
                grad = found[f"{name} packing={packing} {key}"]
                assert parameter.grad is not None and float(parameter.grad.norm()) > 0, key
                assert float((grad - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, key
                compared += 1
    assert compared == len(found)
