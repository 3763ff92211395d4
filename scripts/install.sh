#!/usr/bin/env bash
# Makes .venv and installs rlvr into it, with the extras named in RLVR_EXTRAS. Sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
source .venv/bin/activate
python - <<'PY' || { echo "rlvr needs Python 3.10 or newer: set PYTHON=/path/to/python3.11 and remove .venv" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 10))
PY
# torch first and pinned: installed by itself it takes the build that fits the machine, and nothing below replaces it.
python -c "import torch" 2>/dev/null || pip install --quiet "${RLVR_TORCH:-torch==2.13.0}"
pip install --quiet --constraint scripts/constraints.txt --editable ".${RLVR_EXTRAS:+[$RLVR_EXTRAS]}"
