"""Supervised fine-tuning on (prompt, response) pairs: makes base models, and the distillation arm of a comparison."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlvr import checkpoint, maths, runs
from rlvr.backend import TrainedModel
from rlvr.config import SftConfig
from rlvr.interrupt import StopRequest
from rlvr.log import read_metrics
from rlvr.model import load_policy, load_tokenizer, token_logprobs
from rlvr.rollout.batch import pad_rows
from rlvr.update import micro_batches


def run_sft(config: SftConfig) -> Path:
    """Train to the last step and return the folder of the final model, which is there already when the run is finished."""
    folder = runs.check(config.run_dir, config)
    start_step = int(folder.resume_from.name.removeprefix("step_")) if folder.resume_from else 0
    if folder.resume_from and start_step >= config.sft.steps:
        return folder.resume_from
    config.backend.start()
    base = runs.base_model(config)
    tokenizer = load_tokenizer(base)
    policy = load_policy(str(folder.resume_from or base), config.model.dtype)
    model = config.backend.prepare(policy, config.optimizer, config.sft.steps)
    if folder.resume_from:
        model.load_state_dict(checkpoint.load_state(folder.resume_from)["policy"])
    runs.start(folder.path, config)
    kept = [row for row in read_metrics(folder.path / "metrics.jsonl") if row["step"] <= start_step]
    checkpoint.write_jsonl(folder.path / "metrics.jsonl", kept)
    return _loop(config, folder.path, model, tokenizer, start_step)


def _loop(config: SftConfig, folder: Path, model: TrainedModel, tokenizer: PreTrainedTokenizerBase, start_step: int) -> Path:
    settings = config.sft
    pairs = itertools.islice(iter(config.data), start_step * settings.batch_size, None)
    saved = folder
    with StopRequest() as stop, tqdm(total=settings.steps, initial=start_step, unit="step", desc="sft") as bar:
        for step in range(start_step + 1, settings.steps + 1):
            started = time.perf_counter()
            metrics = sft_step(config, model, tokenizer, itertools.islice(pairs, settings.batch_size))
            metrics["time/step_s"] = time.perf_counter() - started
            if step % settings.log_every == 0 or step == settings.steps:
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            bar.set_postfix(loss=f"{metrics['sft/loss_nats']:.3f}", refresh=False)
            bar.update()
            due = settings.checkpoint_every is not None and step % settings.checkpoint_every == 0
            if due or stop.requested or step == settings.steps:
                state = {"policy": model.state_dict()}
                saved = checkpoint.save(folder, step, lambda path: model.save(path, tokenizer), state)
            if stop.requested and step < settings.steps:
                raise KeyboardInterrupt
    return saved


def sft_step(
    config: SftConfig, model: TrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]
) -> dict[str, float]:
    """One update on the mean negative log-prob per response token; the prompt carries no loss."""
    rows = [(tokenizer(prompt)["input_ids"], _response(tokenizer, response)) for prompt, response in pairs]
    batch = pad_rows(rows, tokenizer.pad_token_id).to(config.backend.device)
    weights = maths.token_weights(batch.response_mask, "token-mean")
    everything = batch.groups.new_tensor(range(len(batch)))
    total = 0.0
    for part in micro_batches(batch.response_mask, everything, config.sft.micro_batch_tokens):
        micro = batch.select(part).trim()
        logprobs, _ = token_logprobs(model.module, micro, temperature=1.0)
        loss = -(logprobs * weights[part, : logprobs.shape[1]]).sum()
        model.backward(loss)
        total += float(loss.detach())
    return {"sft/loss_nats": total, "sft/grad_norm": model.step(), "sft/lr": model.lr}


def _response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
