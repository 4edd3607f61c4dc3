#!/usr/bin/env bash
# Fine-tune a checkpoint of this library on conversations; without one, train recipe mod_lm first.
#   recipes/sft_lm.sh [--ranks N] [--hostfile FILE] [--dry-run] [section.key=value …]
# checkpoint.weights= names the checkpoint or run, whose model the recipe's section must be. Without
# it, recipe mod_lm trains in runs/sft_lm/pretrained (output= or OUTPUT names the folder).
# PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# A stage that is running stops when this script is ended.
export LAUNCHED_BY=$$
recipe="$root/recipes/sft_lm.yaml"
output="${OUTPUT:-runs/sft_lm}"
for word in "$@"; do
  case "$word" in
    -h | --help | --dry-run | --dry_run | checkpoint.weights=*)
      exec "$python" -m launch.start --config "$recipe" "$@" ;;
    output=*) output="${word#output=}" ;;
  esac
done
pretrained=(--config "$root/recipes/mod_lm.yaml" output="$output/pretrained")
"$python" -m launch.start "${pretrained[@]}"
# A training that was stopped as asked has exited 0 too.
"$python" -m launch.run.finished "${pretrained[@]}"
exec "$python" -m launch.start --config "$recipe" "$@" output="$output/tuned" \
  checkpoint.weights="$output/pretrained"
