"""What test_scoring_zero3.py runs on each rank: ``torchrun ... scoring_worker.py OUT``.

Imported by the test too, so that one process computes from the same models, rows and losses.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen2Config

from rlvr.rollout.batch import pad_rows
from rlvr.scoring import CriticScorer, PolicyScorer, check_packing

VOCABULARY = 40
# Micro-batches of each rank: (prompt, response) lengths of their rows. The ranks differ in tokens and chunks; the last one of
# rank 1 is a filler without a response token.
SHARES = [[[(3, 9), (2, 4), (4, 7)], [(5, 6)]], [[(2, 1)], [(3, 0)]]]


def scorers(packing: bool, tied: bool = True) -> dict[str, nn.Module]:
    """A policy whose head works on three tokens at a time, and a critic; the same weights in every process."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy, critic = AutoModelForCausalLM.from_config(config), AutoModelForTokenClassification.from_config(config)
    return {
        "policy": PolicyScorer(policy.eval(), packing=packing, logits_per_chunk=3 * VOCABULARY),
        "critic": CriticScorer(critic.eval(), packing=packing),
    }


def loss_of(name: str, scorer: nn.Module, lengths: list[tuple[int, int]]) -> Tensor:
    """A sum over the rows' tokens with weights drawn from the lengths alone."""
    generator = torch.Generator().manual_seed(sum(17 * a + b for a, b in lengths))
    rows = [tuple(tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()) for n in pair) for pair in lengths]
    batch = pad_rows(rows, 0)  # type: ignore[arg-type]
    weights = torch.rand(batch.tokens.shape, generator=generator)
    if name == "policy":
        first, second = scorer(batch.tokens, batch.response_mask, 0.8, entropy_grad=True)
        return (weights * (first + 0.1 * second)).sum()
    first, second = scorer(batch.tokens, batch.response_mask)
    return (weights * first).sum() + second.sum()


def main(out: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed(dist_backend="gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(SHARES[0]),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    }
    found: dict[str, Tensor] = {}
    for packing, tied in ((False, True), (True, False)):
        for name, scorer in scorers(packing, tied).items():
            optimizer = torch.optim.SGD(scorer.parameters(), lr=0.0)
            engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)
            check_packing(engine)
            for _ in range(2):  # the second time DeepSpeed follows the order of modules that it recorded
                for lengths in SHARES[rank]:
                    # DeepSpeed averages over ranks and accumulation steps
                    engine.backward(loss_of(name, engine, lengths) * world_size * len(SHARES[0]))
                    if engine.is_gradient_accumulation_boundary():
                        grads = {key: safe_get_full_grad(p) for key, p in scorer.named_parameters()}
                    engine.step()
            found |= {f"{name} packing={packing} {key}": grad.clone() for key, grad in grads.items()}
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
