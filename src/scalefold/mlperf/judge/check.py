"""Judge one log: the official compliance checker, our own rules, and whether the run is the benchmark at all.

Exit codes of a verdict: 0 valid closed-division log; 3 well-formed log of a configuration that is not the benchmark
(the differing keys are listed); 1 invalid, or the log of another MLPerf benchmark; 2 no log that could be read.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from scalefold.errors import LogError
from scalefold.mlperf.judge.lint import Finding, has_type, lint, run_begins
from scalefold.mlperf.judge.official_tools import fast_yaml_loader
from scalefold.mlperf.log.events import merge_parts
from scalefold.mlperf.log.keys import BENCHMARK, EXPECTED, KEYS, RULESET, TARGET_LDDT, USAGE
from scalefold.mlperf.log.logfile import Log, read_log
from scalefold.textfile import is_finite_number

Kind = Literal["valid", "non_benchmark", "invalid", "other_benchmark", "unreadable"]
#: From best to worst, with the exit status of each.
EXIT_CODES: dict[Kind, int] = {"valid": 0, "non_benchmark": 3, "invalid": 1, "other_benchmark": 1, "unreadable": 2}
_CRASH = "the checker stopped with"
_CONFIG = f"{USAGE}_{RULESET}/common.yaml"
_HEADLINES: dict[Kind, str] = {
    "valid": "valid closed-division log",
    "non_benchmark": "well-formed log of a non-benchmark configuration",
    "invalid": "invalid",
    "other_benchmark": "another benchmark",
    "unreadable": "unreadable",
}


@dataclass(frozen=True)
class Difference:
    """A key whose legal value is not the closed division's."""

    key: str
    logged: Any
    expected: Any


@dataclass(frozen=True)
class Verdict:
    """What a log is, and why.

    ``official`` holds the official checker's complaints about the log as it is; ``official_otherwise`` those that
    remain when the differing keys are given their benchmark values.
    """

    file: str
    kind: Kind
    differences: tuple[Difference, ...]
    findings: tuple[Finding, ...]
    official: tuple[str, ...]
    official_otherwise: tuple[str, ...]
    minutes: float | None
    samples_to_converge: float | None

    @property
    def exit_code(self) -> int:
        """0 valid, 3 well-formed but not the benchmark, 1 invalid or another benchmark's, 2 unreadable."""
        return EXIT_CODES[self.kind]

    @property
    def reasons(self) -> list[str]:
        """Every reason why the log cannot be submitted: official ones, our errors, what only a submission needs."""
        official = [f"official checker: {text}" for text in self.official_otherwise]
        ours = [_describe(f) for f in sorted(self.findings, key=lambda finding: finding.severity != "error")]
        died = any(text.startswith(_CRASH) for text in self.official_otherwise)
        return ours + official if died else official + ours

    @property
    def headline(self) -> str:
        """One line."""
        if self.kind == "non_benchmark":
            keys = ", ".join(d.key for d in self.differences)
            noun = "key differs" if len(self.differences) == 1 else "keys differ"
            return f"{_HEADLINES[self.kind]}; {len(self.differences)} {noun}: {keys}"
        if self.kind == "valid":
            return _HEADLINES[self.kind]
        if self.kind != "invalid":
            return self.reasons[0]
        reasons = self.reasons
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return f"{_HEADLINES[self.kind]}: {reasons[0]}{more}"

    def text(self) -> str:
        """The verdict as lines and tables for a terminal."""
        lines = [f"{self.file}: {self.headline}"]
        if self.kind in ("other_benchmark", "unreadable"):
            return lines[0]
        if self.minutes is not None:
            samples = f"{self.samples_to_converge:,}" if is_finite_number(self.samples_to_converge) else "-"
            lines.append(f"  time to train {self.minutes:.3f} min, samples to converge {samples}")
        official = "passes" if not self.official else f"{len(self.official)} complaint(s)"
        lines.append(f"  official checker ({USAGE} {RULESET}, warnings as errors): {official}")
        if self.differences:
            rows = [(d.key, _short(d.logged), _short(d.expected)) for d in self.differences]
            lines += _table(("key", "logged", "benchmark"), rows)
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON-ready data; a logged number that is not finite becomes its name as text."""
        fields = asdict(self)
        fields.update(exit_code=self.exit_code, headline=self.headline, reasons=self.reasons)
        return json.loads(json.dumps(fields, default=repr), parse_constant=str)


def check_log(path: str | Path) -> Verdict:
    """Read, judge and classify one result file; parts of it that a crashed run left are joined first.

    Raises:
        LogError: the file cannot be read or is no MLPerf log.
    """
    if not Path(path).exists() and any(Path(path).parent.glob(f"{Path(path).name}.*.part")):
        merge_parts(path)  # the run ended before it could
    log = read_log(path)
    if (other := other_benchmark(log)) is not None:
        return _unjudged(path, "other_benchmark", f"a log of {other}; only logs of {BENCHMARK} are judged here")
    findings, differing = lint(log), differences(log)
    official = official_messages(log.file)
    otherwise = official_messages(log.file, as_benchmark=log) if differing else official
    several = len(run_begins(log)) > 1
    if several:
        differing, otherwise = [], []  # the official complaints and the keys are those of several runs at once
    errors = [f for f in findings if f.severity == "error"]
    if otherwise or errors or (findings and not differing):
        kind: Kind = "invalid"
    else:
        kind = "non_benchmark" if differing else "valid"
    return Verdict(
        file=str(path),
        kind=kind,
        differences=tuple(differing),
        findings=tuple(findings),
        official=tuple(official),
        official_otherwise=tuple(otherwise),
        minutes=log.minutes if not several and log.first("run_start") and log.first("run_stop") else None,
        samples_to_converge=None if several else log.samples_to_converge,
    )


def judge_log(path: str | Path) -> Verdict:
    """:func:`check_log`, with a verdict on files that cannot be read as well."""
    try:
        return check_log(path)
    except LogError as error:
        return _unjudged(path, "unreadable", str(error).removeprefix(f"{path}: "))


def _unjudged(path: str | Path, kind: Kind, reason: str) -> Verdict:
    return Verdict(str(path), kind, (), (Finding(_HEADLINES[kind], reason),), (), (), None, None)


def other_benchmark(log: Log) -> str | None:
    """Name of the MLPerf HPC benchmark that the log is of, where that is not ours."""
    name = log.value("submission_benchmark")
    return name if isinstance(name, str) and name != BENCHMARK and name in _official_benchmarks() else None


@cache
def _official_benchmarks() -> frozenset[str]:
    """Benchmarks of the official rule set: those with rules of their own."""
    rules = resources.files("mlperf_logging.compliance_checker").joinpath(f"{USAGE}_{RULESET}")
    names = {file.name.removesuffix(".yaml").removeprefix("closed_") for file in rules.iterdir()}
    return frozenset(name for name in names if "_" not in name and name != "common")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first of those furthest from a valid log, in the order of :data:`EXIT_CODES`."""
    order = list(EXIT_CODES)
    return max(verdicts, key=lambda verdict: order.index(verdict.kind))


