#!/usr/bin/env bash
# Linear against hyperspherical routing, 3 seeds each, then the table of docs/mixture_of_experts.md.
#   recipes/compare_routers.sh [--dry-run] [section.key=value …]
# Writes docs/results/routers_{moe,xmoe}_lm.json when all six runs are finished. Continues where it
# was stopped. output= names the folder of the runs, by default runs/compare_routers.
# PYTHON names the interpreter; by default .venv's, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# A stage that is running stops when this script is ended.
export LAUNCHED_BY=$$
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
cd "$root"
small=(model.dim=128 model.num_layers=4 model.num_heads=4 model.ffn_dim=256 data.seq_len=128
  train.steps=240 train.batch_size=16 train.warmup_steps=20 train.evaluate_every=0
  checkpoint.every=40 checkpoint.keep=2 monitor.tensorboard=false
  deepspeed.zero_optimization.stage=0)
output=runs/compare_routers
dry_run=
for word in "$@"; do
  case "$word" in
    -h | --help) exec "$python" -m launch.train --config recipes/moe_lm.yaml "${small[@]}" "$@" ;;
    --dry-run | --dry_run) dry_run=yes ;;
    output=*) output="${word#output=}" ;;
    train.seed=*) echo "error: $word: must be left out; seeds 0, 1 and 2 are compared" >&2; exit 2 ;;
  esac
done
for seed in 0 1 2; do
  for recipe in moe_lm xmoe_lm; do
    words=(--config "recipes/$recipe.yaml" "${small[@]}" "$@" train.seed="$seed"
      output="$output/$recipe-$seed")
    if [ -n "$dry_run" ]; then
      "$python" -m launch.start --ranks 1 "${words[@]}"
      continue
    fi
    "$python" -m launch.train "${words[@]}"
    # A training that was stopped as asked has exited 0 too.
    "$python" -m launch.run.finished "${words[@]}"
  done
  # Seeds differ in nothing that a plan shows.
  [ -z "$dry_run" ] || exit 0
done
for recipe in moe_lm xmoe_lm; do
  "$python" -m launch.compare_routing "$output/$recipe"-{0,1,2} \
    --json "docs/results/routers_$recipe.json"
done
