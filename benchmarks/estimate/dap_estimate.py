"""Step and evaluation times nobody has measured yet, bounded from what was measured. Estimates, not measurements.

    python benchmarks/estimate/dap_estimate.py
    scalefold plan configs/eos_h100_260x8_dap8.yaml --step-times benchmarks/results/step_estimate_high.csv \\
        --eval-times benchmarks/results/eval_estimate_high.csv

Reads step_time.csv, dap_share.csv, exchange_alone.csv, step_kernels.csv (newest profiles with R = 1),
exchange_counts.csv, exchange_symmetric.csv, exchange.csv, exchange_2_gpus.csv and evaluation_time.csv; writes
step_estimate_{low,high}.csv and eval_estimate_{low,high}.csv, which plans read. Assumptions are the two scenarios
below, ``LOW`` and ``HIGH``.

Where a rank's share of the step was measured alone on such a card (``step_time.py --dap-share``), only the wire is
estimated: the share, and for each exchange that was counted what it costs between GPUs beyond what it costs inside one.
Where none was measured, a step at DAP P is made of

* kernels that the P ranks share: each a P-th of its measured time, but never shorter than a launch;
* kernels that every rank repeats (embedders, structure module, heads, losses, optimizer), and gaps between kernels;
* exchanges, as counted, at the measured cost of their size; one after the other, nothing hidden behind computing;
* copies that rearrange tensors before and after the library's exchanges; direct ones need none.

All this for one pass (R = 1), whose kernels are known; the mean step has the same mix, and 2.5 times the forward
exchanges. Each kind of card from its own newest profile. Sums of gradients over replicas are left out.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from common import FOLDER, append_rows, print_table, read_rows
from evaluation_time import CHAINS
from scalefold.data.features.features import FeatureSettings
from scalefold.scaling.step_time import REFERENCE_EVAL_TIMES, read_eval_times

MEAN_PASSES = 2.5
COPY_TB_PER_S = 0.72 * 4.3  # of the analytic model, docs/scaling_model.md: a copy reads and writes
LAUNCH_US = 2.0  # same source
MB_IN_MIB = 1e6 / 2**20
DAP_SIZES = (1, 2, 4, 8)
NCCL, DIRECT, ALONE = "exchange.csv", "exchange_symmetric.csv", "exchange_alone.csv"
SHARES = "dap_share.csv"
SHARE_COLUMNS = ("median_ms", "computing_ms", "repeated_ms", "gaps_ms", "exchange_alone_ms")  # in the order of Alone
GPUS = ("H100", "H200")
REPEATED_KERNELS = ("adam", "multi_tensor", "mem", "points", "frames", "pack", "cutlass", "sm80_xmma", "sm90_xmma")
LIBRARY_KERNELS = ("at::native", "cublaslt", "softmax", "elementwise", "reduc")
LENGTHS = list(map(FeatureSettings().padded_length, CHAINS))  # of evaluation chains


@dataclass(frozen=True)
class Scenario:
    """What is assumed where nothing is measured.

    ``shortest_us``: a kernel does not get shorter. ``loss_per_doubling``: share of their speed that kernels lose with
    each halving of their work. ``library_is_shared``: PyTorch's elementwise kernels and reductions belong to the shared
    part. ``direct``: GPUs read each other's memory at the cost measured between two, for what comes from P - 1 of P
    ranks instead of one of two; else NCCL exchanges. ``eight_over_four``: NCCL's exchange of 8 ranks over that of 4.
    ``wire``: beside a measured share, what an exchange costs beyond one inside a GPU, over the same between two GPUs
    that do nothing else: in a step ranks come to a barrier at unequal times, and more ranks more so.
    """

    name: str
    shortest_us: float
    loss_per_doubling: float
    library_is_shared: bool
    direct: bool
    eight_over_four: float
    wire: float


LOW = Scenario("low", 2.0, 0.0, library_is_shared=True, direct=True, eight_over_four=1.0, wire=1.0)
HIGH = Scenario("high", 4.0, 0.1, library_is_shared=False, direct=False, eight_over_four=2.0, wire=2.0)


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a mean step at one DAP size."""

    shared: float
    repeated: float
    exchanges: float
    copies: float

    @property
    def total(self) -> float:
        """The step."""
        return self.shared + self.repeated + self.exchanges + self.copies


