"""Figures and tables of docs/scaling.md, from the CSV files of this folder, the published logs and the planner.

    python benchmarks/measure/exchange_counts.py && python benchmarks/estimate/dap_estimate.py   # what it draws from
    python benchmarks/estimate/plot_scaling.py                                                   # minutes
    python benchmarks/estimate/plot_scaling.py --png --figures FOLDER --page COPY.md             # try it elsewhere

Writes docs/figures/*.svg, twins for dark pages (``*_dark.svg``), and everything between ``<!-- table: NAME -->`` and
``<!-- end -->`` of the page.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
import drawings
from common import FOLDER, ROOT
from dap_estimate import (
    DAP_SIZES,
    DIRECT,
    HIGH,
    LOW,
    MB_IN_MIB,
    Scenario,
    exchange_rows,
    measured,
    parts,
    read,
    shares,
)
from pages import card, fill, markdown, spread
from scalefold.config import load_config
from scalefold.mlperf.log.published import Published, read_published
from scalefold.report.plots import PALETTE, Plot, draw, scaling_curve
from scalefold.scaling.from_config import system_spec
from scalefold.scaling.plan import Plan, plan, scaling_rows
from scalefold.scaling.replay import replay
from scalefold.scaling.step_time import REFERENCE_STEP_TIMES, find_step_time, read_step_times
from scalefold.scaling.study import Study, study, usual_noise
from scalefold.scaling.system import SystemSpec
from share_tables import SHARE_TABLES

CONFIGS = (
    "h100_1x1", "dgx_h100_1x8", "eos_h100_8x8", "eos_h100_16x8_weak", "eos_h100_32x8", "eos_h100_64x8_dap2",
    "eos_h100_128x8_dap4", "eos_h100_260x8_dap8", "perlmutter_a100_224x4_dap4", "from_scratch_8_h100",
    "from_scratch_1056_to_2080_h100",
)  # fmt: skip
EXCHANGES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
SIMULATED_RUNS = 20


# --- what the page says about one system ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Plans of one system: both estimates, and the shipped guarded and target times."""

    spec: SystemSpec
    low: Plan
    high: Plan
    guarded: Plan
    target: Plan

    def simulated(self) -> list[Study]:
        """Runs of both estimates under the usual disturbances; empty where the plan is open."""
        plans = (self.low, self.high)
        return [study(p, usual_noise(self.spec), runs=SIMULATED_RUNS) for p in plans if p.times is not None]


def forecast(name: str) -> Forecast:
    """Plans of ``configs/NAME.yaml``."""
    spec = system_spec(load_config(ROOT / "configs" / f"{name}.yaml").config)
    return Forecast(
        spec,
        *(estimated_plan(spec, scenario) for scenario in (LOW, HIGH)),
        plan(spec, kind="guarded"),
        plan(spec, kind="target"),
    )


def estimated_plan(spec: SystemSpec, scenario: Scenario) -> Plan:
    """The plan with the tables of ``dap_estimate.py``."""
    step, evaluation = (FOLDER / f"{name}_estimate_{scenario.name}.csv" for name in ("step", "eval"))
    return plan(spec, step_time_csv=step, eval_time_csv=evaluation)


# --- figures ----------------------------------------------------------------------------------------------------------


def modelled_ms(kind: str) -> dict[int, float]:
    """Shipped step times of H100 by DAP size."""
    table = read_step_times(REFERENCE_STEP_TIMES)
    rows = {size: find_step_time(table, "H100", "bf16", size, False, kind) for size in DAP_SIZES}  # type: ignore[arg-type]
    return {size: row.step_ms for size, row in rows.items() if row is not None}


