"""The models of a run and what a rollout batch does to them: policy, critic, reference, and the KL coefficient that moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlvr import maths
from rlvr.backend import TrainedModel
from rlvr.config import RunConfig
from rlvr.model import load_critic, load_policy, token_logprobs, token_values
from rlvr.rollout.batch import pair_batches
from rlvr.rollout.engine import hash_seed
from rlvr.types import Batch
from rlvr.update import UpdatePlan, critic_update, policy_update, score_rows

MISMATCH_ALERT_NATS = 1e-2  # mean k3 above this, with fresh weights, is a fault and not noise


class Learner:
    """Loads what the algorithm declares, scores rollout batches and updates on them.

    ``algorithm`` is that of the settings, with the KL coefficient of the step when the controller is adaptive.
    """

    def __init__(
        self, config: RunConfig, base_path: str, start_path: str, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]
    ) -> None:
        self.config, self.algorithm, self.backend = config, config.algo, config.backend
        updates = config.trainer.steps * config.trainer.updates_per_step
        dtype, backend = config.model.dtype, self.backend
        policy = load_policy(start_path, dtype, config.model.gradient_checkpointing)
        self.policy = backend.prepare(policy, config.optimizer, updates)
        self.reference = backend.freeze(load_policy(base_path, dtype)) if self.algorithm.needs_reference else None
        self.critic: TrainedModel | None = None
        if self.algorithm.needs_critic:
            critic = load_critic(base_path, dtype)
            if "critic" in state:
                critic.load_state_dict(state["critic"]["weights"])
            self.critic = backend.prepare(critic, config.critic.optimizer, updates)
        self.ptx = self._pretraining_batches(tokenizer, state.get("step", 0))
        if state:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.algorithm = replace(self.algorithm, kl_coef=state["kl_coef"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if self.reference is not None and "reference" in state:
            self.reference.load_state_dict(state["reference"])

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the policy's weights."""
        state: dict[str, Any] = {"policy": self.policy.state_dict(), "kl_coef": self.algorithm.kl_coef}
        if self.critic is not None:
            state["critic"] = {"weights": dict(self.critic.weights()), **self.critic.state_dict()}
        if self.reference is not None and self.config.trainer.reset_reference_every:
            state["reference"] = self.reference.state_dict()
        return state

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

    def update(self, batch: Batch, advantages: Tensor, step: int) -> dict[str, float]:
        """Critic, then policy, from the same advantages; then what the new log-probs say about the engine's.

        ``step``: finished steps before this one.
        """
        trainer = self.config.trainer
        plan = UpdatePlan(
            prompts_per_minibatch=trainer.prompts_per_minibatch,
            epochs=trainer.epochs_per_rollout,
            micro_batch_tokens=trainer.micro_batch_tokens,
            temperature=self.config.sampling.temperature,
            loss_agg_const=self.algorithm.loss_agg_const or self.config.sampling.max_new_tokens,
            shuffle_seed=hash_seed(self.config.seed, "minibatches", step),
        )
        metrics: dict[str, float] = {}
        if self.critic is not None:
            targets = self.algorithm.value_targets(batch).detach()
            metrics |= critic_update(self.critic, self.algorithm, batch, targets, plan, self.backend)
            if step < self.config.critic.warmup_steps:
                return metrics | {"policy/updates": 0.0, "policy/entropy_nats": 0.0, "policy/grad_norm": 0.0}
        policy_metrics, old = policy_update(self.policy, self.algorithm, batch, advantages, plan, self.backend, self.ptx)
        mismatch = maths.mismatch_metrics(old, batch.rollout_logprobs, batch.response_mask)
        if self.backend.rank == 0 and mismatch["mismatch/k3_kl"] > MISMATCH_ALERT_NATS:
            tqdm.write(
                f"warning: engine and trainer log-probs differ by {mismatch['mismatch/k3_kl']:.3g} nats (k3) on fresh weights; "
                "suspect the temperature, the weight sync or the precision"
            )
        self._adapt_kl_coef(old, batch)
        reset = trainer.reset_reference_every
        if self.reference is not None and reset and (step + 1) % reset == 0:
            self.reference.load_state_dict(dict(self.policy.weights()))
        return metrics | policy_metrics | mismatch

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
