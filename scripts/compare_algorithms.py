"""Trains the algorithms on Countdown, one seed after the other, and prints the table of docs/algorithms/measured.md.

usage: python scripts/compare_algorithms.py OUT [--algos ppo,grpo,...] [--seeds 0,1,2] [key=value ...]

Every run is ``rlvr train experiment=quickstart algo=NAME seed=S`` with the same settings, evaluated by enumeration (no
sampling noise) instead of by samples. A run that is there already is read, one that was interrupted continues.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlvr import checkpoint
from rlvr.boundary.exact import solve_probabilities
from rlvr.build import from_mapping
from rlvr.config import RunConfig
from rlvr.log import read_metrics
from rlvr.model import load_policy, load_tokenizer
from rlvr.runs import base_model

# Adam moves a weight by about its rate per update: at the default 1e-5 the critic's zero head would end near 1e-3.
SETTINGS = ("trainer.steps=120", "trainer.checkpoint_every=120", "boundary.every=0", "critic.optimizer.lr=1e-3")
WINDOW = 10  # steps over which the reward of the beginning and of the end is averaged
KS = (1, 16, 256)


def train(folder: Path, algo: str, seed: int, overrides: list[str]) -> None:
    newest = checkpoint.latest(folder)
    if newest is not None and len(read_metrics(folder / "metrics.jsonl")) == int(newest.name.removeprefix("step_")):
        return
    words = ["experiment=quickstart", f"algo={algo}", f"seed={seed}", f"run_dir={folder}", *SETTINGS, *overrides]
    subprocess.run([sys.executable, "-m", "rlvr", "train", *words], check=True)


def true_curve(path: str, config: RunConfig) -> list[float]:
    """Mean over the test problems of ``1 - (1 - p)^k``, p the enumerated solve probability at temperature 1."""
    prompts = config.task.prompts("test")
    p = np.array(solve_probabilities(load_policy(path), load_tokenizer(path), config.task, prompts))
    return [float((1 - (1 - p) ** k).mean()) for k in KS]


def measure(folder: Path) -> dict[str, Any]:
    config = from_mapping(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()))
    rows = read_metrics(folder / "metrics.jsonl")
    newest = checkpoint.latest(folder)
    assert newest is not None

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        return statistics.fmean(row[name] for row in part if name in row)

    extras = {  # over the second half of the run
        "explained variance": "critic/explained_variance",
        "keep rate": "groups/mixed_fraction",
        "sampled/used": "rollout/sampled_per_trained",
        "greedy score": "rollout/greedy_score_mean",
        "zero advantages": "advantage/zero_fraction",
    }
    return {
        "first": mean("correct/mean", rows[:WINDOW]),
        "last": mean("correct/mean", rows[-WINDOW:]),
        "base": true_curve(base_model(config), config),
        "curve": true_curve(str(newest), config),
        "minutes": sum(row["time/step_s"] for row in rows) / 60,
        "extras": {label: mean(name, rows[len(rows) // 2 :]) for label, name in extras.items() if name in rows[-1]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--algos", default="ppo,grpo,reinforce_pp,rloo,remax,dapo")
    parser.add_argument("--seeds", default="0,1,2")
    arguments, overrides = parser.parse_known_args()
    cases = [(a, int(s)) for a in arguments.algos.split(",") for s in arguments.seeds.split(",")]
    lines, notes = [], []
    for algo, seed in cases:
        folder = arguments.out / f"{algo}_{seed}"
        train(folder, algo, seed, overrides)
        found = measure(folder)
        if not lines:
            lines.append(f"| base | - | | | {' | '.join(f'{value:.3f}' for value in found['base'])} | |")
        numbers = [found["first"], found["last"], *found["curve"]]
        lines.append(f"| {algo} | {seed} | {' | '.join(f'{value:.3f}' for value in numbers)} | {found['minutes']:.1f} |")
        notes.append(f"{algo} {seed}: " + ", ".join(f"{label} {value:.3f}" for label, value in found["extras"].items()))
    print(f"\n| algorithm | seed | first {WINDOW} steps | last {WINDOW} steps | " + " | ".join(f"pass@{k}" for k in KS), end="")
    print(" | minutes |\n|---|---|---|---|" + "---|" * (len(KS) + 1))
    print("\n".join([*lines, "", *notes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
