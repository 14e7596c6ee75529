"""Our own rules for a whole submission package: what the official tools let through or die on.

Each rule is a function from a :class:`Package` to problems; every problem says what to do. Here: what has to lie where.
Whether runs are what they claim to be is asked in :mod:`scalefold.mlperf.pack.package_runs`, whether the facts agree
with each other in :mod:`scalefold.mlperf.pack.package_facts`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalefold.mlperf.judge.check import Verdict
from scalefold.mlperf.log.keys import BENCHMARK
from scalefold.mlperf.pack import package_facts, package_runs
from scalefold.mlperf.pack.package_tree import Package, Problem, Rule
from scalefold.mlperf.pack.system_desc import FIELDS, unfilled

_ALLOWED_BESIDE_RESULTS = ("pruned_results", "power", "package_checker_params")
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES.append(function)
    return function


def lint_package(package: Package) -> list[Problem]:
    """All problems of all rules."""
    rules = [*RULES, *package_runs.RULES, *package_facts.RULES]
    problems = [problem for check in rules for problem in check(package)]
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
        asked = " ".join(file.read_text(encoding="utf-8", errors="replace").split()) if file.is_file() else ""
        yield Problem(package.name(file), f"asks checkers to bypass: {asked}", fix)


@rule
def systems_are_described(package: Package) -> Iterator[Problem]:
    """One JSON file per result system, all 33 fields, texts, exactly "closed", nothing essential empty."""
    names = set(package.benchmarks_of)
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
def throughput_stands_beside_time_to_train(package: Package) -> Iterator[Problem]:
    """A throughput result needs a time-to-train result of the same benchmark."""
    weak = [folder for folder in package.folders if folder.scaling == "weak"]
    if weak and not any(folder.scaling == "strong" for folder in package.folders):
        message = "throughput result without a time-to-train result"
        yield Problem(package.name(weak[0].path), message, f"add results/<system>/strong/{BENCHMARK}")


@rule
def links_stay_inside(package: Package) -> Iterator[Problem]:
    """A package is what lies in its folder: a link to elsewhere breaks where reviewers unpack it."""
    root = package.root.resolve()
    for folder, folders, files in os.walk(package.root):
        for path in (Path(folder) / name for name in (*folders, *files)):
            if not path.is_symlink():
                continue
            target = path.resolve()
            if not target.is_relative_to(root) or not target.exists() or os.path.isabs(os.readlink(path)):
                message = f"is a link to {os.readlink(path)}, which is not in the package"
                yield Problem(package.name(path), message, "put the file itself into the package")
            elif "results" in path.relative_to(package.root).parts:
                message = f"is a link to {os.readlink(path)}: one result in two places"
                yield Problem(package.name(path), message, "every result is a file of its own")


@rule
def source_is_shipped(package: Package) -> Iterator[Problem]:
    """Reviewers must see the source, how to run it, under which licence, and the lines that the logs name."""
    if not package.implementations:
        yield Problem(f"benchmarks/{BENCHMARK}/implementations", "no source", "ship the source that ran")
        return
    for folder in package.implementations:
        if not any(folder.glob("README*")):
            yield Problem(package.name(folder), "no README", "say how to prepare data and run")
    for name, what in (("README", "what is submitted"), ("LICENSE", "under which licence the source is")):
        if not any(package.root.glob(f"{name}*")):
            message = f"no {name} in the organization's folder"
            yield Problem(".", message, f"say {what}", "error" if package.is_ours else "note")
    yield from _line_problems(package)


@rule
def every_system_can_be_run(package: Package) -> Iterator[Problem]:
    """A script that runs and times, for each system; of our own packages, all that ``scalefold pack`` writes."""
    for system in sorted({folder.system for folder in package.folders}):
        folder = package.system_folder(system)
        where = package.name(folder) if folder else f"benchmarks/{BENCHMARK}/{system}"
        if not package.is_ours:
            places = [folder] if folder else package.implementations
            if not any(_is_run_script(file) for place in places for file in place.rglob("*")):
                yield Problem(where, "no script that runs and times this system", "ship run_and_time.sh")
            continue
        names = ("README*", "setup*", "init_datasets*", "run_and_time*", f"{system}.json")
        missing = [name.rstrip("*") for name in names if folder is None or not any(folder.glob(name))]
        if missing:
            fix = "pack again, or put back what `scalefold pack` wrote for this system"
            yield Problem(where, f"missing: {', '.join(missing)}", fix)


def _is_run_script(file: Path) -> bool:
    return file.suffix in (".sh", ".bash", ".sub", ".sbatch", ".slurm", ".pbs") or file.name.startswith("run")


def _line_problems(package: Package) -> Iterator[Problem]:
    """Call sites in the logs that no shipped file of that name has.

    Logs name files as the machine knew them, in folders that need not be those of the package.
    """
    lengths = _source_lengths(package.root / "benchmarks")
    for folder in package.folders:
        sites = {_site(event) for log in folder.logs for event in log.events} - {None}
        longest: dict[str, int] = {}
        for file, number in filter(None, sites):
            longest[file] = max(number, longest.get(file, 0))
        for file, number in sorted(longest.items()):
            shipped = lengths.get(Path(file).name)
            if shipped is None or shipped < number:
                has = "no file of that name" if shipped is None else f"{shipped} lines of it at most"
                message = f"logs name {file}:{number}, and the shipped source has {has}"
                yield Problem(package.name(folder.path), message, "ship the source that wrote the logs", "note")


def _source_lengths(folder: Path) -> dict[str, int]:
    """Lines of the longest Python file of each name, in linked folders too."""
    lengths: dict[str, int] = {}
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.endswith(".py") and (file := Path(place) / name).is_file():
                lengths[name] = max(lengths.get(name, 0), len(file.read_bytes().splitlines()))
    return lengths


def _site(event: Any) -> tuple[str, int] | None:
    name, number = event.metadata.get("file"), event.metadata.get("lineno")
    return (name, number) if isinstance(name, str) and isinstance(number, int) else None
