"""Figures of a report. Each function draws one figure, or returns None when its facts are not there.

Figures are drawn small (a phone's width), with text as text, and with the colours of :data:`PALETTE`, which the page
replaces by CSS variables so that one drawing serves light and dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from scalefold.report.anatomy import anatomy, evaluates_synchronously, hand_over_delays
from scalefold.report.logs import Run, reference_band
from scalefold.report.published import Published

#: Light colours by role; ``page`` holds the dark twins.
PALETTE = {
    "ink": "#1b1f24",
    "quiet": "#6a737d",
    "grid": "#d9dee3",
    "c0": "#1f6feb",
    "c1": "#bc4c00",
    "c2": "#1a7f37",
    "c3": "#8250df",
    "c4": "#cf222f",
    "c5": "#0e7490",
    "c6": "#9a6701",
    "c7": "#57606b",
}
SERIES = [f"c{i}" for i in range(8)]
MAX_POINTS, LOSS_POINTS = 400, 150
_NO_TERMS = {"weighted_total_loss", "scaled_weighted_total_loss", "non_finite_terms"}  # sums of the others, a count

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": PALETTE["quiet"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["quiet"],
    "ytick.color": PALETTE["quiet"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


def _style(name: str) -> Any:
    """House style; the salt keeps the ids of several drawings on one page apart."""
    return _STYLE | {"svg.hashsalt": name}


@dataclass(frozen=True)
class Plot:
    """A finished figure with its file name stem, title and one sentence on how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def svg(self) -> str:
        """The drawing as an ``<svg>`` element with transparent ground; its ids do not collide with other drawings'."""
        stream = io.StringIO()
        with mpl.rc_context(_style(self.name)):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        return re.sub(r'<g id="[^"]*"', "<g", text)

    def save(self, folder: Path) -> list[Path]:
        """Write ``name.svg`` and ``name.png`` (white ground, 150 dots per inch) into ``folder``."""
        files = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        svg = self.svg
        body = svg.index(">") + 1
        files[0].write_text(
            f'{svg[:body]}<rect width="100%" height="100%" fill="white"/>{svg[body:]}', encoding="utf-8"
        )
        with mpl.rc_context(_style(self.name)):
            self.figure.savefig(files[1], facecolor="white", dpi=150)
        return files


def draw(paint: Callable[[Axes], None], name: str, title: str, caption: str, height: float = 2.9) -> Plot:
    """Run ``paint`` on fresh axes of the house style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.3, height), layout="constrained")
        paint(figure.add_subplot())
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return Plot(name, title, caption, figure)


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Block means of at most ``limit`` points, so that long runs stay small files; NaN is skipped."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x), limit + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _colour(index: int) -> str:
    return PALETTE[SERIES[index % len(SERIES)]]


def _count_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")


def lddt_over_samples(runs: Sequence[Run]) -> Plot | None:
    """lDDT-Cα against training samples, with target and the reference's convergence band."""
    curves = [(run, *run.lddt_curve()) for run in runs]
    if not any(len(lddt) for _, _, _, lddt in curves):
        return None

    def paint(axes: Axes) -> None:
        band = reference_band(runs[0])
        if band is not None:
            axes.axvspan(
                band[0] - band[1], band[0] + band[1], color=PALETTE["c2"], alpha=0.16, lw=0, label="reference ± sd"
            )
        for index, (run, samples, _, lddt) in enumerate(curves):
            _curve(axes, samples, lddt, run, index, len(runs))
        _target(axes, runs)
        axes.set(xlabel="training samples", ylabel="lDDT-Cα")
        _count_axis(axes)

    caption = "Mean lDDT-Cα of the evaluation chains against samples seen. "
    if reference_band(runs[0]) is not None:
        caption += "Shaded: where the reference converged (20 runs per batch size; interpolated between 128 and 256)."
    return draw(paint, "lddt_over_samples", "Accuracy over samples", caption)


