#!/usr/bin/env bash
# What only GPUs can show, in one command: doctor, the tests marked gpu, and ten steps with vLLM and ZeRO 2 in bf16 on all
# visible GPUs. Writes gpu_report.md; send it along with a bug report. Arguments are settings of the run, added last:
#   bash scripts/gpu_check.sh trainer.steps=3
# OUT  folder of the run and the logs, replaced (runs/gpu_check)     REPORT  the report (gpu_report.md)
# Exit code: 0 all passed, 1 something did not (the report says what), 2 there is no CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
[ "$gpus" != 0 ] || { echo "gpu_check: torch sees no CUDA device here; rlvr doctor says what it sees" >&2; exit 2; }
OUT="${OUT:-runs/gpu_check}" REPORT="${REPORT:-gpu_report.md}" failed=0
rm -rf "$OUT" && mkdir -p "$OUT"

# section TITLE COMMAND...: runs it on the screen, and into the report with its exit code
section() {
  local title="$1" code=0
  shift
  echo "== $title"
  "$@" 2>&1 | tee "$OUT/section.log" || code=$?
  [ "$code" = 0 ] || failed=1
  { printf '\n## %s: exit code %s\n\n```\n%s\n```\n\n```\n' "$title" "$code" "$(printf '%q ' "$@")"
    tr '\r' '\n' < "$OUT/section.log" | grep -v 'it/s\]\|s/it\]\|step/s\]\|s/step\]\|/probe\]' | tail -n 60 || true
    echo '```'; } >> "$REPORT"
}

{ echo "# GPU check"; echo
  echo "* command: \`bash scripts/gpu_check.sh $*\`"
  echo "* commit: $(git describe --always --dirty --abbrev=12 2>/dev/null || echo 'not a git checkout')"
  echo "* machine: $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | sort | uniq -c | xargs)"
  echo "* date: $(date -u +%Y-%m-%dT%H:%MZ)"; } > "$REPORT"
section "rlvr doctor" python -m rlvr doctor
section "Tests marked gpu" python -m pytest -m gpu -ra tests/gpu
section "Base model" python -m rlvr sft experiment=countdown_base run_dir="$OUT/base"
section "Ten steps" torchrun --standalone --nproc-per-node="$gpus" -m rlvr train experiment=quickstart run_dir="$OUT/run" \
  model.path="$OUT/base" model.make=null engine=vllm backend=deepspeed backend.zero_stage=2 backend.precision=bf16 \
  trainer.steps=10 trainer.checkpoint_every=10 boundary.n=16 boundary.problems=32 "$@"
section "State of the run" python -m rlvr doctor "$OUT/run"
section "Seconds and mismatch per step" python scripts/launch/step_table.py "$OUT/run/metrics.jsonl"
echo "$REPORT: $([ "$failed" = 0 ] && echo 'all passed' || echo 'something did not pass')"
exit "$failed"
