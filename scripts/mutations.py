"""Breaks each formula once and runs the tests that guard it: a mutation that no test notices is a hole.

usage: python scripts/mutations.py [WORD ...]        only the mutations whose name contains one of the words

Each mutation replaces one piece of text, which must occur exactly once, in a copy of the repository. The same tests must
pass on an unchanged copy first. Exit code 1 when a mutation survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
EXAMPLE = ("tests/unit/test_worked_example.py", "tests/unit/test_worked_example_steps.py")
ADVANTAGES = ("tests/unit/test_worked_example_advantages.py",)
PROPERTIES = ("tests/property",)
LOOP = ("tests/integration/test_training.py",)
SPLIT = ("tests/integration/test_gradient_invariance.py", "-k", "split or pretraining")
STAGES = ("tests/integration/test_gradient_invariance.py", "-k", "zero_stage")
RANKS = ("tests/integration/test_gradient_invariance.py", "-k", "any_number_of_processes and 2")


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # under rlvr/
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    # masks
    Mutation(
        "mask by multiplying",
        "maths.py",
        "return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))",
        "return values * mask",
        EXAMPLE,
    ),
    Mutation("sum over the padding", "maths.py", "return where_mask(values, mask).sum(-1)", "return values.sum(-1)", EXAMPLE),
    Mutation("overlong filter ignored", "update.py", "if algorithm.plan.overlong_filter:", "if False:", LOOP),
    # KL
    Mutation("KL sign", "maths.py", "difference = logprobs - ref_logprobs", "difference = ref_logprobs - logprobs", EXAMPLE),
    Mutation(
        "k3 of the other direction", "maths.py", "torch.expm1(-bounded) + bounded", "torch.expm1(bounded) - bounded", EXAMPLE
    ),
    Mutation("k2 without the half", "maths.py", "k2 = difference.square() / 2", "k2 = difference.square()", EXAMPLE),
    Mutation(
        "KL added to the reward",
        "algos/base.py",
        "return rewards - self.kl_coef * self.reward_kl(batch)",
        "return rewards + self.kl_coef * self.reward_kl(batch)",
        ADVANTAGES,
    ),
    Mutation(
        "KL added to the score",
        "algos/base.py",
        "return batch.rewards - self.kl_coef * self.reward_kl(batch).sum(-1)",
        "return batch.rewards + self.kl_coef * self.reward_kl(batch).sum(-1)",
        ADVANTAGES,
    ),
    Mutation(
        "KL loss of the old log-probs",
        "algos/base.py",
        "kl = maths.kl_per_token(current, reference, self.kl_estimator, self.kl_clamp)",
        "kl = maths.kl_per_token(maths.where_mask(batch.old_logprobs, mask), reference, self.kl_estimator, self.kl_clamp)",
        PROPERTIES,
    ),
    Mutation("adaptive KL unbounded", "maths.py", "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0", EXAMPLE),
    # advantages
    Mutation("biased group std", "maths.py", "(squares / (size - ddof)).sqrt()", "(squares / size).sqrt()", EXAMPLE),
    Mutation("biased whitening", "maths.py", "chosen.var(correction=ddof)", "chosen.var(correction=0)", ADVANTAGES),
    Mutation(
        "flat groups left to rounding",
        "algos/grpo.py",
        "advantage = advantage.masked_fill(maths.flat_groups(scores, batch.groups), 0.0)",
        "pass",
        PROPERTIES,
    ),
    Mutation(
        "score on the first token",
        "maths.py",
        "mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
        "mask & (mask.cumsum(1) == 1)",
        ADVANTAGES,
    ),
    Mutation(
        "reward-to-go reset by a hole in the mask",
        "maths.py",
        "running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)",
        "running = torch.where(mask[:, t], rewards[:, t] + gamma * running, torch.zeros_like(running))",
        PROPERTIES,
    ),
    Mutation(
        "GAE takes a masked value",
        "maths.py",
        "next_value = torch.where(mask[:, t], values[:, t], next_value)",
        "next_value = values[:, t]",
        ADVANTAGES,
    ),
    Mutation(
        "returns from whitened advantages",
        "algos/ppo.py",
        "maths.where_mask(self.raw_advantages(batch) + batch.values",
        "maths.where_mask(self.advantages(batch) + batch.values",
        ADVANTAGES,
    ),
    Mutation(
        "bootstrap of every row",
        "algos/ppo.py",
        "torch.where(batch.truncated, batch.final_values, torch.zeros_like(batch.final_values))",
        "batch.final_values",
        ADVANTAGES,
    ),
    Mutation("baseline with the row itself", "algos/rloo.py", " * size / (size - 1)", "", ADVANTAGES),
    Mutation(
        "greedy baseline left out",
        "algos/remax.py",
        "difference = batch.rewards - batch.greedy_rewards",
        "difference = batch.rewards",
        ADVANTAGES,
    ),
    Mutation(
        "group baseline left out of REINFORCE++",
        "algos/reinforce_pp.py",
        "scores = scores - maths.group_mean(scores, batch.groups)",
        "pass",
        ADVANTAGES,
    ),
    Mutation(
        "DAPO without clip-higher",
        "algos/dapo.py",
        "clip_eps_high: float | None = 0.28",
        "clip_eps_high: float | None = None",
        ADVANTAGES,
    ),
    # policy and value loss
    Mutation(
        "clip on the wrong side",
        "maths.py",
        "objective = torch.minimum(ratio * advantages",
        "objective = torch.maximum(ratio * advantages",
        EXAMPLE,
    ),
    Mutation(
        "clip sides swapped",
        "maths.py",
        "ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)",
        "ratio.clamp(1 - eps_high, 1 + eps_low) * advantages)",
        EXAMPLE,
    ),
    Mutation(
        "dual clip of every sign",
        "maths.py",
        "torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)",
        "torch.maximum(objective, dual_clip * advantages)",
        PROPERTIES,
    ),
    Mutation("CISPO through the ratio", "maths.py", "ratio.detach().clamp(", "ratio.clamp(", PROPERTIES),
    Mutation(
        "row ratio of sums instead of means",
        "maths.py",
        "difference = row_mean(difference, mask)[:, None]",
        "difference = row_sum(difference, mask)[:, None]",
        EXAMPLE,
    ),
    Mutation(
        "rollout weight upside down",
        "maths.py",
        "log_ratio(old_logprobs, rollout_logprobs, mask, level).exp()",
        "log_ratio(rollout_logprobs, old_logprobs, mask, level).exp()",
        EXAMPLE,
    ),
    Mutation("value clip takes the smaller", "algos/ppo.py", "torch.maximum(loss,", "torch.minimum(loss,", ADVANTAGES),
    Mutation("overlong penalty without an end", "maths.py", " / buffer_tokens, 1.0)", " / buffer_tokens, 1e9)", PROPERTIES),
    # aggregation
    Mutation(
        "empty rows counted",
        "maths.py",
        "rows = (lengths > 0).sum().clamp(min=1)",
        "rows = lengths.numel() * (lengths >= 0).any()",
        PROPERTIES,
    ),
    Mutation(
        "constant from the padded width",
        "maths.py",
        "(1.0 / (rows.to(dtype) * constant))",
        "(1.0 / (rows.to(dtype) * mask.shape[1]))",
        EXAMPLE,
    ),
    Mutation(
        "mean of each micro-batch",
        "update.py",
        "weight = maths.where_mask(row_weights[micro, :width], part.response_mask)",
        "weight = maths.token_weights(mask[micro], algorithm.loss_agg, groups=part.groups, "
        "constant=plan.loss_agg_const)[:, :width]",
        SPLIT,
    ),
    Mutation(
        "critic's mean of each micro-batch",
        "update.py",
        "weight, target = maths.where_mask(weights[micro, :width], part.response_mask), targets[micro, :width]",
        'weight, target = maths.token_weights(mask[micro], "token-mean")[:, :width], targets[micro, :width]',
        SPLIT,
    ),
    Mutation(
        "advantages of the minibatch",
        "update.py",
        "    for rows in parts:\n",
        "    for rows in parts:\n        advantages = torch.zeros_like(advantages).index_copy("
        "0, rows, algorithm.advantages(batch.select(rows)))\n",
        (*LOOP, "-k", "whole_batch or micro"),
    ),
    Mutation("entropy punished", "update.py", "loss = loss - algorithm.c_ent", "loss = loss + algorithm.c_ent", LOOP),
    Mutation("ratio fixed at 1", "update.py", "on_policy = len(parts) == 1", "on_policy = True", (*LOOP, "-k", "ratio")),
    Mutation("pretraining term unweighted", "update.py", "model.backward(coefficient * loss)", "model.backward(loss)", SPLIT),
    # ranks
    Mutation("gradients of one rank", "backend/data_parallel.py", "if self.accelerator.num_processes > 1:", "if False:", RANKS),
    Mutation(
        "gradients averaged over ranks",
        "backend/data_parallel.py",
        "work.wait()",
        "work.wait()\n        for parameter in trained:\n            parameter.grad /= self.accelerator.num_processes",
        RANKS,
    ),
    Mutation("gradients averaged by ZeRO", "backend/deepspeed.py", "loss * self.backend.world_size", "loss", STAGES),
    Mutation(
        "a row counted on two ranks",
        "micro_batches.py",
        "response_mask=torch.zeros_like(part.response_mask)",
        "response_mask=part.response_mask",
        ("tests/unit/test_data_and_batch.py",),
    ),
    # log-probs and sampling plan
    Mutation("log-probs without temperature", "scoring.py", ".div_(self.temperature)", "", EXAMPLE),
    Mutation(
        "values after the token",
        "scoring.py",
        "nn.functional.pad(after[:, :-1], (1, 0))",
        "after",
        ("tests/unit/test_model_scores.py",),
    ),
    Mutation(
        "weight gradient of the last chunk alone",
        "scoring.py",
        "sums[index - 1].add_(grad)",
        "sums[index - 1].copy_(grad)",
        ("tests/unit/test_scoring.py",),
    ),
    Mutation(
        "packed rows without positions of their own",
        "scoring.py",
        '"position_ids": columns[inside][None], ',
        "",
        ("tests/unit/test_scoring.py",),
    ),
    Mutation("a stale engine goes on", "learner.py", "if not gap <= limit:", "if False:", LOOP),
    Mutation(
        "greedy rows among the sampled",
        "rollout/collect.py",
        "kept.append((prompt, rows, greedy))",
        "kept.append((prompt, rows[:-1] + greedy, greedy))",
        (*LOOP, "-k", "greedy"),
    ),
    Mutation(
        "greedy rows with one seed",
        "rollout/collect.py",
        'hash_seed("greedy", *own)',
        "0",
        (*LOOP, "-k", "greedy"),
    ),
    Mutation(
        "greedy rows counted as sampled",
        "rollout/collect.py",
        "sampled.extend(rows)",
        "sampled.extend(rows + greedy)",
        (*LOOP, "-k", "greedy"),
    ),
    Mutation(
        "flat groups kept",
        "algos/base.py",
        "0 < int(correct.sum()) < correct.numel()",
        "0 <= int(correct.sum()) < correct.numel()",
        EXAMPLE,
    ),
    Mutation(
        "groups out of order",
        "rollout/collect.py",
        "kept = kept[:wanted]",
        "kept = kept[:wanted][::-1]",
        (*LOOP, "-k", "dynamic"),
    ),
    Mutation(
        "stale weights in the engine",
        "trainer.py",
        "config.engine.update_weights(self.learner.weights())",
        "None",
        (*LOOP, "-k", "stale or engine or documented or rises"),
    ),
)


def run_tests(tests: tuple[str, ...], mutation: Mutation | None) -> bool:
    """Whether the tests pass in a copy of the repository, changed by the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored)
        if mutation is not None:
            path = copy / "rlvr" / mutation.file
            path.write_text(path.read_text().replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode not in (0, 1):  # 1: tests failed; anything else: they did not run
            raise RuntimeError(f"{mutation.name if mutation else 'unchanged'}: pytest stopped\n{done.stdout[-3000:]}")
        return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    misfits = [m.name for m in chosen if (ROOT / "rlvr" / m.file).read_text().count(m.old) != 1]
    if misfits:
        print(f"the text of these mutations no longer occurs exactly once: {', '.join(misfits)}", file=sys.stderr)
        return 1
    selections = list(dict.fromkeys(m.tests for m in chosen))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = list(tqdm(pool.map(lambda tests: run_tests(tests, None), selections), total=len(selections), desc="unchanged"))
        if not all(sound):
            broken = [" ".join(tests) for tests, good in zip(selections, sound, strict=True) if not good]
            print(f"these tests fail on the unchanged repository: {'; '.join(broken)}", file=sys.stderr)
            return 1
        passed = list(tqdm(pool.map(lambda m: run_tests(m.tests, m), chosen), total=len(chosen), desc="mutations"))
    for mutation, survived in zip(chosen, passed, strict=True):
        print(f"{'SURVIVED' if survived else 'caught  '}  {mutation.name} ({mutation.file})")
    print(f"{len(chosen) - sum(passed)} of {len(chosen)} mutations caught")
    return int(any(passed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
