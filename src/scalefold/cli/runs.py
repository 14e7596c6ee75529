"""Verbs around a run: examine, show, plan, simulate, launch, train.

Heavy imports happen inside the verbs, so that ``scalefold show`` works on a login node without touching torch.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from scalefold.cli.results import JsonOption, print_json

ConfigFile = Annotated[Path, typer.Argument(help="system file, for example configs/tiny.yaml")]


Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, after the file")]


def leave(status: int) -> None:
    """End with ``status``; in a run of several ranks at once, whatever the libraries that they share still hold.

    After an error exchanges under way may never end, and what libraries do after the last line of Python has no bound.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def doctor(
    run: Annotated[Path | None, typer.Option(help="explain from its files how this run ended, run_dir")] = None,
) -> None:
    """Examine this machine, or a run that has ended. Exit status 1 if a run would fail, or cannot be resumed.

    Examples: scalefold doctor; scalefold doctor --run runs/mine
    """
    from scalefold.autopsy import examine_run
    from scalefold.doctor import examine

    findings = examine() if run is None else examine_run(run)
    for finding in findings:
        print(f"{finding.level:8s} {finding.topic:16s} {finding.text}")
    raise typer.Exit(code=int(any(f.level == "problem" for f in findings)))


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


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint of run.run_dir")] = False,
    result_index: Annotated[int, typer.Option(help="N of result_N.txt")] = 0,
    instance: Annotated[int, typer.Option(help="index of a weak-scaling instance")] = 0,
    accept_changes: Annotated[
        bool, typer.Option(help="with --resume: go on although settings differ from the run's config.yaml")
    ] = False,
    inject: Annotated[
        list[str] | None, typer.Option(help="rehearse a fault, FAULT@STEP (again for more); the run is no result")
    ] = None,
) -> None:
    """Train until the target is reached. The same command under srun, torchrun and mpirun.

    Exit status 0: target reached; 4: step budget ended or stop was requested; 5: another rank was lost; 6: the next of
    the configuration's phases needs other ranks, start them with --resume; 2: any other error that has a message.

    Faults to rehearse: kill-root, kill-rank, kill-evaluation, kill-worker, freeze-root, freeze-rank, freeze-evaluation,
    freeze-worker, nan-gradient, nan-loss, full-disk-checkpoint, full-disk-log, slow-storage, clock-jump,
    evaluation-memory, open-files; docs/faults.md says what each does and what a run says of it.

    Example: scalefold train configs/tiny.yaml run.run_dir=runs/mine
    """
    from scalefold.config import load_config
    from scalefold.rehearse.faults import parse_faults
    from scalefold.run.begin import RunOptions
    from scalefold.run.loop import run_rank

    options = RunOptions(resume, result_index, instance, accept_changes, parse_faults(inject or []))
    outcome = run_rank(load_config(config, overrides or []).config, options)
    leave(outcome.exit_status if outcome is not None else 0)


StepTimes = Annotated[Path | None, typer.Option(help="measured step times, CSV; default: the shipped table alone")]


EvalTimes = Annotated[Path | None, typer.Option(help="measured evaluation times, CSV")]


KindOption = Annotated[
    str | None, typer.Option(help="measured, estimated, guarded, published or target step times only")
]


ConvergenceOption = Annotated[str, typer.Option(help="samples to converge: reference or published")]


Extrapolate = Annotated[bool, typer.Option(help="allow batches at which nobody observed convergence")]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    step_times: StepTimes = None,
    eval_times: EvalTimes = None,
    kind: KindOption = None,
    convergence: ConvergenceOption = "reference",
    extrapolate: Extrapolate = False,
    tune: Annotated[
        list[Path] | None, typer.Option(help="folder of an earlier run; again for more, the newest last")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print memory, loader demand and minutes that a system will need, with the source of every number.

    With --tune: what earlier runs of it would change in loader workers, prefetch, evaluation ranks and padding, and
    what that is worth.

    Examples: scalefold plan configs/eos_h100_260x8_dap8.yaml --kind target;
    scalefold plan configs/mine.yaml --tune runs/mine
    """
    if tune:
        from dataclasses import asdict

        from scalefold.config import load_config
        from scalefold.scaling.from_runs import changes

        proposed = changes(load_config(config, overrides or []).config, tune)
        if as_json:
            print_json([asdict(change) for change in proposed])
        else:
            print("\n".join(change.text() for change in proposed))
        return
    from scalefold.scaling.from_config import plan_config

    found = plan_config(config, overrides or [], step_times, eval_times, kind, convergence, extrapolate)
    if as_json:
        print_json(found.as_dict())
    else:
        print(found.text())


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
    scalefold simulate --replay src/scalefold/mlperf/log/published_runs.csv
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
