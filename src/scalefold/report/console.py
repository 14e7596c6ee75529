"""What a person sees while a run is going: one line per step, or a live table on a terminal."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table

from scalefold.report.record import EvalRow, StepRow


def format_duration(seconds: float) -> str:
    """3.2 -> ``3s``, 192 -> ``3m12s``, 7380 -> ``2h03m``, 200000 -> ``2d07h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_minutes(minutes: float) -> str:
    """``7.51 min`` for minutes, ``42.0 s`` below one, ``4h18m`` from two hours on."""
    if minutes < 1:
        return f"{minutes * 60:.1f} s"
    return f"{minutes:.2f} min" if minutes < 120 else format_duration(minutes * 60)


def step_line(
    row: StepRow,
    last_eval: EvalRow | None = None,
    target: float | None = None,
    eta_s: float | None = None,
    shown_terms: tuple[str, ...] = ("fape",),
) -> str:
    """One line for one step; what is not known is left out.

    ``step  840  loss 1.873  fape 0.412  lddt 0.781@800→0.800  412 ms (data 3 fwd 148 bwd 171)  71.4 GiB  eta 3m12s``
    """
    parts = [f"step {row.step:4d}", f"loss {row.loss:.3f}"]
    parts += [f"{name} {row.terms[name]:.3f}" for name in shown_terms if name in row.terms]
    parts += [lddt_text(last_eval, target)] if last_eval else []
    parts += [_time_text(row)] if row.step_ms is not None else []
    parts += [f"{row.peak_gib:.1f} GiB"] if row.peak_gib is not None else []
    parts += [f"eta {format_duration(eta_s)}"] if eta_s is not None else []
    return "  ".join(parts)


def lddt_text(last_eval: EvalRow, target: float | None) -> str:
    """``lddt 0.781@800→0.800``: value, step of the weights, target."""
    return f"lddt {last_eval.lddt_ca:.3f}@{last_eval.step}" + (f"→{target:.3f}" if target is not None else "")


def _phases(row: StepRow) -> Mapping[str, float]:
    data = {} if row.data_ms is None else {"data": row.data_ms}
    return {**data, **row.phases_ms}


def _time_text(row: StepRow) -> str:
    inner = " ".join(f"{name} {ms:.0f}" for name, ms in _phases(row).items())
    return f"{row.step_ms:.0f} ms" + (f" ({inner})" if inner else "")


class Progress:
    """Live progress of one run on rank 0.

    On a terminal a table that is redrawn at most four times a second; elsewhere plain lines, at most one per
    ``min_interval_s``. Evaluations and notes are always shown. ``expected_steps`` gives the time left; leave it None
    when nobody knows how many steps it takes.
    """

    def __init__(
        self,
        target: float | None = None,
        expected_steps: int | None = None,
        stream: TextIO | None = None,
        min_interval_s: float = 0.5,
        live: bool | None = None,
    ) -> None:
        self.target, self.expected_steps = target, expected_steps
        self._stream = stream if stream is not None else sys.stdout
        self._min_interval_s = min_interval_s
        self._last_print = -float("inf")
        self._recent_ms: list[float] = []
        self._last_eval: EvalRow | None = None
        self._last_step: StepRow | None = None
        self._held_back: StepRow | None = None
        self._live = self._start_live() if (self._stream.isatty() if live is None else live) else None

    def step(self, row: StepRow) -> None:
        """Show one step (or not, if the last one was shown a moment ago)."""
        self._last_step = row
        if row.step_ms is not None:
            self._recent_ms = [*self._recent_ms[-19:], row.step_ms]
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last_print >= self._min_interval_s:
            self._print_step(row)
        else:
            self._held_back = row

    def evaluation(self, row: EvalRow) -> None:
        """Show one evaluation result, behind the last step before it."""
        if self._held_back is not None:
            self._print_step(self._held_back)
        self._last_eval = row
        took = f"  {row.seconds:.1f} s" if row.seconds is not None else ""
        reached = "  target reached" if self.target is not None and row.lddt_ca >= self.target else ""
        self.note(f"eval step {row.step}  samples {row.samples}  {lddt_text(row, self.target)}{took}{reached}")

    def note(self, text: str) -> None:
        """Show a line of text: compiling 7/12, checkpoint written, resumed, ..."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
            self._live.update(self._table())
        else:
            self._print(text)

    def close(self) -> None:
        """Show the last step if it was held back and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._held_back is not None:
            self._print_step(self._held_back)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_step(self, row: StepRow) -> None:
        self._last_print = time.monotonic()
        self._held_back = None
        self._print(step_line(row, self._last_eval, self.target, self._eta_s(row.step)))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _start_live(self) -> Live:
        console = RichConsole(file=self._stream)
        live = Live(Table(), console=console, refresh_per_second=4, transient=False)
        live.start()
        return live

    def _eta_s(self, step: int) -> float | None:
        if self.expected_steps is None or not self._recent_ms:
            return None
        return max(0, self.expected_steps - step) * sum(self._recent_ms) / len(self._recent_ms) / 1000

    def _table(self) -> Table:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        row = self._last_step
        if row is None:
            return table
        eta_s = self._eta_s(row.step)
        table.add_row("step", f"{row.step}" + (f" of {self.expected_steps}" if self.expected_steps else ""))
        table.add_row("loss", "  ".join([f"{row.loss:.3f}", *(f"{n} {v:.3f}" for n, v in row.terms.items())]))
        if self._last_eval:
            table.add_row("evaluation", lddt_text(self._last_eval, self.target))
        if row.step_ms is not None:
            table.add_row("time", _time_text(row))
        if row.peak_gib is not None:
            table.add_row("memory", f"{row.peak_gib:.1f} GiB")
        if eta_s is not None:
            table.add_row("eta", format_duration(eta_s))
        return table
