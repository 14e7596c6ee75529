"""Figures of a report. Each function draws one figure, or returns None when its facts are not there.

Figures are drawn small (a phone's width), with text as text, and with the colours of :data:`PALETTE`, which the page
replaces by CSS variables so that one drawing serves light and dark.

Longer than 400 lines, because it has one function per figure.
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

from scalefold.mlperf.log.published import Published
from scalefold.report.anatomy import anatomy, evaluates_synchronously, hand_over_delays
from scalefold.report.logs import Run, reference_band
from scalefold.report.systems import Line, System, lines

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


def draw(
    paint: Callable[[Axes], None], name: str, title: str, caption: str, height: float = 2.9, width: float = 4.3
) -> Plot:
    """Run ``paint`` on fresh axes of the house style; sizes are in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
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


def lddt_over_samples(systems: Sequence[System]) -> Plot | None:
    """lDDT-Cα against training samples, with target, and the reference's convergence band and floor."""
    curves = [(line, *line.run.lddt_curve()) for line in lines(systems)]
    if not any(len(lddt) for _, _, _, lddt in curves):
        return None
    has_band = any(reference_band(system.first) for system in systems)

    def paint(axes: Axes) -> None:
        _bands(axes, systems)
        for line, samples, _, lddt in curves:
            _curve(axes, samples, lddt, line)
        _target(axes, systems)
        axes.set(xlabel="training samples", ylabel="lDDT-Cα")
        _count_axis(axes)

    caption = "Mean lDDT-Cα of the evaluation chains against samples seen. "
    if has_band:
        caption += "Shaded: where the reference converged (20 runs per batch size; interpolated between 128 and 256)."
        caption += " Dotted: the floor, below which the mean of ten runs must not converge."
    return draw(paint, "lddt_over_samples", "Accuracy over samples", caption, _height(systems))


def _bands(axes: Axes, systems: Sequence[System]) -> None:
    """Reference and floor of each batch size that the systems train with; systems of one batch share them."""
    alone = len(systems) == 1
    for index, system in {
        system.first.facts.get("global_batch_size"): (i, system) for i, system in enumerate(systems)
    }.values():
        band, floor = reference_band(system.first), system.floor_samples
        colour = PALETTE["c2"] if alone else _colour(index)
        if band is not None:
            label = "reference ± sd" if alone else None
            axes.axvspan(band[0] - band[1], band[0] + band[1], color=colour, alpha=0.16, lw=0, label=label)
        if floor is not None:
            axes.axvline(floor, color=colour, lw=1.2, ls=":", label="floor" if alone else None)


def lddt_over_time(systems: Sequence[System]) -> Plot | None:
    """lDDT-Cα against minutes since ``run_start``."""
    curves = [(line, *line.run.lddt_curve()) for line in lines(systems)]
    if not any(np.isfinite(seconds).any() for _, _, seconds, _ in curves):
        return None

    def paint(axes: Axes) -> None:
        for line, _, seconds, lddt in curves:
            _curve(axes, seconds / 60, lddt, line)
        _target(axes, systems)
        axes.set(xlabel="minutes since run_start", ylabel="lDDT-Cα")
        if len(systems) > 1:
            axes.set_xscale("log")
            _plain_log(axes.xaxis)

    caption = "Each point stands at the time its result was known."
    return draw(paint, "lddt_over_time", "Accuracy over time", caption, _height(systems))


def _height(systems: Sequence[System]) -> float:
    """Inches of a figure with one legend entry per system above it."""
    return 2.9 + (0.2 * len(systems) if len(systems) > 1 else 0.0)


def _plain_log(axis: Axis) -> None:
    """Logarithmic axis with plain numbers: 0.5, 10, 200."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, axes.dataLim.ymax * 1.15 or 1.0)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, line: Line) -> None:
    many = line.is_one_of_many
    axes.plot(
        x,
        y,
        marker=None if many else "o",
        ms=3,
        color=_colour(line.colour),
        alpha=0.45 if many else 1.0,
        lw=1.0 if many else 1.6,
        ls=("-", "--", ":")[line.colour // len(SERIES) % 3],
        label=line.label,
    )


def _legend(axes: Axes, systems: Sequence[System]) -> None:
    """Names of systems above the figure, where they are long; names of runs inside."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if len(systems) > 1:
        legend = axes.figure.legend(loc="outside upper left", ncols=1, fontsize=8, borderaxespad=0.2)
    else:
        legend = axes.legend(loc="best")
    for handle in legend.get_lines():
        handle.set_alpha(1.0)


