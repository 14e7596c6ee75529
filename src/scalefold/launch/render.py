"""One readable sbatch file from one configuration: what an administrator can read, edit and submit by hand.

The file starts every run with ``srun`` and the same command that works under torchrun and alone; nothing is hidden in
a wrapper. Repeats run one after another with fresh seeds from the operating system's entropy; weak-scaling instances
run side by side on their own nodes, each with its own folder, seed, log and node count.
"""

import shlex
from pathlib import Path
from string import Template

from scalefold.config import Config
from scalefold.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch")


def render_sbatch(config: Config, config_file: Path, project_dir: Path) -> str:
    """The text of the job file.

    Args:
        config: the validated configuration.
        config_file: the file it came from; the job reads it again, so it must be visible on the nodes.
        project_dir: checkout that holds ``launch/run.sh``; visible on the nodes.

    Raises:
        ConfigError: keys that contradict each other for a job.
    """
    launch = config.launch
    if launch.container_image and launch.venv:
        raise ConfigError("launch: give container_image or venv, not both")
    values = {
        "system": config.system,
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(config)),
        "project_dir": shlex.quote(str(project_dir)),
        "config_file": shlex.quote(str(config_file)),
        "run_dir": shlex.quote(str(config.run.run_dir)),
        "environment": "\n".join(f"export {k}={shlex.quote(v)}" for k, v in sorted(launch.environment.items())),
        "modules": "\n".join(f"module load {shlex.quote(m)}" for m in launch.modules),
        "activate": f"export SCALEFOLD_VENV={shlex.quote(launch.venv)}" if launch.venv else "",
        "triton_cache_dir": launch.triton_cache_dir,
        "numa_binding": launch.numa_binding,
        "repeats": str(launch.repeats),
        "instances": str(launch.instances),
        "nodes": str(config.parallel.nodes),
        "ntasks": str(config.parallel.world_size),
        "srun_options": " ".join(srun_options(config)),
        "drop_caches": drop_caches_lines(config),
        "nccl_test": nccl_test_lines(config),
    }
    text = Template(TEMPLATE.read_text()).substitute(values)
    return _squeeze_blank_lines(text)


def directives(config: Config) -> list[str]:
    """The ``#SBATCH`` options, in the order of the manual page."""
    launch, parallel = config.launch, config.parallel
    tasks = parallel.world_size // parallel.nodes
    lines = [
        f"--job-name=scalefold-{config.system}",
        f"--nodes={parallel.nodes * launch.instances}",
        f"--ntasks-per-node={tasks}",
        f"--time={launch.time_limit_min}",
        f"--output={config.run.run_dir}/slurm-%j.out",
        "--open-mode=append",
        f"--signal=TERM@{launch.signal_grace_s}",
        "--requeue" if launch.requeue else "--no-requeue",
    ]
    if parallel.gpus_per_node:
        lines.append(f"--gpus-per-node={parallel.gpus_per_node}")
    if launch.exclusive:
        lines.append("--exclusive")
    for option in ("partition", "account"):
        if getattr(launch, option):
            lines.append(f"--{option}={getattr(launch, option)}")
    if launch.cpus_per_task:
        lines.append(f"--cpus-per-task={launch.cpus_per_task}")
    return lines


def srun_options(config: Config) -> list[str]:
    """Options of every ``srun`` that starts ranks."""
    launch, parallel = config.launch, config.parallel
    options = [f"--mpi={launch.mpi}", "--kill-on-bad-exit=1", "--label"]
    if parallel.gpus_per_node and launch.gpu_binding == "closest":
        options.append("--gpu-bind=none")
    if launch.cpus_per_task:
        options.append(f"--cpus-per-task={launch.cpus_per_task}")
    if launch.container_image:
        options += [f"--container-image={shlex.quote(launch.container_image)}", "--no-container-mount-home"]
        if launch.container_mounts:
            options.append(f"--container-mounts={shlex.quote(','.join(launch.container_mounts))}")
    return options


def drop_caches_lines(config: Config) -> str:
    """Commands that empty the operating system's caches on all nodes before a run (rules: Data State)."""
    command = config.launch.drop_caches_command
    if command is None:
        return "  # No launch.drop_caches_command: the log will say cache_clear false, and is no valid submission."
    quoted = shlex.quote(f"sync && {command}")
    return (
        f'  srun --mpi=none --overlap --nodes="$$NODES" --relative="$$offset" --ntasks-per-node=1 bash -c {quoted}\n'
        "  export SCALEFOLD_CACHES_DROPPED=1"
    ).replace("$$", "$")


def nccl_test_lines(config: Config) -> str:
    """An optional bandwidth test before the first run; its failure ends the job before any clock starts."""
    command = config.launch.nccl_test_command
    if command is None:
        return ""
    return f'echo "NCCL test"\nsrun {" ".join(srun_options(config))} bash -c {shlex.quote(command)}'


def _squeeze_blank_lines(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines) + "\n"
