"""Times and engine mismatch of every step of a run, as a markdown table: python scripts/launch/step_table.py METRICS.jsonl"""

import json
import sys
from pathlib import Path

COLUMNS = ("time/step_s", "time/generate_s", "time/update_s", "time/sync_s", "mismatch/abs_diff_max", "correct/mean")


def table(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [["step", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[str(row["step"]), *(f"{row[name]:.4g}" if name in row else "" for name in COLUMNS)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
