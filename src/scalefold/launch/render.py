"""One readable sbatch file from one configuration: what an administrator can read, edit and submit by hand.

The file starts every run with ``srun`` and the same command that works under torchrun and alone; nothing is hidden in
a wrapper. Repeats run one after another, each with a seed from the operating system's entropy; weak-scaling instances
run side by side on their own nodes, each with its own folder, seed, log and node count.
"""

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalefold.config import Config
from scalefold.errors import ConfigError

TEMPLATE = Path(__file__).with_name("job.sbatch")
#: Where docker/Dockerfile puts the project inside the image.
IMAGE_PROJECT_DIR = "/opt/scalefold"
LONGEST_PATH, LONGEST_NAME = 800, 200  # Slurm takes 1024, file systems 255; names of jobs, runs and files follow
NO_PYXIS = (
    "launch.container_image needs pyxis, and this Slurm has no --container-image; ask the administrator for it, "
    "or set launch.venv, launch.container_image=null and launch.container_mounts=[]"
)


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
    check_text(config, config_file, project_dir)
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
        "unverified": "\n".join(f"# Not verified: {text}" for text in unverified(config)),
        "nodes": str(parallel.nodes),
        "ntasks": str(parallel.world_size),
        "ntasks_per_node": str(parallel.world_size // parallel.nodes),
        "repeats": str(launch.repeats),
        "instances": str(launch.instances),
        "requeue": str(int(launch.requeue)),
        "restarts": str(launch.restarts),
        "environment": "\n".join(environment_lines(config)),
        "cache_dir": launch.cache_dir,
        "preconditions": "\n".join(precondition_lines(config, continue_job)),
        "mounts": "\n".join(container_lines(config)),
        "srun_options": "\n  ".join(["", *srun_options(config)]) + "\n",
        "command_prefix": command_prefix(config),
        "network_check": "\n".join(network_check_lines(config)),
        "drop_caches": "\n".join(drop_caches_lines(config)),
    }
    text = re.sub(r"@(\w+)@", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))
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
    if 60 * launch.time_limit_min <= launch.signal_grace_s:
        raise ConfigError(
            f"launch.time_limit_min {launch.time_limit_min}: ends before launch.signal_grace_s {launch.signal_grace_s} "
            "has begun; give the job more minutes than it needs to stop in an orderly way"
        )


def check_text(config: Config, config_file: Path, project_dir: Path) -> None:
    """Refuse text that would mean something else in a job file: to the shell, to Slurm, to YAML or to pyxis.

    Raises:
        ConfigError: naming the key and the character.
    """
    for key, text in _texts(config):
        if bad := re.search(r"[\x00-\x1f\x7f]", text):
            raise ConfigError(f"{key}: {bad[0]!r} cannot stand in a job file; found {text!r}")
    if not re.fullmatch(r"[\w.+-]{1,128}", config.system):
        raise ConfigError(f"system: {config.system!r} names a job: up to 128 letters, digits and . _ + - only")
    places = {"run.run_dir": config.run.run_dir, "the system file": config_file, "the project folder": project_dir}
    for key, place in places.items():
        if bad := re.search(r"[^\w ./@~+=^()-]|^-", str(place)):
            raise ConfigError(f"{key}: {bad[0]!r} cannot stand in the name of a folder of a job; found {str(place)!r}")
        if len(str(place)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(place).parts):
            raise ConfigError(
                f"{key}: longer than {LONGEST_PATH} characters, or one name in it longer than {LONGEST_NAME} bytes; "
                f"found {str(place)[:60]}..."
            )
    if bad := re.search(r"[\"`\\;]|\$\(", config.launch.cache_dir):
        raise ConfigError(f"launch.cache_dir: {bad[0]!r}: the shell expands ${{NAME}} there and nothing else")
    for name in config.launch.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(f"launch.environment: {name!r} is no name of a variable")


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    """Every text that a job file repeats, with its key."""
    yield "system", config.system
    yield "run.run_dir", str(config.run.run_dir)
    for key, value in config.launch.model_dump().items():
        items = list(itertools.chain(*value.items())) if isinstance(value, dict) else value
        for item in items if isinstance(items, list | tuple) else [items]:
            yield f"launch.{key}", str(item)


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
        f"--nodes={parallel.nodes * launch.instances + launch.spare_nodes}",
        f"--ntasks-per-node={parallel.world_size // parallel.nodes}",
        f"--time={launch.time_limit_min}",
        f"--output={config.run.run_dir}/slurm-%j.out",
        "--open-mode=append",
        "--requeue" if launch.requeue else "--no-requeue",
    ]
    if launch.spare_nodes:
        lines.append("--no-kill")
    if launch.signal_grace_s:
        lines.append(f"--signal=B:USR1@{launch.signal_grace_s}")
    if parallel.gpus_per_node and launch.gpu_request != "none":
        prefix = "gpus-per-node=" if launch.gpu_request == "gpus-per-node" else "gres=gpu:"
        lines.append(f"--{prefix}{parallel.gpus_per_node}")
    if launch.cpus_per_task:
        lines.append(f"--cpus-per-task={launch.cpus_per_task}")
    if launch.exclusive:
        lines += ["--exclusive", "--mem=0"]
    lines += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(launch, name))]
    return [shlex.quote(line) for line in lines] + list(launch.sbatch_options)


def environment_lines(config: Config) -> list[str]:
    """Modules, environment variables and what ``launch/run.sh`` reads."""
    launch = config.launch
    return [f"module load {shlex.quote(module)}" for module in launch.modules] + [
        f"export {name}={shlex.quote(value)}" for name, value in variables(config).items()
    ]


