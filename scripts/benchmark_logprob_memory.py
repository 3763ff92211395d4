"""Peak memory of log-probs, forward and backward, over the number of tokens: in chunks against the whole logits.

usage: python scripts/benchmark_logprob_memory.py [--tokens 256,512,...] [--vocabulary 150000] [--hidden 64] [--repeats 3]

Every point is a process of its own, because a process's peak never falls. It loads a one-layer model, scores four rows of
eight tokens and takes the gradient (for what torch allocates once), notes its peak resident memory, does the same with one
row of the given tokens, and reports how much the peak grew, and the seconds of that second pass. ``whole`` is ``log_softmax``
over all logits of the model's own forward pass. On the CPU; prints a markdown table, median (lowest to highest) of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("chunked", "whole")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(way: str, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from rlvr.scoring import PolicyScorer

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": tokens + 1}
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=vocabulary, **sizes, **heads)).eval()
    scorer = PolicyScorer(model)

    def pass_over(rows: int, width: int) -> None:
        ids = torch.randint(vocabulary, (rows, width + 1), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        if way == "chunked":
            loss = scorer(ids, mask, 1.0)[0].sum()
        else:
            logprobs = torch.log_softmax(model(input_ids=ids[:, :-1], use_cache=False).logits.float(), -1)
            loss = logprobs.gather(-1, ids[:, 1:, None]).sum()
            with torch.no_grad():  # the entropies, which the scorer returns too
                (logprobs.exp() * logprobs).sum(-1)
        loss.backward()

    pass_over(4, 8)
    before, start = peak_mib(), time.perf_counter()
    pass_over(1, tokens)
    return {"mib": peak_mib() - before, "seconds": time.perf_counter() - start}


def spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="256,512,1024,2048,4096")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--point", help=argparse.SUPPRESS)  # WAY:TOKENS, measured in this process
    arguments = parser.parse_args()
    if arguments.point:
        way, tokens = arguments.point.split(":")
        print(json.dumps(measure(way, int(tokens), arguments.vocabulary, arguments.hidden)))
        return
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"`python scripts/benchmark_logprob_memory.py {' '.join(sys.argv[1:])}`, commit {commit or 'unknown'}, "
          f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS="
          f"{os.environ.get('OMP_NUM_THREADS', 'unset')}; vocabulary {arguments.vocabulary}, width {arguments.hidden}, "
          f"float32, {arguments.repeats} repeats\n")  # fmt: skip
    print(
        "| tokens | logits, MiB | chunked, peak MiB | whole, peak MiB | chunked, s | whole, s |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for tokens in map(int, arguments.tokens.split(",")):
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for way in WAYS * arguments.repeats:
            command = [sys.executable, __file__, *sys.argv[1:], "--point", f"{way}:{tokens}"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
        cells = [
            spread([p[key] for p in found[way]], form) for key, form in (("mib", ",.0f"), ("seconds", ".2f")) for way in WAYS
        ]
        print(f"| {tokens} | {tokens * arguments.vocabulary * 4 / 2**20:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