def differences(log: Log) -> list[Difference]:
    """Keys with a legal value that is not the closed division's, in the order of the log.

    Wrong types are no differences but errors. The open division counts as a difference: this check speaks of closed
    results only.
    """
    wanted = EXPECTED | {"submission_division": "closed"}
    found: dict[str, Difference] = {}
    for event in log.events:
        if event.key not in wanted or event.key in found or not has_type(KEYS[event.key], event.value):
            continue
        is_legal = not KEYS[event.key].choices or event.value in KEYS[event.key].choices
        if is_legal and event.value != wanted[event.key]:
            found[event.key] = Difference(event.key, event.value, wanted[event.key])
    return list(found.values())


def official_messages(file: Path, as_benchmark: Log | None = None) -> list[str]:
    """Complaints of the official compliance checker, warnings included; none means that it passes.

    With ``as_benchmark`` (the same log, parsed) the closed division's values replace the logged ones first, which
    shows what else is wrong with the log of a run that is not the benchmark.
    """
    from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser

    checker = mlp_compliance.make_checker(USAGE, RULESET, quiet=False, werror=True)
    with _official_tool():
        try:
            lines, broken = mlp_parser.parse_file(str(file), ruleset=RULESET)
            if as_benchmark is not None:
                lines = [_as_benchmark(line, as_benchmark) for line in lines]
            checker.check_loglines(lines, _CONFIG)
        except Exception as error:  # the checker dies on logs that it does not foresee: that is a verdict too
            return [f"{_CRASH} {type(error).__name__}: {error}"]
        finally:
            mlp_compliance.enqueued_configs.clear()
    messages = [f"line does not parse: {reason}" for _, reason in broken]
    return messages + [_shorten(m) for m in [*checker.overwritable.values(), *checker.not_overwritable]]


def _as_benchmark(line: Any, log: Log) -> Any:
    """The official parser's line with the benchmark's value; accuracies keep their side of the target."""
    wanted = EXPECTED | {"submission_division": "closed"}
    value = line.value["value"]
    if line.key in wanted:
        value = wanted[line.key]
    elif line.key == "eval_accuracy" and is_finite_number(value):
        target = log.value("target_avg_lddt_ca_value")
        value = TARGET_LDDT if is_finite_number(target) and target <= value <= 1 else min(value, TARGET_LDDT - 0.01)
    return line._replace(value={**line.value, "value": value})


@contextlib.contextmanager
def _official_tool() -> Iterator[None]:
    """The official tools log through the root logger and configure it when they find it bare; neither leaks out.

    While they run, the C loader reads their rules.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()
    disabled = root.manager.disable
    loader = yaml.BaseLoader
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    yaml.BaseLoader = fast_yaml_loader()
    try:
        yield
    finally:
        yaml.BaseLoader = loader
        logging.disable(disabled)
        root.removeHandler(handler)


def _shorten(message: str) -> str:
    """Keep the key, the test and the value of a complaint; the checker prints its whole state after them."""
    check = re.match(r"CHECK for '(\w+)' failed in line (\d+):\n(.*)\nfailed test: (.*)", message)
    if check:
        key, number, _, test = check.groups()
        return f"{key} (MLLOG line {int(number) + 1}) fails {test.strip()}"
    return " ".join(message.split("\ncurrent context")[0].split())[:300]


def _describe(finding: Finding) -> str:
    where = f"line {finding.line}: " if finding.line else ""
    return f"{finding.rule}: {where}{finding.message}"


def _short(value: Any, width: int = 24) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    ]
