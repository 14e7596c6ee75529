"""Verbs of the command line that look at data, runs and submissions; ``cli`` adds them to the command."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalefold.errors import ConfigError
from scalefold.textfile import parse_json, read_text

if TYPE_CHECKING:
    from scalefold.mlperf.pack.package import SystemEntry

JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs instead of text")]
Runs = Annotated[list[Path], typer.Argument(help="run folders, result files or folders of result_N.txt")]


def add_verbs(app: typer.Typer) -> None:
    """Register every verb of this file."""
    app.command("eval")(evaluate)
    for verb in (report, export, compare_runs, score, pack, verify_package, describe_system, bench_data, demo):
        app.command()(verb)


def print_json(found: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))


def evaluate(
    config: Annotated[Path, typer.Argument(help="system file")],
    weights: Annotated[Path, typer.Argument(help="swa_checkpoint.pt, resumable_checkpoint.pt or a state dict")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
) -> None:
    """Evaluate weights on the evaluation chains and print every chain's lDDT-Cα.

    Example: scalefold eval configs/tiny.yaml runs/tiny/checkpoints/last/000200/swa_checkpoint.pt
    """
    from scalefold.config import load_config
    from scalefold.eval.weights import evaluate_weights

    settings = load_config(config, overrides or []).config
    result = evaluate_weights(settings, weights, note=lambda text: print(text, file=sys.stderr, flush=True))
    for chain, value in sorted(result.chains.items(), key=lambda pair: pair[1]):
        print(f"{chain:12s} {value:.4f}")
    print(f"average lDDT-Cα {result.lddt_ca:.6f} over {len(result.chains)} chains in {result.seconds:.1f} s")


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
    scaling_csv: Annotated[Path | None, typer.Option(help="scaling curve: columns kind, accelerators, minutes")] = None,
    step_times: Annotated[Path | None, typer.Option(help="benchmarks/results/step_time.csv")] = None,
) -> None:
    """Write one self-contained HTML page (and SVG, PNG figures) on our own or anybody's runs.

    Example: scalefold report runs/tiny --out runs/tiny/report.html
    """
    from scalefold.report.page import write_report

    written = write_report(runs, out, check=_verdict(runs), scaling_csv=scaling_csv, step_time_csv=step_times)
    print(written.page)


def _verdict(runs: list[Path]) -> dict[str, object] | None:
    """What the page says of the result files, if there are any."""
    from scalefold.mlperf.judge.score import result_files

    files = [file for path in runs for file in (result_files(path) if path.is_dir() else [path])]
    logs = [file for file in files if file.suffix == ".txt"]
    return _judge(logs) if logs else None


def _judge(logs: list[Path]) -> dict[str, object]:
    """The check's outcome, headline (of several logs: the worst one's) and text, as the report takes them."""
    from scalefold.mlperf.judge.check import check_log, worst

    verdicts = [check_log(log) for log in logs]
    found = worst(verdicts)
    named = f"{len(logs)} logs, the worst is {found.file}: " if len(logs) > 1 else ""
    text = "\n".join(verdict.text() for verdict in verdicts)
    kinds = {"ok": found.kind == "valid", "well_formed": found.kind == "non_benchmark"}
    return {**kinds, "headline": f"{named}{found.headline}", "details": text}


def export(
    run: Annotated[Path, typer.Argument(help="run folder, folder of result_N.txt, result or metrics file")],
    to: Annotated[str, typer.Option(help="tensorboard, wandb or mlflow; each is an optional extra")],
    out: Annotated[Path | None, typer.Option(help="folder for what the tool writes; default: RUN/<tool>")] = None,
) -> None:
    """Hand what a run recorded to another tool. Reads files only, also while the run goes on.

    Example: scalefold export runs/tiny --to tensorboard
    """
    from scalefold.report.export import export as export_runs

    folder = out or (run if run.is_dir() else run.parent) / to
    print("\n".join(export_runs(run, to, folder)))


def compare_runs(
    a: Annotated[Path, typer.Argument(help="baseline: run folder or metrics.jsonl")],
    b: Annotated[Path, typer.Argument(help="run to compare")],
    tolerance: Annotated[float | None, typer.Option(help="largest relative difference of window means")] = None,
    window: Annotated[int, typer.Option(help="steps per moving mean")] = 20,
    plot: Annotated[Path | None, typer.Option(help="overlay of both curves, .svg or .png")] = None,
) -> None:
    """Overlay two training curves with a tolerance band. Exit status 1 outside the band.

    Example: scalefold compare-runs runs/plain runs/fast --plot curves.svg
    """
    from scalefold.report.compare import compare_runs as compare

    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {plot}: must end in .svg or .png")
    comparison = compare(a, b, tolerance=tolerance, window=window)
    print(comparison.text())
    if plot is not None:
        comparison.plot(plot)
    raise typer.Exit(code=int(not comparison.ok))


def score(
    folder: Annotated[Path, typer.Argument(help="organization, system, result or job folder")],
    as_json: JsonOption = False,
) -> None:
    """Print time-to-train scores (strong) or TTTa (weak), unscaled and scaled.

    Exit status 1 if a result is illegal: runs are missing or failed, or they converge faster than the reference allows.

    Example: scalefold score submission/results
    """
    from scalefold.mlperf.judge.score import score as score_folders

    scores = score_folders(folder)
    if as_json:
        print_json([found.as_dict() for found in scores])
    else:
        print("\n".join(found.text() for found in scores))
    raise typer.Exit(code=int(not all(found.is_legal for found in scores)))


def describe_system(
    out: Annotated[Path, typer.Argument(help="systems/<system>.json to write")],
    nodes: Annotated[int, typer.Option(help="number of nodes like this one", min=1)] = 1,
    submitter: Annotated[str, typer.Option(help="organization")] = "",
    field: Annotated[list[str] | None, typer.Option(help="NAME=VALUE that a person states")] = None,
) -> None:
    """Fill the system description from this machine and name what a person must fill in.

    Example: scalefold describe-system mlperf_logs/systems/dgx.json --nodes 8 --submitter Example
    """
    from scalefold.mlperf.pack.system_desc import describe_system as describe

    known = dict(_pair(text) for text in field or [])
    description = describe(number_of_nodes=nodes, submitter=submitter, system_name=out.stem, known=known)
    description.write(out)
    print(f"{out}: to fill in by hand: {', '.join(description.to_fill) or 'nothing'}")
    if description.fields["accelerators_per_node"] == "0":
        print(f"{out}: no accelerator is seen here; for a system with GPUs remove the file and call this on a GPU node")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--field `{text}` must look like NAME=VALUE")
    return name, value


def pack(
    out: Annotated[Path, typer.Argument(help="organization folder to build; must not exist")],
    org: Annotated[str, typer.Option(help="organization")],
    system: Annotated[list[Path], typer.Option(help="systems/<system>.json from describe-system; once per system")],
    config: Annotated[list[str], typer.Option(help="[SYSTEM=]configuration that was run, or config.yaml of a run")],
    strong: Annotated[
        list[str] | None, typer.Option(help="[SYSTEM=]job folder, or ten times a run folder or log")
    ] = None,
    weak: Annotated[
        list[str] | None, typer.Option(help="[SYSTEM=]job folder, or ten or more times an instance's folder or log")
    ] = None,
    pruned: Annotated[list[str] | None, typer.Option(help="[SYSTEM=]pruned instance")] = None,
    dry_run: Annotated[bool, typer.Option(help="only say what the package would hold")] = False,
) -> None:
    """Assemble a submission as the package checker walks it, then check it.

    With several systems, every configuration and run is preceded by its system: the name of the JSON file.

    Examples: scalefold pack out --org Example --system dgx.json --config configs/dgx_h100_1x8.yaml --strong runs/a;
    scalefold pack out --org Example --system n260.json --config n260=a.yaml --strong n260=runs/a/job_7
    --system n256.json --config n256=b.yaml --weak n256=runs/b/job_8
    """
    from scalefold.mlperf.pack.package import Submission
    from scalefold.mlperf.pack.package import pack as build

    names = [file.stem for file in system]
    if len(set(names)) < len(names):
        raise ConfigError(f"pack: --system {', '.join(names)}: a name is given twice, and results lie in its folder")
    given = {"config": config, "strong": strong, "weak": weak, "pruned": pruned}
    files = {option: _by_system(f"--{option}", found or [], names) for option, found in given.items()}
    entries = [_system_entry(file, **{option: found[file.stem] for option, found in files.items()}) for file in system]
    print(build(Submission(org=org, systems=tuple(entries)), out, dry_run=dry_run).text())
    if not dry_run:
        verify_package(out)


def _by_system(option: str, given: Sequence[str], names: list[str]) -> dict[str, tuple[Path, ...]]:
    """``[SYSTEM=]PATH`` arguments by system; the name may be left out where there is only one."""
    found: dict[str, tuple[Path, ...]] = dict.fromkeys(names, ())
    for text in given:
        name, _, path = text.partition("=")
        if name not in found:
            name, path = names[0], text
            if len(names) > 1:
                raise ConfigError(f"{option} {text}: must begin with {' or '.join(f'{known}=' for known in names)}")
        found[name] += (Path(path),)
    return found


def _system_entry(
    file: Path, config: tuple[Path, ...], strong: tuple[Path, ...], weak: tuple[Path, ...], pruned: tuple[Path, ...]
) -> "SystemEntry":
    from scalefold.mlperf.pack.package import SystemEntry

    try:
        description = parse_json(read_text(file, ConfigError, "system description (`scalefold describe-system`)"))
    except ValueError as error:
        raise ConfigError(f"{file}: no JSON ({error}); `scalefold describe-system` writes it") from None
    if not isinstance(description, dict):
        raise ConfigError(f"{file}: must hold one JSON object with the system's fields")
    if not config:
        raise ConfigError(f"pack: no --config for system {file.stem}; give the configuration that was run")
    return SystemEntry(
        name=file.stem,
        description=description,
        config=config[0],
        further_configs=config[1:],
        strong=strong,
        weak=weak,
        pruned=pruned,
    )


def verify_package(
    folder: Annotated[Path, typer.Argument(help="organization folder")], as_json: JsonOption = False
) -> None:
    """Run all official checkers and our own rules on a copy of a submission; one verdict table.

    Exit status 1 if anything has to be repaired before submitting.

    Example: scalefold verify-package submission
    """
    from scalefold.mlperf.pack.verify import verify_package as verify

    verdict = verify(folder)
    if as_json:
        print_json(verdict.as_dict())
    else:
        print(verdict.text())
    raise typer.Exit(code=verdict.exit_code)


def bench_data(
    store: Annotated[Path, typer.Argument(help="prepared store")],
    config: Annotated[Path | None, typer.Option(help="system whose demand for workers is computed")] = None,
    samples: Annotated[int | None, typer.Option(help="measure that many chains, evenly spaced", min=1)] = None,
    step_s: Annotated[float | None, typer.Option(help="step time of that system in seconds")] = None,
) -> None:
    """Measure how long samples take on one core: quantiles, bytes read, slowest chains, workers needed.

    Example: scalefold bench-data data/store --config configs/eos_h100_260x8_dap8.yaml --step-s 0.1
    """
    from scalefold.config import load_config
    from scalefold.data.configured import feature_settings
    from scalefold.data.features.features import FeatureSettings
    from scalefold.data.loading.bench import bench_data as measure
    from scalefold.data.loading.bench import workers_needed

    if step_s is not None and (config is None or not step_s > 0):
        raise ConfigError(f"--step-s {step_s:g}: must be positive, and --config must name the system it belongs to")
    loaded = load_config(config).config if config else None
    settings = feature_settings(loaded) if loaded else FeatureSettings()
    result = measure(str(store), settings, max_chains=samples, report=print)
    if loaded is not None and step_s is not None:
        needed = workers_needed(result.mean_wall_s, step_s, loaded.local_batch_size)
        print(f"{loaded.system}: {needed} workers per replica keep up with a step of {step_s:g} s")
    print("\n".join(result.lines()))


def demo(
    folder: Annotated[Path, typer.Option(help="everything is written here")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="system file")] = Path("configs/tiny.yaml"),
) -> None:
    """Generate tiny proteins, prepare them, train to the target, check the log, write the report (CPU, minutes).

    Example: scalefold demo --folder runs/demo
    """
    from scalefold.config import load_config
    from scalefold.data.made.demo import generate
    from scalefold.data.store.prepare import prepare
    from scalefold.report.page import write_report

    load_config(config)
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; remove it or choose another --folder")
    print("1/5  generate proteins")
    made = generate(folder / "raw")
    print(f"     {made.num_entries} entries, {made.num_alignment_rows} alignment rows, {made.seconds:.0f} s")
    print("2/5  prepare the store")
    prepare(made.layout(), folder / "store")
    print("3/5  train to the target lDDT-Cα")
    run_dir = folder / "run"
    command = [sys.executable, "-m", "scalefold", "train", str(config), f"data.store_dir={folder / 'store'}"]
    status = subprocess.run([*command, f"run.run_dir={run_dir}"]).returncode
    if status not in (0, 4):  # 4: the step budget ended, which leaves a whole log
        raise typer.Exit(code=status)
    print("4/5  check the log")
    verdict = _judge([run_dir / "result_0.txt"])
    print(verdict["details"])
    print("5/5  write the report")
    page = write_report(run_dir, folder / "report.html", check=verdict)
    print(f"\nstore   {folder / 'store'}\nlog     {run_dir / 'result_0.txt'}\nmetrics {run_dir / 'metrics.jsonl'}")
    print(f"config  {run_dir / 'config.yaml'}\nreport  {page.page}")
    print("target reached" if status == 0 else f"target NOT reached (exit status {status})")
    raise typer.Exit(code=status)


def check(
    logs: Annotated[list[Path], typer.Argument(help="result_N.txt, one or more")], as_json: JsonOption = False
) -> None:
    """Judge MLPerf logs with the official checker and our stricter rules.

    Exit status, that of the worst log: 0: valid closed-division log; 3: well-formed log of a non-benchmark
    configuration; 1: invalid, or the log of another benchmark; 2: a file cannot be read.

    Example: scalefold check runs/tiny/result_0.txt
    """
    from scalefold.mlperf.judge.check import judge_log, worst

    verdicts = []
    for log in logs:
        verdicts.append(verdict := judge_log(log))
        if not as_json:
            unreadable = verdict.kind == "unreadable"
            print(f"error: {verdict.text()}" if unreadable else verdict.text(), file=sys.stderr if unreadable else None)
    if as_json:
        print_json([verdict.as_dict() for verdict in verdicts])
    raise typer.Exit(code=worst(verdicts).exit_code)
