#!/usr/bin/env bash
# Installs what the tests need, then runs all checks. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
RLVR_EXTRAS=dev source scripts/install.sh
bash scripts/check.sh "$@"
