# Sourced by the launch scripts, from the folder in which the run is to be.
#   launch ALL_PROCESSES TORCHRUN_FLAG... -- RLVR_ARGUMENT...
# DRY_RUN=1: print the command, then check the settings in one process that is told how many there would be.
launch() {
  local processes="$1" flags=()
  shift
  while [ "$1" != "--" ]; do flags+=("$1"); shift; done
  shift
  local command=(torchrun "${flags[@]}" -m rlvr "${VERB:-train}" "$@")
  if [ "${DRY_RUN:-0}" = 1 ]; then
    echo "# $(printf '%q ' "${command[@]}")"
    WORLD_SIZE="$processes" exec python -m rlvr "${VERB:-train}" "$@" --dry-run
  fi
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${STOP_S:-100}"
  exec "${command[@]}"
}

# CUDA devices that torch sees; 1 where there is none.
visible_gpus() { python -c 'import torch; print(torch.cuda.device_count() or 1)'; }
