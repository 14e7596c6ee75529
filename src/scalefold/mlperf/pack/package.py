"""Build the organization folder of a submission, exactly as the package checker walks it.

::

    <org>/README.md  LICENSE
    <org>/systems/<system>.json
    <org>/results/<system>/strong/openfold/result_0.txt .. result_9.txt
    <org>/results/<system>/weak/openfold/result_<i>.txt          >= 10 instances, and pruned_results/
    <org>/benchmarks/openfold/implementations/scalefold/          this source, unaltered
    <org>/benchmarks/openfold/<system>/                           README, scripts, configuration, system JSON

Logs are copied byte for byte, in the order of their ``run_start``. Configurations are packed resolved, so that the
scripts run wherever the folder lies.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from scalefold.config import dump_config, load_config
from scalefold.errors import LogError
from scalefold.mlperf.judge.score import result_files
from scalefold.mlperf.log.keys import BENCHMARK, MIN_WEAK_INSTANCES, NUM_STRONG_RUNS
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.mlperf.pack.package_tree import IMPLEMENTATION

_NOT_SHIPPED = ("mlperf_logs", "runs", "build", "dist", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class SystemEntry:
    """Results of one system.

    ``strong``, ``weak`` and ``pruned`` are log files, run folders (with ``result_*.txt``) or folders of a job with its
    runs; ``config`` is the YAML that was run, ``further_configs`` those of other runs of the same system (throughput
    beside time to train); ``description`` the system JSON's fields.
    """

    name: str
    description: dict[str, Any]
    config: Path | None = None
    further_configs: tuple[Path, ...] = ()
    strong: tuple[Path, ...] = ()
    weak: tuple[Path, ...] = ()
    pruned: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An organization's submission: its name, its systems, and the source tree that ran."""

    org: str
    systems: tuple[SystemEntry, ...]
    source_dir: Path | None = None


