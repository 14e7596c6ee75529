"""An organization folder, read once: result folders with logs and verdicts, system descriptions, system folders."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from scalefold.errors import LogError
from scalefold.mlperf.judge.check import Verdict, check_log
from scalefold.mlperf.judge.score import result_files
from scalefold.mlperf.log.keys import BENCHMARK
from scalefold.mlperf.log.logfile import Log, read_log

#: Name of our own source below ``benchmarks/openfold/implementations``.
IMPLEMENTATION = "scalefold"

Severity = Literal["error", "note"]


@dataclass(frozen=True)
class Problem:
    """What is wrong where (path inside the package), and what to do; notes do not fail a package."""

    where: str
    message: str
    fix: str
    severity: Severity = "error"


@dataclass(frozen=True)
class ResultFolder:
    """One ``results/<system>/<scaling>/openfold`` folder: its logs, those of pruned instances, all their verdicts."""

    path: Path
    system: str
    scaling: str
    logs: tuple[Log, ...]
    verdicts: tuple[Verdict, ...]
    pruned: tuple[Log, ...] = ()


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
                contents = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(contents, dict):
                    raise ValueError("not an object")
                found[file.stem] = contents
            except (OSError, ValueError) as error:
                self.unreadable.append(Problem(self.name(file), f"not a JSON object: {error}", "repair the file"))
        return found

    @cached_property
    def benchmarks_of(self) -> dict[str, list[str]]:
        """Benchmarks, ours and others, with results of each system."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.root.glob("results/*/*/*")):
            names = found.setdefault(path.parents[1].name, [])
            if path.is_dir() and path.parent.name in ("strong", "weak") and path.name not in names:
                names.append(path.name)
        return found

    @property
    def source(self) -> Path:
        """Folder of what was run: implementations, and a folder per system."""
        return self.root / "benchmarks" / BENCHMARK

    @property
    def implementations(self) -> list[Path]:
        """Folders of source."""
        return [p for p in sorted(self.source.glob("implementations/*")) if p.is_dir()]

    @property
    def is_ours(self) -> bool:
        """Whether it ships this source, so that it has everything that ``scalefold pack`` writes."""
        return any(p.name == IMPLEMENTATION for p in self.implementations)

    def system_folder(self, system: str) -> Path | None:
        """Where a system's scripts and configuration lie, in either of the two usual places."""
        places = [self.source / system, self.source / "implementations" / system]
        return next((place for place in places if place.is_dir()), None)

    def name(self, path: Path) -> str:
        """Path inside the package."""
        return path.relative_to(self.root).as_posix()

    def _folder(self, path: Path) -> ResultFolder:
        logs, pruned, verdicts = [], [], []
        for file in [*result_files(path), *result_files(path / "pruned_results")]:
            try:
                log, verdict = read_log(file), check_log(file)
            except LogError as error:
                self.unreadable.append(Problem(self.name(file), str(error), "replace it by the run's log"))
                continue
            verdicts.append(verdict)
            (logs if file.parent == path else pruned).append(log)
        names = path.parents[1].name, path.parent.name
        return ResultFolder(path, *names, tuple(logs), tuple(verdicts), tuple(pruned))


Rule = Callable[[Package], Iterator[Problem]]