def _target(axes: Axes, systems: Sequence[System]) -> None:
    for target in sorted({run.target for system in systems for run in system.runs if run.target is not None}):
        axes.axhline(target, color=PALETTE["ink"], lw=1.0, ls="--", label=f"target {target:g}")
    _legend(axes, systems)


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


def loader_wait(systems: Sequence[System]) -> Plot | None:
    """Mean wait for the next batch per training cycle, as logged by ``tracked_stats``."""
    caption = "Mean time per step in which the GPU had no batch, by cycle."
    values = {"name": "loader_wait", "title": "Wait for the loader", "caption": caption, "unit": "ms per step"}
    return _tracked(systems, lambda run: run.log and run.log.batch_wait_s, 1000.0, **values)


def throughput(systems: Sequence[System]) -> Plot | None:
    """Samples per second of each training cycle."""
    caption = "Samples per second by training cycle, as the log states it."
    values = {"name": "throughput", "title": "Throughput", "caption": caption, "unit": "samples per second"}
    return _tracked(systems, lambda run: run.log and run.log.throughput, 1.0, **values)


def _tracked(
    systems: Sequence[System],
    rows: Callable[[Run], Any],
    scale: float,
    *,
    name: str,
    title: str,
    caption: str,
    unit: str,
) -> Plot | None:
    """Values [M, 2] of cycle and number, of every run that has them."""
    chosen = list(lines(systems, rows))
    if not chosen:
        return None

    def paint(axes: Axes) -> None:
        for line in chosen:
            cycles, values = np.array(rows(line.run)).T
            _curve(axes, cycles, values * scale, line)
        axes.set(xlabel="training cycle", ylabel=unit)
        _from_zero(axes)
        _legend(axes, systems)

    return draw(paint, name, title, caption, _height(systems))


def evaluation_delay(systems: Sequence[System]) -> Plot | None:
    """How long after the end of a cycle its evaluation result was known."""
    chosen = list(lines(systems, lambda run: run.log is not None and hand_over_delays(run.log)))
    if not chosen:
        return None

    def paint(axes: Axes) -> None:
        for line in chosen:
            assert line.run.log is not None
            samples, delay, _ = np.array(hand_over_delays(line.run.log)).T
            _curve(axes, samples, delay, line)
        axes.set(xlabel="training samples", ylabel="seconds")
        _from_zero(axes)
        _count_axis(axes)
        _legend(axes, systems)

    waits = {line.run.log is not None and evaluates_synchronously(line.run.log) for line in chosen}
    meanwhile = {True: "training waits meanwhile.", False: "training goes on meanwhile."}
    how = meanwhile[waits.pop()] if len(waits) == 1 else "training waits for some systems, for others it goes on."
    caption = f"Seconds from the end of a cycle to its result; {how}"
    return draw(paint, "evaluation_delay", "Evaluation delay", caption, _height(systems))


def minutes_anatomy(systems: Sequence[System]) -> Plot | None:
    """Parts of the time to train: one bar per run, or per system the means of its runs."""
    found = {system.label: [(run.name, parts) for run in system.runs if run.log and (parts := anatomy(run.log))]
             for system in systems}  # fmt: skip
    bars = [(name, np.array(list(parts.parts.values()))) for runs in found.values() for name, parts in runs]
    if len(systems) > 1:
        tables = {label: np.array([list(parts.parts.values()) for _, parts in runs]) for label, runs in found.items()}
        bars = [(label, table.mean(axis=0)) for label, table in tables.items() if len(table)]
    if not bars:
        return None
    synchronous = {parts.synchronous for runs in found.values() for _, parts in runs}
    wait = "wait" if len(synchronous) > 1 else "evaluation" if synchronous.pop() else "hand-over"
    names = ["start", "first cycle", f"first {wait}", "steady cycles", f"later {wait}s", "tail"]

    def paint(axes: Axes) -> None:
        table = np.array([seconds for _, seconds in bars]) / 60
        shown = table / table.sum(axis=1, keepdims=True) * 100 if len(systems) > 1 else table
        left = np.zeros(len(bars))
        for index, name in enumerate(names):
            axes.barh(range(len(bars)), shown[:, index], left=left, height=0.7, color=_colour(index), label=name)
            left += shown[:, index]
        axes.set_yticks(range(len(bars)), [_wrapped(name) for name, _ in bars])
        axes.invert_yaxis()
        axes.set(xlabel="share of the time to train, %" if len(systems) > 1 else "minutes since run_start")
        axes.grid(axis="y", visible=False)
        axes.figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    height = min(1.7 + (0.5 if len(systems) > 1 else 0.24) * len(bars), 7.0)
    caption = "From run_start to run_stop; the parts add up." + (" Means of each system's runs." * (len(systems) > 1))
    return draw(paint, "anatomy", "Anatomy of the minutes", caption, height)


