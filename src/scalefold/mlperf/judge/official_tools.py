"""Run the official MLPerf tools as their command lines do, and hand back status and text.

All tools of one call share a single child interpreter (importing scipy and pandas takes longer than most checks), in a
scratch folder where they may drop their log files. Several of them exit with 0 on errors: judge the text.
"""

import contextlib
import io
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from scalefold.errors import LogError
from scalefold.mlperf.log.keys import TOKEN

TIMEOUT_S = 1800


@dataclass(frozen=True)
class ToolResult:
    """One tool's run: its module below ``mlperf_logging``, arguments, exit status and all it printed."""

    module: str
    arguments: tuple[str, ...]
    status: int
    output: str

    @property
    def crashed(self) -> str | None:
        """The last line of a traceback, or None."""
        if "Traceback (most recent call last)" not in self.output:
            return None
        return self.output.strip().splitlines()[-1]

    @property
    def errors(self) -> list[str]:
        """Lines that the tool marked as errors or critical."""
        marks = ("ERROR - ", "ERROR: ", "CRITICAL ERROR", "** CRITICAL")
        return [line.strip() for line in self.output.splitlines() if line.strip().startswith(marks)]

    def line_with(self, text: str) -> str | None:
        """The first output line that holds ``text``."""
        return next((line.strip() for line in self.output.splitlines() if text in line), None)


def run_tools(calls: Sequence[tuple[str, Sequence[str]]]) -> list[ToolResult]:
    """Run each ``python -m mlperf_logging.<module> <arguments>``; paths in the arguments must be absolute.

    Raises:
        LogError: the tools are not installed or the child interpreter dies.
    """
    request = json.dumps([[module, list(arguments)] for module, arguments in calls])
    with tempfile.TemporaryDirectory(prefix="mlperf-tools-") as scratch:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-m", "scalefold.mlperf.judge.official_tools"],
            input=request,
            capture_output=True,
            text=True,
            cwd=scratch,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LogError(f"the official MLPerf tools cannot run: {last}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [ToolResult(m, tuple(a), status, out) for (m, a), (status, out) in zip(calls, answers, strict=True)]


def fast_yaml_loader() -> Any:
    """The C twin of the loader with which the tools read their rules once per log: same result, faster."""
    return getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def quick_sub(sub: Callable[..., str]) -> Callable[..., str]:
    """``re.sub``, but for what the tools do to every line: to cut what stands before its last token takes them time
    that grows with the square of the line's length.
    """

    def cut(pattern: Any, replacement: Any, string: Any, *options: Any, **named: Any) -> str:
        if (pattern, replacement) != (f".*{TOKEN}", TOKEN) or options or named:
            return sub(pattern, replacement, string, *options, **named)
        lines = (line.rpartition(replacement) for line in string.split("\n"))
        return "\n".join(token + rest for _, token, rest in lines)

    return cut


def _run_one(module: str, arguments: list[str]) -> tuple[int, str]:
    """Run one module as ``__main__`` with its own logging set-up."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    output = io.StringIO()
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(f"mlperf_logging.{module}", run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            status = 1
            traceback.print_exc()
    return status, output.getvalue()


def main() -> None:
    """Child process: calls as JSON on standard input, answers as one JSON line on standard output."""
    yaml.BaseLoader = fast_yaml_loader()
    re.sub = quick_sub(re.sub)
    answers = [_run_one(module, arguments) for module, arguments in json.load(sys.stdin)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