def read(name: str) -> list[dict[str, str]]:
    """Rows of a CSV file of this folder; none where the file is not there yet."""
    return read_rows(FOLDER / name) if (FOLDER / name).exists() else []


@dataclass(frozen=True)
class Measured:
    """A measured step: mean over R = 1..4, in milliseconds."""

    mean_ms: float
    source: str
    complete: bool


def measured(device: str, dap: int = 1) -> Measured | None:
    """Newest measurement of this project at a DAP size on a kind of card; DAP-1 on one GPU.

    Of one commit, R = 1..4, or R = 1 and 4: steps grow linearly with R (281, 344, 407, 469 on an H200).
    """
    sets: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in read("step_time.csv"):
        fits = row["variant"] == "ours" and device in row["device"] and int(row["dap"]) == dap
        if fits and (dap > 1 or row["gpus"] == "1"):
            sets.setdefault((row["date"], row["commit"], row["gpus"]), {})[int(row["passes"])] = float(row["median_ms"])
    for (date, commit, gpus), times in reversed(list(sets.items())):
        if {1, 4} <= set(times):
            chosen = list(times.values()) if len(times) == 4 else [times[1], times[4]]
            source = f"measured {date} at {commit} on {gpus} {device}, benchmarks/results/step_time.csv"
            source += "" if len(times) == 4 else ": mean of R = 1 and 4"
            return Measured(sum(chosen) / len(chosen), source, len(times) == 4)
    return None


@dataclass(frozen=True)
class Alone:
    """A rank's share of the step without its peers: mean over R = 1..4, in milliseconds."""

    wall: float
    computing: float
    repeated: float
    gaps: float
    exchanges: float
    date: str
    commit: str


def over_passes(rows: Mapping[int, Mapping[str, str]]) -> list[float]:
    """Means over R of a share, by its rows for R = 1..4, or 1 and 4 if not all are there."""
    chosen = list(rows.values()) if len(rows) == 4 else [rows[1], rows[4]]
    return [mean(float(row[name]) for row in chosen) for name in SHARE_COLUMNS]


def share_alone(gpu: str, size: int) -> Alone | None:
    """Newest share at a DAP size on a kind of card, of one commit and with R = 1..4, or 1 and 4.

    One with R = 1 alone grows with R as the newest with more passes did, on whichever card that was.
    """
    sets: dict[tuple[str, str, str], dict[int, dict[str, str]]] = {}
    for row in read(SHARES):
        if int(row["dap"]) == size:
            sets.setdefault((row["date"], row["commit"], row["device"]), {})[int(row["passes"])] = row
    whole = [(commit, rows) for (_, commit, _), rows in sets.items() if {1, 4} <= set(rows)]
    for (date, commit, device), rows in reversed(list(sets.items())):
        if gpu in device and {1, 4} <= set(rows):
            return Alone(*over_passes(rows), date, commit)
        if gpu in device and 1 in rows and whole:
            source, grown = whole[-1]
            growth = over_passes(grown)[0] / float(grown[1]["median_ms"])
            means = [growth * float(rows[1][name]) for name in SHARE_COLUMNS]
            return Alone(*means, date, f"{commit}, R = 1, which grows as at {source}")
    return None


def is_shared(kernel: str, scenario: Scenario) -> bool:
    """Whether the ranks of a group share this kernel's work."""
    name = kernel.lower()
    if any(word in name for word in REPEATED_KERNELS):
        return False
    return scenario.library_is_shared or not any(word in name for word in LIBRARY_KERNELS)


def newest_profile(gpu: str) -> list[dict[str, str]]:
    """Kernels of the last profiled step of this project with one pass on a kind of card."""
    ours = [row for row in read("step_kernels.csv") if (row["variant"], row["passes"]) == ("ours", "1")]
    rows = [row for row in ours if gpu in row["device"]]
    last = rows[-1]["date"], rows[-1]["commit"]
    return [row for row in rows if (row["date"], row["commit"]) == last]


def computing_ms(gpu: str, size: int, scenario: Scenario) -> tuple[float, float]:
    """Shared and repeated milliseconds of one pass with backward as profiled, gaps among the repeated."""
    shared, repeated, busy_ms = 0.0, 0.0, 0.0
    profile = newest_profile(gpu)
    for row in profile:
        calls, total_ms = int(row["calls"]), float(row["total_ms"])
        busy_ms += total_ms
        if not is_shared(row["kernel"], scenario):
            repeated += total_ms
            continue
        each_us = 1e3 * total_ms / calls
        speed = size * (1 - scenario.loss_per_doubling) ** math.log2(size)
        shared += calls * min(each_us, max(each_us / speed, scenario.shortest_us)) / 1e3
    return shared, repeated + max(0.0, one_pass_ms(gpu, profile[0]["commit"]) - busy_ms)


