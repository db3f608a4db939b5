#!/usr/bin/env bash
# A slice (or several) on GKE by xpk: one container a host. The image has `ches-jax[tpu,remote]` installed. When all have
# ended, `ches merge $BUCKET/runs/score` on any machine joins what they scored.
set -euo pipefail
: "${CLUSTER:?the cluster}" "${BUCKET:?gs://...}" "${IMAGE:?an image with ches-jax[tpu,remote]}" "${TYPE:=v5litepod-256}" "${SLICES:=1}"
xpk workload create --cluster "$CLUSTER" --workload "${RUN:-ches-score}" --docker-image "$IMAGE" \
  --tpu-type "$TYPE" --num-slices "$SLICES" --max-restarts 100 --command \
  "ches score --model $BUCKET/models/llama-3-8b --pairs $BUCKET/pairs.jsonl --dtype bfloat16 --logps \
   --out $BUCKET/runs/score --distributed auto --resume"
