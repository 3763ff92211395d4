"""The RL loop: prompts -> rollouts -> verdicts -> batch -> advantages -> updates -> new weights in the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from rlvr import checkpoint, runs
from rlvr.boundary.evaluate import evaluate_run, evaluation_prompts
from rlvr.build import to_mapping
from rlvr.config import RunConfig, check_processes
from rlvr.data import PromptStream
from rlvr.interrupt import StopRequest
from rlvr.learner import Learner
from rlvr.log import MetricsLog, console_line
from rlvr.model import encode_prompt, load_tokenizer
from rlvr.rewards import bind_verifier
from rlvr.rollout.batch import make_batch, rollout_batch
from rlvr.rollout.collect import Collector
from rlvr.rollout.metrics import rollout_metrics, rollout_rows
from rlvr.types import InputError, Prompt, StepData

T = TypeVar("T")


class Trainer:
    """``Trainer(config).run()`` trains to the last step and evaluates, resuming from what the run folder holds.

    In a notebook, ``step()`` does one step and returns its metrics. Raises InputError for what the user can fix.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.backend = config, config.backend
        self.backend.start()
        self.is_main, self.device = self.backend.rank == 0, self.backend.device
        check_processes(config)
        if self.is_main and (config.sampling.top_p < 1 or config.sampling.top_k):
            print(
                "warning: sampling.top_p and top_k cut the engine's distribution, not the trainer's; the log-probs then differ"
            )
        with self.backend.main_first():
            folder = runs.check(config.run_dir, config)
            self.base_path = runs.base_model(config)
        self.folder = folder.path
        self.tokenizer = load_tokenizer(self.base_path)
        prompts = self._usable_prompts(config.task.prompts("train"))
        if config.boundary.every != 0:
            evaluation_prompts(config.task, config.boundary)  # refused now rather than after the training
        state = checkpoint.load_state(folder.resume_from) if folder.resume_from else {}
        self.step_number: int = state.get("step", 0)
        self.learner = Learner(config, self.base_path, self.tokenizer, folder.resume_from, state)
        self.learner.sleep()
        config.engine.load(str(folder.resume_from or self.base_path), [self.tokenizer.eos_token_id])
        self.stream = PromptStream(prompts, config.seed, state.get("prompts_taken", 0))
        self.collector = Collector(
            config.engine,
            self.tokenizer,
            bind_verifier(config.reward, config.task.reward()),
            self.stream,
            config.sampling,
            config.trainer.prompts_per_step,
            config.trainer.responses_per_prompt,
            config.seed,
            self.backend,
        )
        self._engine_sleeps = False
        self._check_engine()
        self._save_s = 0.0
        self.log = None
        self.backend.gather(None)  # every rank has checked the folder before rank 0 writes to it
        if self.is_main:
            runs.start(self.folder, config)
            self.log = MetricsLog(self.folder, self.step_number, config.wandb, to_mapping(config))

    def run(self) -> None:
        """Train, then evaluate the base and the checkpoints and write the report."""
        self.train()
        self.close()
        self._hand_over_to_engine()
        evaluate_run(self.config, self.base_path)
        self.config.engine.close()
        self.backend.stop()

    def train(self) -> None:
        """Train to ``trainer.steps``. Ctrl-C finishes the step, saves and raises KeyboardInterrupt; again, it stops at once."""
        steps = self.config.trainer.steps
        progress = tqdm(total=steps, initial=self.step_number, unit="step", desc="train", disable=not self.is_main)
        with StopRequest() as stop, progress as bar:
            while self.step_number < steps:
                metrics = self.step()
                if self.is_main:
                    bar.write(console_line(self.step_number, steps, metrics))
                bar.update()
                if any(self.backend.gather(stop.requested)):  # together: a rank alone would wait for the others for ever
                    self.save()
                    raise KeyboardInterrupt

    def step(self) -> dict[str, float]:
        """One rollout batch and all its updates; logs and saves when due. Returns the step's metrics."""
        config, started, self._spent = self.config, time.perf_counter(), {"time/save_s": self._save_s}
        algorithm = self.learner.algorithm  # whose KL coefficient may move with the step
        self._hand_over_to_engine()
        data = self.collector.collect(algorithm, self.step_number)
        self._hand_over_to_learner()
        self._refuse_crashes(data)
        pad = self.tokenizer.pad_token_id
        batch = self._timed("batch", lambda: make_batch(data, algorithm.plan, config.sampling, pad))
        batch = self._timed("score", lambda: self.learner.score(batch.to(self.device)))
        advantages = self._timed("advantages", lambda: algorithm.advantages(batch).detach())
        metrics = self._timed("update", lambda: self.learner.update(batch, advantages, self.step_number))
        self._timed("sync", lambda: config.engine.update_weights(self.learner.weights()))
        self.step_number += 1
        metrics |= rollout_metrics(data, batch, advantages, config.trainer.responses_per_prompt)
        metrics["data/epoch"] = self.stream.epoch
        metrics |= data.timings_s | self._spent
        metrics["time/step_s"] = time.perf_counter() - started
        metrics["perf/rollout_tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/generate_s"]
        metrics["perf/step_tokens_per_s"] = metrics["rollout/tokens"] / metrics["time/step_s"]
        if self.device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.log is not None:
            self.log.write(self.step_number, metrics)  # before the checkpoint: a resumed run repeats lines, never invents them
        saving = time.perf_counter()
        self._save_when_due(data)
        self._save_s = time.perf_counter() - saving
        return metrics

    def _enter(self, phase: str) -> None:
        self.backend.phase(f"step {self.step_number + 1}: {phase}")

    def _timed(self, phase: str, call: Callable[[], T]) -> T:
        """Run ``call`` as a phase of the step, with its wall time in the metrics."""
        self._enter(phase)
        start = time.perf_counter()
        result = call()
        self._spent[f"time/{phase}_s"] = time.perf_counter() - start
        return result

    def save(self) -> None:
        """Write a checkpoint of this step: a plain Hugging Face folder and the state to resume from."""
        self.backend.phase(f"save after step {self.step_number}")
        state = {"prompts_taken": self.stream.taken, **self.learner.state()}
        checkpoint.save(self.folder, self.step_number, self.learner.save, state, self.backend)

    def close(self) -> None:
        """Flush the logs. The engine stays loaded: evaluation reuses it."""
        if self.log is not None:
            self.log.close()

    def _hand_over_to_engine(self) -> None:
        """Device memory goes to the engine: it generates next. Only now, so that checkpoints are saved by an awake learner."""
        self.learner.sleep()
        if self._engine_sleeps:
            self.config.engine.wake()
        self._engine_sleeps = False

    def _hand_over_to_learner(self) -> None:
        self.config.engine.sleep()
        self._engine_sleeps = True
        self.learner.wake()

    def _check_engine(self) -> None:
        rows = self.collector.trial()
        self._hand_over_to_learner()
        self.learner.check_engine(rollout_batch(rows, self.tokenizer.pad_token_id).to(self.device))

    def _usable_prompts(self, prompts: Any) -> list[Prompt]:
        """The training prompts within the length limit; longer ones are refused or dropped, as configured, never cut."""
        limit = self.config.trainer.max_prompt_tokens
        lengths = [len(encode_prompt(self.tokenizer, prompt)) for prompt in prompts]
        usable = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
        too_long = len(lengths) - len(usable)
        if too_long and self.config.trainer.long_prompts == "error":
            raise InputError(
                f"trainer.max_prompt_tokens: got {limit}, but {too_long} of {len(lengths)} training prompts are longer (the "
                f"longest has {max(lengths)} tokens); raise it, or set trainer.long_prompts=drop to leave them out"
            )
        if too_long and self.is_main:
            print(f"left out {too_long} of {len(lengths)} training prompts longer than {limit} tokens")
        return usable

    def _refuse_crashes(self, data: StepData) -> None:
        crashed = [row for row in data.sampled if row.verdict is not None and row.verdict.status == "crashed"]
        share = len(crashed) / len(data.sampled)
        if share > self.config.trainer.max_crashed_fraction:
            detail = crashed[0].verdict.detail if crashed[0].verdict else ""
            raise RuntimeError(
                f"{len(crashed)} of {len(data.sampled)} verdicts of step {self.step_number + 1} crashed (share {share:.2f}, "
                f"trainer.max_crashed_fraction={self.config.trainer.max_crashed_fraction}); the first: {detail}"
            )

    def _save_when_due(self, data: StepData) -> None:
        trainer, step = self.config.trainer, self.step_number
        if self.is_main and trainer.save_rollouts_every and step % trainer.save_rollouts_every == 0:
            path = self.folder / "rollouts" / f"{checkpoint.step_name(step)}.jsonl"
            checkpoint.write_jsonl(path, rollout_rows(data))
        if step % trainer.checkpoint_every == 0 or step == trainer.steps:
            self.save()
