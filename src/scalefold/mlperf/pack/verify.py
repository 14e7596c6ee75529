"""Judge a submission package: all official tools on a throw-away copy, our own rules, scores, and what to fix.

The copy matters: package checker and summarizer write or delete ``scaling.json`` in the result folders. No bypass flag
is ever passed.
"""

import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from scalefold.errors import LogError
from scalefold.mlperf.judge.official_tools import ToolResult, run_tools
from scalefold.mlperf.judge.score import Score, score_folder
from scalefold.mlperf.log.keys import BENCHMARK, RULESET, USAGE
from scalefold.mlperf.pack.package_lint import Package, Problem, lint_package

Result = Literal["pass", "fail", "note"]
_SCORE_TOLERANCE_MIN = 1e-6


@dataclass(frozen=True)
class Row:
    """One line of the verdict table. A row on the whole package names all its benchmarks and systems."""

    check: str
    where: str
    result: Result
    detail: str
    fix: str = ""
    benchmark: str = ""
    system: str = ""


@dataclass(frozen=True)
class PackageVerdict:
    """Everything known about a package. Exit code 0: submit it; 1: something fails."""

    folder: str
    rows: tuple[Row, ...]
    scores: tuple[Score, ...]

    @property
    def exit_code(self) -> int:
        """0 when no row fails, else 1."""
        return int(any(row.result == "fail" for row in self.rows))

    @property
    def failures(self) -> list[Row]:
        """The rows that fail."""
        return [row for row in self.rows if row.result == "fail"]

    def text(self) -> str:
        """Table, scores and repairs for a terminal."""
        header = ("check", "result", "benchmark", "system", "where", "detail")
        cells = [(r.check, r.result, r.benchmark, r.system, r.where, r.detail) for r in self.rows]
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[5]]) for r in [header, *cells]]
        lines += ["", *(score.text() for score in self.scores)]
        fixes = [
            f"{i}. {row.benchmark} on {row.system}: {row.where}: {row.detail}\n   {row.fix}"
            for i, row in enumerate(self.failures, start=1)
        ]
        ready = "ready to submit" if not fixes else f"{len(fixes)} to fix:"
        return "\n".join([*lines, "", f"{self.folder}: {ready}", *fixes])

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON-ready data."""
        rows = [asdict(row) for row in self.rows]
        scores = [score.as_dict() for score in self.scores]
        return {"folder": self.folder, "exit_code": self.exit_code, "rows": rows, "scores": scores}


def verify_package(org_dir: str | Path) -> PackageVerdict:
    """Run every check on an organization folder; the folder itself stays untouched.

    Raises:
        LogError: the folder is no package (no ``results``), or the official tools cannot run.
    """
    return verify_packages([org_dir])[0]


def verify_packages(org_dirs: Sequence[str | Path]) -> list[PackageVerdict]:
    """Verdicts of several organization folders, with one start of the official tools for all of them."""
    folders = [Path(folder) for folder in org_dirs]
    for folder in folders:
        if not (folder / "results").is_dir():
            raise LogError(f"{folder}: no results folder; an organization folder has results, systems and benchmarks")
    with tempfile.TemporaryDirectory(prefix="mlperf-verify-") as scratch:
        copies = [_copy(folder, Path(scratch) / str(i)) for i, folder in enumerate(folders)]
        calls = [_calls(copy) for copy in copies]
        answers = iter(run_tools([call for of_one in calls for call in of_one]))
        grouped = [list(islice(answers, len(of_one))) for of_one in calls]
        return [_judge(*each) for each in zip(folders, copies, grouped, strict=True)]


def _judge(org_dir: Path, copy: Path, results: list[ToolResult]) -> PackageVerdict:
    package = Package(org_dir)
    own = lint_package(package)
    scores = [score for folder in package.folders if (score := _score(folder.path))]
    rows = _official_rows(copy, results)
    rows += _compare_scores(_summary_file(copy), scores)
    rows += [_own_row(problem) for problem in own] or [Row("own rules", ".", "pass", "nothing found")]
    rows += [row for score in scores for row in _score_rows(score, org_dir)]
    return PackageVerdict(str(org_dir), tuple(_named(row, package.benchmarks_of) for row in rows), tuple(scores))


def _named(row: Row, benchmarks_of: dict[str, list[str]]) -> Row:
    """The row with its benchmark and system, as far as its place tells them, else all that it may concern."""
    kind, *parts = row.where.split("/")
    every = sorted({name for names in benchmarks_of.values() for name in names})
    benchmarks, systems = every, sorted(benchmarks_of)
    if kind == "results" and parts:
        systems = [parts[0]]
        benchmarks = [name for name in parts[1:3] if name in (*every, BENCHMARK)] or benchmarks_of.get(parts[0], every)
    elif kind == "systems" and parts:
        systems = [parts[0].removesuffix(".json")]
        benchmarks = benchmarks_of.get(systems[0], every)
    elif kind == "benchmarks" and parts:
        benchmarks = [parts[0]]
        known = [name for name in benchmarks_of if parts[0] in benchmarks_of[name]]
        systems = [name for name in known if name in parts[1:3]] or sorted(known)
    return replace(row, benchmark=", ".join(benchmarks) or BENCHMARK, system=", ".join(systems) or "no system")


def _copy(org_dir: Path, scratch: Path) -> Path:
    copy = scratch / org_dir.resolve().name
    shutil.copytree(org_dir, copy, symlinks=True)
    _remove_tool_files(copy)
    return copy


def _remove_tool_files(copy: Path) -> None:
    """What checkers wrote before, and files that ask them to look away (both are reported by our own rules)."""
    for name in ("scaling.json", "package_checker_params"):
        for file in copy.rglob(name):
            file.unlink()


def _score(folder: Path) -> Score | None:
    try:
        return score_folder(folder)
    except LogError:
        return None


def _own_row(problem: Problem) -> Row:
    return Row(
        "own rules", problem.where, "fail" if problem.severity == "error" else "note", problem.message, problem.fix
    )


def _score_rows(score: Score, org_dir: Path) -> Iterable[Row]:
    """What the score itself says: problems of the series, and scaling that the committee may apply."""
    where = Path(score.folder).relative_to(org_dir).as_posix()
    for problem in score.problems:
        yield Row("score", where, "fail", problem, "see the rules for results, section 7.3")
    convergence = score.convergence
    if convergence and convergence.status == "pass" and convergence.factor > 1 and score.scaled_minutes:
        detail = f"converges faster than the reference: the committee may scale by {convergence.factor:.4f}"
        yield Row("score", where, "note", detail)


# The official tools ----------------------------------------------------------------------------------------------


def _summary_file(copy: Path) -> Path:
    return copy.parent / "summary.csv"


def _calls(copy: Path) -> list[tuple[str, list[str]]]:
    systems = sorted(copy.glob("systems/*.json"))
    folders = sorted(p for kind in ("strong", "weak") for p in copy.glob(f"results/*/{kind}/{BENCHMARK}"))
    calls: list[tuple[str, list[str]]] = [("repo_checker", [str(copy), USAGE, RULESET])]
    calls += [("system_desc_checker", [str(file), USAGE, RULESET]) for file in systems]
    calls += [("rcp_checker", [str(f), "--rcp_usage", USAGE, "--rcp_version", RULESET]) for f in folders]
    calls += [("result_summarizer", [str(copy), USAGE, RULESET, "--csv", str(_summary_file(copy))])]
    calls += [("package_checker", [str(copy), USAGE, RULESET, "--werror"])]
    return calls


def _official_rows(copy: Path, results: list[ToolResult]) -> list[Row]:
    rows = []
    for result in results:
        target = Path(result.arguments[0])
        where = "." if target == copy else target.relative_to(copy).as_posix()
        rows.append(_crash_row(result, where) if result.crashed else _JUDGES[result.module](result, where))
    return rows


def _crash_row(result: ToolResult, where: str) -> Row:
    name = result.module.replace("_", " ")
    return Row(name, where, "fail", f"stopped with {result.crashed}", "repair what our own rules name for this folder")


def _judge_repo(result: ToolResult, where: str) -> Row:
    if "ALL CHECKS PASSED" in result.output:
        return Row("repo checker", where, "pass", "names, sizes and links")
    reason = _relative(" ".join(result.errors), result.arguments[0])
    fix = "rename files with spaces or leading dots, drop files above 50 MB and broken links"
    return Row("repo checker", where, "fail", reason, fix)


def _judge_system(result: ToolResult, where: str) -> Row:
    if "System description checker passed" in result.output:
        return Row("system checker", where, "pass", "33 fields present")
    return Row("system checker", where, "fail", " ".join(result.errors), "add the missing fields")


def _judge_rcp(result: ToolResult, where: str) -> Row:
    mean, floor = _number(r"'RCP Mean': ", result.output), _number(r"'Min Epochs': ", result.output)
    submission = _number(r"Submission mean epochs: ", result.output)
    figures = ""
    if mean and floor and submission:
        factor = max(1.0, mean / submission)
        figures = f": {submission:,.0f} samples, reference {mean:,.0f}, floor {floor:,.0f}, factor {factor:.4f}"
    if result.status == 0 and "RCP test PASSED" in result.output:
        return Row("rcp checker", where, "pass", f"convergence{figures}")
    reason = (result.line_with("RCP test FAILED") or "failed").removeprefix("ERROR - ").split(", RCP test")[0]
    fix = "do not tune for fewer samples than the floor; use a batch size of at most 256 that is equal in all runs"
    return Row("rcp checker", where, "fail", f"{reason}{figures}", fix)


def _judge_package(result: ToolResult, where: str) -> Row:
    if "PACKAGE CHECKER FOUND NO ERRORS, SUCCESS" in result.output:
        return Row("package checker", where, "pass", "no errors")
    reason = _relative("; ".join(_errors_by_folder(result.output)) or "errors", result.arguments[0])
    return Row("package checker", where, "fail", reason[:600], "repair the files and folders it names")


def _errors_by_folder(output: str) -> list[str]:
    """Errors of the package checker, each preceded by the benchmark and the system that it was at."""
    found: dict[str, list[str]] = {}
    system = benchmark = ""
    for line in output.splitlines():
        if match := re.search(r"^INFO -\s+(System|Benchmark) (\S+)$", line):
            system, benchmark = (match[2], "") if match[1] == "System" else (system, match[2])
        elif "Running compliance checks in dir" in line:
            system = benchmark = ""
        elif line.startswith("ERROR - "):
            place = f"{benchmark} on {system}: " if system else ""
            found.setdefault(place, []).append(line.removeprefix("ERROR - ").strip())
    return [f"{place}{' '.join(errors)}" for place, errors in found.items()]


def _judge_summary(result: ToolResult, where: str) -> Row:
    critical = [line for line in result.errors if "CRITICAL" in line]
    if critical:
        return Row("summarizer", where, "fail", critical[0], "too many runs do not comply or do not converge")
    return Row("summarizer", where, "pass", "summary written")


_JUDGES = {
    "repo_checker": _judge_repo,
    "system_desc_checker": _judge_system,
    "rcp_checker": _judge_rcp,
    "package_checker": _judge_package,
    "result_summarizer": _judge_summary,
}


def _number(before: str, text: str) -> float | None:
    match = re.search(before + r"(?:np\.float64\()?([\d.eE+]+)", text)
    return float(match[1]) if match else None


def _relative(text: str, folder: str) -> str:
    return text.replace(f"{folder}/", "")


def _compare_scores(file: Path, scores: list[Score]) -> Iterable[Row]:
    """The summarizer's unscaled scores against ours."""
    official = _summary_minutes(file)
    for score in scores:
        system = Path(score.folder).parents[1].name
        minutes = official.get(score.scaling, [])
        where = f"results/{system}/{score.scaling}/{BENCHMARK}"
        if score.minutes is None:
            yield Row("summarizer", where, "fail", "no score", "see the problems of this folder")
        elif not any(abs(m - score.minutes) < _SCORE_TOLERANCE_MIN for m in minutes):
            found = ", ".join(f"{m:.4f}" for m in minutes) or "none"
            detail = f"official score {found}, ours {score.minutes:.4f} min"
            yield Row("summarizer", where, "fail", detail, "a run counts for one of the two only: see the other rows")
        else:
            yield Row("summarizer", where, "pass", f"official score {score.minutes:.4f} min equals ours")


def _summary_minutes(file: Path) -> dict[str, list[float]]:
    """OpenFold minutes in the summary: strong and weak tables follow each other in one CSV, each with its header."""
    found: dict[str, list[float]] = {"strong": [], "weak": []}
    columns = {BENCHMARK: "strong", f"{BENCHMARK}:time_to_train_all": "weak"}
    header: list[str] = []
    for row in csv.reader(file.read_text(encoding="utf-8").splitlines()) if file.exists() else []:
        if row and row[0] == "division":
            header = row
            continue
        for name, value in zip(header, row, strict=False):
            if name in columns and value:
                found[columns[name]].append(float(value))
    return found


def dump(verdict: PackageVerdict, file: Path) -> None:
    """Write the verdict as JSON."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(verdict.as_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
