"""The models of a run and what a rollout batch does to them: policy, critic, reference, and the KL coefficient that moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlvr import maths
from rlvr.backend import TrainedModel
from rlvr.checkpoint import STATE_FOLDER
from rlvr.config import RunConfig
from rlvr.lora import merged_weights, without_adapter
from rlvr.micro_batches import MicroBatcher
from rlvr.model import load_critic, load_policy, load_trained
from rlvr.rollout.batch import pair_batches
from rlvr.rollout.engine import hash_seed
from rlvr.scoring import CriticScorer, check_packing, policy_scorer
from rlvr.types import Batch
from rlvr.update import UpdatePlan, critic_update, policy_update
from rlvr.weights import copy_weights, write_model

# Above these, the mean of |engine - trainer log-prob| per token is taken for wrong weights and not for rounding. On tiny models
# float32 on both sides gave means of 3e-7, bfloat16 single tokens up to 2e-3.
MISMATCH_NATS, MISMATCH_FLOAT32_NATS = 0.05, 1e-3


class Learner:
    """Loads what the algorithm declares, scores rollout batches and updates on them.

    ``algorithm`` is that of the settings, with the KL coefficient of the step when the controller is adaptive.
    """

    def __init__(
        self,
        config: RunConfig,
        base_path: str,
        tokenizer: PreTrainedTokenizerBase,
        resume_from: Path | None,
        state: dict[str, Any],
    ) -> None:
        self.config, self.algorithm, self.backend, self.tokenizer = config, config.algo, config.backend, tokenizer
        trainer, updates = config.trainer, config.trainer.steps * config.trainer.updates_per_step
        self.batcher = MicroBatcher(config.backend, trainer.micro_batch_tokens, trainer.packing)
        saved = resume_from / STATE_FOLDER if resume_from is not None else None
        policy = policy_scorer(load_trained(config.model, base_path, resume_from, config.seed), config.model, trainer.packing)
        self.policy = self.backend.prepare(policy, config.optimizer, updates)
        self.reference = None
        if self.algorithm.needs_reference and config.model.lora is None:  # adapters switched off are the reference
            kept = saved / "reference" if saved is not None else None
            source = str(kept) if kept is not None and kept.is_dir() else base_path
            reference = policy_scorer(load_policy(source, config.model.dtype), config.model, trainer.packing)
            self.reference = self.backend.freeze(reference)
        self.critic: TrainedModel | None = None
        if self.algorithm.needs_critic:
            source = str(saved / "critic_model") if saved is not None else base_path
            critic = load_critic(source, config.model.dtype, new_head=saved is None)
            self.critic = self.backend.prepare(CriticScorer(critic, trainer.packing), config.critic.optimizer, updates)
        self.ptx = self._pretraining_batches(tokenizer, state.get("step", 0))
        if saved is not None:
            self.policy.load_state(saved / "policy")
            self.algorithm = replace(self.algorithm, kl_coef=state["kl_coef"])
            if self.critic is not None:
                self.critic.load_state(saved / "critic")
        if trainer.packing:
            for model in (self.policy, self.critic):
                if model is not None:
                    check_packing(model.module)

    def save(self, folder: Path) -> None:
        """The policy as a model folder, and in ``trainer_state/`` what resuming needs beside it. Every rank calls it."""
        lora, saved = self.config.model.lora, folder / STATE_FOLDER
        write_model(folder, self.policy.model, self.tokenizer, self.backend, merge=lora is not None and lora.merge_checkpoints)
        self.policy.save_state(saved / "policy")
        if self.critic is not None:
            write_model(saved / "critic_model", self.critic.model, self.tokenizer, self.backend)
            self.critic.save_state(saved / "critic")
        if self.reference is not None and self.config.trainer.reset_reference_every:
            write_model(saved / "reference", self.reference.model, self.tokenizer, self.backend)

    def state(self) -> dict[str, Any]:
        """The small part of what resuming needs."""
        return {"kl_coef": self.algorithm.kl_coef}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every parameter of the policy, adapters merged. Every rank iterates it."""
        return merged_weights(self.policy.model, self.backend.gathered)

    def sleep(self) -> None:
        """Give device memory back to the engine, where the back end's settings say so."""
        for model in self._trained():
            model.sleep()

    def wake(self) -> None:
        for model in self._trained():
            model.wake()

    def _trained(self) -> list[TrainedModel]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def _pretraining_batches(self, tokenizer: PreTrainedTokenizerBase, step: int) -> Iterator[Batch] | None:
        """One batch of ``data.ptx`` for each policy update, from where the run stands."""
        data, warmup = self.config.data, self.config.critic.warmup_steps if self.algorithm.needs_critic else 0
        if data.ptx is None:
            return None
        updates_done = max(step - warmup, 0) * self.config.trainer.updates_per_step
        batches = pair_batches(tokenizer, data.ptx, data.ptx_rows, skip=updates_done)
        return (batch.to(self.backend.device) for batch in batches)

    def score(self, batch: Batch) -> Batch:
        """Log-probs and values that stay fixed during the step, as far as the algorithm needs them."""
        policy, temperature = self.policy.module, self.config.sampling.temperature
        if self.algorithm.needs_old_logprobs or self.config.trainer.updates_per_step > 1:
            old, _ = self.batcher.score(
                batch, lambda part: policy(part.tokens, part.response_mask, temperature, entropies=False)
            )
            batch = replace(batch, old_logprobs=old)
        if self.algorithm.needs_reference:
            reference = self.reference or policy
            with nullcontext() if self.reference is not None else without_adapter(self.policy.model):
                ref, _ = self.batcher.score(
                    batch, lambda part: reference(part.tokens, part.response_mask, temperature, entropies=False)
                )
            batch = replace(batch, ref_logprobs=ref)
        if self.critic is not None:
            critic = self.critic.module
            values, final = self.batcher.score(batch, lambda part: critic(part.tokens, part.response_mask))
            batch = replace(batch, values=values, final_values=final)
        return batch

    def update(self, batch: Batch, advantages: Tensor, step: int) -> dict[str, float]:
        """Critic, then policy, from the same advantages; then what the new log-probs say about the engine's.

        ``step``: finished steps before this one.
        """
        trainer = self.config.trainer
        plan = UpdatePlan(
            prompts_per_minibatch=trainer.prompts_per_minibatch,
            epochs=trainer.epochs_per_rollout,
            temperature=self.config.sampling.temperature,
            loss_agg_const=self.algorithm.loss_agg_const or self.config.sampling.max_new_tokens,
            shuffle_seed=hash_seed(self.config.seed, "minibatches", step),
        )
        metrics: dict[str, float] = {}
        if self.critic is not None:
            targets = self.algorithm.value_targets(batch).detach()
            metrics |= critic_update(self.critic, self.algorithm, batch, targets, plan, self.batcher)
            if step < self.config.critic.warmup_steps:
                return metrics | {"policy/updates": 0.0, "policy/entropy_nats": 0.0, "policy/grad_norm": 0.0}
        policy_metrics, old = policy_update(self.policy, self.algorithm, batch, advantages, plan, self.batcher, self.ptx)
        mismatch = maths.mismatch_metrics(old, batch.rollout_logprobs, batch.response_mask)
        self._refuse_stale_engine(mismatch, f"the responses of step {step + 1}")
        self._adapt_kl_coef(old, batch)
        reset = trainer.reset_reference_every
        if self.reference is not None and reset and (step + 1) % reset == 0:
            copy_weights(self.policy.model, self.reference.model, self.backend)
        return metrics | policy_metrics | mismatch

    def check_engine(self, batch: Batch) -> None:
        """Raise RuntimeError when the log-probs of a few responses of the engine are not those of the policy."""
        policy, temperature = self.policy.module, self.config.sampling.temperature
        own, _ = self.batcher.score(batch, lambda part: policy(part.tokens, part.response_mask, temperature, entropies=False))
        found = maths.mismatch_metrics(own, batch.rollout_logprobs, batch.response_mask)
        self._refuse_stale_engine(found, "a first trial of the engine")

    def _refuse_stale_engine(self, mismatch: Mapping[str, float], where: str) -> None:
        config, gap = self.config, mismatch.get("mismatch/abs_diff_mean", 0.0)
        limit = config.trainer.max_mismatch_nats
        if limit is None:
            float32 = config.model.dtype == "float32" and getattr(config.backend, "precision", None) == "no"
            exact = float32 and getattr(config.engine, "dtype", None) == "float32"
            truncated = config.sampling.top_p < 1 or config.sampling.top_k  # the engine's is then another distribution
            limit = math.inf if truncated else MISMATCH_FLOAT32_NATS if exact else MISMATCH_NATS
        if not gap <= limit:
            raise RuntimeError(
                f"in {where}, log-probs of engine and trainer differ by {gap:.3g} nats in the mean, more than {limit:.3g} "
                "(trainer.max_mismatch_nats): the engine holds other weights, temperature or precision than the trainer. The "
                "run stops; the last checkpoint is sound"
            )

    def _adapt_kl_coef(self, old_logprobs: Tensor, batch: Batch) -> None:
        """After the batch was shaped with the old coefficient: the next one, from the KL of the weights that drew the batch."""
        algo = self.algorithm
        if batch.ref_logprobs is None or algo.kl_controller != "adaptive":
            return
        kl = maths.kl_per_token(old_logprobs, batch.ref_logprobs, "k1")
        per_row = maths.row_sum(kl, batch.response_mask).mean()
        unit = per_row if algo.kl_target_unit == "sequence" else maths.masked_mean(kl, batch.response_mask)
        beta = maths.adapt_kl_coef(algo.kl_coef, float(unit), algo.kl_target, len(batch), algo.kl_horizon)
        self.algorithm = replace(algo, kl_coef=beta)
