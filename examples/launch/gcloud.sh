#!/usr/bin/env bash
# A TPU VM slice by gcloud: the same command on every host; --distributed auto finds the others.
#   NAME=ches ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=gs://my-bucket ./gcloud.sh create|run|watch|resume|merge|delete
set -euo pipefail
: "${NAME:=ches}" "${ZONE:?the zone}" "${TYPE:=v5litepod-16}" "${BUCKET:?gs://...}"
: "${MODEL:=$BUCKET/models/llama-3-8b}" "${PAIRS:=$BUCKET/pairs.jsonl}" "${OUT:=$BUCKET/runs/score}"
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }
score="~/ches/bin/ches score --model $MODEL --pairs $PAIRS --dtype bfloat16 --logps --out $OUT --distributed auto --resume"
case "${1:?create, run, watch, resume, merge or delete}" in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version v2-alpha-tpuv5-lite
    everywhere "python3 -m venv ~/ches && ~/ches/bin/pip install 'ches-jax[tpu,remote]'" ;;
  run|resume) everywhere "$score" ;;
  watch) gcloud storage ls "$OUT/parts/done-*" | wc -l ;;
  merge) everywhere "test \$(hostname | grep -o '[0-9]*\$') != 0 || ~/ches/bin/ches merge $OUT" ;;
  delete) gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" ;;
esac
