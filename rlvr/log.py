"""What a run says: the table of metrics, the JSONL file that is the truth, wandb as a copy, one console line a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvr.types import InputError

# name -> (unit, meaning). Names under time/, perf/ and memory/ may differ between two runs from one seed; no other may.
METRICS: dict[str, tuple[str, str]] = {
    "correct/mean": ("fraction", "verifier's word over every sampled response, before dynamic sampling drops groups"),
    "reward/mean": ("score", "over the rows trained on, after shaping"),
    "reward/std": ("score", "over the rows trained on, after shaping"),
    "score/mean": ("score", "over every sampled response, before shaping"),
    "groups/all_right_fraction": ("fraction", "prompts whose every response is correct, before dynamic sampling"),
    "groups/all_wrong_fraction": ("fraction", "prompts whose every response is wrong, before dynamic sampling"),
    "groups/mixed_fraction": ("fraction", "prompts with right and wrong responses, before dynamic sampling"),
    "groups/kept_fraction": ("fraction", "sampled prompts that trained (1 without dynamic sampling)"),
    "rollout/length_mean_tokens": ("tokens", "response length, end-of-sequence included"),
    "rollout/length_max_tokens": ("tokens", "longest response"),
    "rollout/truncated_fraction": ("fraction", "responses cut by the length limit"),
    "rollout/generation_batches": ("count", "generation batches of the step (1 without dynamic sampling)"),
    "rollout/sampled_per_trained": ("ratio", "responses sampled per response trained on"),
    "rollout/tokens": ("tokens", "response tokens sampled, greedy ones not counted"),
    "rollout/overlong_penalty_mean": ("score", "mean length penalty of the rows trained on"),
    "rollout/greedy_score_mean": ("score", "mean score of the greedy responses"),
    "rollout/duplicate_fraction": ("fraction", "responses equal to an earlier one of the same prompt in the step"),
    "status/*": ("count", "responses of the step by verdict status"),
    "advantage/mean": ("advantage", "over tokens"),
    "advantage/std": ("advantage", "over tokens"),
    "advantage/min": ("advantage", "over tokens"),
    "advantage/max": ("advantage", "over tokens"),
    "advantage/zero_fraction": ("fraction", "tokens with an advantage of exactly 0"),
    "policy/loss": ("loss", "weighted sum of token losses, mean over the step's updates"),
    "policy/ptx_loss_nats": ("nats", "pretraining term before its weight: mean negative log-prob per token of the pairs"),
    "policy/entropy_nats": ("nats", "mean entropy of the next-token distribution over response tokens"),
    "policy/approx_kl_nats": ("nats", "mean of old minus current log-prob over tokens"),
    "policy/ref_kl_k1_nats": ("nats", "KL against the reference per token, estimator k1"),
    "policy/ref_kl_k3_nats": ("nats", "KL against the reference per token, estimator k3"),
    "policy/ref_kl_clamped_fraction": ("fraction", "tokens whose k3 loss is clamped, where there is such a loss"),
    "policy/rollout_weight_cut_fraction": ("fraction", "tokens whose rollout weight is outside its bounds, with rollout_is"),
    "policy/clip_high_fraction": ("fraction", "tokens clipped from above"),
    "policy/clip_low_fraction": ("fraction", "tokens clipped from below"),
    "policy/clip_dual_fraction": ("fraction", "tokens at the dual clip"),
    "policy/grad_norm": ("norm", "before clipping, mean over the step's updates"),
    "policy/lr": ("rate", "learning rate of the step's last update"),
    "policy/kl_coef": ("weight", "weight of the KL term in this step"),
    "policy/rows": ("count", "responses with a weight in the loss"),
    "policy/tokens": ("tokens", "response tokens with a weight in the loss"),
    "policy/skipped_updates": ("count", "updates of the run so far left out because fp16 gradients overflowed"),
    "policy/updates": ("count", "optimizer updates of the step"),
    "critic/*": ("", "value loss, clip fraction, explained variance 1 - var(R - V) / var(R), return mean and std"),
    "mismatch/*": ("", "engine against trainer log-probs of the same weights, see maths.mismatch_metrics"),
    "data/epoch": ("epochs", "share of the training set seen"),
    "time/save_s": ("seconds", "wall time of writing rollouts and checkpoint after the step before"),
    "time/verify_s": ("seconds", "wall time of grading that generation did not hide"),
    "time/verify_work_s": ("seconds", "time that the reward worked, most of it while the engine drew on"),
    "time/*_s": ("seconds", "wall time of each arrow of the step, on rank 0"),
    "perf/*_tokens_per_s": ("tokens/s", "response tokens over the wall time of generation, or of the whole step"),
    "memory/peak_gib": ("GiB", "highest device memory so far"),
}


class MetricsLog:
    """Appends one object per step to ``metrics.jsonl`` and copies it to wandb when asked for."""

    def __init__(self, run_dir: Path, resume_step: int, wandb_settings: Any, config: Mapping[str, Any]) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._drop_after(resume_step)
        self._wandb = _start_wandb(run_dir, wandb_settings, config) if wandb_settings.mode != "disabled" else None

    def _drop_after(self, step: int) -> None:
        """Steps after the checkpoint a run resumes from are repeated, so their lines go."""
        from rlvr.checkpoint import write_jsonl

        rows = read_metrics(self.path)
        if rows and rows[-1]["step"] > step:
            write_jsonl(self.path, [row for row in rows if row["step"] <= step])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a killed run left half written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _start_wandb(run_dir: Path, settings: Any, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise InputError(
            f"wandb.mode: got {settings.mode}, but wandb is not installed; pip install 'rlvr[wandb]' or set wandb.mode=disabled"
        ) from error
    return wandb.init(
        project=settings.project,
        name=settings.name or run_dir.name,
        dir=str(run_dir),
        mode=settings.mode,
        config=dict(config),
    )


def console_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    parts = [
        f"correct {metrics['correct/mean']:.3f}",
        f"reward {metrics['reward/mean']:.3f}",
        f"length {metrics['rollout/length_mean_tokens']:.1f} tokens",
        f"entropy {metrics['policy/entropy_nats']:.3f} nats",
        f"grad {metrics['policy/grad_norm']:.2f}",
        f"{metrics['perf/step_tokens_per_s']:.0f} tokens/s",
        f"{metrics['time/step_s']:.2f} s",
    ]
    return f"step {step}/{steps}  " + "  ".join(parts)
