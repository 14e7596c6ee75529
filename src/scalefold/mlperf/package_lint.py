"""Our own rules for a whole submission package: what the official tools let through or die on.

Each rule is a function from a :class:`Package` to problems; every problem says what to do.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from scalefold.errors import LogError
from scalefold.mlperf.check import Verdict, check_log
from scalefold.mlperf.keys import BENCHMARK
from scalefold.mlperf.logfile import Log, read_log
from scalefold.mlperf.score import result_files
from scalefold.mlperf.system_desc import FIELDS, unfilled

Severity = Literal["error", "note"]
_ALLOWED_BESIDE_RESULTS = ("pruned_results", "power", "package_checker_params")


@dataclass(frozen=True)
class Problem:
    """What is wrong where (path inside the package), and what to do; notes do not fail a package."""

    where: str
    message: str
    fix: str
    severity: Severity = "error"


@dataclass(frozen=True)
class ResultFolder:
    """One ``results/<system>/<scaling>/openfold`` folder with its logs and their verdicts."""

    path: Path
    system: str
    scaling: str
    logs: tuple[Log, ...]
    verdicts: tuple[Verdict, ...]


@dataclass
class Package:
    """An organization folder, read once."""

    root: Path
    unreadable: list[Problem] = field(default_factory=list)

    @cached_property
    def folders(self) -> list[ResultFolder]:
        """All OpenFold result folders that the package checker would walk."""
        found = []
        for path in sorted(self.root.glob(f"results/*/*/{BENCHMARK}")):
            if path.parent.name in ("strong", "weak"):
                found.append(self._folder(path))
        return found

    @cached_property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Contents of ``systems/*.json`` by name; files that are no JSON objects are reported."""
        found = {}
        for file in sorted(self.root.glob("systems/*.json")):
            try:
                contents = json.loads(file.read_text())
                if not isinstance(contents, dict):
                    raise ValueError("not an object")
                found[file.stem] = contents
            except ValueError as error:
                self.unreadable.append(Problem(self.name(file), f"not a JSON object: {error}", "repair the file"))
        return found

    def name(self, path: Path) -> str:
        """Path inside the package."""
        return path.relative_to(self.root).as_posix()

    def _folder(self, path: Path) -> ResultFolder:
        logs, verdicts = [], []
        for file in [*result_files(path), *result_files(path / "pruned_results")]:
            try:
                log, verdict = read_log(file), check_log(file)
            except LogError as error:
                self.unreadable.append(Problem(self.name(file), str(error), "replace it by the run's log"))
                continue
            verdicts.append(verdict)
            if file.parent == path:
                logs.append(log)
        return ResultFolder(path, path.parents[1].name, path.parent.name, tuple(logs), tuple(verdicts))


