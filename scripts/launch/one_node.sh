#!/usr/bin/env bash
# rlvr on the GPUs of one machine, a process each. Arguments are those of the verb:
#   bash scripts/launch/one_node.sh experiment=gsm8k_grpo engine=vllm backend=deepspeed backend.zero_stage=2
# NPROC     processes (one per visible GPU, 1 without)    VERB  train | sft (train)
# STOP_S    seconds that a stopped run gets to finish its step and save (100)
# DRY_RUN=1 prints the command and checks the settings instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NPROC="${NPROC:-$(visible_gpus)}"
launch "$NPROC" --standalone --nproc-per-node="$NPROC" -- "$@"