def variables(config: Config) -> dict[str, str]:
    """Environment variables of a job; a container gets them even where its image sets others."""
    launch = config.launch
    settings = {"SCALEFOLD_NUMA_BINDING": launch.numa_binding}
    if launch.venv:
        settings["SCALEFOLD_VENV"] = launch.venv
    if launch.nics:
        settings["SCALEFOLD_NICS"] = " ".join(launch.nics)
    if launch.compiled_dir:
        settings["SCALEFOLD_COMPILED_DIR"] = launch.compiled_dir
    return launch.environment | settings


def srun_options(config: Config) -> list[str]:
    """Options of every ``srun`` that starts ranks.

    A rank that ends leaves the others a minute to end as well, whatever its exit status; after that Slurm ends them.
    Binding is left to ``launch/run.sh``, and every rank sees all GPUs of its node. A container is found by name.
    """
    launch = config.launch
    options = [f"--mpi={launch.mpi}", "--kill-on-bad-exit=0", "--wait=60", "--cpu-bind=none"]
    if config.parallel.gpus_per_node and launch.gpu_request != "none":
        options.append("--gpu-bind=none")
    if launch.cpus_per_task:
        options.append(f"--cpus-per-task={launch.cpus_per_task}")
    if launch.container_image:
        options += [
            '--container-name="${container}"',
            "--container-readonly",
            "--no-container-mount-home",
            '--container-workdir="${project_dir}"',
            '--container-mounts="${mounts}"',
            f'"--container-env={",".join(["SCALEFOLD_CACHE_DIR", *variables(config)])}"',
        ]
    return options


def precondition_lines(config: Config, continue_job: int | None) -> list[str]:
    """What must be true before anything starts, each with a message."""
    lines = []
    if continue_job is not None:
        lines.append(f'[[ -d ${{job_dir}} ]] || fail "--continue-job {continue_job}: there is no folder ${{job_dir}}"')
    if config.launch.container_image:
        lines += [
            "if [[ $(srun --help) != *--container-image* ]]; then",
            f'  fail "{NO_PYXIS}"',
            "fi",
        ]
    return lines


def container_lines(config: Config) -> list[str]:
    """Unpack the image once per node under a name; what the container sees of the host.

    That is: the configured folders, the run's folder, the project and the cache.
    """
    launch = config.launch
    if not launch.container_image:
        return []
    given = "".join(f"{shlex.quote(mount)}," for mount in launch.container_mounts)
    own = ("${job_dir}:${job_dir}", "${project_dir}:${project_dir}:ro", "${cache_dir}:${cache_dir}")
    return [
        "# unpacked once per node, found by its name later; goes with the job where pyxis has container_scope=job",
        "container=scalefold_${SLURM_JOB_ID}",
        'srun "${once_per_node[@]}" --ntasks="${#hosts[@]}" --container-name="${container}" \\',
        f"  --container-image={shlex.quote(launch.container_image)} true || \\",
        '  fail "launch.container_image cannot be unpacked on every node, see the lines above"',
        f'mounts={given}"{",".join(own)}"',
    ]


def command_prefix(config: Config) -> str:
    """``launch/run.sh`` as a rank sees it."""
    return f"{IMAGE_PROJECT_DIR}/launch/run.sh" if config.launch.container_image else '"${project_dir}/launch/run.sh"'


def drop_caches_lines(config: Config) -> list[str]:
    """One step per node before each run that empties the operating system's caches (rules: Data State)."""
    command = config.launch.drop_caches_command
    if command is None:
        return ["  # launch.drop_caches_command is not set: the log says cache_clear false, no valid submission"]
    advice = "ask for the right to it, or leave it out with launch.drop_caches_command=null: no valid submission then"
    return [
        '  srun "${once_per_node[@]}" --nodes="${nodes}" --ntasks="${nodes}" --nodelist="${nodelist}" \\',
        f"    bash -c {shlex.quote(f'sync && {command}')} || \\",
        f"    fail {shlex.quote(f'launch.drop_caches_command failed, see the lines above: {command}; {advice}')}",
        "  export SCALEFOLD_CACHES_DROPPED=1 # the log says cache_clear true",
    ]


def network_check_lines(config: Config) -> list[str]:
    """An all-reduce over all ranks before the first run; if it fails, the job ends before any clock starts."""
    wanted = config.launch.network_check_gb_per_s
    if wanted is None:
        return []
    return [
        'nodes="${#hosts[@]}" rendezvous 63 "${hosts[0]}"',
        'srun "${srun_options[@]}" --label --ntasks-per-node="${ntasks_per_node}" --distribution=block \\',
        f'  "${{command_prefix[@]}}" python -m scalefold.launch.network_check --min-gb-per-s {wanted:g} || \\',
        '  fail "network check, see the lines above; launch.network_check_gb_per_s is what it must reach"',
    ]


def unverified(config: Config) -> list[str]:
    """What no test has run: options of software and machines that were never at hand."""
    launch, found = config.launch, []
    if launch.container_image:
        found.append("--container-* options (pyxis and enroot), unpacking under a name, variables over the image's own")
    if config.parallel.gpus_per_node:
        found.append("GPUs under Slurm (--gpus-per-node, --gres, --gpu-bind), binding beside a real GPU")
        found.append("NCCL between nodes, network cards by rank, drop_caches_command with real rights")
    if launch.modules:
        found.append(f"the site's modules: {' '.join(launch.modules)}")
    return found


def _relative(file: Path, folder: Path) -> Path:
    return file.relative_to(folder) if file.is_relative_to(folder) else file
