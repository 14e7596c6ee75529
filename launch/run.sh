#!/usr/bin/env bash
# The one entry of every rank, inside the container or the environment: caches on node-local disk, NUMA binding, command.
# usage: run.sh VERB ARGUMENTS...      for example: run.sh train configs/tiny.yaml
set -euo pipefail

if [[ -n "${SCALEFOLD_VENV:-}" ]]; then
  # shellcheck source=/dev/null
  source "${SCALEFOLD_VENV}/bin/activate"
fi

local_rank="${LOCAL_RANK:-${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}"
cache_root="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/scalefold-triton}"
export TRITON_CACHE_DIR="${cache_root}/rank_${local_rank}"
export TORCHINDUCTOR_CACHE_DIR="${cache_root}/inductor_${local_rank}"
export MPLCONFIGDIR="${cache_root}/matplotlib_${local_rank}"
mkdir -p "${TRITON_CACHE_DIR}" "${TORCHINDUCTOR_CACHE_DIR}" "${MPLCONFIGDIR}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# numa_node RANK: the NUMA node next to the GPU of this rank ("socket"), or counted from the last one ("reversed").
numa_node() {
  local rank=$1 nodes bus
  nodes=$(find /sys/devices/system/node -maxdepth 1 -name 'node[0-9]*' | wc -l)
  case "${SCALEFOLD_NUMA_BINDING:-none}" in
    socket)
      bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader -i "${rank}" 2>/dev/null | tr '[:upper:]' '[:lower:]') || return 1
      cat "/sys/bus/pci/devices/${bus#0000}/numa_node"
      ;;
    reversed) echo $((nodes - 1 - rank % nodes)) ;;
    *) return 1 ;;
  esac
}

bind=()
if command -v numactl >/dev/null && node=$(numa_node "${local_rank}") && [[ "${node}" -ge 0 ]]; then
  bind=(numactl "--cpunodebind=${node}" "--membind=${node}")
fi
exec "${bind[@]}" scalefold "$@"
