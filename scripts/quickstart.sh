#!/usr/bin/env bash
# From a fresh clone to the pass@k picture: makes .venv, installs, trains, evaluates, prints where the report is.
# Any argument is a setting: bash scripts/quickstart.sh trainer.steps=10 run_dir=runs/short
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
rlvr train experiment=quickstart "$@"
