#!/usr/bin/env bash
# The same run without Slurm. One node:   launch/torchrun.sh configs/dgx_h100_1x8.yaml
# Several nodes, on each of them:           NNODES=4 NODE_RANK=2 MASTER_ADDR=first-node launch/torchrun.sh CONFIG
# Further arguments go to `scalefold train`, for example run.run_dir=runs/a training.seed=1
# Exit status 0: target reached; 1: anything else (torchrun's own message names the ranks' exit status).
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,5s/^# //p' "$0"
  exit 2
fi
config=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
overrides=()
for argument in "$@"; do
  if [[ "${argument}" == *=* && "${argument}" != -* ]]; then overrides+=("${argument}"); fi
done
if [[ "${NNODES:-1}" == 1 && -z "${SCALEFOLD_TOKEN:-}" ]]; then # on several nodes: give all of them the same one
  SCALEFOLD_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  export SCALEFOLD_TOKEN # a stray key of another run does not reach this one
fi
per_node=$(scalefold show "${config}" "${overrides[@]}" --ranks-per-node)

exec torchrun \
  --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="${per_node}" \
  --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${MASTER_PORT:-29500}" \
  --no-python "${here}/run.sh" scalefold train "${config}" "$@"
