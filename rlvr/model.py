"""Models and tokenizers: load them, and make small ones."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.utils import logging as transformers_logging

from rlvr.lora import Lora, add_adapter, base_of, is_adapter, merge_adapter, restore_adapter
from rlvr.types import InputError, Prompt

transformers_logging.disable_progress_bar()  # a bar per loaded or saved file would bury the run's own

EOS, PAD = "<eos>", "<pad>"
ALPHABETS: dict[str, str] = {"countdown": "0123456789+-*=,:?\u0120", "bytes": ""}  # U+0120: the space of byte-level tokenizers


@dataclass(frozen=True)
class TinyModel:
    """A small random Qwen2-shaped model with a character tokenizer, made from settings alone."""

    alphabet: str = "countdown"  # characters of the tokenizer: countdown | bytes
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    max_positions: int = 512

    def __post_init__(self) -> None:
        if self.alphabet not in ALPHABETS:
            raise InputError(f"alphabet: got {self.alphabet!r}, expected one of {', '.join(ALPHABETS)}")
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads = {self.num_heads}")


@dataclass(frozen=True)
class ModelSettings:
    """Which model the policy starts from. ``path`` or ``tiny`` must be given."""

    path: str | None = None  # a Hugging Face folder, a folder of a run (its newest checkpoint), or a hub id
    make: str | None = None  # experiment that makes ``path`` with ``rlvr sft`` when it is not there yet
    tiny: TinyModel | None = None  # make a new model with random weights instead
    dtype: str = "float32"  # of the weights in training: float32 | bfloat16
    gradient_checkpointing: bool = False
    head_kernel: str = "torch"  # of the output layer's log-probs in training: torch | liger (liger-kernel, on CUDA)
    float32_head: bool = False  # the output layer's product in float32, whatever the precision of the rest
    lora: Lora | None = None  # train low-rank adapters instead of the weights

    def __post_init__(self) -> None:
        if self.head_kernel not in ("torch", "liger"):
            raise InputError(f"head_kernel: got {self.head_kernel!r}, expected torch or liger")
        if self.head_kernel == "liger" and find_spec("liger_kernel") is None:
            raise InputError('head_kernel: got liger, but it is not installed; pip install "rlvr[liger]" or use torch')


def character_tokenizer(alphabet: str) -> Qwen2Tokenizer:
    """One token per character (byte-level, no merges), plus padding and end of sequence.

    The class is the one that loading the model's folder picks for a Qwen2 model, so that what is saved is what loads.
    """
    symbols = ALPHABETS[alphabet] or sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *symbols])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD, eos_token=EOS, pad_token=PAD)


def make_tiny(tiny: TinyModel, folder: Path, seed: int) -> None:
    """Write a random model and its tokenizer as a plain Hugging Face folder. The same seed gives the same weights."""
    tokenizer = character_tokenizer(tiny.alphabet)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.intermediate_size,
        max_position_embeddings=tiny.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resolve_path(path: str, key: str = "model.path") -> str:
    """A model folder as given, the newest checkpoint of a run folder, or a hub id.

    Raises InputError for something that looks like a folder and holds no model.
    """
    folder = Path(path)
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        return str(folder / "checkpoints" / latest.read_text().strip())
    if (folder / "config.json").is_file() or is_adapter(folder):
        return str(folder)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1 or "runs/" in path
    if looks_local:
        found = "a folder without config.json" if folder.is_dir() else "nothing there"
        raise InputError(
            f"{key}: got {path!r} ({found}), expected a Hugging Face model folder, a run folder with a checkpoint, "
            "or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    return path


def load_policy(path: str, dtype: str = "float32", gradient_checkpointing: bool = False) -> nn.Module:
    """The causal language model at a folder or hub id, dropout off. An adapter's folder gives its base with it merged."""
    model = _load(AutoModelForCausalLM, path, dtype)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_trained(settings: ModelSettings, base_path: str, resume_from: Path | None, seed: int) -> nn.Module:
    """The policy to train: the base or a run's checkpoint; with ``lora`` the base under new or restored adapters."""
    if settings.lora is not None and is_adapter(base_path):
        raise InputError(
            f"model.path: got {base_path!r}, an adapter, together with model.lora, but other programs refuse an adapter on an "
            "adapter; expected a whole model, which rlvr.model.write_merged(ADAPTER, FOLDER) makes of it"
        )
    source = str(resume_from) if resume_from is not None and settings.lora is None else base_path
    model = load_policy(source, settings.dtype, settings.gradient_checkpointing)
    if settings.lora is None:
        return model
    return add_adapter(model, settings.lora, seed) if resume_from is None else restore_adapter(model, resume_from)


def write_merged(path: str, folder: Path, dtype: str = "float32") -> None:
    """Write the merged model of an adapter folder, and its tokenizer, as a plain folder that new adapters can belong to."""
    partial = folder.with_name(f".{folder.name}.partial")
    load_policy(path, dtype).save_pretrained(partial)  # type: ignore[operator]
    load_tokenizer(path).save_pretrained(partial)
    partial.replace(folder)


def load_critic(path: str, dtype: str = "float32", new_head: bool = True) -> nn.Module:
    """The policy's body with a scalar head, values of shape ``[B, T, 1]``; a new head starts at zero."""
    critic = _load(AutoModelForTokenClassification, path, dtype, num_labels=1)
    head = getattr(critic, "score")  # noqa: B009 (a submodule that nn.Module's type does not know)
    if new_head:
        nn.init.zeros_(head.weight)
    return critic


def _load(auto: Any, path: str, dtype: str, **options: Any) -> Any:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype: got {dtype!r}, expected float32 or bfloat16")
    if is_adapter(path):
        return merge_adapter(_load(auto, base_of(path), dtype, **options), Path(path).resolve())
    try:
        model = auto.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    except OSError as error:
        raise InputError(f"model.path: could not load {path!r}: {str(error).splitlines()[0]}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"model.path: {path!r} is an adapter on the hub; download it and give its folder")
    for module in model.modules():  # dropout would make the ratio differ from 1 before the first update
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model.config, "attention_dropout"):
        model.config.attention_dropout = 0.0
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise InputError(f"model.path: no tokenizer at {path!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.path: the tokenizer at {path!r} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Tokens of a prompt, through the chat template when the prompt asks for it."""
    if not prompt.chat:
        return tuple(tokenizer(prompt.text)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError("task.chat: got true, but the tokenizer has no chat template; set task.chat=false")
    system = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
    messages = [*system, {"role": "user", "content": prompt.text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
