"""Models and tokenizers: load, make small ones, and compute log-probs, entropies and values as ``[B, T]``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.utils import logging as transformers_logging

from rlvr import maths
from rlvr.types import Batch, InputError, Prompt

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
    if (folder / "config.json").is_file():
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
    """The causal language model at a folder or hub id, dropout off."""
    model = _load(AutoModelForCausalLM, path, dtype)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_critic(path: str, dtype: str = "float32") -> nn.Module:
    """The policy's body with a new scalar head: values of shape ``[B, T, 1]``, head started at zero."""
    critic = _load(AutoModelForTokenClassification, path, dtype, num_labels=1)
    head = getattr(critic, "score")  # noqa: B009 (a submodule that nn.Module's type does not know)
    nn.init.zeros_(head.weight)
    return critic


def _load(auto: Any, path: str, dtype: str, **options: Any) -> Any:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype: got {dtype!r}, expected float32 or bfloat16")
    try:
        model = auto.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    except OSError as error:
        raise InputError(f"model.path: could not load {path!r}: {str(error).splitlines()[0]}") from error
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


def token_logprobs(model: nn.Module, batch: Batch, temperature: float, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs of the batch's response tokens under the model, and the entropies of their distributions.

    Logits are divided by the sampling temperature and taken in float32. Returns two ``[B, T]`` float32 tensors in nats,
    0 outside the mask; the entropies carry a graph only with ``entropy_grad``.
    """
    mask, first = batch.response_mask, first_response_column(batch.response_mask)
    output = model(input_ids=batch.tokens[:, :-1], use_cache=False, logits_to_keep=mask.shape[1] - first)
    # logits at column t - 1 predict the token at column t; no attention mask is needed, since under right padding a
    # causal model never lets a token look at padding
    scaled = output.logits.float() / temperature  # [B, T - first, V]
    all_logprobs = torch.log_softmax(scaled, -1)
    chosen = all_logprobs.gather(-1, batch.tokens[:, first:].unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropies = maths.entropy(scaled)
    return _at_tokens(chosen, mask, first), _at_tokens(entropies, mask, first)


def token_values(critic: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Values of the states before each response token ``[B, T]``, 0 outside the mask, and after the last token ``[B]``."""
    mask, first = batch.response_mask, first_response_column(batch.response_mask)
    outputs = critic(input_ids=batch.tokens, use_cache=False).logits.float().squeeze(-1)  # [B, T], after each token
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # [B] column of the last response token
    final = maths.where_mask(outputs.gather(1, last[:, None]).squeeze(1), mask.any(1))
    return _at_tokens(outputs[:, first - 1 : -1], mask, first), final


def first_response_column(mask: Tensor) -> int:
    """First column in which any row has a response token; column 1 when no row has one."""
    columns = mask.any(0).nonzero()
    first = int(columns[0]) if len(columns) else 1
    assert first >= 1, "a response needs at least one prompt token before it"
    return first


def _at_tokens(values: Tensor, mask: Tensor, first: int) -> Tensor:
    """``[B, T - first]`` values put at columns ``first`` onwards of ``[B, T]``, 0 outside the mask."""
    return maths.where_mask(nn.functional.pad(values, (first, 0)), mask)
