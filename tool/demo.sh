#!/bin/sh
# The whole pipeline on the built-in sample, in a workspace of its own: the same commands that you would type for your own
# data. Run it with `make demo`, or as `sh tool/demo.sh` in an environment where Etude is installed.
set -eu
cd "$(dirname "$0")/.."
ETUDE_HOME="${ETUDE_HOME:-$PWD/weight/demo}"
export ETUDE_HOME
started=$(date +%s)
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/7 sample data"
python tool/make_sample.py

step "2/7 tokenizer"
(cd train && python train_tokenizer.py all --vocab_size 2048)

step "3/7 pretraining"
(cd train && python train_pretrain.py --config ../tool/demo_pretrain.yaml)

step "4/7 supervised fine-tuning"
(cd train && python train_sft.py --config ../tool/demo_sft.yaml)

step "5/7 evaluation"
python tool/evaluate.py \
    --text "$ETUDE_HOME/training_data/eval/text.jsonl" \
    --questions "$ETUDE_HOME/training_data/eval/questions.jsonl" \
    --output "$ETUDE_HOME/evaluation.json"

step "6/7 export to the Llama format"
python tool/convert_hf.py --report "$ETUDE_HOME/export.json"

step "7/7 a question"
question="Who are you?"
printf '> %s\n' "$question"
python inference/hf.py chat --prompt "$question" --temperature 0

python tool/demo_summary.py "$started"
