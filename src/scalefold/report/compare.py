"""Are two training curves the same? Overlays metrics files step by step, with tolerance bands and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from scalefold.errors import LogError
from scalefold.report import plots
from scalefold.report.record import METRICS_FILE, Metrics, read_metrics

#: Width of a noise band in standard errors: with a few hundred windows a false alarm stays below one in a hundred.
NOISE_SIGMAS = 4.5


@dataclass(frozen=True)
class Row:
    """One quantity of one run against the first run; differences are relative to the first run's value.

    ``max_step`` is the largest difference of a single step, which may reach ``step_band``; ``max_window`` is that of
    window means where it comes nearest to (or farthest over) its ``band``; that window ends at ``worst_step``.
    """

    quantity: str
    run: str
    num_steps: int
    max_step: float
    max_window: float
    worst_step: int
    band: float
    step_band: float | None
    ok: bool


@dataclass(frozen=True)
class Comparison:
    """Outcome of :func:`compare_runs`."""

    names: list[str]
    window: int
    rows: list[Row]
    problems: list[str]
    metrics: list[Metrics] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether all quantities of all runs lie within their bands and nothing is missing."""
        return not self.problems and all(row.ok for row in self.rows)

    def text(self) -> str:
        """Table and verdict for a terminal."""
        head = f"{'quantity':<24}{'steps':>7}{'max step':>12}{'max window':>12}{'band':>12}{'at step':>9}  verdict"
        lines = [f"baseline {self.names[0]}; window of {self.window} steps; relative differences"]
        for name in self.names[1:]:
            lines += ["", f"against {name}", head]
            lines += [_row_text(row) for row in self.rows if row.run == name]
        lines += ["", *self.problems]
        lines.append("same within the bands" if self.ok else "NOT the same")
        return "\n".join(lines)

    def plot(self, path: Path | str) -> Path:
        """Write the overlaid window means of the loss and their relative difference as SVG or PNG, by the suffix."""
        path = Path(path)
        drawing = plots.draw(self._paint, path.stem, "Loss of the runs", "Window means.")
        drawing.figure.savefig(path, facecolor="white", dpi=150)
        return path

    def _paint(self, axes: Axes) -> None:
        for index, (name, metrics) in enumerate(zip(self.names, self.metrics, strict=True)):
            colour = plots.PALETTE[plots.SERIES[index % len(plots.SERIES)]]
            means = _window_means(metrics.loss, self.window)
            axes.plot(
                metrics.step[self.window - 1 :], means, color=colour, lw=1.2, ls="-" if index == 0 else "--", label=name
            )
        axes.set(xlabel="step", ylabel=f"loss, mean of {self.window} steps")
        axes.legend(fontsize=8)


def compare_runs(
    a: Path | str,
    b: Path | str,
    *more: Path | str,
    tolerance: float | None = None,
    step_tolerance: float | None = None,
    window: int = 20,
) -> Comparison:
    """Compare loss and every loss term of runs ``b, ...`` with run ``a`` over the steps they share.

    Args:
        a, b, more: run folders or ``metrics.jsonl`` files; ``a`` is the baseline.
        tolerance: largest allowed relative difference of window means. None: the band comes from the runs' own step
            noise (4.5 standard errors of the difference of two window means), which is right for runs with different
            seeds and generous for runs with equal ones.
        step_tolerance: largest allowed relative difference of any single step; None: single steps may differ freely.
        window: steps per moving mean.

    Raises:
        LogError: a file cannot be read, two runs share fewer steps than one window, or a negative tolerance.
    """
    if window < 1:
        raise LogError(f"window {window}: must be at least one step")
    for bound in (tolerance, step_tolerance):
        if bound is not None and not bound >= 0:
            raise LogError(f"tolerance {bound:g}: must be at least 0")
    paths = [Path(a), Path(b), *map(Path, more)]
    for path in paths:
        if path.suffix == ".txt":
            raise LogError(f"{path}: an MLPerf log has no losses; give the run folder or its {METRICS_FILE}")
    metrics = [read_metrics(path) for path in paths]
    names = _names(paths)
    rows: list[Row] = []
    problems: list[str] = []
    for name, other in zip(names[1:], metrics[1:], strict=True):
        found, trouble = _compare_two(metrics[0], other, name, window, tolerance, step_tolerance)
        rows += found
        problems += trouble
    return Comparison(names, window, rows, problems, metrics)