def _wrapped(label: str) -> str:
    """A system's label in two lines, for the side of a narrow figure."""
    return label.replace(" · ", "\n", 1)


def run_spread(systems: Sequence[System]) -> Plot | None:
    """Minutes against samples to converge, one dot per run."""
    dots = {
        index: [
            (run.log.passing.samples, run.minutes) for run in system.runs if run.log and run.log.passing and run.minutes
        ]
        for index, system in enumerate(systems)
    }
    if sum(map(len, dots.values())) < 2:
        return None

    def paint(axes: Axes) -> None:
        _bands(axes, systems)
        for index, found in dots.items():
            samples, minutes = np.array(found).reshape(-1, 2).T
            label = systems[index].label if len(systems) > 1 else None
            axes.plot(samples, minutes, "o", color=_colour(index), alpha=0.75, label=label)
        axes.set(xlabel="samples to converge", ylabel="minutes")
        if len(systems) > 1:
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        _count_axis(axes)
        _legend(axes, systems)

    caption = "One dot per run: how long, and after how many samples."
    return draw(paint, "run_spread", "Spread of the runs", caption, _height(systems))


def _dot(run: Run) -> tuple[int, float] | None:
    """Samples to converge and minutes."""
    return (run.log.passing.samples, run.minutes) if run.log and run.log.passing and run.minutes else None


def optimizer_state(run: Run) -> Plot | None:
    """Gradient norm before clipping and learning rate of each step."""
    metrics = run.metrics
    if metrics is None or not np.isfinite(metrics.grad_norm).any():
        return None
    steps = metrics.step.astype(float)

    def paint(axes: Axes) -> None:
        axes.plot(*thin(steps, metrics.grad_norm, LOSS_POINTS), color=_colour(0), lw=1.2, label="gradient norm")
        if np.isfinite(metrics.lr).any():
            axes.plot(*thin(steps, metrics.lr, LOSS_POINTS), color=_colour(1), lw=1.6, label="learning rate")
        axes.set_yscale("log")
        axes.set(xlabel="step")
        axes.figure.legend(loc="outside upper left", ncols=2, fontsize=8)

    caption = "Global norm of the averaged gradient before clipping, and the rate; block means."
    return draw(paint, "optimizer", "Gradient norm and learning rate", caption)


def memory(run: Run) -> Plot | None:
    """Peak memory of each step on rank 0's device."""
    metrics = run.metrics
    if metrics is None or not np.isfinite(metrics.peak_gib).any():
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*thin(metrics.step.astype(float), metrics.peak_gib, LOSS_POINTS), color=_colour(0))
        axes.set(xlabel="step", ylabel="GiB")
        _from_zero(axes)

    return draw(paint, "memory", "Peak memory", "Largest allocation of each step on the first rank's device.")


def against_published(systems: Sequence[System], published: Sequence[Published]) -> Plot | None:
    """The systems' minutes beside the published ones, on a logarithmic axis."""
    own = [(system, system.minutes) for system in systems if system.first.is_benchmark]
    rows = [
        (_own_label(system, len(systems)), minutes, _colour(i)) for i, (system, minutes) in enumerate(own) if minutes
    ]
    if not rows:
        return None
    rows = sorted([*rows, *((p.label, p.minutes, PALETTE["c7"]) for p in published)], key=lambda row: row[1])

    def paint(axes: Axes) -> None:
        axes.barh(range(len(rows)), [row[1] for row in rows], color=[row[2] for row in rows], height=0.62)
        for index, row in enumerate(rows):
            axes.text(row[1], index, f" {row[1]:.3g}", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [_wrapped(row[0]) for row in rows])
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.set_xlim(rows[0][1] / 3, rows[-1][1] * 2.5)
        axes.invert_yaxis()
        axes.set(xlabel="minutes to train (log)")
        axes.grid(axis="y", visible=False)

    caption = "Grey: published, MLPerf HPC v3.0 result logs; scored means of 10 runs, weak: mean per instance."
    return draw(paint, "published", "Beside the published results", caption, 1.2 + 0.32 * len(rows))


def _own_label(system: System, count: int) -> str:
    ranks = system.first.facts.get("number_of_ranks", system.first.facts.get("world_size"))
    return system.label if count > 1 else f"this result, {ranks} ranks" if ranks else "this result"


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
