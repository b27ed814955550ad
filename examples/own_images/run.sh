#!/usr/bin/env bash
# README's five commands on drawn images, with the mini LLM and the mini CLIP of demo/: run.sh [FOLDER] [IMAGES] [SEED]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
models=$here/../../demo/models
python=${PYTHON:-python}
images=${2:-300}
mkdir -p "${1:-out/own_images}" && cd "${1:-out/own_images}"
[ -e test.csv ] || "$python" "$here/draw.py" . --train "$images" --test 100 --seed "${3:-0}"

run() { "$python" -m llm2clip "$@"; }
run train-teacher --data train.csv --model "$models/llm" --join "$models/clip" --out teacher
run build-bank    --data train.csv --teacher teacher --out bank
run train-student --bank bank --tower "$models/clip" --out student
run evaluate      --data test.csv --model student --teacher teacher --out scores
run export        --model student --teacher teacher --to sentence-transformers --out bundle
echo "open $PWD/scores/report.html"