def _compare_two(
    a: Metrics, b: Metrics, name: str, window: int, tolerance: float | None, step_tolerance: float | None
) -> tuple[list[Row], list[str]]:
    steps, in_a, in_b = np.intersect1d(a.step, b.step, return_indices=True)
    if len(steps) < window:
        raise LogError(f"{b.path}: shares {len(steps)} steps with {a.path}, less than one window of {window}")
    problems = [
        f"{name}: loss term '{term}' is in only one of the runs" for term in sorted(a.terms.keys() ^ b.terms.keys())
    ]
    pairs = {"loss": (a.loss, b.loss)} | {t: (a.terms[t], b.terms[t]) for t in a.terms if t in b.terms}
    rows = []
    for quantity, (left, right) in pairs.items():
        left, right = left[in_a], right[in_b]
        broken = np.isfinite(left) != np.isfinite(right)
        if broken.any():
            problems.append(f"{name}: {quantity} is finite in only one of the runs at step {steps[broken][0]}")
        else:
            rows.append(_row(quantity, name, steps, left, right, window, tolerance, step_tolerance))
    return rows, problems


def _row(
    quantity: str,
    name: str,
    steps: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    window: int,
    tolerance: float | None,
    step_tolerance: float | None,
) -> Row:
    """Compare two columns [N] that are finite at the same places."""
    known = np.isfinite(left)
    steps, left, right = steps[known], left[known], right[known]
    window = min(window, len(steps))
    if window == 0:
        return Row(quantity, name, 0, 0.0, 0.0, 0, tolerance or 0.0, step_tolerance, True)
    scale = np.maximum(np.abs(_window_means(left, window)), 1e-12)
    step_scale = np.maximum(np.abs(left), scale.mean() * 1e-3)
    max_step = float((np.abs(right - left) / step_scale).max())
    difference = np.abs(_window_means(right, window) - _window_means(left, window)) / scale
    bands = np.full(len(scale), tolerance) if tolerance is not None else _noise_band(left, right, window)
    worst = int(np.argmax(difference - bands))
    ok = bool((difference <= bands).all()) and (step_tolerance is None or max_step <= step_tolerance)
    place = int(steps[worst + window - 1])
    return Row(
        quantity, name, len(steps), max_step, float(difference[worst]), place, float(bands[worst]), step_tolerance, ok
    )


def _noise_band(left: np.ndarray, right: np.ndarray, window: int) -> np.ndarray:
    """Allowed relative difference of window means [N - window + 1] from the scatter of steps around the trends."""
    variance = sum(_relative_scatter(values, window) ** 2 for values in (left, right))
    return np.full(len(left) - window + 1, NOISE_SIGMAS * np.sqrt(variance / window))


def _relative_scatter(values: np.ndarray, window: int) -> float:
    """Standard deviation of steps around the moving mean, relative to it (robust: from the median deviation)."""
    means = _window_means(values, window)
    centres = values[window // 2 : window // 2 + len(means)]
    relative = (centres - means) / np.maximum(np.abs(means), 1e-12)
    shrink = np.sqrt(max(1 - 1 / window, 0.5))
    return float(1.4826 * np.median(np.abs(relative - np.median(relative))) / shrink)


def _window_means(values: np.ndarray, window: int) -> np.ndarray:
    """Means of all windows [N - window + 1]; shorter input gives one mean of everything."""
    window = min(window, max(len(values), 1))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _names(paths: Sequence[Path]) -> list[str]:
    """Shortest names that tell the runs apart: folder names, or whole paths where those are equal."""
    short = [(p if p.is_dir() else p.parent).resolve().name for p in paths]
    return short if len(set(short)) == len(short) else [str(p) for p in paths]


def _row_text(row: Row) -> str:
    verdict = "ok" if row.ok else "DIFFERS"
    if row.step_band is not None and row.max_step > row.step_band:
        verdict += f" (single step above {row.step_band:.1e})"
    numbers = f"{row.max_step:>12.2e}{row.max_window:>12.2e}{row.band:>12.2e}{row.worst_step:>9d}"
    return f"{row.quantity:<24}{row.num_steps:>7d}{numbers}  {verdict}"