def lddt_over_time(runs: Sequence[Run]) -> Plot | None:
    """lDDT-Cα against minutes since ``run_start``."""
    curves = [(run, *run.lddt_curve()) for run in runs]
    if not any(np.isfinite(seconds).any() for _, _, seconds, _ in curves):
        return None

    def paint(axes: Axes) -> None:
        for index, (run, _, seconds, lddt) in enumerate(curves):
            _curve(axes, seconds / 60, lddt, run, index, len(runs))
        _target(axes, runs)
        axes.set(xlabel="minutes since run_start", ylabel="lDDT-Cα")

    return draw(paint, "lddt_over_time", "Accuracy over time", "Each point stands at the time its result was known.")


def _plain_log(axis: Axis) -> None:
    """Logarithmic axis with plain numbers: 0.5, 10, 200."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, axes.dataLim.ymax * 1.15 or 1.0)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, run: Run, index: int, count: int) -> None:
    few = count <= 6
    axes.plot(
        x,
        y,
        marker="o" if count <= 3 else None,
        ms=3,
        color=_colour(index) if few else PALETTE["c0"],
        alpha=1.0 if few else 0.45,
        lw=1.6 if few else 1.0,
        label=run.name if 1 < count <= 6 else None,
    )


def _target(axes: Axes, runs: Sequence[Run]) -> None:
    target = next((run.target for run in runs if run.target is not None), None)
    if target is not None:
        axes.axhline(target, color=PALETTE["c4"], lw=1.2, ls="--", label=f"target {target:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def loss_over_samples(run: Run) -> Plot | None:
    """Total loss and its terms against training samples (against steps where samples are not recorded)."""
    metrics = run.metrics
    if metrics is None or len(metrics.step) == 0:
        return None
    known = np.isfinite(metrics.samples).all()
    x = metrics.samples if known else metrics.step.astype(float)

    terms = {name: values for name, values in metrics.terms.items() if name not in _NO_TERMS}

    def paint(axes: Axes) -> None:
        axes.plot(*thin(x, metrics.loss, LOSS_POINTS), color=PALETTE["ink"], lw=1.8, label="total")
        for index, (name, values) in enumerate(terms.items()):
            axes.plot(*thin(x, values, LOSS_POINTS), color=_colour(index), lw=1.1, label=name)
        if (metrics.loss > 0).all():
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        axes.set(xlabel="training samples" if known else "step", ylabel="loss")
        _count_axis(axes)
        axes.figure.legend(loc="outside upper left", ncols=3, fontsize=8, columnspacing=1.0)

    caption = f"Total and unweighted terms as recorded; block means of at most {LOSS_POINTS} points."
    return draw(paint, "loss", "Losses", caption, 3.6)


def step_breakdown(run: Run) -> Plot | None:
    """Mean step time by phase, one bar per number of recycling passes and one for all."""
    metrics = run.metrics
    if metrics is None or not np.isfinite(metrics.step_ms).any():
        return None
    parts = step_parts(run)
    groups = {"all": np.isfinite(metrics.step_ms)}
    for passes in sorted({int(p) for p in metrics.passes[np.isfinite(metrics.passes)]}):
        groups[f"R={passes}"] = groups["all"] & (metrics.passes == passes)

    def paint(axes: Axes) -> None:
        left = np.zeros(len(groups))
        for index, (name, values) in enumerate(parts.items()):
            means = np.array([np.nanmean(values[chosen]) for chosen in groups.values()])
            axes.barh(range(len(groups)), means, left=left, height=0.62, color=_colour(index), label=name)
            left += means
        for row, total in enumerate(left):
            axes.text(total, row, f" {total:.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds per step")
        axes.set_xlim(right=left.max() * 1.14)
        axes.grid(axis="y", visible=False)
        axes.figure.legend(loc="outside upper left", ncols=4, fontsize=8)

    return draw(
        paint, "step_breakdown", "Step time by phase", "Means over all steps and per number of recycling passes."
    )


def step_parts(run: Run) -> dict[str, np.ndarray]:
    """Milliseconds per step and phase [N]; phases add up to the step, with the remainder named ``other``."""
    metrics = run.metrics
    if metrics is None:
        return {}
    parts = {"data": np.nan_to_num(metrics.data_ms)} if np.isfinite(metrics.data_ms).any() else {}
    parts |= {name: np.nan_to_num(values) for name, values in metrics.phases_ms.items()}
    rest = np.maximum(metrics.step_ms - sum(parts.values(), np.zeros(len(metrics.step))), 0.0)
    return parts | {"other" if parts else "step": rest}


def step_times(run: Run) -> Plot | None:
    """Every step's time and the share of it that waited for the batch."""
    metrics = run.metrics
    if metrics is None or not np.isfinite(metrics.step_ms).any():
        return None

    def paint(axes: Axes) -> None:
        all_passes = sorted({int(p) for p in metrics.passes[np.isfinite(metrics.passes)]}) or [0]
        for index, passes in enumerate(all_passes):
            chosen = metrics.passes == passes if passes else np.ones(len(metrics.step), bool)
            axes.plot(
                *thin(metrics.step[chosen].astype(float), metrics.step_ms[chosen]),
                ".",
                ms=3,
                color=_colour(index),
                label=f"R={passes}" if passes else "step",
            )
        if np.isfinite(metrics.data_ms).any():
            axes.plot(
                *thin(metrics.step.astype(float), metrics.data_ms), color=PALETTE["c4"], lw=1, label="wait for batch"
            )
        axes.set(xlabel="step", ylabel="milliseconds")
        _from_zero(axes)
        axes.figure.legend(loc="outside upper left", ncols=5, fontsize=8, columnspacing=1.0)

    return draw(
        paint, "step_times", "Step times", "One dot per step, by recycling passes; the line is time without work."
    )


