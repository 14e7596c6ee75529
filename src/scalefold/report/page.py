"""One self-contained HTML page about one run or a folder of runs: no server, no links, light and dark.

Everything is read from files, so the page can be made from any submitter's ``result_N.txt`` as from our run folders.
"""

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from scalefold.errors import LogError
from scalefold.mlperf.log.published import Published, read_published
from scalefold.report import plots
from scalefold.report.anatomy import anatomy
from scalefold.report.console import format_minutes
from scalefold.report.logs import Run, read_runs, reference_band
from scalefold.report.systems import System, Verdict, by_system, closed_only, parse_check
from scalefold.telemetry.stragglers import HEAD, read_loads
from scalefold.telemetry.trace import read_anatomies
from scalefold.textfile import replaceable

#: Dark twins of ``plots.PALETTE``, and the ground that they stand on.
DARK_GROUND = "#0f1419"
DARK = {
    "ink": "#e6edf3",
    "quiet": "#93a0ad",
    "grid": "#303a45",
    "c0": "#58a6ff",
    "c1": "#f0883e",
    "c2": "#57c774",
    "c3": "#bc8cff",
    "c4": "#ff7b72",
    "c5": "#39c5d6",
    "c6": "#d9a441",
    "c7": "#a3adb8",
}

_NUM_SLOWEST, _NUM_RANKS = 5, 8
_LAG = "May cost: wait for data beyond the median rank's, and the time that a lower clock than the median rank's adds."
_GROUPS = "The GPU works while the host goes on, and groups of kernels may overlap: shares do not add up to 100 %."


@dataclass(frozen=True)
class ReportFiles:
    """What was written: the page and the single figures beside it."""

    page: Path
    figures: list[Path]


def write_report(
    inputs: Sequence[Path | str] | Path | str,
    out_html: Path | str,
    *,
    check: Verdict | Mapping[str, Any] | str | None = None,
    scaling_csv: Path | str | None = None,
    step_time_csv: Path | str | None = None,
    title: str | None = None,
) -> ReportFiles:
    """Write the page, and each figure as SVG and PNG into ``<page name>_figures`` beside it.

    Args:
        inputs: run folders, folders of ``result_N.txt``, single result files or ``metrics.jsonl`` files.
        check: outcome of the log check: a Verdict, ``{"ok", "headline", "details"}`` or the checker's printed text.
        scaling_csv: table with columns kind, accelerators, minutes (and source): the scaling curve.
        step_time_csv: measured step times, shown as they are.

    Raises:
        LogError: nothing to report on, a file that is no log (names file and line), or no place for a page.
    """
    out = replaceable(Path(out_html), LogError)
    systems = by_system(read_runs(inputs))
    published = read_published()
    scaling = _read_table(scaling_csv)
    figures = _figures(systems, scaling, published)
    text = _page(
        systems,
        figures,
        closed_only(parse_check(check), systems),
        published,
        {"Scaling": scaling, "Step times": _read_table(step_time_csv)},
        title,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.stem}_figures")
    folder.mkdir(exist_ok=True)
    files = [file for plot in figures for file in plot.save(folder)]
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out)
    return ReportFiles(out, files)


def _figures(systems: list[System], scaling: list[dict[str, str]], published: list[Published]) -> list[plots.Plot]:
    single = systems[0].first if len(systems) == len(systems[0].runs) == 1 else None
    found = [
        plots.lddt_over_samples(systems),
        plots.lddt_over_time(systems),
        plots.minutes_anatomy(systems),
        plots.loss_over_samples(single) if single else None,
        plots.optimizer_state(single) if single else None,
        plots.step_breakdown(single) if single else None,
        plots.step_times(single) if single else None,
        plots.memory(single) if single else None,
        plots.run_spread(systems),
        plots.throughput(systems),
        plots.loader_wait(systems),
        plots.evaluation_delay(systems),
        plots.against_published(systems, published),
        plots.scaling_curve(scaling, published),
    ]
    return [plot for plot in found if plot is not None]


