"""One readable sbatch file from one configuration: what an administrator can read, edit and submit by hand.

The file starts every run with ``srun`` and the same command that works under torchrun and alone; nothing is hidden in
a wrapper. Repeats run one after another, each with a seed from the operating system's entropy; weak-scaling instances
run side by side on their own nodes, each with its own folder, seed, log and node count.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from scalefold.config import Config
from scalefold.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch")
#: Where docker/Dockerfile puts the project inside the image.
IMAGE_PROJECT_DIR = "/opt/scalefold"


def render_sbatch(
    config: Config,
    config_file: Path,
    project_dir: Path,
    overrides: Sequence[str] = (),
    continue_job: int | None = None,
) -> str:
    """The text of the job file.

    Args:
        config: the validated configuration, overrides included; see ``in_named_phase`` for one with phases.
        config_file: the file it came from; the job reads it again, so it must be visible on the nodes.
        project_dir: checkout that holds ``launch/run.sh``; visible on the nodes. Relative paths start here.
        overrides: ``key.sub=value`` for every run of the job.
        continue_job: number of an earlier job whose runs this one continues from their checkpoints.

    Raises:
        ConfigError: keys that contradict each other for a job.
    """
    check_launch(config)
    launch, parallel = config.launch, config.parallel
    values = {
        "system": config.system,
        "shape": describe_shape(config),
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(config, project_dir)),
        "project_dir": shlex.quote(str(project_dir)),
        "config_file": shlex.quote(str(_relative(config_file, project_dir))),
        "overrides": shlex.join(overrides),
        "run_dir": shlex.quote(str(config.run.run_dir)),
        "job": "${SLURM_JOB_ID}" if continue_job is None else str(continue_job),
        "job_note": "stays the same when the job is requeued" if continue_job is None else "continues that job's runs",
        "nodes": str(parallel.nodes),
        "ntasks": str(parallel.world_size),
        "repeats": str(launch.repeats),
        "instances": str(launch.instances),
        "requeue": str(int(launch.requeue)),
        "environment": "\n".join(environment_lines(config)),
        "cache_dir": launch.cache_dir,
        "mounts": mounts_line(config),
        "srun_options": "\n  ".join(["", *srun_options(config)]) + "\n",
        "command_prefix": command_prefix(config),
        "network_check": "\n".join(network_check_lines(config)),
        "drop_caches": "\n".join(drop_caches_lines(config)),
    }
    text = re.sub(r"@(\w+)@", lambda match: values[match[1]], TEMPLATE.read_text())
    return re.sub(r"\n{3,}", "\n\n", text)


def in_named_phase(config: Config, name: str | None) -> Config:
    """The configuration as it is in the phase of that name; in the first one without a name. ConfigError if unknown."""
    if not config.phases and name is None:
        return config
    names = [phase.name for phase in config.phases]
    if name is not None and name not in names:
        raise ConfigError(f"--phase {name}: {config.system} has {', '.join(names) or 'no phases'}")
    return config.in_phase(names.index(name) if name else 0)


def check_launch(config: Config) -> None:
    """Refuse jobs that cannot do what their configuration says; raises ConfigError."""
    launch, parallel = config.launch, config.parallel
    if launch.container_image and launch.venv:
        raise ConfigError("launch: give container_image or venv, not both")
    if launch.container_mounts and not launch.container_image:
        raise ConfigError("launch.container_mounts: needs launch.container_image")
    if config.training.seed is not None and launch.repeats * launch.instances > 1:
        raise ConfigError(
            f"training.seed {config.training.seed}: {launch.repeats} repeats x {launch.instances} instances would all "
            "be the same run; leave the seed out, then each takes one from the system's entropy"
        )
    per_node = parallel.world_size // parallel.nodes
    if launch.nics and len(launch.nics) != per_node:
        raise ConfigError(f"launch.nics: {len(launch.nics)} cards for {per_node} ranks per node; name one per rank")


def describe_shape(config: Config) -> str:
    """One sentence about who does what."""
    p, t = config.parallel, config.training
    instances = f", {config.launch.instances} instances at once" if config.launch.instances > 1 else ""
    return (
        f"{p.nodes} nodes, {p.num_train_ranks} ranks train ({p.dp_size} replicas x DAP-{p.dap_size}), "
        f"{p.num_eval_ranks} evaluate, global batch {t.global_batch_size}{instances}"
    )


def directives(config: Config, project_dir: Path) -> list[str]:
    """The ``#SBATCH`` options."""
    launch, parallel = config.launch, config.parallel
    lines = [
        f"--job-name=scalefold-{config.system}",
        f"--chdir={project_dir}",
        f"--nodes={parallel.nodes * launch.instances}",
        f"--ntasks-per-node={parallel.world_size // parallel.nodes}",
        f"--time={launch.time_limit_min}",
        f"--output={config.run.run_dir}/slurm-%j.out",
        "--open-mode=append",
        "--requeue" if launch.requeue else "--no-requeue",
    ]
    if launch.signal_grace_s:
        lines.append(f"--signal=B:USR1@{launch.signal_grace_s}")
    if parallel.gpus_per_node:
        lines.append(f"--gpus-per-node={parallel.gpus_per_node}")
    if launch.cpus_per_task:
        lines.append(f"--cpus-per-task={launch.cpus_per_task}")
    if launch.exclusive:
        lines.append("--exclusive")
    lines += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(launch, name))]
    return lines + list(launch.sbatch_options)


