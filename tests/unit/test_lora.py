"""Adapters against plain models: off they are the base, merged they are what the training model computes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen2Config

from rlvr.build import from_mapping, to_mapping
from rlvr.lora import (
    Lora,
    add_adapter,
    base_of,
    is_adapter,
    merge_adapter,
    merged_weights,
    restore_adapter,
    save_adapter,
    save_merged,
    without_adapter,
)
from rlvr.model import ModelSettings, load_critic, load_policy, load_tokenizer, resolve_path
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.types import InputError, Request, Sampling

pytest.importorskip("peft")
TOKENS = torch.arange(2 * 9).reshape(2, 9) % 19
SHAPES: dict[str, Callable[[], Any]] = {
    "tied": lambda: qwen2(tie_word_embeddings=True),
    "untied": lambda: qwen2(tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1),
}


def qwen2(**settings: Any) -> Qwen2Config:
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "eos_token_id": 1}
    return Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **settings)


@pytest.fixture(params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Folder of a plain model: tied or untied Qwen2, or GPT-2, whose linear layers hold their weights transposed."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[request.param]()).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=TOKENS).logits.float(), -1)


def trained(base: str, dtype: str = "float32", lora: Lora = Lora(r=4, alpha=8)) -> nn.Module:  # noqa: B008 (frozen)
    """A model whose adapters are as far from zero as if it had been trained."""
    model = add_adapter(load_policy(base, dtype), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_new_adapters_change_nothing_and_are_all_that_trains(base: str) -> None:
    plain, model = load_policy(base), add_adapter(load_policy(base), Lora(r=4))
    assert torch.equal(logprobs(model), logprobs(plain))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    linear = [name for name in parameters(plain) if name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight"))]
    assert len(names) == 2 * len(linear)
    assert not any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def test_a_new_adapter_depends_on_its_seed_alone(base: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = parameters(add_adapter(load_policy(base), Lora(), seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same(parameters(add_adapter(load_policy(base), Lora(), seed=3)), first)
    other = parameters(add_adapter(load_policy(base), Lora(), seed=4))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_adapters_off_is_the_base(base: str) -> None:
    plain, model = logprobs(load_policy(base)), trained(base)
    on = logprobs(model)
    assert (on - plain).abs().max() > 0.05
    with without_adapter(model):
        assert torch.equal(logprobs(model), plain)
        with without_adapter(model):
            pass
        assert torch.equal(logprobs(model), plain)
    assert torch.equal(logprobs(model), on)
    with pytest.raises(ZeroDivisionError), without_adapter(model):
        raise ZeroDivisionError
    assert torch.equal(logprobs(model), on)


def test_turning_adapters_off_leaves_what_requires_a_gradient(base: str) -> None:
    model = trained(base)
    for frozen in (False, True):
        model.requires_grad_(False) if frozen else None
        before = [parameter.requires_grad for parameter in model.parameters()]
        with without_adapter(model):
            pass
        assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_plain_models_have_nothing_to_turn_off_or_merge(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    plain = load_policy(base)
    before = logprobs(plain)
    with without_adapter(plain):
        assert torch.equal(logprobs(plain), before)
    assert_same(dict(merged_weights(plain)), parameters(plain))


def test_merged_weights_are_what_the_adapters_compute(base: str) -> None:
    plain, model = load_policy(base), trained(base)
    before, wanted = parameters(model), logprobs(model)
    merged = dict(merged_weights(model))
    assert merged.keys() == parameters(plain).keys()
    with torch.no_grad():
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            parameter.copy_(merged[name])
    torch.testing.assert_close(logprobs(plain), wanted, atol=1e-5, rtol=0)
    assert_same(parameters(model), before)
    assert torch.equal(logprobs(model), wanted)


def test_the_engine_takes_merged_weights(tiny_model: str) -> None:
    model, engine = trained(tiny_model), TransformersEngine()
    engine.load(tiny_model, [1])
    engine.update_weights(merged_weights(model))
    ((drawn,),) = engine.generate([Request((3, 4, 5), (0,))], Sampling(max_new_tokens=6))
    with torch.no_grad():
        all_logprobs = torch.log_softmax(model(input_ids=torch.tensor([[3, 4, 5, *drawn.tokens]])).logits[0, 2:-1], -1)
    own = all_logprobs.gather(1, torch.tensor(drawn.tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(drawn.logprobs), own, atol=1e-5, rtol=0)


def test_each_tensor_gathers_only_what_it_is_made_of(base: str) -> None:
    """Stands in for shards: a parameter holds its values only while it is gathered. (Real shards need a back end.)"""
    model = trained(base)
    wanted = {name: tensor.clone() for name, tensor in merged_weights(model)}
    values = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    sizes = []

    @contextmanager
    def gathered(needed: Sequence[nn.Parameter]) -> Iterator[None]:
        sizes.append(len(needed))
        shards = [parameter.data for parameter in needed]
        for parameter in needed:
            parameter.data = values[parameter]
        yield
        for parameter, shard in zip(needed, shards, strict=True):
            parameter.data = shard

    assert_same({name: tensor.clone() for name, tensor in merged_weights(model, gathered)}, wanted)
    assert set(sizes) == {1, 3} and len(sizes) == len(wanted)


def test_bfloat16_is_merged_in_float32_and_rounded_once(base: str) -> None:
    model = trained(base, "bfloat16")
    own = dict(model.named_parameters(remove_duplicate=False))
    layer = next(name.removesuffix(".base_layer.weight") for name in own if name.endswith(".base_layer.weight"))
    a, b = (own[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
    update = 2.0 * (b @ a)  # alpha / r
    weight = own[f"{layer}.base_layer.weight"]
    exact = weight.float() + (update.T if "c_attn" in layer else update)
    merged = dict(merged_weights(model))[layer.removeprefix("base_model.model.") + ".weight"]
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapters_come_back(base: str, tmp_path: Path, dtype: str) -> None:
    model, folder = trained(base, dtype), tmp_path / "checkpoint"
    save_adapter(model, folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert is_adapter(folder) and not is_adapter(base)
    assert base_of(folder) == base
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 4
    state = torch.random.get_rng_state()
    restored = restore_adapter(load_policy(base_of(folder), dtype), folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(parameters(restored), parameters(model))
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in restored.parameters()] == wanted
    assert_same(parameters(load_policy(str(folder), dtype)), dict(merged_weights(model)))


def test_dropout_of_a_foreign_adapter_is_off(tiny_model: str, tmp_path: Path) -> None:
    save_adapter(trained(tiny_model), tmp_path)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_dropout": 0.5}))
    model = restore_adapter(load_policy(tiny_model), tmp_path)
    assert torch.equal(logprobs(model.train()), logprobs(model.eval()))


def test_gathered_adapter_tensors_are_what_is_saved(base: str, tmp_path: Path) -> None:
    model = trained(base)
    save_adapter(model, tmp_path / "own")
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_adapter(model, tmp_path / "given", state)
    own, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "given"))
    assert_same(given, own)
    with pytest.raises(AssertionError, match="tensors"):
        save_adapter(model, tmp_path / "half", dict(list(state.items())[:3]))


def test_transformers_opens_an_adapter_folder(base: str, tmp_path: Path) -> None:
    model = trained(base)
    save_adapter(model, tmp_path / "checkpoint")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(logprobs(opened.eval()), logprobs(model), atol=1e-6, rtol=0)


def test_a_loaded_checkpoint_is_a_plain_model(base: str, tmp_path: Path) -> None:
    """It trains, saves and takes a second adapter like any other; the second belongs to the first, not to the base below."""
    model = trained(base)
    save_adapter(model, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns about a model that was adapted before
        plain = load_policy(str(tmp_path / "first"))
        second = trained(str(tmp_path / "first"))
    assert type(plain) is type(load_policy(base)) and all(parameter.requires_grad for parameter in plain.parameters())
    torch.testing.assert_close(logprobs(plain), logprobs(model), atol=1e-5, rtol=0)
    plain.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    assert torch.equal(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logprobs(plain))
    save_adapter(second, tmp_path / "second")
    assert base_of(tmp_path / "second") == str(tmp_path / "first")
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "second"))), logprobs(second), atol=1e-5, rtol=0)


def test_a_critic_starts_from_an_adapter_folder(tiny_model: str, tmp_path: Path) -> None:
    model = trained(tiny_model)
    save_adapter(model, tmp_path / "checkpoint")
    critic, merged = dict(load_critic(str(tmp_path / "checkpoint")).named_parameters()), dict(merged_weights(model))
    body = {name: tensor for name, tensor in merged.items() if name.startswith("model.")}
    assert_same({name: critic[name].detach() for name in body}, body)


def test_merged_checkpoints_open_everywhere_and_resume(base: str, tmp_path: Path) -> None:
    model, folder = trained(base), tmp_path / "checkpoint"
    before = parameters(model)
    model.get_base_model().register_buffer("scale", torch.ones(3))  # type: ignore[operator]
    save_merged(model, tmp_path / "with_buffer")
    assert torch.equal(load_file(tmp_path / "with_buffer" / "model.safetensors")["scale"], torch.ones(3))
    del model.get_base_model().scale  # type: ignore[operator]
    save_merged(model, folder)
    assert_same(parameters(model), before)
    assert not is_adapter(folder) and resolve_path(str(folder)) == str(folder)
    opened, information = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(information.values())
    assert not any("lora" in name for name in parameters(opened))
    assert AutoConfig.from_pretrained(folder).architectures == [type(opened).__name__]
    assert_same(parameters(opened), dict(merged_weights(model)))
    assert base_of(folder) == base
    assert_same(parameters(restore_adapter(load_policy(base), folder)), before)


def test_checkpoints_are_found_like_any_folder(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_000002"
    save_adapter(trained(tiny_model), folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    (folder.parent / "latest").write_text("step_000002\n")
    assert resolve_path(str(tmp_path / "run")) == resolve_path(str(folder)) == str(folder)
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(tiny_model).get_vocab()


def test_the_base_is_found_from_another_folder(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(tiny_model).parent)
    save_adapter(add_adapter(load_policy(Path(tiny_model).name), Lora()), tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    assert base_of("moved") == str(Path(tiny_model).resolve())


def test_hub_names_stay_as_they_are(tiny_model: str, tmp_path: Path) -> None:
    model = load_policy(tiny_model)
    model.name_or_path = "someone/some-model"  # type: ignore[assignment]
    save_adapter(add_adapter(model, Lora()), tmp_path)
    assert base_of(tmp_path) == "someone/some-model"


def test_a_base_that_is_gone_is_named(base: str, tmp_path: Path) -> None:
    save_adapter(trained(base), tmp_path / "checkpoint")
    Path(base).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"belongs to .*/base, and nothing is there; .*set base_model_name_or_path in"):
        load_policy(str(tmp_path / "checkpoint"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's, about a base of another name
        restore_adapter(load_policy(str(tmp_path / "elsewhere")), tmp_path / "checkpoint")
    settings = tmp_path / "checkpoint" / "adapter_config.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps({**written, "base_model_name_or_path": str(tmp_path / "elsewhere")}))
    load_policy(str(tmp_path / "checkpoint"))
    settings.write_text(json.dumps({**written, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name the model it belongs to"):
        base_of(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"expected a folder with adapter_config\.json"):
        base_of(tmp_path)


def test_an_adapter_of_another_model_is_refused(base: str, tiny_model: str, tmp_path: Path) -> None:
    save_adapter(trained(tiny_model, lora=Lora(r=2)), tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"does not fit .*/base"):
        merge_adapter(load_policy(base), tmp_path / "checkpoint")
    tensors = tmp_path / "checkpoint" / "adapter_model.safetensors"
    kept = load_file(tensors)
    kept.pop(next(iter(kept)))
    save_file(kept, tensors)
    with pytest.raises(InputError, match="1 tensors missing, 0 unknown, such as base_model"):
        load_policy(str(tmp_path / "checkpoint"))
    tensors.unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_policy(str(tmp_path / "checkpoint"))


def test_other_kinds_of_adapters_are_refused(tiny_model: str, tmp_path: Path) -> None:
    import peft

    peft.get_peft_model(load_policy(tiny_model), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="is of type IA3, expected LORA"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("base", ["tied"], indirect=True)
def test_gradients_flow_with_gradient_checkpointing(base: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(base, gradient_checkpointing=checkpointing)
        model = add_adapter(policy, Lora(r=4)).train()  # transformers recomputes only in training mode
        model(input_ids=TOKENS).logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert sum(bool(grad.abs().max() > 0) for grad in gradients[0].values()) == 14  # B of 7 layers in 2 blocks; A has 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("base", ["untied"], indirect=True)
def test_targets(base: str) -> None:
    for targets in (["q_proj", "self_attn.v_proj"], "q_proj"):
        model = add_adapter(load_policy(base), Lora(targets=targets))
        layers = {name.split(".lora_")[0].rpartition(".")[2] for name in parameters(model) if ".lora_" in name}
        assert layers == ({"q_proj", "v_proj"} if isinstance(targets, list) else {"q_proj"})
    refused = {
        "q_prj": "got q_prj, which matches no module; the model has q_proj, ",
        "roj": "got roj, which matches no module; the model has ",
        "self_attn": "got self_attn, which matches modules that are not linear layers; the model has ",
        "lm_head": "got lm_head, the embeddings or the output layer, ",
        "embed_tokens": "got embed_tokens, the embeddings or the output layer, ",
    }
    for target, message in refused.items():
        with pytest.raises(InputError, match=rf"^model\.lora\.targets: {message}"):
            add_adapter(load_policy(base), Lora(targets=["q_proj", target]))


def test_settings() -> None:
    settings = from_mapping(ModelSettings, {"path": "x", "lora": {"r": 8, "targets": ["q_proj"]}}, "model")
    assert settings.lora == Lora(r=8, targets=["q_proj"])
    assert from_mapping(ModelSettings, to_mapping(settings), "model") == settings
    assert ModelSettings().lora is None
    refused = {
        "r: got 0, expected at least 1": {"r": 0},
        "alpha: got 0.0, expected above 0": {"alpha": 0},
        r"targets: got \[\], expected all-linear or names": {"targets": []},
        r"targets: got \[3\], expected all-linear or names": {"targets": [3]},
        "dropout: .* has no setting 'dropout'; it has r, alpha, targets": {"dropout": 0.1},
    }
    for message, given in refused.items():
        with pytest.raises(InputError, match=rf"model\.lora\.{message}"):
            from_mapping(ModelSettings, {"lora": given}, "model")


def test_peft_is_asked_for_when_it_is_missing(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(trained(tiny_model), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for needs_peft in (lambda: add_adapter(load_policy(tiny_model), Lora()), lambda: load_policy(str(tmp_path))):
        with pytest.raises(InputError, match=r'pip install "rlvr\[peft\]"'):
            needs_peft()
