"""Log-probs, entropies and values from chunks and packed rows are those of the whole logits of padded rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from rlvr import maths
from rlvr.model import load_policy
from rlvr.rollout.batch import pad_rows
from rlvr.scoring import CriticScorer, PolicyScorer, check_packing
from rlvr.types import InputError

V = 61
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MORE: dict[str, Any] = {**SIZES, **TOKENS, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2_SIZES: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT_SIZES: dict[str, Any] = {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
PACKABLE: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**MORE, tie_word_embeddings=True),
    "llama": LlamaConfig(**MORE),
    "gemma2": Gemma2Config(**MORE, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "gemma3": Gemma3TextConfig(**MORE, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(**GPT2_SIZES, **TOKENS, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "gpt-neox": GPTNeoXConfig(**SIZES, **TOKENS, intermediate_size=64),
    "cohere": CohereConfig(**MORE, logit_scale=0.0625),
    "granite": GraniteConfig(**MORE, logits_scaling=3.0, attention_multiplier=0.3),
    "mixtral": MixtralConfig(**MORE, num_local_experts=4),
    "phi": PhiConfig(**MORE),  # its head has a bias
}
MIXING: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**SIZES, **TOKENS, **OPT_SIZES),
    "bloom": BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, **TOKENS),
    "recurrent gemma": RecurrentGemmaConfig(**{**MORE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16),
}
LENGTHS = [(3, 9), (5, 2), (4, 0), (2, 7)]  # prompt, response tokens
GENERATOR = torch.Generator().manual_seed(3)
ROWS = [tuple(tuple(torch.randint(3, V, (n,), generator=GENERATOR).tolist()) for n in pair) for pair in LENGTHS]
BATCH = pad_rows(ROWS, 0)  # type: ignore[arg-type]
INPUTS = (BATCH.tokens, BATCH.response_mask)
WEIGHTS = torch.randn(2, *BATCH.tokens.shape, generator=GENERATOR)
COUNT = int(BATCH.response_mask.sum())


def make(name: str, seed: int = 0, **settings: Any) -> Any:
    """A random model whose logits and biases are large enough to matter."""
    config = copy.deepcopy({**PACKABLE, **MIXING}[name])
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def make_critic(name: str = "qwen2") -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(PACKABLE[name])
    config.num_labels = 1
    return AutoModelForTokenClassification.from_config(config).eval()


def whole(model: Any, temperature: float, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """The same from all logits of the model's own forward pass."""
    tokens, mask = INPUTS
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    chosen = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    padded = [nn.functional.pad(t, (1, 0)) for t in (chosen, entropies if entropy_grad else entropies.detach())]
    return maths.where_mask(padded[0], mask), maths.where_mask(padded[1], mask)