def _page(
    systems: list[System],
    figures: list[plots.Plot],
    verdict: Verdict | None,
    published: list[Published],
    tables: dict[str, list[dict[str, str]]],
    title: str | None,
) -> str:
    template = Template(resources.files("scalefold.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title or _title(systems)),
        subtitle=html.escape(_subtitle(systems)),
        light=_variables(plots.PALETTE),
        dark=_variables(DARK),
        verdict=_verdict(verdict),
        tiles="\n".join(_system_tiles(i, system, len(systems)) for i, system in enumerate(systems)),
        figures="\n".join(map(_figure, figures)),
        sections="\n".join(_sections(systems, verdict, published, tables)),
    )


def _system_tiles(index: int, system: System, count: int) -> str:
    tiles = "".join(_tile(value, label) for label, value in _key_figures(system).items())
    colour = plots.SERIES[index % len(plots.SERIES)]
    name = f'<span class="swatch" style="background: var(--{colour})"></span>{html.escape(system.label)}'
    head = f"<h2>{name}</h2>" if count > 1 else ""
    return f'{head}<div class="tiles">{tiles}</div>'


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _title(systems: list[System]) -> str:
    runs = [run for system in systems for run in system.runs]
    facts = runs[0].facts
    name = facts.get("submission_platform") or facts.get("config_name") or facts.get("config") or runs[0].name
    what = f"{len(systems)} systems" if len(systems) > 1 else str(name)
    return f"OpenFold training: {what}" + (f", {len(runs)} runs" if len(runs) > 1 else "")


def _subtitle(systems: list[System]) -> str:
    other = [system.label for system in systems if not system.first.is_benchmark]
    if len(other) == len(systems):
        text = "not the benchmark configuration: no reference band applies"
    else:
        text = "MLPerf HPC v3.0 OpenFold"
        text += f" (not the benchmark configuration: {', '.join(other)})" if other else ""
    org = systems[0].first.facts.get("submission_org") if len(systems) == 1 else None
    return f"{org} · {text}" if org else text


def _key_figures(system: System) -> dict[str, str]:
    """Label to text of the tiles of a system; what is not known has no tile."""
    runs, run = system.scored or list(system.runs), system.first
    tiles: dict[str, str] = {}
    count = f"{len(system.scored)} of {len(system.runs)} runs"
    if system.minutes is not None:
        several = (
            f"minutes per instance, mean of {count}" if system.is_throughput else f"time to train, mean of {count}"
        )
        tiles[several if len(system.runs) > 1 else "time to train"] = format_minutes(system.minutes)
    elif len(system.runs) > 1 or (run.log and run.log.status not in (None, "success")):
        tiles["time to train: a run goes on or missed the target"] = "no score"
    last = [lddt[-1] for r in runs if len(lddt := r.lddt_curve()[2])]
    if last:
        tiles["last lDDT-Cα" if len(runs) == 1 else "last lDDT-Cα, mean"] = f"{np.mean(last):.4f}"
    if system.samples is not None:
        tiles[f"samples to converge, {count}" if len(system.runs) > 1 else "samples to converge"] = (
            f"{system.samples:,.0f}"
        )
    if (band := reference_band(run)) is not None:
        tiles["reference: samples"] = f"{band[0]:,.0f} ± {band[1]:,.0f}"
    if system.floor_samples is not None:
        tiles["floor for ten runs: samples"] = f"{system.floor_samples:,.0f}"
    for label, key in (("ranks", "number_of_ranks"), ("global batch", "global_batch_size"), ("precision", "precision")):
        if key in run.facts:
            tiles[label] = str(run.facts[key])
    return tiles | _metric_tiles(run if len(system.runs) == 1 else None)


def _metric_tiles(run: Run | None) -> dict[str, str]:
    if run is None or run.metrics is None:
        return {}
    metrics, tiles = run.metrics, {}
    if np.isfinite(metrics.step_ms).any():
        tiles["median step"] = f"{np.nanmedian(metrics.step_ms):.0f} ms"
        if np.isfinite(metrics.data_ms).any():
            tiles["median wait for batch"] = f"{np.nanmedian(metrics.data_ms):.1f} ms"
    if np.isfinite(metrics.peak_gib).any():
        tiles["peak memory"] = f"{np.nanmax(metrics.peak_gib):.1f} GiB"
    return tiles


def _sections(
    systems: list[System],
    verdict: Verdict | None,
    published: list[Published],
    tables: dict[str, list[dict[str, str]]],
) -> list[str]:
    parts = [_section("Runs", _runs_table(systems)), _section("Anatomy of the minutes", _anatomy_table(systems))]
    if any(system.first.is_benchmark for system in systems):
        parts.append(_section("Published results, MLPerf HPC v3.0", _published_table(published)))
    for name, rows in tables.items():
        parts.append(_section(name, _table(list(rows[0]), [list(r.values()) for r in rows]) if rows else ""))
    first = systems[0].first
    if len(systems) == len(systems[0].runs) == 1:
        parts += _measured_sections(first)
    environment = first.facts.get("environment")
    if isinstance(environment, Mapping):
        parts.append(_section("Environment", _facts_table(environment)))
    for system in systems:
        facts = {k: v for k, v in system.first.facts.items() if not isinstance(v, Mapping)}
        of = f": {system.label}" if len(systems) > 1 else ""
        parts.append(_details(f"What the {'runs state' if of else 'run states'} about itself{of}", _facts_table(facts)))
    if first.config_text:
        parts.append(_details("Configuration", f"<pre>{html.escape(first.config_text)}</pre>"))
    if verdict is not None and verdict.details:
        parts.append(_details("Text of the check", f"<pre>{html.escape(verdict.details)}</pre>"))
    return [part for part in parts if part]


def _runs_table(systems: list[System]) -> str:
    head = ["run", "status", "time to train", "started", "before the clock", "evaluations", "samples", "last lDDT-Cα"]
    rows = [[system.label, *_run_row(run)] for system in systems for run in system.runs]
    if len(systems) == 1:
        return _table([*head, "seed"], [row[1:] for row in rows])
    return _table(["system", *head, "seed"], rows)


def _run_row(run: Run) -> list[str]:
    samples, _, lddt = run.lddt_curve()
    log = run.log
    return [
        run.name,
        (log.status or "running") if log else "",
        format_minutes(run.minutes) if run.minutes is not None else "",
        _started(log.run_start_ms) if log else "",
        f"{log.init_s:.0f} s" if log and log.init_s is not None else "",
        f"{len(lddt)}",
        f"{samples[-1]:,.0f}" if len(samples) else "",
        f"{lddt[-1]:.4f}" if len(lddt) else "",
        str(run.facts.get("seed", "")),
    ]


def _started(time_ms: float) -> str:
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def _anatomy_table(systems: list[System]) -> str:
    return "".join(_system_anatomy(system, len(systems) > 1) for system in systems)


def _system_anatomy(system: System, named: bool) -> str:
    found = [parts for run in system.runs if run.log is not None and (parts := anatomy(run.log)) is not None]
    if not found:
        return ""
    total = float(np.mean([parts.total_s for parts in found]))
    rows = []
    for index, name in enumerate(found[0].parts):
        seconds = float(np.mean([list(parts.parts.values())[index] for parts in found]))
        rows.append([name, f"{seconds:.1f}", f"{100 * seconds / total:.1f} %"])
    rows.append(["sum", f"{total:.1f}", "100.0 %"])
    steady = np.mean([parts.steady_cycle_s for parts in found])
    note = _note(f"Mean of {len(found)} run{'s' * (len(found) > 1)}. Steady cycle: {steady:.2f} s.")
    head = f"<h3>{html.escape(system.label)}</h3>" if named else ""
    return head + _table(["part", "seconds", "share"], rows) + note


def _measured_sections(run: Run) -> list[str]:
    """What ranks, GPUs and profiler measured during one run, where they did."""
    folder, result = run.folder, run.log.path.name.split(".")[0] if run.log else None
    parts = [_section("Slowest samples", _slowest_table(run))]
    if folder is None:
        return parts
    loads = read_loads(folder, result)
    energy = f" GPUs used {loads.energy_kwh:.3f} kWh from the clock's start on." if loads.energy_kwh is not None else ""
    table = _table(HEAD, loads.rows(_NUM_RANKS)) + _note(f"{_LAG}{energy}") if loads.ranks else ""
    parts.append(_section(f"Stragglers: {len(loads.ranks)} ranks", table))
    for trace in read_anatomies(folder):
        name = f"Anatomy of a step: {trace.file.stem.replace('_', ' ')}"
        longest = [[name[:60], f"{calls:.1f}", f"{ms:.2f}"] for name, calls, ms in trace.longest]
        note = _note(f"Mean of {trace.steps} steps of {trace.step_ms:.1f} ms. {_GROUPS if trace.on_gpu else ''}")
        tables = _table(["part", "ms per step", "share"], trace.rows()) + note
        parts.append(_section(name, tables + _table(["longest", "calls per step", "ms per step"], longest)))
    return parts


def _note(text: str) -> str:
    return f'<p class="quiet">{html.escape(text)}</p>'


def _slowest_table(run: Run) -> str:
    """The samples that took longest to build, as the run noted them at its end."""
    events = run.metrics.events if run.metrics is not None else []
    noted = next((event for event in reversed(events) if event["name"] == "loader"), {"slowest": []})
    rows = [[str(sample["chain"]), f"{sample['seconds']:.3f} s"] for sample in noted["slowest"][:_NUM_SLOWEST]]
    if not rows:
        return ""
    note = f"Built by rank 0: {noted['workers']} loader workers, {noted['prefetch']} batches ahead each."
    return _table(["chain", "time to build"], rows) + _note(note)


def _published_table(published: list[Published]) -> str:
    head = ["submitter", "system", "scaling", "accelerators", "batch", "DAP", "s per step", "runs", "minutes"]
    rows = [
        [p.submitter, p.system, p.scaling, f"{p.num_accelerators} {p.accelerator}", str(p.global_batch_size),
         str(p.dap_size), f"{p.step_s:.3f}", str(p.num_runs), f"{p.minutes:.2f}"]
        for p in published
    ]  # fmt: skip
    return _table(head, rows)


def _facts_table(facts: Mapping[str, Any]) -> str:
    return _table(["key", "value"], [[str(key), str(value)] for key, value in facts.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [all(_is_number(row[i]) for row in rows if row[i]) for i in range(len(head))]
    classes = ["number" if flag else "text" for flag in numeric]
    cells = "".join(f'<th class="{c}">{html.escape(text)}</th>' for c, text in zip(classes, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{c}">{html.escape(t)}</td>' for c, t in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return f'<p class="more" hidden>The table goes on to the right.</p><div class="scroll" tabindex="0">{table}</div>'


def _is_number(text: str) -> bool:
    return text[:1].isdigit() and (text[-1].isdigit() or text.endswith((" s", " min", " %")))


def _section(name: str, body: str) -> str:
    return f"<h2>{html.escape(name)}</h2>\n{body}" if body else ""


def _details(name: str, body: str) -> str:
    return f"<details><summary>{html.escape(name)}</summary>{body}</details>"


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    mark, name = ("✓", "ok") if verdict.ok else ("○", "other") if verdict.well_formed else ("✗", "bad")
    return f'<p class="verdict {name}">{mark} {html.escape(verdict.headline)}</p>'


def _figure(plot: plots.Plot) -> str:
    svg = plot.svg
    for name, colour in plots.PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    title, caption = html.escape(plot.title), html.escape(plot.caption)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def _read_table(path: Path | str | None) -> list[dict[str, str]]:
    if path is None or not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    if any(None in row or None in row.values() for row in rows):
        raise LogError(f"{path}: a row has more or fewer fields than the heading")
    return rows