@dataclass
class Plan:
    """What a package will hold, by path inside the organization folder: copies of files, and texts."""

    copies: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line per file; the source tree is summed up."""
        prefix = f"benchmarks/{BENCHMARK}/implementations/{IMPLEMENTATION}/"
        shown = [f"{path}  <- {source}" for path, source in self.copies.items() if not path.startswith(prefix)]
        shown += [f"{path}  (written)" for path in self.texts if not path.startswith(prefix)]
        num_source = sum(path.startswith(prefix) for path in self.copies)
        return "\n".join([*sorted(shown), f"{prefix}  <- {num_source} source files", *self.notes])


def pack(submission: Submission, org_dir: str | Path, *, dry_run: bool = False) -> Plan:
    """Build ``org_dir`` (which must not exist); with ``dry_run`` only say what it would hold.

    The folder appears complete or not at all. Judging it is :func:`scalefold.mlperf.pack.verify.verify_package`'s work.

    Raises:
        LogError: no system, a wrong number of runs, a log that cannot be read, or an existing folder.
    """
    org_dir = Path(org_dir)
    plan = plan_package(submission)
    if dry_run:
        return plan
    if org_dir.exists():
        raise LogError(f"{org_dir} exists: a package is built new; move the old one away")
    org_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{org_dir.name}.", dir=org_dir.parent))
    try:
        _build(plan, temporary)
        temporary.chmod(0o755)
        temporary.replace(org_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return plan


def plan_package(submission: Submission) -> Plan:
    """Decide every file of the package."""
    if not submission.systems:
        raise LogError("a submission needs at least one system")
    plan = Plan()
    source_dir = submission.source_dir or default_source_dir()
    _plan_source(plan, source_dir)
    for system in submission.systems:
        _plan_results(plan, system)
        _plan_system_folder(plan, system)
    plan.texts["README.md"] = _readme(submission)
    if (source_dir / "LICENSE").is_file():
        plan.copies["LICENSE"] = source_dir / "LICENSE"
    return plan


def _build(plan: Plan, folder: Path) -> None:
    for path, source in plan.copies.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / path)
    for path, text in plan.texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
        if path.endswith(".sh"):
            (folder / path).chmod(0o755)


# Results ---------------------------------------------------------------------------------------------------------


def _plan_results(plan: Plan, system: SystemEntry) -> None:
    if not system.strong and not system.weak:
        raise LogError(f"system {system.name}: no strong and no weak runs given")
    if system.strong:
        chosen, left_out = choose_runs(collect_logs(system.strong), system.name)
        _plan_logs(plan, f"results/{system.name}/strong/{BENCHMARK}", chosen)
        if left_out:
            names = ", ".join(str(log.file) for log in left_out)
            plan.notes.append(f"{system.name}: left out of the longer series, keep for reviewers: {names}")
    if system.weak:
        weak = collect_logs(system.weak)
        if len(weak) < MIN_WEAK_INSTANCES:
            raise LogError(
                f"system {system.name}: {len(weak)} weak instances, at least {MIN_WEAK_INSTANCES} are needed"
            )
        _plan_logs(plan, f"results/{system.name}/weak/{BENCHMARK}", weak)
        _plan_logs(plan, f"results/{system.name}/weak/{BENCHMARK}/pruned_results", collect_logs(system.pruned))


def _plan_logs(plan: Plan, folder: str, logs: list[Log]) -> None:
    plan.copies.update({f"{folder}/result_{i}.txt": log.file for i, log in enumerate(logs)})


def collect_logs(paths: Iterable[Path]) -> list[Log]:
    """Logs of files and run folders, ordered by ``run_start``."""
    files: list[Path] = []
    for path in paths:
        found = result_files(path) if path.is_dir() else [path]
        if not found:
            raise LogError(f"{path}: run folder without result_*.txt")
        files += found
    return sorted((read_log(file) for file in files), key=lambda log: log.need("run_start").time_ms)


def choose_runs(logs: list[Log], system: str) -> tuple[list[Log], list[Log]]:
    """The ten runs to submit, and the others: of a longer series the ten consecutive runs closest to its median.

    Closest: least sum of distances of their minutes to the series' median (MLPerf training rules, "Scoring").
    """
    if len(logs) < NUM_STRONG_RUNS:
        raise LogError(f"system {system}: {len(logs)} strong runs, exactly {NUM_STRONG_RUNS} are needed")
    minutes = [log.minutes for log in logs]
    middle = median(minutes)
    windows = range(len(logs) - NUM_STRONG_RUNS + 1)
    first = min(windows, key=lambda i: sum(abs(m - middle) for m in minutes[i : i + NUM_STRONG_RUNS]))
    chosen = logs[first : first + NUM_STRONG_RUNS]
    return chosen, [log for log in logs if log not in chosen]


# Source ----------------------------------------------------------------------------------------------------------


def default_source_dir() -> Path:
    """The checkout that this package runs from."""
    root = Path(__file__).resolve().parents[4]
    if not (root / "pyproject.toml").is_file():
        raise LogError("the source tree cannot be found beside the installed package: name it with source_dir")
    return root


def _plan_source(plan: Plan, source_dir: Path) -> None:
    """Copy the tree that git tracks (as it is on disk); names that the repository checker refuses stay out."""
    prefix = f"benchmarks/{BENCHMARK}/implementations/{IMPLEMENTATION}"
    files = _tracked_files(source_dir)
    shipped = [f for f in files if not any(p.startswith(".") or " " in p or p in _NOT_SHIPPED for p in f.parts)]
    if not shipped:
        raise LogError(f"{source_dir}: no source files to ship")
    plan.copies.update({f"{prefix}/{file.as_posix()}": source_dir / file for file in shipped})
    state = _git_state(source_dir)
    plan.texts[f"{prefix}/SOURCE.txt"] = state
    if "modified" in state:
        plan.notes.append(f"{source_dir}: {state.strip()}: log line numbers may not match a published commit")


def _tracked_files(source_dir: Path) -> list[Path]:
    listed = _git(source_dir, "ls-files", "-z")
    if listed is not None:
        return [Path(name) for name in sorted(listed.split("\0")) if name and (source_dir / name).is_file()]
    return sorted(file.relative_to(source_dir) for file in source_dir.rglob("*") if file.is_file())


def _git_state(source_dir: Path) -> str:
    commit = _git(source_dir, "rev-parse", "HEAD")
    if commit is None:
        return "scalefold source, not from a git checkout\n"
    changes = (_git(source_dir, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    suffix = f" with {len(changes)} modified files" if changes else ""
    return f"scalefold commit {commit.strip()}{suffix}\n"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


# Texts -----------------------------------------------------------------------------------------------------------


_PREAMBLE = f"""\
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
implementation=$(cd "${{here}}/../implementations/{IMPLEMENTATION}" && pwd)
PATH="${{implementation}}/.venv/bin:${{PATH}}"
"""


def _plan_system_folder(plan: Plan, system: SystemEntry) -> None:
    folder = f"benchmarks/{BENCHMARK}/{system.name}"
    description = json.dumps(system.description, indent=2) + "\n"
    plan.texts[f"systems/{system.name}.json"] = description
    plan.texts[f"{folder}/{system.name}.json"] = description
    configs = [file for file in (system.config, *system.further_configs) if file is not None]
    for file in configs:
        plan.texts[f"{folder}/{file.name}"] = _resolved(file)
    plan.texts[f"{folder}/README.md"] = _system_readme(system, configs)
    plan.texts[f"{folder}/setup.sh"] = f'#!/usr/bin/env bash\n{_PREAMBLE}make -C "${{implementation}}" setup\n'
    plan.texts[f"{folder}/init_datasets.sh"] = f'#!/usr/bin/env bash\n{_PREAMBLE}scalefold prepare "$@"\n'
    for name, file in zip(_run_scripts(configs), configs or [None], strict=True):
        plan.texts[f"{folder}/{name}"] = _run_script(name, file)


def _run_scripts(configs: list[Path]) -> list[str]:
    """``run_and_time.sh`` for the first configuration, ``run_and_time_NAME.sh`` for every other."""
    return ["run_and_time.sh", *(f"run_and_time_{file.stem}.sh" for file in configs[1:])]


def _resolved(file: Path) -> str:
    """The configuration with the values of all files that it builds on."""
    return f"# {file.name}, resolved: it needs no other file.\n{dump_config(load_config(file).config)}"


def _run_script(name: str, config: Path | None) -> str:
    """Submits the job under Slurm, else starts one run on this node (or on each of several, see launch/torchrun.sh)."""
    given = "" if config else " CONFIG.yaml"
    chosen = f'config="${{here}}/{config.name}"' if config else 'config=$(realpath "$1")\nshift'
    return f"""#!/usr/bin/env bash
