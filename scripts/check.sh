#!/usr/bin/env bash
# Lint, types and tests in the active environment. Arguments go to pytest: bash scripts/check.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check rlvr tests scripts docs/examples
ruff check rlvr tests scripts docs/examples
mypy
python -m pytest "$@"
