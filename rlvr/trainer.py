"""The RL loop: prompts -> rollouts -> verdicts -> batch -> advantages -> updates -> new weights in the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from rlvr import checkpoint, maths, runs
from rlvr.boundary.evaluate import evaluate_run, evaluation_prompts
from rlvr.build import to_mapping
from rlvr.config import RunConfig, check_processes
from rlvr.data import PromptStream
from rlvr.interrupt import StopRequest
from rlvr.log import MetricsLog, console_line
from rlvr.model import encode_prompt, load_critic, load_policy, load_tokenizer, token_logprobs, token_values
from rlvr.rewards import bind_verifier
from rlvr.rollout.batch import make_batch, pair_batches
from rlvr.rollout.collect import Collector, timed
from rlvr.rollout.engine import hash_seed
from rlvr.rollout.metrics import rollout_metrics, rollout_rows
from rlvr.types import Batch, InputError, Prompt, StepData
from rlvr.update import UpdatePlan, critic_update, policy_update, score_rows

MISMATCH_ALERT_NATS = 1e-2  # mean k3 above this, with fresh weights, is a fault and not noise


class Trainer:
    """``Trainer(config).run()`` trains to the last step and evaluates, resuming from what the run folder holds.

    In a notebook, ``step()`` does one step and returns its metrics. Raises InputError for what the user can fix.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.algorithm = config, config.algo
        self.backend = config.backend
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
        start_path = str(folder.resume_from or self.base_path)
        self._load_models(start_path, state)
        config.engine.load(start_path, [self.tokenizer.eos_token_id])
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
        self.ptx = self._pretraining_batches()
        self._save_s = 0.0
        self.log = None
        if self.is_main:
            runs.start(self.folder, config)
            self.log = MetricsLog(self.folder, self.step_number, config.wandb, to_mapping(config))

    def run(self) -> None:
        """Train, then evaluate the base and the checkpoints and write the report (rank 0 does, the others are done)."""
        self.train()
        self.close()
        self.backend.stop()
        if self.is_main:
            evaluate_run(self.config, self.base_path)
        self.config.engine.close()

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
        config, started = self.config, time.perf_counter()
        spent = {"time/save_s": self._save_s}
        data = self.collector.collect(self.algorithm, self.step_number)
        config.engine.sleep()
        self._refuse_crashes(data)
        pad = self.tokenizer.pad_token_id
        batch = timed(spent, "time/batch_s", lambda: make_batch(data, self.algorithm.plan, config.sampling, pad))
        batch = timed(spent, "time/score_s", lambda: self._score(batch.to(self.device)))
        advantages = timed(spent, "time/advantages_s", lambda: self.algorithm.advantages(batch).detach())
        metrics = timed(spent, "time/update_s", lambda: self._update(batch, advantages))
        self.step_number += 1
        timed(spent, "time/sync_s", self._sync_engine)
        metrics |= rollout_metrics(data, batch, advantages, config.trainer.responses_per_prompt)
        metrics["data/epoch"] = self.stream.epoch
        metrics |= data.timings_s | spent
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

    def save(self) -> None:
        """Write a checkpoint of this step: a plain Hugging Face folder and the state to resume from."""
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "prompts_taken": self.stream.taken,
            "kl_coef": self.algorithm.kl_coef,
        }
        if self.critic is not None:
            state["critic"] = {"weights": dict(self.critic.weights()), **self.critic.state_dict()}
        if self.reference is not None and self.config.trainer.reset_reference_every:
            state["reference"] = self.reference.state_dict()
        if self.is_main:
            checkpoint.save(self.folder, self.step_number, lambda path: self.policy.save(path, self.tokenizer), state)

    def close(self) -> None:
        """Flush the logs. The engine stays loaded: evaluation reuses it."""
        if self.log is not None:
            self.log.close()

    # ---- arrows of a step ----

    def _score(self, batch: Batch) -> Batch:
        """Log-probs and values that stay fixed during the step, as far as the algorithm needs them."""
        budget, temperature = self.config.trainer.micro_batch_tokens, self.config.sampling.temperature
        if self.algorithm.needs_old_logprobs or self.config.trainer.updates_per_step > 1:
            module = self.policy.module
            old, _ = score_rows(batch, lambda part: token_logprobs(module, part, temperature), budget, self.backend)
            batch = replace(batch, old_logprobs=old)
        if self.reference is not None:
            reference = self.reference
            ref, _ = score_rows(batch, lambda part: token_logprobs(reference, part, temperature), budget, self.backend)
            batch = replace(batch, ref_logprobs=ref)
        if self.critic is not None:
            critic = self.critic.module
            values, final = score_rows(batch, lambda part: token_values(critic, part), budget, self.backend)
            batch = replace(batch, values=values, final_values=final)
        return batch

    def _update(self, batch: Batch, advantages: torch.Tensor) -> dict[str, float]:
        """Critic, then policy, from the same advantages; then what the new log-probs say about the engine's."""
        trainer = self.config.trainer
        plan = UpdatePlan(
            prompts_per_minibatch=trainer.prompts_per_minibatch,
            epochs=trainer.epochs_per_rollout,
            micro_batch_tokens=trainer.micro_batch_tokens,
            temperature=self.config.sampling.temperature,
            loss_agg_const=self.algorithm.loss_agg_const or self.config.sampling.max_new_tokens,
            shuffle_seed=hash_seed(self.config.seed, "minibatches", self.step_number),
        )
        metrics: dict[str, float] = {}
        if self.critic is not None:
            targets = self.algorithm.value_targets(batch).detach()
            metrics |= critic_update(self.critic, self.algorithm, batch, targets, plan, self.backend)
            if self.step_number < self.config.critic.warmup_steps:
                return metrics | {"policy/updates": 0.0, "policy/entropy_nats": 0.0, "policy/grad_norm": 0.0}
        policy_metrics, first_pass = policy_update(self.policy, self.algorithm, batch, advantages, plan, self.backend, self.ptx)
        old = first_pass if batch.old_logprobs is None else batch.old_logprobs
        mismatch = maths.mismatch_metrics(old, batch.rollout_logprobs, batch.response_mask)
        if self.is_main and mismatch["mismatch/k3_kl"] > MISMATCH_ALERT_NATS:
            tqdm.write(
                f"warning: engine and trainer log-probs differ by {mismatch['mismatch/k3_kl']:.3g} nats (k3) on fresh weights; "
                "suspect the temperature, the weight sync or the precision"
            )
        self._after_update(old, batch)
        return metrics | policy_metrics | mismatch

    def _sync_engine(self) -> None:
        self.config.engine.update_weights(self.policy.weights())
        self.config.engine.wake()

    def _after_update(self, old_logprobs: torch.Tensor, batch: Batch) -> None:
        """State that moves between steps: the adaptive KL coefficient, and the reference when it is reset."""
        algo, reset = self.algorithm, self.config.trainer.reset_reference_every
        if batch.ref_logprobs is not None and algo.kl_controller == "adaptive":
            kl = maths.kl_per_token(old_logprobs, batch.ref_logprobs, "k1")
            per_row = maths.row_sum(kl, batch.response_mask).mean()
            unit = per_row if algo.kl_target_unit == "sequence" else maths.masked_mean(kl, batch.response_mask)
            beta = maths.adapt_kl_coef(algo.kl_coef, float(unit), algo.kl_target, len(batch), algo.kl_horizon)
            self.algorithm = replace(algo, kl_coef=beta)
        if self.reference is not None and reset and (self.step_number + 1) % reset == 0:
            self.reference.load_state_dict(dict(self.policy.weights()))

    # ---- around the step ----

    def _load_models(self, start_path: str, state: dict[str, Any]) -> None:
        config = self.config
        updates = config.trainer.steps * config.trainer.updates_per_step
        dtype, backend = config.model.dtype, self.backend
        policy = load_policy(start_path, dtype, config.model.gradient_checkpointing)
        self.policy = backend.prepare(policy, config.optimizer, updates)
        self.reference = backend.freeze(load_policy(self.base_path, dtype)) if self.algorithm.needs_reference else None
        self.critic = None
        if self.algorithm.needs_critic:
            critic = load_critic(self.base_path, dtype)
            if "critic" in state:
                critic.load_state_dict(state["critic"]["weights"])
            self.critic = backend.prepare(critic, config.critic.optimizer, updates)
        if not state:
            return
        self.policy.load_state_dict(state["policy"])
        self.algorithm = replace(self.algorithm, kl_coef=state["kl_coef"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if self.reference is not None and "reference" in state:
            self.reference.load_state_dict(state["reference"])

    def _pretraining_batches(self) -> Iterator[Batch] | None:
        """One batch of ``data.ptx`` for each policy update, from where the run stands."""
        data, warmup = self.config.data, self.config.critic.warmup_steps if self.algorithm.needs_critic else 0
        if data.ptx is None:
            return None
        updates_done = max(self.step_number - warmup, 0) * self.config.trainer.updates_per_step
        batches = pair_batches(self.tokenizer, data.ptx, data.ptx_rows, skip=updates_done)
        return (batch.to(self.device) for batch in batches)

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
