"""Supervised fine-tuning on (prompt, response) pairs: makes base models, and the distillation arm of a comparison."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlvr import checkpoint, runs
from rlvr.backend import TrainedModel
from rlvr.config import SftConfig
from rlvr.interrupt import StopRequest
from rlvr.log import read_metrics
from rlvr.micro_batches import MicroBatcher
from rlvr.model import load_tokenizer, load_trained
from rlvr.rollout.batch import pair_batches
from rlvr.scoring import policy_scorer
from rlvr.types import Batch
from rlvr.update import add_pretraining_loss
from rlvr.weights import write_model


def run_sft(config: SftConfig) -> Path:
    """Train to the last step and return the folder of the final model, which is there already when the run is finished."""
    config.backend.start()
    with config.backend.main_first():
        folder = runs.check(config.run_dir, config)
    start_step = int(folder.resume_from.name.removeprefix("step_")) if folder.resume_from else 0
    if folder.resume_from and start_step >= config.sft.steps:
        config.backend.stop()
        return folder.resume_from
    with config.backend.main_first():
        base = runs.base_model(config)
    tokenizer = load_tokenizer(base)
    scorer = policy_scorer(load_trained(config.model, base, folder.resume_from, config.seed), config.model)
    model = config.backend.prepare(scorer, config.optimizer, config.sft.steps)
    if folder.resume_from:
        model.load_state(folder.resume_from / checkpoint.STATE_FOLDER / "policy")
    if config.backend.rank == 0:
        runs.start(folder.path, config)
        kept = [row for row in read_metrics(folder.path / "metrics.jsonl") if row["step"] <= start_step]
        checkpoint.write_jsonl(folder.path / "metrics.jsonl", kept)
    saved = _loop(config, folder.path, model, tokenizer, start_step)
    config.backend.stop()
    return saved


def _loop(config: SftConfig, folder: Path, model: TrainedModel, tokenizer: PreTrainedTokenizerBase, start_step: int) -> Path:
    settings, backend = config.sft, config.backend
    batches = pair_batches(tokenizer, config.data, settings.batch_size, skip=start_step)
    saved, main, lora = folder, backend.rank == 0, config.model.lora

    def write(path: Path) -> None:
        write_model(path, model.model, tokenizer, backend, merge=lora is not None and lora.merge_checkpoints)
        model.save_state(path / checkpoint.STATE_FOLDER / "policy")

    progress = tqdm(total=settings.steps, initial=start_step, unit="step", desc="sft", disable=not main)
    with StopRequest() as stop, progress as bar:
        for step in range(start_step + 1, settings.steps + 1):
            started = time.perf_counter()
            backend.phase(f"step {step}")
            metrics = sft_step(config, model, next(batches))
            metrics["time/step_s"] = time.perf_counter() - started
            if main and (step % settings.log_every == 0 or step == settings.steps):
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            bar.set_postfix(loss=f"{metrics['sft/loss_nats']:.3f}", refresh=False)
            bar.update()
            stopping = any(backend.gather(stop.requested))  # together: a rank alone would wait for the others for ever
            due = settings.checkpoint_every is not None and step % settings.checkpoint_every == 0
            if due or stopping or step == settings.steps:
                saved = checkpoint.save(folder, step, write, {}, backend)
            if stopping and step < settings.steps:
                raise KeyboardInterrupt
    return saved


def sft_step(config: SftConfig, model: TrainedModel, batch: Batch) -> dict[str, float]:
    """One update on the mean negative log-prob per response token; the prompt carries no loss."""
    backend = config.backend
    batcher = MicroBatcher(backend, config.sft.micro_batch_tokens)
    share = add_pretraining_loss(model, batch.to(backend.device), 1.0, batcher)
    return {"sft/loss_nats": sum(backend.gather(share)), "sft/grad_norm": model.step(), "sft/lr": model.lr}