def one_pass_ms(gpu: str, commit: str) -> float:
    """A step with one pass of the commit that was profiled: gaps are what is left of it beside its kernels."""
    ours = [row for row in read("step_time.csv") if (row["variant"], row["passes"], row["gpus"]) == ("ours", "1", "1")]
    return float([row for row in ours if gpu in row["device"] and row["commit"] == commit][-1]["median_ms"])


def exchange_rows(gpus: int, file: str = NCCL) -> list[dict[str, str]]:
    """Measured exchanges of so many GPUs of one host, the newest of every size."""
    return list({row["mib_per_rank"]: row for row in read(file) if int(row["gpus"]) == gpus}.values())


def exchange_us(name: str, mib: float, size: int, scenario: Scenario) -> float:
    """Cost of one exchange, linear between measured sizes and beyond the largest, constant below the smallest."""
    if scenario.direct:
        return direct_us(name, mib, size)
    factor, rows = 1.0, exchange_rows(size)
    if not rows and size == 2:
        earlier = read("exchange_2_gpus.csv")
        rows = [row | {"mib_per_rank": str(float(row["mb_per_rank"]) * MB_IN_MIB)} for row in earlier]
    elif not rows:
        factor, rows = scenario.eight_over_four, exchange_rows(4)
    return factor * _interpolated(rows, name, mib)


def direct_us(name: str, mib: float, size: int) -> float:
    """Direct exchange among ``size`` GPUs; where they were not measured, among two that send each other as much."""
    own = exchange_rows(size, DIRECT)
    return _interpolated(own, name, mib) if own else _interpolated(exchange_rows(2, DIRECT), name, received(mib, size))


def received(mib: float, size: int) -> float:
    """MiB that a rank of two puts in to receive what one of ``size`` receives from all others."""
    return mib * 2 * (size - 1) / size


def wire_us(name: str, mib: float, size: int, scenario: Scenario) -> float:
    """What a direct exchange costs beyond the same inside one GPU."""
    inside = {row["mib_per_rank"]: row for row in read(ALONE) if int(row["dap"]) == size}
    return scenario.wire * max(0.0, direct_us(name, mib, size) - _interpolated(list(inside.values()), name, mib))


def wire_ms(size: int, scenario: Scenario) -> float:
    """The wire of all exchanges of a mean step."""
    rows = [row for row in read("exchange_counts.csv") if int(row["dap"]) == size]
    times = {"forward": MEAN_PASSES, "backward": 1.0}
    each = [wire_us(row["exchange"], float(row["mib_per_rank"]), size, scenario) for row in rows]
    return sum(times[row["direction"]] * int(row["calls"]) * us for row, us in zip(rows, each, strict=True)) / 1e3