# usage: {name} [--here]{given} [key.sub=value ...]   for example data.store_dir=/where/the/store/lies
# With Slurm: submits the job of all timed runs. Without, or with --here: one run on this node.
{_PREAMBLE}here_only=0
if [[ "${{1:-}}" == --here ]]; then
  here_only=1
  shift
fi
{chosen}
if ((!here_only)) && command -v sbatch >/dev/null; then
  exec scalefold launch "${{config}}" "$@" --project-dir "${{implementation}}"
fi
exec "${{implementation}}/launch/torchrun.sh" "${{config}}" "$@"
"""


def _system_readme(system: SystemEntry, configs: list[Path]) -> str:
    d = system.description
    accelerators = f"{d.get('accelerators_per_node')} x {d.get('accelerator_model_name') or 'no accelerator'}"
    names = [f"with `{file.name}`" for file in configs] or ["with the configuration that is its first argument"]
    runs = "; ".join(f"`./{script}` {name}" for script, name in zip(_run_scripts(configs), names, strict=True))
    return f"""# OpenFold on {system.name}

{d.get("number_of_nodes")} nodes, {accelerators} per node, {d.get("framework")}, {d.get("operating_system")}.

1. `./setup.sh` prepares the software once (../implementations/{IMPLEMENTATION}, its README names the versions).
2. `./init_datasets.sh --help` prepares the data set once, off the clock.
3. The timed runs: {runs}. Under Slurm a script submits them; elsewhere, or with
   `--here`, it starts one.
   Arguments override the configuration: `data.store_dir=` where the data set lies, `training.init_checkpoint=`,
   `run.run_dir=`. Each run writes its own `result_<i>.txt`.
"""


def _readme(submission: Submission) -> str:
    rows = []
    for system in submission.systems:
        kinds = [kind for kind, runs in (("time to train", system.strong), ("throughput", system.weak)) if runs]
        rows.append(f"| {system.name} | {' and '.join(kinds)} | benchmarks/{BENCHMARK}/{system.name} |")
    table = "\n".join(rows)
    return f"""# {submission.org}: MLPerf HPC v3.0 OpenFold

| system | results | how to run |
|---|---|---|
{table}

Source: `benchmarks/{BENCHMARK}/implementations/{IMPLEMENTATION}`. Logs are the programs' own, unaltered; logs of runs
with asynchronous evaluation were joined from the two roots' parts by `scalefold.mlperf.log.events.merge_parts`.
"""