def environment_lines(config: Config) -> list[str]:
    """Modules, environment variables and what ``launch/run.sh`` reads."""
    launch = config.launch
    settings = {"SCALEFOLD_NUMA_BINDING": launch.numa_binding}
    if launch.venv:
        settings["SCALEFOLD_VENV"] = launch.venv
    if launch.nics:
        settings["SCALEFOLD_NICS"] = " ".join(launch.nics)
    variables = launch.environment | settings
    return [f"module load {shlex.quote(module)}" for module in launch.modules] + [
        f"export {name}={shlex.quote(value)}" for name, value in variables.items()
    ]


def srun_options(config: Config) -> list[str]:
    """Options of every ``srun`` that starts ranks.

    A rank that ends leaves the others a minute to end as well, whatever its exit status; after that Slurm ends them.
    Binding is left to ``launch/run.sh``, and every rank sees all GPUs of its node.
    """
    launch = config.launch
    options = [f"--mpi={launch.mpi}", "--kill-on-bad-exit=0", "--wait=60", "--label", "--cpu-bind=none"]
    if config.parallel.gpus_per_node:
        options.append("--gpu-bind=none")
    if launch.cpus_per_task:
        options.append(f"--cpus-per-task={launch.cpus_per_task}")
    if launch.container_image:
        options += [
            f"--container-image={shlex.quote(launch.container_image)}",
            "--container-readonly",
            "--no-container-mount-home",
            '--container-workdir="${project_dir}"',
            '--container-mounts="${mounts}"',
        ]
    return options


def mounts_line(config: Config) -> str:
    """What a container sees of the host: the configured folders, the run's folder, the project and the cache."""
    launch = config.launch
    if not launch.container_image:
        return ""
    own = ("${job_dir}:${job_dir}", "${project_dir}:${project_dir}:ro", "${cache_dir}:${cache_dir}")
    return f'mounts="{",".join([*launch.container_mounts, *own])}"'


def command_prefix(config: Config) -> str:
    """``launch/run.sh`` as a rank sees it."""
    return f"{IMAGE_PROJECT_DIR}/launch/run.sh" if config.launch.container_image else '"${project_dir}/launch/run.sh"'


def drop_caches_lines(config: Config) -> list[str]:
    """One step per node before each run that empties the operating system's caches (rules: Data State)."""
    command = config.launch.drop_caches_command
    if command is None:
        return ["  # launch.drop_caches_command is not set: the log says cache_clear false, no valid submission"]
    return [
        '  srun --mpi=none --nodes="${nodes}" --ntasks="${nodes}" --ntasks-per-node=1 --relative="${offset}" \\',
        f"    bash -c {shlex.quote(f'sync && {command}')}",
        "  export SCALEFOLD_CACHES_DROPPED=1 # the log says cache_clear true",
    ]


def network_check_lines(config: Config) -> list[str]:
    """An all-reduce over all ranks before the first run; if it fails, the job ends before any clock starts."""
    wanted = config.launch.network_check_gb_per_s
    if wanted is None:
        return []
    return [
        "rendezvous 63 0",
        'srun "${srun_options[@]}" "${command_prefix[@]}" \\',
        f"  python -m scalefold.launch.network_check --min-gb-per-s {wanted:g}",
    ]


def _relative(file: Path, folder: Path) -> Path:
    return file.relative_to(folder) if file.is_relative_to(folder) else file
