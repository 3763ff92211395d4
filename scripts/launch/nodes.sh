#!/usr/bin/env bash
# rlvr on several machines that share a file system. The same line on each of them, within a few minutes:
#   NNODES=2 HEAD=node1 bash scripts/launch/nodes.sh experiment=gsm8k_grpo engine=vllm backend=deepspeed
# NNODES    machines                                      HEAD  one of them, host or host:port (port 29500), seen by all
# NPROC     processes a machine (its visible GPUs, or 1)  VERB  train | sft (train)
# NODE_RANK optional; 0 on HEAD and anything else elsewhere, where a machine does not know itself by the name in HEAD
# RESTARTS  how often all processes are started again after a failure, from the newest checkpoint (3)
# JOB       a name for this launch, the same everywhere (rlvr)
# STOP_S, DRY_RUN=1 as in one_node.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${NNODES:?set NNODES to the number of machines}" "${HEAD:?set HEAD to the name of one machine}"
NPROC="${NPROC:-$(visible_gpus)}"
flags=(--nnodes="$NNODES" --nproc-per-node="$NPROC" --max-restarts="${RESTARTS:-3}")
flags+=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-rlvr}")
if [ -n "${NODE_RANK:-}" ]; then
  flags+=(--rdzv-conf="is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
fi
launch $((NNODES * NPROC)) "${flags[@]}" -- "$@"
