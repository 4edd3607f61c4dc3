#!/usr/bin/env bash
# Train the recipe of this script's name: every GPU of the node, or 2 ranks on the CPU.
#   recipes/segments_lm.sh [--ranks N] [--hostfile FILE] [section.key=value …]
# PYTHON names the interpreter; by default .venv's, else python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="$(basename "${BASH_SOURCE[0]}" .sh)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m launch.start --config "$root/recipes/$name.yaml" "$@"