Rule = Callable[[Package], Iterator[Problem]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES.append(function)
    return function


def lint_package(package: Package) -> list[Problem]:
    """All problems of all rules."""
    problems = [problem for check in RULES for problem in check(package)]
    return package.unreadable + problems


@rule
def results_lie_where_the_checker_looks(package: Package) -> Iterator[Problem]:
    """Without the strong or weak level the package checker finds nothing and reports success."""
    if not package.folders:
        fix = f"put logs into results/<system>/strong/{BENCHMARK}/result_0.txt .. result_9.txt"
        yield Problem("results", "no OpenFold result folder: the package checker would report success on nothing", fix)
    known = {folder.path for folder in package.folders}
    for file in sorted(package.root.glob("results/**/result_*.txt")):
        if BENCHMARK in file.parts and not known & set(file.parents):
            fix = f"move it below results/<system>/strong/{BENCHMARK} or .../weak/{BENCHMARK}"
            yield Problem(package.name(file), "result file where no checker looks", fix)


@rule
def result_folders_hold_results_only(package: Package) -> Iterator[Problem]:
    """A scaling.json changes the score; other files are not walked."""
    for folder in package.folders:
        for path in sorted(folder.path.iterdir()):
            if path.name == "scaling.json":
                fix = "delete it: checkers write it, and only the review committee decides on scaling"
                yield Problem(package.name(path), "a left-over scaling.json multiplies the score", fix)
            elif not (path.match("result_*.txt") or path.name in _ALLOWED_BESIDE_RESULTS):
                yield Problem(package.name(path), "not a result_<i>.txt", "rename or remove it")


@rule
def no_bypass_is_asked_for(package: Package) -> Iterator[Problem]:
    """A bypass hides a failed convergence or seed check."""
    for file in sorted(package.root.rglob("package_checker_params")):
        fix = "delete it and repair what it hides; a bypass is the review committee's to grant"
        yield Problem(package.name(file), f"asks checkers to bypass: {' '.join(file.read_text().split())}", fix)


@rule
def systems_are_described(package: Package) -> Iterator[Problem]:
    """One JSON file per result system, all 33 fields, texts, exactly "closed", nothing essential empty."""
    names = {folder.system for folder in package.folders}
    for name in sorted(names - set(package.systems)):
        fix = "write it with `scalefold describe-system`; its name is that of the results folder"
        yield Problem(f"systems/{name}.json", "missing: the package checker stops with a traceback", fix)
    for name, contents in package.systems.items():
        yield from _description_problems(f"systems/{name}.json", contents, is_used=name in names)


def _description_problems(where: str, contents: dict[str, Any], is_used: bool) -> Iterator[Problem]:
    missing = [f for f in FIELDS if f not in contents]
    if missing:
        yield Problem(where, f"missing fields: {', '.join(missing)}", "add them; texts may be empty where optional")
    for name, value in contents.items():
        if not isinstance(value, str) and name != "other_software_stack":
            yield Problem(where, f"{name} is {value!r}: numbers make the system checker crash", f'write "{value}"')
    if contents.get("division") not in ("closed", "open"):
        message = f"division is {contents.get('division')!r}: anything but closed disables seed and convergence checks"
        yield Problem(where, message, 'write "closed"')
    if empty := [f for f in unfilled(contents) if f in contents]:
        yield Problem(where, f"still empty: {', '.join(empty)}", "a person must fill them in")
    for name in ("number_of_nodes", "accelerators_per_node", "host_processors_per_node"):
        if name in contents and not str(contents[name]).isdigit():
            yield Problem(where, f"{name} is {contents[name]!r}, the summarizer needs a number", 'write e.g. "8"')
    if not is_used:
        yield Problem(where, "no results for this system", "add results or remove the file", "note")


@rule
def every_log_is_valid(package: Package) -> Iterator[Problem]:
    """The official tools accept one broken file as the dropped worst run; only a run that did not converge may be."""
    for folder in package.folders:
        for verdict in folder.verdicts:
            where = package.name(Path(verdict.file))
            if verdict.kind == "valid" or _only_failed_to_converge(verdict):
                continue
            yield Problem(where, verdict.headline, "see `scalefold check` on this file; run it again if need be")


def _only_failed_to_converge(verdict: Verdict) -> bool:
    """An honest failure: status aborted, target never met, nothing else wrong."""
    others = [f for f in verdict.findings if f.rule != "status"]
    official = [m for m in verdict.official_otherwise if "eval_accuracy" not in m]
    return not verdict.differences and not others and not official


@rule
def failed_runs_are_within_the_rules(package: Package) -> Iterator[Problem]:
    """One run of ten may fail to converge; a throughput instance that failed is pruned."""
    for folder in package.folders:
        failed = [log.file.name for log in folder.logs if log.status != "success"]
        if folder.scaling == "strong" and len(failed) == 1:
            message = f"{failed[0]} did not converge and stands as the slowest run"
            yield Problem(package.name(folder.path), message, "nothing to do; reviewers will look", "note")
        elif failed:
            message = f"{len(failed)} runs did not converge: {', '.join(failed)}"
            fix = "move to pruned_results" if folder.scaling == "weak" else "at most one of ten; run the series again"
            yield Problem(package.name(folder.path), message, fix)


@rule
def runs_differ_from_each_other(package: Package) -> Iterator[Problem]:
    """The seed checker compares seed and line; equal seeds from two lines, or one run twice, pass it."""
    for folder in package.folders:
        for key, what in (("seed", "seed"), ("run_start", "run_start stamp")):
            seen: dict[str, str] = {}
            for log in folder.logs:
                event = log.first(key)
                value = "" if event is None else str(event.value if key == "seed" else event.time_ms)
                is_copy = value and value in seen and (key == "seed" or folder.scaling == "strong")
                if is_copy:
                    message = f"same {what} {value} as {seen[value]}"
                    yield Problem(package.name(log.file), message, "every run has its own entropy and its own log")
                seen.setdefault(value, log.file.name)


@rule
def one_directory_is_one_experiment(package: Package) -> Iterator[Problem]:
    """Batch size, scale, precision, loader, organization, platform and division are those of all runs (trap 15)."""
    keys = ("global_batch_size", "gradient_accumulation_steps", "number_of_nodes", "accelerators_per_node")
    keys += ("number_of_ranks", "precision", "initial_training_dataloader_type", "submission_org")
    keys += ("submission_platform", "submission_division", "opt_base_learning_rate")
    for folder in package.folders:
        for key in keys:
            values = {json.dumps(log.value(key)) for log in folder.logs}
            if len(values) > 1:
                message = f"{key} differs among the runs: {', '.join(sorted(values))}"
                yield Problem(package.name(folder.path), message, "submit runs of one configuration")


@rule
def logs_agree_with_the_system(package: Package) -> Iterator[Problem]:
    """Division, and node and accelerator counts, which the summary takes from the JSON file alone."""
    for folder in package.folders:
        contents = package.systems.get(folder.system)
        if contents is None or not folder.logs:
            continue
        where, log = package.name(folder.path), folder.logs[0]
        if log.value("submission_division") != contents.get("division"):
            message = f"division {log.value('submission_division')} in logs, {contents.get('division')} in the JSON"
            yield Problem(where, message, "make them equal")
        yield from _scale_problems(where, folder, log, contents)


def _scale_problems(where: str, folder: ResultFolder, log: Log, contents: dict[str, Any]) -> Iterator[Problem]:
    nodes, gpus = log.value("number_of_nodes"), log.value("accelerators_per_node")
    total = str(contents.get("number_of_nodes"))
    if str(contents.get("accelerators_per_node")) != str(gpus):
        message = f"accelerators_per_node {gpus} in logs, {contents.get('accelerators_per_node')} in the JSON"
        yield Problem(where, message, "make them equal")
    if folder.scaling == "strong" and total != str(nodes):
        message = f"number_of_nodes {nodes} in logs, {total} in the JSON: the system would be listed at a wrong size"
        yield Problem(where, message, "give each scale its own system name and JSON")
    if folder.scaling == "weak" and total.isdigit() and isinstance(nodes, int) and int(total) < nodes:
        yield Problem(where, f"an instance has {nodes} nodes, the system {total}", "correct the JSON")


@rule
def throughput_stands_beside_time_to_train(package: Package) -> Iterator[Problem]:
    """A throughput result needs a time-to-train result of the same benchmark."""
    weak = [folder for folder in package.folders if folder.scaling == "weak"]
    if weak and not any(folder.scaling == "strong" for folder in package.folders):
        message = "throughput result without a time-to-train result"
        yield Problem(package.name(weak[0].path), message, f"add results/<system>/strong/{BENCHMARK}")


@rule
def source_is_shipped(package: Package) -> Iterator[Problem]:
    """Reviewers must see the source, how to run it, and the lines that the logs name."""
    base = package.root / "benchmarks" / BENCHMARK
    implementations = [p for p in sorted(base.glob("implementations/*")) if p.is_dir()]
    if not implementations:
        yield Problem(f"benchmarks/{BENCHMARK}/implementations", "no source", "ship the source that ran")
        return
    for folder in implementations:
        if not any(folder.glob("README*")):
            yield Problem(package.name(folder), "no README", "say how to prepare data and run")
    yield from _line_problems(package, base)


def _line_problems(package: Package, base: Path) -> Iterator[Problem]:
    """Call sites in the logs that no shipped file has."""
    lengths: dict[str, list[tuple[str, int]]] = {}
    for file in base.rglob("*.py"):
        with file.open("rb") as handle:
            lengths.setdefault(file.name, []).append((file.as_posix(), sum(1 for _ in handle)))
    sites = {_site(event) for folder in package.folders for log in folder.logs for event in log.events}
    for name, number in sorted(site for site in sites if site):
        tail = "/".join(Path(name).parts[-2:])
        matches = [length for path, length in lengths.get(Path(name).name, []) if path.endswith(tail)]
        if not any(length >= number for length in matches):
            message = f"logs name {name}:{number}, which the shipped source does not have"
            yield Problem(f"benchmarks/{BENCHMARK}", message, "ship the source that wrote the logs", "note")


def _site(event: Any) -> tuple[str, int] | None:
    name, number = event.metadata.get("file"), event.metadata.get("lineno")
    return (name, number) if isinstance(name, str) and isinstance(number, int) else None
