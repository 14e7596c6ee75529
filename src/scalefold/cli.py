"""The command line: verbs to functions, no logic of its own.

Heavy imports happen inside the verbs, so that ``scalefold show`` works on a login node without touching torch.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from scalefold import __version__, cli_launch
from scalefold.cli_results import JsonOption, add_verbs, print_json
from scalefold.errors import ScaleFoldError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="system file, for example configs/tiny.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, after the file")]


def print_version(asked: bool) -> None:
    """Of the option ``--version``, which needs no verb."""
    if asked:
        print(f"scalefold {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """MLPerf HPC OpenFold: prepare data, train, evaluate, check, submit."""


def main() -> None:
    """Entry of the ``scalefold`` command: user errors are one line and a status; other errors keep their traceback.

    A file that cannot be opened, read or written is a user error too.
    """
    try:
        app()
    except ScaleFoldError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(error.exit_status)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {place}{error.strerror}", file=sys.stderr, flush=True)
        leave(ScaleFoldError.exit_status)


def leave(status: int) -> None:
    """End with ``status``; in a run of several ranks at once, whatever the libraries that they share still hold.

    After an error exchanges under way may never end, and what libraries do after the last line of Python has no bound.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@app.command()
def doctor() -> None:
    """Examine this machine. Exit status 1 if a run would fail.

    Example: scalefold doctor
    """
    from scalefold.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.level:8s} {finding.topic:16s} {finding.text}")
    raise typer.Exit(code=int(any(f.level == "problem" for f in findings)))


@app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks_per_node: Annotated[bool, typer.Option(help="print only the number of processes per node")] = False,
) -> None:
    """Print every value of a configuration and where it comes from.

    Example: scalefold show configs/tiny.yaml training.seed=1
    """
    from scalefold.config import describe_config, load_config

    loaded = load_config(config, overrides or [])
    if ranks_per_node:
        print(loaded.config.parallel.world_size // loaded.config.parallel.nodes)
        return
    rows = describe_config(loaded)
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:{width}s}  {value:32s}  {origin}")


@app.command()
def prepare(
    mmcif_dir: Annotated[
        Path, typer.Option(help="folder of .cif or .cif.gz files, or the official set's chains.csv and dicts")
    ],
    out: Annotated[Path, typer.Option(help="store to write")],
    alignments: Annotated[
        list[Path] | None, typer.Option(help="OpenProteinSet-style folder, or one with super.index; repeatable")
    ] = None,
    clusters: Annotated[
        Path | None, typer.Option(help="clusters-by-entity-40.txt; without it no chain of mmCIF files can train")
    ] = None,
    obsolete: Annotated[Path | None, typer.Option(help="obsolete.dat")] = None,
    evaluation_list: Annotated[Path | None, typer.Option(help="CAMEO-style csv, or chain ids")] = None,
    workers: Annotated[int, typer.Option(help="processes on this node")] = 1,
    mpi: Annotated[bool, typer.Option(help="share the work over MPI ranks (needs mpi4py)")] = False,
) -> None:
    """Read raw structures and alignments into a store. Restartable: run it again to continue.

    Example: scalefold prepare --mmcif-dir pdb/raw --alignments open_protein_set --clusters clusters-by-entity-40.txt
    --obsolete obsolete.dat --out data/store --workers 32
    """
    from scalefold.data.prepare import mpi_team
    from scalefold.data.prepare import prepare as prepare_store
    from scalefold.data.rawlayout import RawLayout

    layout = RawLayout(mmcif_dir, tuple(alignments or ()), clusters, obsolete, evaluation_list)
    summary = prepare_store(layout, out, workers, team=mpi_team() if mpi else None)
    print(f"{summary.num_chains} chains in {summary.seconds:.1f} s; {summary.num_rejected} rejected, ", end="")
    print(f"see {out / 'rejected.csv'}")


@app.command()
def download(
    out: Annotated[Path, typer.Option(help="folder to fill")],
    only: Annotated[
        list[str] | None, typer.Option(help="mmcif, obsolete, clusters, openproteinset, preprocessed or checkpoint")
    ] = None,
    source: Annotated[str | None, typer.Option(help="address of the one part named with --only")] = None,
    listing: Annotated[Path | None, typer.Option("--list", help="PDB ids, or a CSV of path, bytes, sha256")] = None,
    dry_run: Annotated[bool, typer.Option(help="say what would be fetched, fetch nothing")] = False,
    workers: Annotated[int, typer.Option(help="transfers at once")] = 8,
) -> None:
    """Fetch data and checkpoint. Run it again to continue. Exit status 1 if something is missing.

    Example: scalefold download --out data --only mmcif --dry-run
    """
    from scalefold.data.download import run_downloads

    complete = run_downloads(out, only or [], source, listing, dry_run, workers)
    raise typer.Exit(code=int(not complete))


@app.command()
def verify_data(
    store: Annotated[Path, typer.Argument(help="store folder")],
    quick: Annotated[bool, typer.Option(help="sizes only, no checksums")] = False,
) -> None:
    """Check a store against its manifest. Exit status 1 if anything differs.

    Example: scalefold verify-data data/store
    """
    from scalefold.data.manifest import verify_data as verify

    result = verify(store, quick)
    for problem in result.problems:
        print(problem)
    print(f"{result.num_files} files, {result.num_bytes / 1e9:.3f} GB, {result.num_chains} chains: ", end="")
    print(f"{len(result.problems)} problems" if result.problems else "as prepared")
    raise typer.Exit(code=int(bool(result.problems)))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint of run.run_dir")] = False,
    result_index: Annotated[int, typer.Option(help="N of result_N.txt")] = 0,
    instance: Annotated[int, typer.Option(help="index of a weak-scaling instance")] = 0,
    accept_changes: Annotated[
        bool, typer.Option(help="with --resume: go on although settings differ from the run's config.yaml")
    ] = False,
) -> None:
    """Train until the target is reached. The same command under srun, torchrun and mpirun.

    Exit status 0: target reached; 4: step budget ended or stop was requested; 5: another rank was lost; 6: the next of
    the configuration's phases needs other ranks, start them with --resume; 2: any other error that has a message.

    Example: scalefold train configs/tiny.yaml run.run_dir=runs/mine
    """
    from scalefold.config import load_config
    from scalefold.run import RunOptions
    from scalefold.train import run_rank

    options = RunOptions(resume, result_index, instance, accept_changes)
    outcome = run_rank(load_config(config, overrides or []).config, options)
    leave(outcome.exit_status if outcome is not None else 0)