def loader_wait(runs: Sequence[Run]) -> Plot | None:
    """Mean wait for the next batch per training cycle, as logged by ``tracked_stats``."""
    chosen = [run for run in runs if run.log is not None and run.log.batch_wait_s]
    if not chosen:
        return None

    def paint(axes: Axes) -> None:
        for index, run in enumerate(chosen):
            assert run.log is not None
            cycles, waits = np.array(run.log.batch_wait_s).T
            _curve(axes, cycles, waits * 1000, run, index, len(chosen))
        axes.set(xlabel="training cycle", ylabel="ms per step")
        _from_zero(axes)
        if 1 < len(chosen) <= 6:
            axes.legend()

    return draw(
        paint, "loader_wait", "Wait for the loader", "Mean time per step in which the GPU had no batch, by cycle."
    )


def throughput(runs: Sequence[Run]) -> Plot | None:
    """Samples per second of each training cycle."""
    chosen = [run for run in runs if run.log is not None and run.log.throughput]
    if not chosen:
        return None

    def paint(axes: Axes) -> None:
        for index, run in enumerate(chosen):
            assert run.log is not None
            cycles, rates = np.array(run.log.throughput).T
            _curve(axes, cycles, rates, run, index, len(chosen))
        axes.set(xlabel="training cycle", ylabel="samples per second")
        _from_zero(axes)
        if 1 < len(chosen) <= 6:
            axes.legend()

    return draw(paint, "throughput", "Throughput", "Samples per second by training cycle, as the log states it.")


def evaluation_delay(runs: Sequence[Run]) -> Plot | None:
    """How long after the end of a cycle its evaluation result was known."""
    chosen = [(run, hand_over_delays(run.log)) for run in runs if run.log is not None]
    chosen = [(run, delays) for run, delays in chosen if delays]
    if not chosen:
        return None

    def paint(axes: Axes) -> None:
        for index, (run, delays) in enumerate(chosen):
            samples, delay, _ = np.array(delays).T
            _curve(axes, samples, delay, run, index, len(chosen))
        axes.set(xlabel="training samples", ylabel="seconds")
        _from_zero(axes)
        _count_axis(axes)
        if 1 < len(chosen) <= 6:
            axes.legend()

    waits = all(run.log is not None and evaluates_synchronously(run.log) for run, _ in chosen)
    caption = "Seconds from the end of a cycle to its result; " + (
        "training waits meanwhile." if waits else "training goes on meanwhile."
    )
    return draw(paint, "evaluation_delay", "Evaluation delay", caption)


