#!/usr/bin/env bash
# The methods of the decoder beside random, fixed and smaller dense controls, three seeds.
#   recipes/compare_methods.sh [--jobs N] [key=value …]
# Writes docs/results/methods.{md,png,json}; finished runs are kept in runs/compare_methods.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
cd "$root"
exec "$python" -m launch.compare recipes/compare_methods.yaml "$@"