def gradients(model: nn.Module, outputs: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of a weighted sum of the outputs, all parameters in one vector."""
    model.zero_grad()
    weights = [w.to(t.dtype) if t.ndim == 2 else w[:, 0] for w, t in zip(WEIGHTS, outputs, strict=True)]
    (outputs[0] * weights[0] + (outputs[1] * weights[1]).mean()).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None]
    return torch.cat([grad.flatten().clone() for grad in grads.values() if grad is not None])


def distance(one: Tensor, other: Tensor) -> float:
    assert float(one.norm()) > 0
    return float((one - other).double().norm() / one.double().norm())


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", ["qwen2", "llama", "phi", "gemma2"])  # tied; untied; head with a bias; bounded logits
def test_any_chunk_gives_the_values_and_gradients_of_the_whole(name: str, tokens_per_chunk: int, entropy_grad: bool) -> None:
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        model = make(name).to(dtype)
        scorer = PolicyScorer(model, logits_per_chunk=tokens_per_chunk * V + V - 1)
        expected = whole(model, 0.7, entropy_grad)
        found = scorer(*INPUTS, 0.7, entropy_grad)
        assert found[0].requires_grad and found[1].requires_grad == entropy_grad
        for one, other in zip(expected, found, strict=True):
            assert other.dtype == dtype
            torch.testing.assert_close(other, one, atol=10 * bound, rtol=10 * bound)
        assert distance(gradients(model, expected), gradients(model, scorer(*INPUTS, 0.7, entropy_grad))) < bound


@pytest.mark.parametrize("tokens_per_chunk", [2, 1000])
def test_without_entropies_the_log_probs_and_gradients_stay(tokens_per_chunk: int) -> None:
    found = []
    for entropies in (True, False):
        model = make("qwen2")
        scorer = PolicyScorer(model, logits_per_chunk=tokens_per_chunk * model.config.vocab_size)
        logprobs, second = scorer(*INPUTS, 0.7, entropies=entropies)
        assert bool((second != 0).any()) is entropies
        logprobs.sum().backward()
        found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in scorer.parameters()])))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", PACKABLE)
def test_every_architecture_padded_and_packed(name: str) -> None:
    model = make(name)
    for temperature in (1.0, 0.6):
        expected = whole(model, temperature)
        for packing in (False, True):
            found = PolicyScorer(model, packing=packing, logits_per_chunk=5 * V)(*INPUTS, temperature)
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
                assert not bool(other[~BATCH.response_mask].any())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_packed_gradients_are_the_padded_ones(name: str, attention: str) -> None:
    model = make(name)
    model.set_attn_implementation(attention)
    padded, packed = (PolicyScorer(model, packing=packing, logits_per_chunk=4 * V) for packing in (False, True))
    assert distance(gradients(model, padded(*INPUTS, 0.7, True)), gradients(model, packed(*INPUTS, 0.7, True))) < 2e-6


def test_packed_values_and_their_gradients_are_the_padded_ones() -> None:
    critic = make_critic()
    padded, packed = CriticScorer(critic), CriticScorer(critic, packing=True)
    expected, found = padded(*INPUTS), packed(*INPUTS)
    for row, (prompt, response) in enumerate(ROWS):
        for place in range(len(response) + 1):
            value = critic(input_ids=torch.tensor([[*prompt, *response[:place]]])).logits[0, -1, 0].item()
            stands = expected[1][row] if place == len(response) else expected[0][row, len(prompt) + place]
            assert stands.item() == pytest.approx(value if response else 0.0, abs=1e-5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
        assert one.abs().max().item() > 0.01
    assert not bool(found[0][~BATCH.response_mask].any()) and found[1][2].item() == 0
    assert distance(gradients(critic, expected), gradients(critic, found)) < 2e-6


def test_every_row_alone_gives_the_same(tiny_model: str) -> None:
    """Packed lengths of one row, and a tokenizer's real model."""
    policy = load_policy(tiny_model)
    tokens = BATCH.tokens % policy.config.vocab_size  # type: ignore[operator, union-attr]
    scorer = PolicyScorer(policy, packing=True)
    together = scorer(tokens, BATCH.response_mask, 1.0)[0]
    alone = [scorer(tokens[b : b + 1], BATCH.response_mask[b : b + 1], 1.0)[0] for b in range(len(BATCH))]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_packed_rows_is_refused(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    found = PolicyScorer(model)(*INPUTS, 1.0)[0]
    torch.testing.assert_close(found, whole(model, 1.0)[0], atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    with pytest.raises(InputError, match=r"trainer\.packing: got true, but \w+ with \w+ attention does not keep"):
        check_packing(PolicyScorer(model, packing=True))


@pytest.mark.parametrize("name", PACKABLE)
def test_a_bfloat16_model_that_parts_packed_rows_passes(name: str) -> None:
    """With weights at their usual small start, where rounding is largest beside what a row sees."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(PACKABLE[name]).eval().to(torch.bfloat16)
        check_packing(PolicyScorer(model, packing=True))
    if name == "qwen2":
        check_packing(CriticScorer(make_critic().to(torch.bfloat16), packing=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_batch_without_a_response_gives_zeros_and_a_zero_gradient_everywhere(name: str, packing: bool) -> None:
    nothing = torch.zeros_like(BATCH.response_mask)
    model, critic = make(name), make_critic()
    for width in (2, BATCH.tokens.shape[1]):
        for module, outputs in (
            (model, PolicyScorer(model, packing=packing)(BATCH.tokens[:, :width], nothing[:, :width], 0.7, True)),
            (critic, CriticScorer(critic, packing=packing)(BATCH.tokens[:, :width], nothing[:, :width])),
        ):
            module.zero_grad()
            (outputs[0].sum() + outputs[1].sum()).backward()
            for key, parameter in module.named_parameters():
                assert parameter.grad is not None and not bool(parameter.grad.any()), key
            assert not bool(outputs[0].any() or outputs[1].any())


def test_gradient_checkpointing_of_the_body_changes_nothing() -> None:
    model = make("qwen2")
    scorer = PolicyScorer(model, packing=True, logits_per_chunk=3 * V)
    expected = gradients(model, scorer(*INPUTS, 0.7, True))
    model.gradient_checkpointing_enable()
    model.train()  # transformers recomputes layers in training mode only; these configurations have no dropout
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    scored = scorer(*INPUTS, 0.7, True)
    assert distance(expected, gradients(model, scored)) < 1e-6
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [2, 1000])
def test_float32_head_is_nearer_to_the_exact_log_probs_and_gradient(rows: int) -> None:
    """bfloat16 weights, and float32 weights under bfloat16 autocast; exact is the head in float64 on the same states."""
    for autocast in (False, True):
        errors, far = [], []
        for float32_head in (False, True):
            model = make("llama").to(torch.float32 if autocast else torch.bfloat16)
            states: list[Tensor] = []
            model.lm_head.register_forward_pre_hook(lambda _, args, kept=states: kept.append(args[0]))
            scorer = PolicyScorer(model, float32_head=float32_head, logits_per_chunk=rows * V)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = scorer(*INPUTS, 1.0)[0]
            assert found.dtype == torch.float32
            weight = model.lm_head.weight.detach().double().requires_grad_()
            exact = torch.log_softmax(states[-1].detach().double() @ weight.T, -1)
            wanted = exact.gather(1, BATCH.tokens[BATCH.response_mask][:, None]).squeeze(1)
            wanted.sum().backward()
            found.sum().backward()
            errors.append((found[BATCH.response_mask] - wanted).abs().max().item())
            assert weight.grad is not None
            far.append(distance(weight.grad, model.lm_head.weight.grad))
        assert errors[1] < 1e-5 < 1e-3 < errors[0]
        assert far[1] < (1e-5 if autocast else 3e-3) and far[1] <= far[0]  # 3e-3: the gradient itself is bfloat16


class LargestTensor(TorchDispatchMode):
    """Keeps the size in bytes of the largest tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, Tensor)]
        LargestTensor.largest = max([LargestTensor.largest, *sizes])
        return made


def largest(compute: Callable[[], Any]) -> int:
    LargestTensor.largest = 0
    with LargestTensor():
        compute()
    return LargestTensor.largest


@pytest.mark.parametrize("packing", [False, True])
def test_no_tensor_is_larger_than_a_chunk_or_the_weight(packing: bool) -> None:
    vocabulary, width, tokens_per_chunk = 50_000, 65, 16
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, vocab_size=vocabulary, intermediate_size=16)).eval()
    tokens = torch.randint(vocabulary, (2, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    scorer = PolicyScorer(model, packing=packing, logits_per_chunk=tokens_per_chunk * vocabulary)
    chunk = tokens_per_chunk * vocabulary * 4
    assert chunk > model.lm_head.weight.nbytes
    assert largest(lambda: scorer(tokens, mask, 1.0, True)[0].sum().backward()) == chunk
    all_logits = int(mask.sum()) * vocabulary * 4
    assert largest(lambda: PolicyScorer(model)(tokens, mask, 1.0)[0].sum().backward()) == all_logits > chunk


def test_lora_layers_are_scored_and_trained(tiny_model: str) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero, where the adapter does nothing
            nn.init.normal_(parameter)
    for packing, rows in ((False, 1000), (True, 3)):
        scorer = PolicyScorer(adapted, packing=packing, logits_per_chunk=rows * V)
        expected, found = whole(adapted, 0.7), scorer(*INPUTS, 0.7)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert distance(gradients(adapted, expected), gradients(adapted, found)) < 2e-6
        assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
        with adapted.disable_adapter():
            assert (scorer(*INPUTS, 0.7)[0] - found[0]).abs().max().item() > 1e-3


def test_what_the_head_cannot_read_is_refused() -> None:
    peft = pytest.importorskip("peft")
    on_head = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match=r"the output layer of LlamaForCausalLM is Linear, expected a linear"):
        PolicyScorer(on_head)
    prompts = peft.get_peft_model(make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="expected one inside the layers"):
        PolicyScorer(prompts)


def test_an_unknown_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does something to its logits, and one that scales its hidden states before the head, as MiniCPM does."""
    kind = type(make("qwen2"))
    original = kind.forward

    def bent(self: Any, **arguments: Any) -> Any:
        out = original(self, **arguments)
        out.logits = torch.where(out.logits > 5, out.logits + 1, out.logits)
        return out

    def halved(self: Any, **arguments: Any) -> Any:
        out = self.model(**arguments)
        out.logits = self.lm_head(out.last_hidden_state * 0.5)
        return out

    for forward, words in ((bent, "changes its logits"), (halved, "changes its hidden states")):
        monkeypatch.setattr(kind, "forward", forward)
        with pytest.raises(InputError, match=words):
            PolicyScorer(make("qwen2"))(*INPUTS, 1.0)


def test_the_model_itself_and_its_names_stay_as_they_were() -> None:
    model = make("qwen2")
    tokens, names = BATCH.tokens[:, :5], list(model.state_dict())
    logits, generated = model(input_ids=tokens).logits, model.generate(tokens, max_new_tokens=4, do_sample=False)
    scorer = PolicyScorer(model)
    scorer(*INPUTS, 1.0)
    assert torch.equal(model(input_ids=tokens).logits, logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), generated)
    assert list(model.state_dict()) == names
    assert [name for name, _ in scorer.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    twin = copy.deepcopy(scorer)  # a copy's head must use the copy's weight
    with torch.no_grad():
        twin.model.lm_head.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert not torch.equal(twin(*INPUTS, 1.0)[0], scorer(*INPUTS, 1.0)[0])
    torch.testing.assert_close(twin(*INPUTS, 1.0)[0], whole(twin.model, 1.0)[0], atol=1e-5, rtol=1e-5)