def minutes_anatomy(runs: Sequence[Run]) -> Plot | None:
    """Parts of the time to train, one bar per run."""
    found = [(run.name, anatomy(run.log)) for run in runs if run.log is not None]
    bars = [(name, parts) for name, parts in found if parts is not None]
    if not bars:
        return None

    def paint(axes: Axes) -> None:
        left = np.zeros(len(bars))
        for index, position in enumerate(range(6)):
            seconds = np.array([list(parts.parts.values())[position] for _, parts in bars])
            label = list(bars[0][1].parts)[position]
            axes.barh(range(len(bars)), seconds / 60, left=left, height=0.7, color=_colour(index), label=label)
            left += seconds / 60
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set(xlabel="minutes since run_start")
        axes.grid(axis="y", visible=False)
        axes.figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    height = min(1.7 + 0.24 * len(bars), 7.0)
    return draw(paint, "anatomy", "Anatomy of the minutes", "From run_start to run_stop; the parts add up.", height)


def run_spread(runs: Sequence[Run]) -> Plot | None:
    """Minutes against samples to converge, one dot per run."""
    dots = [(run.log.passing.samples, run.minutes) for run in runs if run.log and run.log.passing and run.minutes]
    if len(dots) < 2:
        return None

    def paint(axes: Axes) -> None:
        samples, minutes = np.array(dots).T
        band = reference_band(runs[0])
        if band is not None:
            axes.axvspan(
                band[0] - band[1], band[0] + band[1], color=PALETTE["c2"], alpha=0.16, lw=0, label="reference ± sd"
            )
            axes.legend(loc="upper left")
        axes.plot(samples, minutes, "o", color=PALETTE["c0"], alpha=0.75)
        axes.set(xlabel="samples to converge", ylabel="minutes")
        _count_axis(axes)

    return draw(paint, "run_spread", "Spread of the runs", "One dot per run: how long, and after how many samples.")


def against_published(
    runs: Sequence[Run], minutes: float | None, published: Sequence[Published], label: str
) -> Plot | None:
    """This result's minutes beside the published ones, on a logarithmic axis."""
    if minutes is None or not runs[0].is_benchmark:
        return None
    rows = sorted([(label, minutes, True), *((p.label, p.minutes, False) for p in published)], key=lambda row: row[1])

    def paint(axes: Axes) -> None:
        colours = [PALETTE["c0"] if own else PALETTE["c7"] for _, _, own in rows]
        axes.barh(range(len(rows)), [row[1] for row in rows], color=colours, height=0.62)
        for index, row in enumerate(rows):
            axes.text(row[1], index, f" {row[1]:.3g}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.set_xlim(rows[0][1] / 3, rows[-1][1] * 2.5)
        axes.invert_yaxis()
        axes.set(xlabel="minutes to train (log)")
        axes.grid(axis="y", visible=False)

    caption = "Published: MLPerf HPC v3.0 result logs; scored means of 10 runs, weak: mean per instance."
    return draw(paint, "published", "Beside the published results", caption)


def scaling_curve(points: Sequence[dict[str, str]], published: Sequence[Published]) -> Plot | None:
    """Minutes to train against accelerators: published, measured and modelled rows of a scaling table."""
    rows = [(r.get("kind", "modelled"), float(r["accelerators"]), float(r["minutes"])) for r in points]
    if not rows:
        return None

    def paint(axes: Axes) -> None:
        for index, kind in enumerate(dict.fromkeys(kind for kind, _, _ in rows)):
            line = np.array(sorted((x, y) for k, x, y in rows if k == kind)).T
            axes.plot(line[0], line[1], marker="o", ms=4, color=_colour(index), label=kind)
        dots = np.array([(p.num_accelerators, p.minutes) for p in published]).reshape(-1, 2).T
        axes.plot(dots[0], dots[1], "D", ms=5, color=PALETTE["c7"], label="published")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _plain_log(axes.yaxis)
        axes.set(xlabel="accelerators", ylabel="minutes to train")
        axes.legend()

    return draw(
        paint, "scaling", "Scaling curve", "Time to train by number of accelerators; sources in the scaling table."
    )
