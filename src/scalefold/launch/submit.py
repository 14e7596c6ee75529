"""From a configuration to a submitted job."""

import shutil
import subprocess
from pathlib import Path

from scalefold.config import Config
from scalefold.errors import ConfigError
from scalefold.launch.render import NO_PYXIS

JOB_FILE = "job.sbatch"


def find_project_dir(folder: Path) -> Path:
    """The folder that holds ``launch/run.sh``: ``folder`` or one of its parents. ConfigError if none does."""
    for candidate in (folder.resolve(), *folder.resolve().parents):
        if (candidate / "launch" / "run.sh").is_file():
            return candidate
    raise ConfigError(
        f"{folder}: neither it nor its parents hold launch/run.sh; start in the checkout or name it with --project-dir"
    )


def submit(config: Config, text: str, project_dir: Path, continue_job: int | None = None) -> tuple[Path, str]:
    """Write the job file into the run folder and hand it to ``sbatch``; returns the file and the job's number.

    Raises:
        ConfigError: there is no Slurm here, it cannot start containers, there is no job to continue, or Slurm refuses
            the new one; its message is passed on.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("no sbatch on the PATH: submit from a login node, or start launch/torchrun.sh on each node")
    if config.launch.container_image and not has_pyxis():
        raise ConfigError(NO_PYXIS)
    run_dir = project_dir / config.run.run_dir
    if continue_job is not None and not (run_dir / f"job_{continue_job}").is_dir():
        there = ", ".join(sorted(folder.name for folder in run_dir.glob("job_*"))) or "none"
        raise ConfigError(f"--continue-job {continue_job}: no folder {run_dir}/job_{continue_job}; there: {there}")
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / JOB_FILE
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
    done = subprocess.run(
        ["sbatch", "--parsable", str(file)], cwd=project_dir, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise ConfigError(f"{file}: sbatch refuses the job: {done.stderr.strip()}")
    return file, done.stdout.strip().split(";")[0]


def has_pyxis() -> bool:
    """Whether srun knows the options of NVIDIA's container plugin."""
    return (
        "--container-image"
        in subprocess.run(["srun", "--help"], capture_output=True, encoding="utf-8", errors="replace").stdout
    )
