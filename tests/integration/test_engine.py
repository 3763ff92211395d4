"""The transformers engine against the trainer's own forward pass, and against itself in other company."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from scipy import stats
from transformers import GenerationConfig

from rlvr.model import encode_prompt, load_policy, load_tokenizer
from rlvr.rollout import Engine
from rlvr.rollout.batch import pad_rows
from rlvr.rollout.engine import hash_seed
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.scoring import PolicyScorer
from rlvr.tasks.countdown import CountdownTask
from rlvr.types import Completion, Request, Sampling

PROMPTS = CountdownTask(test_problems=8, train_problems=8).prompts("test")


def ready_engine(path: str, **settings: int) -> TransformersEngine:
    engine = TransformersEngine(**settings)
    engine.load(path, [load_tokenizer(path).eos_token_id])
    return engine


def requests(path: str, per_prompt: int, greedy: bool = False) -> list[Request]:
    tokenizer = load_tokenizer(path)
    seeds = [tuple(hash_seed("test", p.id, i) for i in range(per_prompt)) for p in PROMPTS]
    return [Request(encode_prompt(tokenizer, p), own, greedy) for p, own in zip(PROMPTS, seeds, strict=True)]


def trainer_logprobs(path: str, asked: list[Request], drawn: list[list[Completion]], temperature: float) -> torch.Tensor:
    rows = [(request.prompt_tokens, c.tokens) for request, group in zip(asked, drawn, strict=True) for c in group]
    batch = pad_rows(rows, 0)
    with torch.no_grad():
        return PolicyScorer(load_policy(path))(batch.tokens, batch.response_mask, temperature)[0][batch.response_mask]


def test_engine_is_an_engine(tiny_model: str) -> None:
    assert isinstance(TransformersEngine(), Engine)


def test_logprobs_are_the_trainers_at_any_temperature(tiny_model: str) -> None:
    """Left padding in the engine, right padding in the trainer, prompts of different lengths: same log-probs."""
    engine, asked = ready_engine(tiny_model), requests(tiny_model, per_prompt=6)
    assert len({len(request.prompt_tokens) for request in asked}) > 1
    for temperature in (1.0, 0.7):
        drawn = engine.generate(asked, Sampling(max_new_tokens=10, temperature=temperature))
        engines = torch.tensor([value for group in drawn for c in group for value in c.logprobs])
        torch.testing.assert_close(engines, trainer_logprobs(tiny_model, asked, drawn, temperature), atol=2e-5, rtol=0)


def test_generation_settings_of_the_folder_do_not_bend_the_sampling(tiny_model: str, tmp_path: Path) -> None:
    folder = str(shutil.copytree(tiny_model, tmp_path / "penalised"))
    GenerationConfig(repetition_penalty=2.0, top_k=2, do_sample=True).save_pretrained(folder)
    asked, sampling = requests(tiny_model, per_prompt=4), Sampling(max_new_tokens=8)
    plain, penalised = (ready_engine(path).generate(asked, sampling) for path in (tiny_model, folder))
    assert plain == penalised


def test_a_response_depends_on_its_own_seed_alone(tiny_model: str) -> None:
    sampling, asked = Sampling(max_new_tokens=10), requests(tiny_model, per_prompt=4)
    together = ready_engine(tiny_model).generate(asked, sampling)
    few_rows = ready_engine(tiny_model, max_rows=3).generate(asked, sampling)
    alone = ready_engine(tiny_model).generate([Request(asked[2].prompt_tokens, asked[2].seeds[1:2])], sampling)
    assert [[c.tokens for c in group] for group in together] == [[c.tokens for c in group] for group in few_rows]
    assert alone[0][0].tokens == together[2][1].tokens


def test_different_seeds_give_different_responses(tiny_model: str) -> None:
    (group,) = ready_engine(tiny_model).generate(requests(tiny_model, 64)[:1], Sampling(max_new_tokens=12))
    assert len({c.tokens for c in group}) > 60


def test_finish_reasons_and_stop_token(tiny_model: str) -> None:
    stop = load_tokenizer(tiny_model).eos_token_id
    drawn = ready_engine(tiny_model).generate(requests(tiny_model, 32), Sampling(max_new_tokens=10))
    completions = [c for group in drawn for c in group]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert len(c.tokens) == len(c.logprobs) <= 10
        assert (stop in c.tokens) == (c.finish_reason == "stop")
        assert stop not in c.tokens[:-1]
        assert c.finish_reason == "stop" or len(c.tokens) == 10


def test_greedy_and_sampled_rows_share_a_call(tiny_model: str) -> None:
    """A greedy row takes the most likely token each time, whatever its seed."""
    asked = requests(tiny_model, 2, greedy=True) + requests(tiny_model, 2)
    drawn = ready_engine(tiny_model).generate(asked, Sampling(max_new_tokens=6))
    model = load_policy(tiny_model)
    for request, group in zip(asked[: len(PROMPTS)], drawn[: len(PROMPTS)], strict=True):
        assert group[0].tokens == group[1].tokens
        for position, token in enumerate(group[0].tokens):
            context = torch.tensor([[*request.prompt_tokens, *group[0].tokens[:position]]])
            assert int(model(context).logits[0, -1].argmax()) == token
    assert any(group[0].tokens != group[1].tokens for group in drawn[len(PROMPTS) :])


def test_first_tokens_follow_the_models_distribution(tiny_model: str) -> None:
    """Chi-square of 4,000 first tokens against the softmax at temperature 0.8."""
    tokens = requests(tiny_model, 1)[0].prompt_tokens
    seeds = tuple(hash_seed("chi-square", index) for index in range(4000))
    (group,) = ready_engine(tiny_model).generate([Request(tokens, seeds)], Sampling(max_new_tokens=1, temperature=0.8))
    expected = torch.softmax(load_policy(tiny_model)(torch.tensor([tokens])).logits[0, -1].double() / 0.8, -1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=len(expected))
    assert stats.chisquare(counts.numpy(), expected.detach().numpy() * 4000).pvalue > 1e-3


def test_new_weights_arrive_tied_embeddings_included(tiny_model: str) -> None:
    asked, sampling = requests(tiny_model, 2), Sampling(max_new_tokens=8)
    engine, changed = ready_engine(tiny_model), load_policy(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine.update_weights(changed.named_parameters(remove_duplicate=False))
    drawn = engine.generate(asked, sampling)
    batch = pad_rows([(r.prompt_tokens, c.tokens) for r, group in zip(asked, drawn, strict=True) for c in group], 0)
    with torch.no_grad():
        expected = PolicyScorer(changed)(batch.tokens, batch.response_mask, 1.0)[0][batch.response_mask]
    engines = torch.tensor([value for group in drawn for c in group for value in c.logprobs])
    torch.testing.assert_close(engines, expected, atol=2e-5, rtol=0)
