#!/usr/bin/env bash
# The one entry of every rank, inside the container or the environment: caches on node-local disk, binding, command.
# usage: run.sh COMMAND ARGUMENTS...      for example: run.sh scalefold train configs/tiny.yaml
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,3s/^# //p' "$0"
  exit 2
fi
if [[ -n "${SCALEFOLD_VENV:-}" ]]; then
  # shellcheck source=/dev/null
  source "${SCALEFOLD_VENV}/bin/activate"
fi

cache_dir="${SCALEFOLD_CACHE_DIR:-${TMPDIR:-/tmp}/scalefold-${USER:-cache}}"
# compiled code found there runs as this user: the folder must be this user's own
if ! (umask 077 && mkdir -p "${cache_dir}") || [[ -L "${cache_dir}" || ! -O "${cache_dir}" ]]; then
  echo "error: ${cache_dir}: belongs to somebody else or is a link; set launch.cache_dir (here SCALEFOLD_CACHE_DIR) to a folder of your own" >&2
  exit 2
fi
chmod go-w "${cache_dir}"
export TRITON_CACHE_DIR="${cache_dir}/triton" # one per node: ranks share what is compiled, files are renamed into place
export TORCHINDUCTOR_CACHE_DIR="${cache_dir}/inductor"
export CUDA_CACHE_PATH="${cache_dir}/cuda"
export MPLCONFIGDIR="${cache_dir}/matplotlib"
mkdir -p "${TRITON_CACHE_DIR}" "${TORCHINDUCTOR_CACHE_DIR}" "${CUDA_CACHE_PATH}" "${MPLCONFIGDIR}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_ORDER=PCI_BUS_ID # the order of nvidia-smi, which the binding below relies on

local_rank="${LOCAL_RANK:-${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}"
numa_dir="${SCALEFOLD_NUMA_DIR:-/sys/devices/system/node}"

# numa_node: the NUMA node next to the GPU of this rank ("socket"), or counted from the last one ("reversed").
numa_node() {
  local bus count
  case "${SCALEFOLD_NUMA_BINDING:-none}" in
    socket)
      bus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader -i "${local_rank}" 2>/dev/null) || return 1
      bus=${bus,,}
      cat "/sys/bus/pci/devices/${bus#0000}/numa_node"
      ;;
    reversed)
      count=$(find "${numa_dir}" -maxdepth 1 -name 'node[0-9]*' | wc -l)
      echo $((count - 1 - local_rank % count))
      ;;
    *) return 1 ;;
  esac
}

if [[ -n "${SCALEFOLD_NICS:-}" ]]; then
  read -ra nics <<<"${SCALEFOLD_NICS}"
  export NCCL_IB_HCA="=${nics[local_rank % ${#nics[@]}]}"
fi

bind=()
if node=$(numa_node) && [[ "${node}" -ge 0 && -r "${numa_dir}/node${node}/cpulist" ]]; then
  bind=(taskset --cpu-list "$(<"${numa_dir}/node${node}/cpulist")") # memory follows: Linux allocates where it is touched
fi
exec "${bind[@]}" "$@"