def _interpolated(rows: list[dict[str, str]], name: str, mib: float) -> float:
    sizes, costs = np.array(sorted((float(row["mib_per_rank"]), float(row[f"{name}_us"])) for row in rows)).T
    us = float(np.interp(mib, sizes, costs))
    if mib > sizes[-1]:
        us += (mib - sizes[-1]) * (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
    return us


def exchanges_ms(size: int, scenario: Scenario) -> tuple[float, float]:
    """Exchanges and the copies around them, per mean step."""
    exchanges = copies = 0.0
    for row in read("exchange_counts.csv"):
        if int(row["dap"]) == size:
            times = MEAN_PASSES if row["direction"] == "forward" else 1.0
            us = exchange_us(row["exchange"], float(row["mib_per_rank"]), size, scenario)
            exchanges += times * int(row["calls"]) * us / 1e3
            if scenario.direct:
                continue
            moved_us = 2 * float(row["copied_mib"]) * 2**20 / COPY_TB_PER_S / 1e6
            copies += times * (moved_us + int(row["copies"]) * LAUNCH_US) / 1e3
    return exchanges, copies


def parts(gpu: str, size: int, scenario: Scenario) -> Parts:
    """The mean step on ``gpu`` (H100 or H200) at a DAP size; of a measured share only the wire is estimated."""
    alone = share_alone(gpu, size) if size > 1 else None
    if alone is not None:
        shared, repeated = alone.computing - alone.repeated, alone.repeated + alone.gaps
        return Parts(shared, repeated, alone.wall - shared - repeated + wire_ms(size, scenario), 0.0)
    card, known = measured(gpu), computing_ms(gpu, 1, scenario)
    assert card is not None
    scale = card.mean_ms / sum(known)
    shared, repeated = computing_ms(gpu, size, scenario)
    return Parts(scale * shared, scale * repeated, *exchanges_ms(size, scenario))


def step_rows(scenario: Scenario) -> list[dict[str, object]]:
    """Table of step times for plans: measured where they were measured, else estimated."""
    rows = []
    for gpu in GPUS:
        for size in DAP_SIZES:
            known, guess = measured(gpu, size), parts(gpu, size, scenario)
            alone = share_alone(gpu, size)
            source = f"{scenario.name} estimate of benchmarks/estimate/dap_estimate.py: computing "
            source += f"{guess.shared + guess.repeated:.0f}"
            source += "" if alone is None else f" (share measured {alone.date} at {alone.commit})"
            source += f", exchanges {guess.exchanges:.0f}, copies {guess.copies:.0f}"
            rows.append(
                {
                    "kind": "measured" if known is not None and known.complete else "estimated",
                    "gpu": gpu,
                    "precision": "bf16",
                    "dap_size": size,
                    "activation_checkpointing": "false",
                    "step_ms": round(guess.total if known is None else known.mean_ms, 1),
                    "source": source if known is None else known.source,
                }
            )
    return rows


def evaluation_row(scenario: Scenario) -> dict[str, object]:
    """Cost of evaluating 180 chains: as measured on one H100 (high); the analytic model's target in all (low)."""
    rows = [row for row in read("evaluation_time.csv") if "H100" in row["device"]]
    variant = "ours" if any(row["variant"] == "ours" for row in rows) else "ours_uncaptured"
    table = sorted({int(r["length"]): float(r["median_ms"]) for r in rows if r["variant"] == variant}.items())
    each_s = np.interp(LENGTHS, *np.array(table).T) / 1e3
    total_s = float(each_s.sum())
    source = f"{variant} in benchmarks/results/evaluation_time.csv, one H100: 180 chains of 60 to 700 residues"
    if scenario is LOW:
        model_s = next(row.total_gpu_s for row in read_eval_times(REFERENCE_EVAL_TIMES) if row.kind == "target")
        if model_s < total_s:
            total_s, source = model_s, f"total: analytic model, target; longest chain: {source}"
    return {
        "kind": "estimated",
        "gpu": "H100",
        "total_gpu_s": round(total_s, 1),
        "longest_chain_s": round(float(each_s.max()), 2),
        "source": source,
    }


def shares(gpu: str) -> list[dict[str, object]]:
    """Parts of the step by DAP size, for people."""
    rows: list[dict[str, object]] = []
    for size in DAP_SIZES:
        known = measured(gpu, size)
        if known is not None:
            rows.append(_line(size, "measured", {}, known.mean_ms))
        for scenario in (LOW, HIGH) if size > 1 else ():
            found = parts(gpu, size, scenario)
            rows.append(_line(size, scenario.name, vars(found), found.total))
    return rows


def _line(size: int, case: str, known: dict[str, float], total: float) -> dict[str, object]:
    names = ("shared", "repeated", "exchanges", "copies")
    line: dict[str, object] = {"dap": size, "case": case}
    line |= {f"{name}_ms": f"{known[name]:.1f}" if known else "" for name in names}
    percent = f"{100 * known['exchanges'] / total:.0f}" if known else ""
    return line | {"step_ms": f"{total:.1f}", "exchange_percent": percent}


def main() -> int:
    """Estimate, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the four tables, written anew")
    arguments = parser.parse_args()
    for scenario in (LOW, HIGH):
        for name, rows in (("step", step_rows(scenario)), ("eval", [evaluation_row(scenario)])):
            file = arguments.out / f"{name}_estimate_{scenario.name}.csv"
            file.unlink(missing_ok=True)
            append_rows(file, rows)
    for gpu in GPUS:
        print(f"{gpu}, mean over R, ms; estimates beyond DAP-1")
        print_table(shares(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
