#!/bin/sh
# The whole pipeline on the built-in sample, in a workspace of its own: the same commands that you would type for your own
# data. `make demo` runs it; so does `sh tool/demo/run.sh` wherever Etude is installed. Stopped, it goes on where it was.
set -eu
cd "$(dirname "$0")/../.."
ETUDE_HOME="${ETUDE_HOME:-$PWD/weight/demo}"
export ETUDE_HOME
started=$(date +%s)
data="$ETUDE_HOME/training_data"
step() { printf '\n== %s\n' "$1"; }

step "1/7  sample data"
python tool/make_sample.py

step "2/7  tokenizer"
(cd train && python train_tokenizer.py all --data "$data/pretrain" "$data/sft" --vocab_size 2048)

step "3/7  pretraining"
(cd train && python train_pretrain.py --config ../tool/demo/pretrain.yaml)

step "4/7  supervised fine-tuning"
(cd train && python train_sft.py --config ../tool/demo/sft.yaml)

step "5/7  evaluation"
python tool/evaluate.py --model "$ETUDE_HOME/weight/etude_pretrained_model" --text "$data/eval/text.jsonl" \
    --output "$ETUDE_HOME/evaluation/text.json"
python tool/evaluate.py --questions "$data/eval/questions.jsonl" --output "$ETUDE_HOME/evaluation/questions.json"

step "6/7  export to the Llama format"
python tool/convert_hf.py

step "7/7  a question"
question="Who are you?"
printf '> %s\n' "$question"
python inference/hf.py chat --prompt "$question" --temperature 0

python tool/demo/summary.py --started "$started"
