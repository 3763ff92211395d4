"""The affine reward: scores move, the verifier's word does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from rlvr.build import from_mapping, to_mapping
from rlvr.compose import compose
from rlvr.config import RunConfig
from rlvr.rewards import Reward, bind_verifier, grade
from rlvr.rewards.affine import AffineReward
from rlvr.types import InputError, Prompt, Rollout, Verdict

VERDICTS = {
    "right": Verdict(1.0, True, "graded", "4", "equal"),
    "wrong": Verdict(0.0, False, "graded", "5", "not equal"),
    "half": Verdict(0.5, False, "graded", "4 of 8", "some tests pass"),
    "none": Verdict(0.0, False, "unparsed"),
    "slow": Verdict(0.0, False, "timeout", None, "timed out after 5 s"),
    "broken": Verdict(0.0, False, "crashed", None, "RecursionError"),
    "foreign": Verdict(0.0, False, "unsupported"),
}


@dataclass(frozen=True)
class TableReward:
    """The verdict that stands in the table under the response's text."""

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [VERDICTS[rollout.text] for rollout in rollouts]


def judged(reward: Reward, finish_reason: str = "stop") -> dict[str, Verdict]:
    """Verdict of every row of the table under the reward."""
    prompts = [Prompt(text, text, None, "table/train") for text in VERDICTS]
    rollouts = [Rollout(text, 0, 0, (1,), (2,), (0.0,), finish_reason, text, 0) for text in VERDICTS]
    rows = grade(bind_verifier(reward, TableReward()), prompts, rollouts)
    return {row.text: row.verdict for row in rows if row.verdict is not None}


def test_scores_by_hand() -> None:
    found = {text: verdict.score for text, verdict in judged(AffineReward(scale=2.0, shift=-1.0)).items()}
    expected = {"right": 1.0, "half": 0.0} | dict.fromkeys(["wrong", "none", "slow", "broken", "foreign"], -1.0)
    assert found == expected


def test_the_rest_of_the_verdict_stays() -> None:
    for text, verdict in judged(AffineReward(scale=-3.0, shift=0.5)).items():
        before = VERDICTS[text]
        assert (verdict.correct, verdict.status) == (before.correct, before.status)
        assert (verdict.extracted, verdict.detail) == (before.extracted, before.detail)


def test_defaults_change_nothing() -> None:
    assert judged(AffineReward()) == VERDICTS


def test_a_cut_response_without_an_answer_is_still_called_truncated() -> None:
    assert judged(AffineReward(shift=-1.0), finish_reason="length")["none"].status == "truncated"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale: got 0.0, expected a finite value other than 0"),
        ({"scale": float("nan")}, "scale: got nan, expected a finite value"),
        ({"scale": float("inf")}, "scale: got inf, expected a finite value"),
        ({"shift": float("-inf")}, "shift: got -inf, expected a finite value"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AffineReward(**settings)  # type: ignore[arg-type]


def test_recipe_keeps_the_tasks_verifier_and_repeats_from_its_record() -> None:
    config = from_mapping(RunConfig, compose("train", ["model.path=x", "reward=plus_minus_one"]))
    assert config.reward == AffineReward(scale=2.0, shift=-1.0)
    bound = bind_verifier(config.reward, config.task.reward())
    assert bound == AffineReward(config.task.reward(), 2.0, -1.0)
    assert from_mapping(RunConfig, to_mapping(config)) == config


def test_other_numbers_from_the_command_line() -> None:
    words = ["model.path=x", "reward=plus_minus_one", "reward.scale=1", "reward.shift=-0.5"]
    assert from_mapping(RunConfig, compose("train", words)).reward == AffineReward(scale=1.0, shift=-0.5)