@app.command()
def check(
    logs: Annotated[list[Path], typer.Argument(help="result_N.txt, one or more")], as_json: JsonOption = False
) -> None:
    """Judge MLPerf logs with the official checker and our stricter rules.

    Exit status, that of the worst log: 0: valid closed-division log; 3: well-formed log of a non-benchmark
    configuration; 1: invalid, or the log of another benchmark; 2: a file cannot be read.

    Example: scalefold check runs/tiny/result_0.txt
    """
    from scalefold.mlperf.check import judge_log, worst

    verdicts = []
    for log in logs:
        verdicts.append(verdict := judge_log(log))
        if not as_json:
            unreadable = verdict.kind == "unreadable"
            print(f"error: {verdict.text()}" if unreadable else verdict.text(), file=sys.stderr if unreadable else None)
    if as_json:
        print_json([verdict.as_dict() for verdict in verdicts])
    raise typer.Exit(code=worst(verdicts).exit_code)


StepTimes = Annotated[Path | None, typer.Option(help="measured step times, CSV; default: the shipped table alone")]
EvalTimes = Annotated[Path | None, typer.Option(help="measured evaluation times, CSV")]
KindOption = Annotated[
    str | None, typer.Option(help="measured, estimated, guarded, published or target step times only")
]
ConvergenceOption = Annotated[str, typer.Option(help="samples to converge: reference or published")]
Extrapolate = Annotated[bool, typer.Option(help="allow batches at which nobody observed convergence")]


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    step_times: StepTimes = None,
    eval_times: EvalTimes = None,
    kind: KindOption = None,
    convergence: ConvergenceOption = "reference",
    extrapolate: Extrapolate = False,
    as_json: JsonOption = False,
) -> None:
    """Print memory, loader demand and minutes that a system will need, with the source of every number.

    Example: scalefold plan configs/eos_h100_260x8_dap8.yaml --kind target
    """
    from scalefold.scaling.from_config import plan_config

    found = plan_config(config, overrides or [], step_times, eval_times, kind, convergence, extrapolate)
    if as_json:
        print_json(found.as_dict())
    else:
        print(found.text())


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Argument(help="system file, for example configs/tiny.yaml")] = None,
    overrides: Overrides = None,
    step_times: StepTimes = None,
    eval_times: EvalTimes = None,
    kind: KindOption = None,
    convergence: ConvergenceOption = "reference",
    extrapolate: Extrapolate = False,
    runs: Annotated[int, typer.Option(help="number of simulated runs")] = 10,
    seed: Annotated[int, typer.Option(help="of the simulation")] = 0,
    replay: Annotated[Path | None, typer.Option(help="published runs, CSV: predict each from its own parts")] = None,
) -> None:
    """Simulate runs of a planned system (spread of the minutes, and where they go), or replay published ones.

    Exit status of a replay: 1 if a run is predicted more than 10 % off.

    Examples: scalefold simulate configs/eos_h100_260x8_dap8.yaml --runs 100;
    scalefold simulate --replay src/scalefold/mlperf/published_runs.csv
    """
    from scalefold.errors import ConfigError

    if (config is None) == (replay is None):
        raise ConfigError("simulate: name either a system file or --replay CSV")
    if replay is not None:
        from scalefold.scaling.replay import replay as replay_runs

        replayed = replay_runs(replay)
        print(replayed.text())
        raise typer.Exit(code=int(not replayed.ok()))
    from scalefold.scaling.from_config import simulate_config

    assert config is not None
    planning = (step_times, eval_times, kind, convergence, extrapolate)
    print(simulate_config(config, overrides or [], *planning, runs=runs, seed=seed).text())


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="print the job file, submit nothing")] = False,
    project_dir: Annotated[Path | None, typer.Option(help="checkout, as the nodes see it")] = None,
    phase: Annotated[str | None, typer.Option(help="name of the phase to start, where the file has phases")] = None,
    continue_job: Annotated[int | None, typer.Option(help="continue the runs of this earlier job")] = None,
) -> None:
    """Render one sbatch file and submit it. Overrides hold for every run of the job.

    Example: scalefold launch configs/eos_h100_260x8_dap8.yaml launch.account=me --dry-run
    """
    from scalefold.config import load_config
    from scalefold.launch.render import in_named_phase, render_sbatch
    from scalefold.launch.submit import find_project_dir, submit

    loaded = in_named_phase(load_config(config, overrides or []).config, phase)
    folder = project_dir or find_project_dir(Path.cwd())
    text = render_sbatch(loaded, config.resolve(), folder, overrides or [], continue_job)
    if dry_run:
        print(text, end="")
        return
    file, job_id = submit(loaded, text, folder, continue_job)
    print(f"job {job_id} submitted: {file}; output: {loaded.run.run_dir}/slurm-{job_id}.out")


cli_launch.add_verbs(app)
add_verbs(app)