def step_by_dap() -> Plot:
    """Step time against the number of GPUs that share a sample."""

    def paint(axes: Axes) -> None:
        published = [
            (int(r["dap"]), float(r["step_ms"])) for r in read("dap_references.csv") if r["kind"] == "published"
        ]
        axes.plot(*np.array(published).T, "D-", ms=5, color=PALETTE["c7"], label="ScaleFold, published")
        axes.plot(*np.array(list(modelled_ms("guarded").items())).T, ":", color=PALETTE["c1"], label="model, guarded")
        axes.plot(*np.array(list(modelled_ms("target").items())).T, ":", color=PALETTE["c2"], label="model, target")
        low, high = ([parts("H100", size, s).total for size in DAP_SIZES] for s in (LOW, HIGH))
        axes.fill_between(DAP_SIZES, low, high, color=PALETTE["c0"], alpha=0.22, lw=0, label="ours, estimated (H100)")
        for gpu, mark in (("H100", "o"), ("H200", "s")):
            known = {size: found.mean_ms for size in DAP_SIZES if (found := measured(gpu, size)) is not None}
            axes.plot(
                list(known), list(known.values()), mark, ms=6, color=PALETTE["c0"], label=f"ours, measured ({gpu})"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(DAP_SIZES, [str(size) for size in DAP_SIZES])
        axes.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1000", "2000"])
        axes.minorticks_off()
        axes.set(xlabel="GPUs per sample (DAP size)", ylabel="ms per step", ylim=(45, 2600))
        axes.figure.legend(loc="outside upper left", ncols=2, fontsize=8)

    return draw(paint, "step_by_dap", "Step time", "Mean over 1 to 4 recycling passes.", height=3.7)


def exchange_costs() -> Plot:
    """Microseconds of an exchange against its size: NCCL among four GPUs and two, direct between two."""

    def paint(axes: Axes) -> None:
        four, two, direct = exchange_rows(4), read("exchange_2_gpus.csv"), exchange_rows(2, DIRECT)
        for index, name in enumerate(EXCHANGES):
            colour, words = PALETTE[f"c{index}"], name.replace("_", "-")
            x, y = np.array([(float(r["mib_per_rank"]), float(r[f"{name}_us"])) for r in four]).T
            axes.plot(x, y, "o-", ms=3, color=colour, label=words)
            x, y = np.array([(float(r["mb_per_rank"]) * MB_IN_MIB, float(r[f"{name}_us"])) for r in two]).T
            axes.plot(x, y, "--", lw=1, color=colour)
            if f"{name}_us" in direct[0]:
                x, y = np.array([(float(r["mib_per_rank"]), float(r[f"{name}_us"])) for r in direct]).T
                axes.plot(x, y, ":", lw=1.6, color=colour)
        axes.plot([], [], "--", lw=1, color=PALETTE["ink"], label="dashed: NCCL, two GPUs")
        axes.plot([], [], ":", lw=1.6, color=PALETTE["ink"], label="dotted: direct, two GPUs")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_yticks([10, 20, 50, 100, 200, 300], ["10", "20", "50", "100", "200", "300"])
        axes.minorticks_off()
        axes.set(xlabel="MiB that each rank puts in", ylabel="µs per exchange")
        axes.figure.legend(loc="outside upper left", ncols=3, fontsize=8)

    return draw(paint, "exchange_costs", "Exchanges", "Inside a CUDA graph, GPUs of one host.", height=3.4)


def step_parts() -> Plot:
    """Parts of the estimated step, low and high."""

    def paint(axes: Axes) -> None:
        bars = [(size, scenario) for size in DAP_SIZES for scenario in ((LOW, HIGH) if size > 1 else (LOW,))]
        found = [parts("H100", size, scenario) for size, scenario in bars]
        left = np.zeros(len(bars))
        for index, name in enumerate(("shared", "repeated", "exchanges", "copies")):
            widths = np.array([getattr(part, name) for part in found])
            axes.barh(range(len(bars)), widths, left=left, height=0.66, color=PALETTE[f"c{index}"], label=name)
            left += widths
        for row, total in enumerate(left):
            axes.text(total, row, f" {total:.0f}", va="center", fontsize=9)
        names = [f"DAP-{size} {scenario.name}" if size > 1 else "1 GPU, measured" for size, scenario in bars]
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.set(xlabel="ms per step, H100, mean over R", xlim=(0, left.max() * 1.12))
        axes.grid(axis="y", visible=False)
        axes.figure.legend(loc="outside upper left", ncols=4, fontsize=8)

    return draw(paint, "step_parts", "Parts of a step", "Estimates beyond one GPU.", height=3.0)


def minutes_by_gpus(forecasts: Sequence[Forecast], published: Sequence[Published]) -> Plot:
    """Time to train against GPUs: published, and planned for the shipped H100 systems."""
    chosen = [f for f in forecasts if "H100" in f.spec.gpu]
    kinds = {"planned, high estimate": "high", "planned, low estimate": "low", "model, guarded": "guarded"}
    rows = [row for kind, name in kinds.items() for row in scaling_rows([getattr(f, name) for f in chosen], kind)]
    found = scaling_curve(rows, published)
    assert found is not None
    axes = found.figure.axes[0]
    axes.legend(loc="lower left", frameon=False, fontsize=7.5)
    for result in published:
        left = result.num_accelerators > 500  # of the point: the axis ends there
        at, side = (result.num_accelerators, result.minutes), {True: "right", False: "left"}[left]
        text = f"{result.submitter}: {result.minutes:.3g}"
        axes.annotate(text, at, (-6 if left else 6, -3), textcoords="offset points", fontsize=7, ha=side)
    return Plot("minutes_by_gpus", found.title, found.caption, found.figure)


# --- tables -----------------------------------------------------------------------------------------------------------


def step_table() -> str:
    """Measured, estimated, modelled and published step times by DAP size."""
    references = read("dap_references.csv")
    guarded, target = modelled_ms("guarded"), modelled_ms("target")

    def reference(size: int, kind: str) -> str:
        return next(
            (f"{float(r['step_ms']):.0f}" for r in references if (int(r["dap"]), r["kind"]) == (size, kind)), "–"
        )

    rows = []
    for size in DAP_SIZES:
        known = [measured(gpu, size) for gpu in ("H200", "H100")]
        cells = ["**not measured**" if found is None else f"{found.mean_ms:.0f}" for found in known]
        guess = spread(*(parts("H100", size, s).total for s in (LOW, HIGH))) if size > 1 else "–"
        aims = f"{reference(size, 'aim')} / {reference(size, 'limit')}"
        modelled = f"{target[size]:.0f} / {guarded[size]:.0f}"
        rows.append([size, *cells, guess, aims.replace("– / –", "–"), modelled, reference(size, "published")])
    head = ["DAP", "H200, measured", "H100, measured", "H100, estimated", "budget: aim / limit"]
    return markdown([*head, "model: target / guarded", "ScaleFold, published"], rows)


def exchange_table() -> str:
    """Four GPUs against two, µs."""
    four, two = exchange_rows(4), read("exchange_2_gpus.csv")
    by_size = {row["mb_per_rank"]: row for row in two}
    rows = [
        [row["mib_per_rank"], *(f"{row[f'{n}_us']} / {by_size[row['mib_per_rank']][f'{n}_us']}" for n in EXCHANGES)]
        for row in four
    ]
    return markdown(["MiB per rank", *(name.replace("_", "-") for name in EXCHANGES)], rows)


def direct_table() -> str:
    """Direct exchanges and NCCL's between two GPUs, measured in one run, µs."""
    names, found = EXCHANGES[:3], exchange_rows(2, DIRECT)
    rows = [[r["mib_per_rank"], *(f"{r[f'{n}_us']} / {r[f'{n}_nccl_us']}" for n in names)] for r in found]
    return markdown(["MiB per rank", *(name.replace("_", "-") for name in names)], rows)


def written_table() -> str:
    """Exchanges that are written by the program before them, beside direct ones behind it, µs; newest rows of each."""
    known = {(int(r["gpus"]), r["pattern"]): r for r in read("exchange_written.csv")}
    names = ("gpus", "pattern", "mib", "maker_us", "direct_us", "written_us")
    rows = [
        [*(r[name] for name in names), f"{float(r['written_us']) / float(r['direct_us']):.2f}", card(r), r["commit"]]
        for r in known.values()
    ]
    return markdown(["GPUs", "what is made", "MiB", "maker", "direct", "written", "ratio", "card", "commit"], rows)


def breakdown_table() -> str:
    """Measured steps of one and of two GPUs, the newest of every card, layout and number of passes, ms."""
    known = [r for r in read("step_breakdown.csv") if int(r["gpus"]) <= 2]
    newest = {(card(r), r["gpus"], r["dap"], r["passes"]): r for r in known}
    names = ("wall_ms", "computing_ms", "exchange_alone_ms", "gaps_ms", "direct_ms", "barrier_ms", "kernels")
    rows = [[*key, *(newest[key][name] for name in names), newest[key]["commit"]] for key in sorted(newest)]
    head = ["card", "GPUs", "DAP", "R", "step", "computing", "exchanges alone", "gaps", "direct exchanges", "barriers"]
    return markdown([*head, "kernels", "commit"], rows)


def count_table() -> str:
    """Exchanges, MiB and estimated milliseconds by DAP size."""
    rows = []
    for size in DAP_SIZES[1:]:
        cells: list[object] = [size]
        for direction in ("forward", "backward"):
            own = [r for r in read("exchange_counts.csv") if (int(r["dap"]), r["direction"]) == (size, direction)]
            calls = sum(int(r["calls"]) for r in own)
            mib = sum(int(r["calls"]) * float(r["mib_per_rank"]) for r in own)
            cells += [f"{calls} × {mib / calls:.1f} = {mib:,.0f} MiB"]
        steps = [parts("H100", size, scenario).exchanges for scenario in (LOW, HIGH)]
        share = [100 * s / parts("H100", size, c).total for s, c in zip(steps, (LOW, HIGH), strict=True)]
        cells += [spread(*steps), spread(min(share), max(share)) + " %"]
        rows.append(cells)
    head = ["DAP", "forward, one pass", "backward", "ms per mean step (estimate)", "share of the estimated step"]
    return markdown(head, rows)


def parts_table() -> str:
    """Parts of the estimated step on H100."""
    rows = [list(row.values()) for row in shares("H100")]
    head = [
        "DAP",
        "case",
        "shared kernels",
        "repeated kernels, gaps",
        "exchanges",
        "copies",
        "step, ms",
        "exchanges, %",
    ]
    return markdown(head, rows)


def plan_table(forecasts: Sequence[Forecast]) -> str:
    """Minutes of every shipped system."""
    rows = []
    for f in forecasts:
        s, ends = f.spec, (f.low, f.high)
        layout = f"{s.dp_size} × DAP-{s.dap_size}" + (f" + {s.num_eval_ranks}" if s.num_eval_ranks else "")
        step, evaluation, minutes = (
            spread(*(p.value(name) for p in ends), digits)
            for name, digits in (("step time", 0), ("evaluation", 1), ("time to train", 1))
        )
        if s.in_phases:
            step, evaluation, minutes = "–", "–", "open: trains in phases"
        simulated = spread(*(found.score_minutes for found in f.simulated()), 1) if f.low.minutes is not None else "–"
        modelled = spread(f.target.minutes, f.guarded.minutes, 1)
        rows.append([f"`{s.name}`", s.world_size, layout, step, evaluation, minutes, simulated, modelled])
    head = ["system", "GPUs", "replicas + evaluation", "step, ms", "evaluation, s", "planned min", "simulated min"]
    return markdown([*head, "model: target to guarded, min"], rows)


def largest_table(forecasts: Sequence[Forecast]) -> str:
    """Where the seconds of the 2080-GPU run go."""
    found = next(f for f in forecasts if f.spec.world_size == 2080)
    low, high = found.simulated()
    ends = list(zip(low.mean_parts().items(), high.mean_parts().values(), strict=True))
    rows = [[name, f"{a:.1f}", f"{b:.1f}"] for (name, a), b in ends if max(abs(a), abs(b)) >= 0.05]
    rows.append(["**sum**", *(f"**{60 * float(s.minutes.mean()):.0f} s**" for s in (low, high))])
    scores = [
        f"**{s.score_minutes:.2f} min** ({np.min(s.minutes):.2f} to {np.max(s.minutes):.2f})" for s in (low, high)
    ]
    rows.append(["score of 20 runs (spread)", *scores])
    return markdown(["seconds, mean of 20 simulated runs", "low estimate", "high estimate"], rows)


def replay_table() -> str:
    """Published runs, predicted from their own parts."""
    rows = []
    results = {(p.submitter, p.system, p.scaling): p for p in read_published()}
    for key, runs in replay().groups().items():
        score = results[key]
        worst = max(runs, key=lambda run: abs(run.error))
        mean = float(np.mean([run.error for run in runs]))
        errors = [f"{100 * mean:+.1f} %", f"{100 * worst.error:+.1f} %"]
        rows.append([f"{key[0]}, {key[2]}", score.num_accelerators, len(runs), f"{score.minutes:.2f}", *errors])
    return markdown(["result", "GPUs", "runs", "published min", "mean error", "worst run"], rows)


def main() -> int:
    """Draw, fill, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("--png", action="store_true", help="PNG files as well")
    arguments = parser.parse_args()
    arguments.figures.mkdir(parents=True, exist_ok=True)
    forecasts = [forecast(name) for name in CONFIGS]
    plots = [step_by_dap(), exchange_costs(), step_parts(), minutes_by_gpus(forecasts, read_published())]
    for figure in plots:
        print(*drawings.write(figure, arguments.figures, arguments.png))
    tables: dict[str, Callable[[], str]] = SHARE_TABLES | {
        "step": step_table,
        "exchange": exchange_table,
        "direct": direct_table,
        "written": written_table,
        "breakdown": breakdown_table,
        "counts": count_table,
        "parts": parts_table,
        "plans": lambda: plan_table(forecasts),
        "largest": lambda: largest_table(forecasts),
        "replay": replay_table,
    }
    arguments.page.write_text(fill(arguments.page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
