"""True pass@k of the base and every checkpoint of Countdown runs, from enumerated answers: no sampling noise.

usage: python scripts/countdown_exact.py RUN_DIR [RUN_DIR ...]

Prints, per model, the mean over the test problems of 1 - (1 - p)^k with p the exact solve probability at temperature 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from rlvr import checkpoint
from rlvr.boundary.exact import solve_probabilities
from rlvr.build import from_mapping
from rlvr.config import RunConfig
from rlvr.model import load_policy, load_tokenizer
from rlvr.runs import base_model

KS = (1, 4, 16, 64, 256, 1024)


def main(folders: list[str]) -> int:
    if not folders:
        print(__doc__, file=sys.stderr)
        return 2
    print("| run | step | " + " | ".join(f"pass@{k}" for k in KS) + " | smallest p | share with p < 1/256 |")
    print("|---|---|" + "---|" * (len(KS) + 2))
    for folder in map(Path, folders):
        config = from_mapping(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()))
        prompts = config.task.prompts("test")
        models = [(0, base_model(config))]
        models += [(s, str(folder / "checkpoints" / checkpoint.step_name(s))) for s in checkpoint.saved_steps(folder)]
        for step, path in tqdm(models, unit="model", desc=folder.name):
            p = np.array(solve_probabilities(load_policy(path), load_tokenizer(path), config.task, prompts))
            curve = " | ".join(f"{(1 - (1 - p) ** k).mean():.3f}" for k in KS)
            tqdm.write(f"| {folder.name} | {step} | {curve} | {p.min():.1e} | {(p < 1 / 256).mean():.3f} |", file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
