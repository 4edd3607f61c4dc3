#!/usr/bin/env bash
# Train a dense decoder, turn its feed-forwards into rows of learners, fine-tune: three commands.
#   recipes/acm_lm.sh [--ranks N] [--hostfile FILE] [--dry-run] [section.key=value …]
# Arguments go to both trainings. output= (or OUTPUT) names the folder of the runs, by default
# runs/acm_lm. Finished stages are not repeated; a stage that was stopped ends the script.
# PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# A stage that is running stops when this script is ended.
export LAUNCHED_BY=$$
recipe="$root/recipes/acm_lm.yaml"
output="${OUTPUT:-runs/acm_lm}"
dry_run=
for word in "$@"; do
  case "$word" in
    -h | --help) exec "$python" -m launch.start --config "$recipe" "$@" ;;
    --dry-run | --dry_run) dry_run=yes ;;
    output=*) output="${word#output=}" ;;
  esac
done
dense=(--config "$recipe" model.adaptive_computation=null train.steps=200
  train.learning_rate=2.0e-3 "$@" output="$output/dense")
tuned=(--config "$recipe" "$@" output="$output/tuned")
"$python" -m launch.start "${dense[@]}"
if [ -z "$dry_run" ]; then
  # A training that was stopped as asked has exited 0 too.
  "$python" -m launch.run.finished "${dense[@]}"
  teacher="$(ls -d "$output"/dense/checkpoints/step-* | tail -n 1)"
  # teacher.json is the manifest, with its checksums, of what tuned was made of; written last.
  if ! cmp -s "$teacher/manifest.json" "$output/tuned/teacher.json"; then
    if [ -e "$output/tuned" ]; then
      aside="$output/tuned.$(date +%Y%m%d-%H%M%S)"
      mv "$output/tuned" "$aside"
      echo "$output/tuned: was not made of $teacher; moved to $aside and made anew"
    fi
    "$python" -m launch.convert acm "$teacher" --output "$output/tuned"
    cp "$teacher/manifest.json" "$output/tuned/teacher.json"
  fi
fi
exec "$python" -m launch.start "${tuned[@]}"
