"""Write docs/metrics.md from the table in rlvr.log."""

from __future__ import annotations

from pathlib import Path

from rlvr.log import METRICS

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

One JSON object per step in `metrics.jsonl`; a step is one rollout batch and all its optimizer updates. Means over tokens
count every token once, whatever the micro-batches. Names under `time/`, `perf/` and `memory/` may differ between two runs
from one seed; no other may. Written by `python scripts/write_metrics_page.py` from `rlvr.log.METRICS`.

| name | unit | meaning |
|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(f"| `{name}` | {unit or '-'} | {meaning} |\n" for name, (unit, meaning) in METRICS.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
