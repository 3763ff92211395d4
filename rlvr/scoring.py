"""The trained modules as the trainer calls them: batch tensors in, log-probs, entropies and values per token out.

Each is the root module that a back end wraps, so every use of a parameter happens inside its forward pass. The float32
logits ``[tokens, V]`` of a batch never exist at once, only those of one chunk of tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlvr import maths
from rlvr.model import ModelSettings
from rlvr.types import InputError

# Elements of the logits computed at once: 256 MiB in float32, and about three tensors of that size live at the peak. 2**26 is
# 447 tokens of a vocabulary of 150,000, enough for an efficient product; fewer save little beside the activations of the body.
LOGITS_PER_CHUNK = 2**26

# What the model is asked to make of known logits: the first shows the slope at 0, the second the bound, the rest verify both.
PROBE_LOGITS = (2.0**-10, 1e30, 0.0, 1.0, -1.0, 10.0, -30.0, 100.0)
# Of the change that a row suffers from seeing the other. Small random models that mix packed rows reached 0.13 to 1 and those
# that keep them apart 0, in float32 and bfloat16.
PACKING_GAP = 0.05


@dataclass(frozen=True)
class HeadTask:
    """What the output layer computes in one call, from the hidden states ``[N, H]`` before each of N tokens.

    One call, however many chunks: ZeRO-3 gathers a module's parameters when it is called, a collective, and ranks have
    different numbers of tokens.
    """

    targets: Tensor  # [N] int64, the tokens
    temperature: float
    entropy_grad: bool
    float32: bool  # take the product in float32, whatever the weights' dtype and autocast
    scale: float  # of the logits, as the architecture defines them
    cap: float | None  # bound of the logits, approached as tanh, as the architecture defines it
    rows: int  # tokens per chunk
    entropy: bool  # compute entropies at all
    liger: bool  # log-probs from Liger's kernel, where it computes the same: no bound, no gradient through the entropies

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probs ``[N]`` and entropies ``[N]``."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        dtype = torch.promote_types(weight.dtype, torch.float32) if self.float32 else dtype
        with torch.autocast(device, enabled=False):
            if self.liger and self.cap is None and not self.entropy_grad:
                return self._with_liger(hidden.to(dtype), weight.to(dtype), _cast(bias, dtype))
            if len(hidden) <= self.rows:  # nothing to save: keep the logits for the backward pass
                return self.score(hidden.to(dtype), weight.to(dtype), _cast(bias, dtype), self.targets)
            return ChunkedHead.apply(self, dtype, hidden, weight, bias)

    def _with_liger(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The kernel knows no entropies: they take a second product, without a gradient."""
        if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("model.head_kernel: got liger on the CPU, expected a CUDA device; use torch")
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        factor, none = self.scale / self.temperature, -100  # none: a target that is left out, which there is not
        offset = None if bias is None else bias * factor
        settings = (None, none, 0.0, 0.0, "none")  # class weights, ignored target, z-loss, label smoothing, reduction
        losses = LigerFusedLinearCrossEntropyFunction.apply(hidden * factor, weight, self.targets, offset, *settings)[0]
        if not self.entropy:
            return -losses, torch.zeros_like(losses)
        with torch.no_grad():
            split = zip(hidden.split(self.rows), self.targets.split(self.rows), strict=True)
            entropies = [self.score(piece, weight, bias, targets)[1] for piece, targets in split]
        return -losses, torch.cat(entropies)

    def transformed(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def score(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The same of one chunk; the second is 0 where nobody asks for it."""
        # in place where autograd allows it, and no name that keeps the logits: each tensor of this size counts
        logprobs = self.transformed(nn.functional.linear(hidden, weight, bias)).div_(self.temperature).log_softmax(-1)  # [n, V]
        chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
        if not (entropy and self.entropy):
            return chosen, torch.zeros_like(chosen)
        if self.entropy_grad and torch.is_grad_enabled():
            return chosen, maths.entropy(logprobs)  # the softmax of log-probs is the same distribution
        probabilities = logprobs.detach().exp()
        return chosen, -probabilities.xlogy_(probabilities).sum(-1)


class ChunkedHead(torch.autograd.Function):
    """``HeadTask.score`` chunk by chunk; the backward pass computes each chunk's logits again.

    One function instead of a checkpoint per chunk: the chunks' gradients of the weight are summed in float32, entropies that
    carry no gradient are not computed again, and the weight is used at one node of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any, task: HeadTask, dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.task, ctx.dtype = task, dtype
        ctx.save_for_backward(hidden, weight, bias)
        cast, offset = weight.to(dtype), _cast(bias, dtype)
        parts = [
            task.score(piece.to(dtype), cast, offset, targets)
            for piece, targets in zip(hidden.split(task.rows), task.targets.split(task.rows), strict=True)
        ]
        logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        if not task.entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        task, (hidden, weight, bias) = ctx.task, ctx.saved_tensors
        used = 2 if task.entropy_grad else 1  # outputs with a gradient
        fixed = [t if t is None else t.detach().to(ctx.dtype) for t in (weight, bias)]
        needed = [index for index, need in enumerate(ctx.needs_input_grad[2:]) if need]
        of_hidden: list[Tensor] = []
        sums = [None if t is None else torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in fixed]
        split = [t.split(task.rows) for t in (hidden, task.targets, *grads[:used])]
        for piece, targets, *outer in zip(*split, strict=True):
            leaves = [piece.to(ctx.dtype).detach(), *fixed]
            for index in needed:
                leaves[index] = leaves[index].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                outputs = task.score(*leaves, targets, entropy=task.entropy_grad)[:used]
                found = torch.autograd.grad(outputs, [leaves[index] for index in needed], outer)
            for index, grad in zip(needed, found, strict=True):
                if index == 0:
                    of_hidden.append(grad.to(hidden.dtype))
                else:
                    sums[index - 1].add_(grad)  # type: ignore[union-attr]
        results = [torch.cat(of_hidden) if of_hidden else None]
        for index, tensor in enumerate((weight, bias), start=1):
            results.append(sums[index - 1].to(tensor.dtype) if index in needed else None)  # type: ignore[union-attr]
        return (None, None, *results)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _head_forward(self: nn.Linear, hidden: Tensor, task: HeadTask | None = None) -> Any:
    """Logits as ever, so that the model itself still works, or what the task asks for."""
    if task is None:
        return nn.functional.linear(hidden, self.weight, self.bias)
    return task.run(hidden, self.weight, self.bias)


def _extend(head: Any) -> None:
    head.forward = MethodType(_head_forward, head)


class Scorer(nn.Module):
    """A model, and rows as the model reads them: padded, or packed one after the other.

    Packed rows hold no padding, and ``position_ids`` that start again at 0 part them: transformers builds a block-diagonal
    mask from these for eager and sdpa attention, and separate sequences for flash attention. With eager and sdpa the cost and
    the mask are quadratic in the packed length; only flash attention makes packing long rows cheaper than padding them.
    """

    def __init__(self, model: nn.Module, packing: bool = False) -> None:
        super().__init__()
        self.model, self.packing = model, packing
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise InputError(f"model: got an adapter of type {config.peft_type}, expected one inside the layers such as LoRA")
        self._checked = False

    @property
    def plain(self) -> Any:
        """The Hugging Face model, the layers of an adapter inside it, but not peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]

    def _inputs(self, tokens: Tensor, lengths: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Arguments for the model, and which of ``tokens`` its outputs stand for in order, ``[B, T] bool``.

        No attention mask: under right padding a causal model never lets a token look at padding.
        """
        if not self.packing:
            return {"input_ids": tokens, "use_cache": False}, torch.ones_like(tokens, dtype=torch.bool)
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        lengths = torch.where((lengths > 0).any(), lengths, 1)  # a batch without a response token still needs an input
        inside = columns < lengths[:, None]
        return {"input_ids": tokens[inside][None], "position_ids": columns[inside][None], "use_cache": False}, inside

    def _check(self) -> None:
        """On the first call, so that under ZeRO-3 the parameters are there and every rank runs it."""
        if self.packing:
            self._check_packing()
        self._checked = True

    def _random_row(self, length: int) -> Tensor:
        vocabulary = self.plain.config.get_text_config().vocab_size
        row = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(length))
        return row.to(next(self.parameters()).device)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """The second of two packed rows must come out as it does alone, far from what it is when it sees the first."""
        first, second = self._random_row(7), self._random_row(5)
        both = torch.cat([first, second], 1)
        positions = torch.cat([torch.arange(7), torch.arange(5)])[None].to(both.device)
        body = partial(self.plain.base_model, use_cache=False)
        alone = body(input_ids=second).last_hidden_state.float()
        seeing = body(input_ids=both).last_hidden_state[:, 7:].float()
        packed = body(input_ids=both, position_ids=positions).last_hidden_state[:, 7:].float()
        if not (packed - alone).norm() <= PACKING_GAP * (seeing - alone).norm():
            raise InputError(
                f"trainer.packing: got true, but {type(self.plain).__name__} with "
                f"{self.plain.config._attn_implementation} attention does not keep packed rows apart; "
                "set trainer.packing=false"
            )


class PolicyScorer(Scorer):
    """The policy as the trainer calls it; ``model`` is a Hugging Face causal language model or a PeftModel around one.

    The output layer must be a plain linear layer. How the architecture scales or bounds its logits is measured on the first
    call, on made-up logits, rather than read from the configuration, where each family has names of its own; an architecture
    that does something else with its hidden states or logits raises InputError then.
    """

    def __init__(
        self,
        model: nn.Module,
        float32_head: bool = False,
        packing: bool = False,
        logits_per_chunk: int = LOGITS_PER_CHUNK,
        liger: bool = False,
    ) -> None:
        super().__init__(model, packing)
        self.float32_head, self.logits_per_chunk, self.liger = float32_head, logits_per_chunk, liger
        self.scale: float = 1.0
        self.cap: float | None = None
        head = self.plain.get_output_embeddings()
        if type(head) is not nn.Linear:  # a subclass or an adapter may do more with its input than multiply by its weight
            raise InputError(
                f"model: the output layer of {type(self.plain).__name__} is {type(head).__name__}, expected a linear layer; "
                "leave it out of an adapter's target modules and modules to save"
            )
        _extend(head)

    def forward(
        self,
        tokens: Tensor,
        response_mask: Tensor,
        temperature: float,
        entropy_grad: bool = False,
        entropies: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens and entropies of their distributions: ``[B, T]`` each, float32, in nats.

        tokens: ``[B, T]`` int64, right-padded; response_mask: ``[B, T]`` bool. 0 outside the mask. Logits are divided by the
        temperature and taken in float32 (float64 for a float64 model). The entropies carry a graph only with
        ``entropy_grad``; without ``entropies`` they are 0 and cost nothing. A batch without a response token gives zeros and a
        zero gradient on every parameter.
        """
        assert not bool(response_mask[:, 0].any()), "a response needs at least one prompt token before it"
        if not self._checked:
            self._check()
        wanted = response_mask.clone()
        wanted[0, 1] |= ~response_mask.any()  # one token stands in for none
        inputs, inside = self._inputs(tokens[:, :-1], _lengths(response_mask) - 1)
        hidden = self.plain.base_model(**inputs).last_hidden_state.flatten(0, 1)
        before = wanted[:, 1:][inside].nonzero().squeeze(1)  # [N] the state at column t - 1 predicts the token at t
        task = self._task(tokens[wanted], temperature, entropy_grad, entropies)
        scores = self.plain.get_output_embeddings()(hidden.index_select(0, before), task=task)
        empty = torch.zeros(tokens.shape, dtype=scores[0].dtype, device=tokens.device)
        first, second = (maths.where_mask(empty.masked_scatter(wanted, score), response_mask) for score in scores)
        return first, second

    def _task(self, targets: Tensor, temperature: float, entropy_grad: bool, entropies: bool = True) -> HeadTask:
        rows = max(1, self.logits_per_chunk // self.plain.get_output_embeddings().out_features)
        return HeadTask(
            targets, temperature, entropy_grad, self.float32_head, self.scale, self.cap, rows, entropies, self.liger
        )

    def _check(self) -> None:
        super()._check()
        self._measure_head()

    @torch.no_grad()
    def _measure_head(self) -> None:
        """The scale and bound of the logits, from what the model's own forward pass makes of the logits we hand it."""
        head, row, seen = self.plain.get_output_embeddings(), self._random_row(4), []
        given = torch.tensor(PROBE_LOGITS, device=row.device).repeat(head.out_features // len(PROBE_LOGITS) + 1)

        def made_up(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return given[: head.out_features].expand(*hidden.shape[:-1], -1)

        head.forward = made_up
        try:
            returned = self.plain(input_ids=row, use_cache=False).logits[0, -1].float()
        finally:
            _extend(head)
        slope, top = float(returned[0] / given[0]), float(returned[1])
        self.scale = 1.0 if abs(slope - 1) < 1e-6 else slope
        self.cap = top if top < 1e20 else None
        body = self.plain.base_model(input_ids=row, use_cache=False).last_hidden_state
        expected = self._task(row, 1.0, False).transformed(given[: head.out_features])
        if len(seen) != 1 or seen[0].shape != body.shape or not (seen[0] - body).norm() <= 0.01 * body.norm():
            raise InputError(f"model: {type(self.plain).__name__} changes its hidden states before the output layer")
        if returned.shape != expected.shape or not torch.allclose(returned, expected, rtol=1e-5):
            raise InputError(
                f"model: {type(self.plain).__name__} changes its logits after the output layer by more than a factor and a "
                "tanh bound"
            )


class CriticScorer(Scorer):
    """The critic as the trainer calls it; ``model`` is a Hugging Face token classifier with one output."""

    def forward(self, tokens: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the states before each response token ``[B, T]``, 0 outside the mask, and after the last token ``[B]``.

        tokens: ``[B, T]`` int64, right-padded; response_mask: ``[B, T]`` bool. Float32 (float64 for a float64 model). A row
        without a response has final value 0; a batch of only such rows gives a zero gradient on every parameter.
        """
        assert not bool(response_mask[:, 0].any()), "a response needs at least one prompt token before it"
        if not self._checked:
            self._check()
        lengths = _lengths(response_mask)
        inputs, inside = self._inputs(tokens, lengths)
        values = self.plain(**inputs).logits.flatten()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        after = torch.zeros(tokens.shape, dtype=values.dtype, device=tokens.device).masked_scatter(inside, values)
        before = maths.where_mask(nn.functional.pad(after[:, :-1], (1, 0)), response_mask)
        final = after.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        return before, maths.where_mask(final, lengths > 0)


def policy_scorer(model: nn.Module, settings: ModelSettings, packing: bool = False) -> PolicyScorer:
    """The scorer that the settings ask for."""
    return PolicyScorer(model, settings.float32_head, packing, liger=settings.head_kernel == "liger")


def _lengths(mask: Tensor) -> Tensor:
    """``[B]`` tokens of each row up to its last response token; 0 for a row without one."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(1)


def check_packing(scorer: nn.Module) -> None:
    """Make the first call of a scorer, bare or wrapped by a back end: the one that checks the model. All ranks call it alike.

    Raises InputError for a model that mixes packed rows (``trainer.packing``) or that the scorer cannot read.
    """
    inner = getattr(scorer, "module", scorer)
    device = next(inner.parameters()).device
    tokens, mask = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.tensor([[False, True]], device=device)
    with torch.no_grad():
        scorer(tokens, mask, 1.0) if isinstance(inner, PolicyScorer) else scorer(tokens, mask)
