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

# Kernels that `scalefold compile` has made, once per node: the first rank copies, the others wait. Triton's lists of a
# kernel's files name them with the folder in which they were made.
compiled="${SCALEFOLD_COMPILED_DIR:-}"
if [[ -n "${compiled}" ]]; then
  exec {lock}>"${cache_dir}/compiled.lock"
  flock "${lock}"
  if [[ "$(cat "${cache_dir}/compiled.from" 2>/dev/null)" != "${compiled}" ]]; then
    cp -R "${compiled}/." "${TRITON_CACHE_DIR}/"
    find "${TRITON_CACHE_DIR}" -name '__grp__*.json' -exec \
      sed -i -E "s|\"[^\"]*/([^/\"]+/[^/\"]+)\"|\"${TRITON_CACHE_DIR}/\\1\"|g" {} +
    echo "${compiled}" >"${cache_dir}/compiled.from"
  fi
  exec {lock}>&-
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_ORDER=PCI_BUS_ID # the order of nvidia-smi, which the binding below relies on

local_rank="${LOCAL_RANK:-${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}"
numa_dir="${SCALEFOLD_NUMA_DIR:-/sys/devices/system/node}"

pci_dir="${SCALEFOLD_PCI_DIR:-/sys/bus/pci/devices}"
num_local="${LOCAL_WORLD_SIZE:-${SLURM_NTASKS_PER_NODE:-${OMPI_COMM_WORLD_LOCAL_SIZE:-1}}}"

# numa_nodes: the NUMA node of every local rank, a line each: next to its GPU ("socket"), or counted from the last one
# ("reversed").
numa_nodes() {
  local bus count rank
  case "${SCALEFOLD_NUMA_BINDING:-none}" in
    socket)
      nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null | head -n "${num_local}" | while read -r bus; do
        bus=${bus,,}
        cat "${pci_dir}/${bus#0000}/numa_node"
      done
      ;;
    reversed)
      count=$(find "${numa_dir}" -maxdepth 1 -name 'node[0-9]*' | wc -l)
      for ((rank = 0; rank < num_local; rank++)); do echo $((count - 1 - rank % count)); done
      ;;
    *) ;;
  esac
}

# own_cpus: the cores of this rank's NUMA node are divided among the ranks that belong there, whole cores with all their
# hardware threads; nothing where the node is not known.
own_cpus() {
  local nodes node before
  mapfile -t nodes < <(numa_nodes)
  node=${nodes[local_rank]:--1}
  if ((node < 0)); then return; fi
  before=$(printf '%s\n' "${nodes[@]:0:local_rank}" | grep -cx "${node}" || true)
  lscpu --parse=CPU,CORE,NODE | awk -F, -v node="${node}" -v mine="${before}" \
    -v ranks="$(printf '%s\n' "${nodes[@]}" | grep -cx "${node}")" '
    !/^#/ && $3 == node { if (!($2 in seen)) { seen[$2] = n++ } core[$1] = seen[$2]; cpus[k++] = $1 }
    END {
      for (i = 0; i < k; i++) {
        if (int(core[cpus[i]] * ranks / n) == mine) { printf "%s%s", comma, cpus[i]; comma = "," }
      }
    }'
}

if [[ -n "${SCALEFOLD_NICS:-}" ]]; then
  read -ra nics <<<"${SCALEFOLD_NICS}"
  export NCCL_IB_HCA="=${nics[local_rank % ${#nics[@]}]}"
fi

bind=()
cpus=$(own_cpus)
if [[ -n "${cpus}" ]]; then
  bind=(taskset --cpu-list "${cpus}") # memory follows: Linux allocates where it is touched
fi
exec "${bind[@]}" "$@"
