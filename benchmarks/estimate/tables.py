"""Tables of README.md and docs/performance.md, from ``benchmarks/results/*.csv``: the newest row of each card.

    python benchmarks/estimate/tables.py                                        # prints all of them
    python benchmarks/estimate/tables.py --write README.md docs/performance.md  # after new rows

Newer rows stand further down in a file. Of steps and operations the newest commit counts that was measured most fully,
so that no table mixes the numbers of passes of two commits.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from pages import card, markdown, print_or_write
from sub_layers import OPTIMIZER, SubLayer, Times, sub_layers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PASSES = ("1", "2", "3", "4")
NONE = "–"
GOALS = ("gate", "aim")
STEP_VARIANTS = {
    "ours": "ours",
    "ours_ckpt": "ours, activation checkpointing",
    "plain_ckpt": "plain PyTorch, the same in a CUDA graph",
}
OPERATIONS = (  # name in the table, operation and shape in kernels.csv
    ("attention with bias, 256 × 4 heads × 256 × 32", "attention", "1x256x256x4h32_bias"),
    ("attention with bias, 128 × 8 × 256 × 32 (MSA row)", "attention", "1x128x256x8h32_bias"),
    ("attention with bias, 1024 × 8 × 256 × 8 (extra MSA row)", "attention", "1x1024x256x8h8_bias"),
    ("attention, 256 × 8 × 128 × 32 (MSA column)", "attention", "1x256x128tx8h32_plain"),
    ("triangle multiplication, outgoing, 256², c 128", "triangle_multiplication", "1x256x256x128_outgoing"),
    ("triangle multiplication, incoming", "triangle_multiplication", "1x256x256x128_incoming"),
    ("transition, 256², c 128", "transition", "1x256x256x128by4"),
    ("transition of the MSA, c 256", "transition", "1x128x256x256by4"),
    ("projections, pair", "layer_norm_linear", "1x256x256x128to128+128+128+128+4"),
    ("projections, MSA", "layer_norm_linear", "1x128x256x256to256+256+256+256"),
    ("gated output, pair", "gated_output", "1x256x256x128from128"),
    ("gated output, MSA column", "gated_output", "1x256x128tx256from256"),
    ("outer product's operands, 128 rows", "outer_product_project", "1x128x256x256"),
    ("outer product update, 128 rows", "outer_product_update", "128x256x256"),
    ("global column attention, 1024 × 256 × 64", "global_attention", "1x1024x256x64"),
    ("invariant point attention, 256 × 12 heads", "invariant_point_attention", "256x12"),
    ("structure module, its iterations", "structure_iterations", "256x384"),
    ("point errors of 8 × 256 frames, 256 points", "point_errors", "8x256x256"),
    ("layer norm, pair", "layer_norm", "1x256x256x128"),
)
CURVES = {  # of training_curve.csv
    "ours": "ours",
    "rounded": "plain, weights rounded otherwise",
    "ours_rounded": "ours, so rounded",
}
TERMS = {
    "loss": "loss",
    "fape": "FAPE",
    "supervised_chi": "torsion angles",
    "distogram": "distogram",
    "masked_msa": "masked MSA",
    "plddt_loss": "pLDDT",
}
RIVALS = {"compiled": "compiled", "cuequivariance": "cuEquivariance", "fast_trimul": "fast-trimul", "plain": "plain"}
LAYOUTS = {
    "one_gpu": "one GPU",
    "dap2": "DAP 2",
    "dp2": "data parallel 2",
    "train_eval": "one trains, one evaluates",
    "target": "target reached",
    "stop_one_gpu": "SIGTERM, one GPU",
    "stop_one_gpu resumed": "and `--resume`",
    "stop_dap2": "SIGTERM, DAP 2",
    "stop_dap2 resumed": "and `--resume`",
    "phases": "phase of two replicas",
    "phases resumed": "and its next one, of DAP 2",
    "killed": "one rank killed",
}
PARTS = {  # of small_kernels.csv
    "plain": "plain",
    "single": "iterations one by one",
    "unstitched": "unstitched",
    "ours": "ours",
    "fused": "ours, Inductor around",
}
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Rows of a result file, oldest first."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def newest(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], Row]:
    """The last row of each combination of ``keys``, in the order of their first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[key] for key in keys)] = row
    return found


def newest_commit(rows: Sequence[Row], parts: str) -> list[Row]:
    """The rows of the newest commit that has most of the different values of ``parts``; of each value the last one."""
    by_commit: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_commit.setdefault(row["commit"], {})[row[parts]] = row
    last = {row["commit"]: place for place, row in enumerate(rows)}
    best = max(by_commit, key=lambda commit: (len(by_commit[commit]), last[commit]), default=None)
    return [] if best is None else list(by_commit[best].values())


def steps(device: str, variant: str = "ours") -> dict[str, Row]:
    """Passes -> row of the newest step on one GPU of a card that was measured for most numbers of passes."""
    wanted = {"device": device, "variant": variant, "gpus": "1", "dap": "1"}
    rows = [row for row in read("step_time") if all(row[key] == value for key, value in wanted.items())]
    return {row["passes"]: row for row in newest_commit(rows, "passes")}


def mean_ms(found: dict[str, Row]) -> str:
    """Mean over one to four passes; a dash where one is missing."""
    return f"{mean(float(found[r]['median_ms']) for r in PASSES):.1f}" if set(PASSES) <= set(found) else NONE


def devices(name: str) -> list[str]:
    """Cards of a result file, the last measured one first."""
    return list(dict.fromkeys(row["device"] for row in reversed(read(name))))


def headline_table() -> str:
    """What README and docs say first."""
    rows: list[Sequence[object]] = []
    for device in devices("step_time"):
        if found := steps(device):
            row = next(iter(found.values()))
            rows.append(["training step, mean over 1 to 4 passes", f"{mean_ms(found)} ms", card(row), row["commit"]])
    peer = next(row for row in read("peer_figures") if row["what"] == "training step, mean over R = 1 to 4")
    rows.append(
        ["the same of the published program at its best", f"{peer['value']} ms", card(peer), "`peer_figures.csv`"]
    )
    rows += [row for device in devices("step_breakdown") for row in shared_rows(device)]
    runs = list(newest(read("gpu_runs"), "layout").values())
    for column, what, unit in (
        ("start_to_first_step_s", "`run_start` to the end of the first step, at most", ".1f s"),
        ("stop_to_exit_s", "`run_stop` to the end of the last process, at most", ".1f s"),
        ("checkpoint_stall_ms", "stall of a step at a checkpoint, at most", ".1f ms"),
    ):
        judged = [row for row in runs if row[column] and row["layout"] != "killed"]
        worst = max(judged, key=lambda row: float(row[column]))
        digits, name = unit.split(" ")
        rows.append([what, f"{float(worst[column]):{digits}} {name}", card(worst), worst["commit"]])
    last = read("reproducibility")[-1]
    alike = [row for row in read("reproducibility") if all(row[key] == last[key] for key in ("device", "repeats"))]
    bits = newest(alike, "what", "dap", "passes").values()
    differ = sum(int(row["differing"]) > 0 for row in bits)
    what = f"operations and whole steps whose bits differ in {last['repeats']} repeats"
    rows.append([what, f"{differ} of {len(bits)}", card(last), f"{last['commit']} and before"])
    return markdown(["what", "figure", "card", "commit"], rows)


def shared_rows(device: str) -> list[list[object]]:
    """How much sooner GPUs that share a sample are done than one: of each number the newest call that timed both."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in (row for row in read("step_breakdown") if row["device"] == device and row["gpus"] == row["dap"]):
        times.setdefault((row["dap"], row["commit"]), {})[row["passes"]] = float(row["wall_ms"])
    found: list[list[object]] = []
    for dap, commit in sorted({d: c for d, c in times if d != "1" and ("1", c) in times}.items()):
        one, shared = times["1", commit], times[dap, commit]
        passes = sorted(one.keys() & shared.keys())
        what = f"step of {dap} GPUs that share a sample (DAP {dap}), mean over {' and '.join(passes)} passes"
        ratio = f"{sum(one[r] for r in passes) / sum(shared[r] for r in passes):.2f} times as fast as one's"
        found.append([what, ratio, card({"device": device}), commit])
    return found


def step_table() -> str:
    """Steps of one GPU by number of passes."""
    rows = []
    for device in devices("step_time"):
        for variant, name in STEP_VARIANTS.items():
            if found := steps(device, variant):
                row = next(iter(found.values()))
                times = [f"{float(found[r]['median_ms']):.0f}" if r in found else NONE for r in PASSES]
                peak = max(float(own["peak_gib"]) for own in found.values())
                rows.append([card(row), name, row["commit"], *times, f"**{mean_ms(found)}**", f"{peak:.1f}"])
    return markdown(["card", "variant", "commit", *(f"R = {r}" for r in PASSES), "mean", "peak GiB"], rows)


def step_history(device: str) -> dict[str, str]:
    """Commit -> mean of all commits that were measured on one GPU for all numbers of passes, oldest first."""
    own = [r for r in read("step_time") if (r["device"], r["variant"], r["gpus"]) == (device, "ours", "1")]
    commits = dict.fromkeys(row["commit"] for row in own)
    means = {commit: mean_ms({row["passes"]: row for row in own if row["commit"] == commit}) for commit in commits}
    return {commit: ms for commit, ms in means.items() if ms != NONE}


def history_table() -> str:
    """The steps of every card, oldest first."""
    rows = []
    for device in devices("step_time"):
        text = " → ".join(f"{ms} ({commit})" for commit, ms in step_history(device).items())
        rows.append([card({"device": device}), text])
    return markdown(["card", "mean step, ms (commit)"], rows)


def goal_table() -> str:
    """The newest step of every card beside the gate and the aim that were set for it."""
    goals = newest(read("cards"), "card")
    rows: list[Sequence[object]] = []
    for device in devices("step_time"):
        if (goal := goals.get((card({"device": device}),))) is None or not (history := step_history(device)):
            continue
        commit, ms = list(history.items())[-1]
        over = [f"{goal[f'{kind}_ms']} ({100 * (float(ms) / float(goal[f'{kind}_ms']) - 1):+.0f} %)" for kind in GOALS]
        rows.append([goal["card"], ms, *over, commit])
    return markdown(["card", "mean step, ms", *(f"{kind} (step over it)" for kind in GOALS), "commit"], rows)


def operation_table() -> str:
    """Operations on the card that was measured last; figures of an older commit than ours' in italics.

    The last but one column is the time of both directions of the fastest other over ours.
    """
    device = devices("kernels")[0]
    own = newest([row for row in read("kernels") if row["device"] == device], "operation", "shape", "variant")
    rows = []
    for name, operation, shape in OPERATIONS:
        if (ours := own.get((operation, shape, "ours"))) is None:
            continue
        others = [own.get((operation, shape, variant)) for variant in RIVALS]
        cells = [microseconds(row, ours["commit"]) for row in (ours, *others)]
        fastest = min((both_us(row) for row in others if row is not None), default=None)
        gain = NONE if fastest is None else f"{fastest / both_us(ours):.2f}"
        rows.append([name, *cells, gain, ours["commit"]])
    return markdown(
        [f"µs on {card({'device': device})}", "ours", *RIVALS.values(), "fastest other / ours", "commit"], rows
    )


def both_us(row: Row) -> float:
    """Time of forward and backward."""
    return float(row["forward_us"]) + float(row["backward_us"])


def microseconds(row: Row | None, commit: str) -> str:
    """``66 / 228``, in italics where it was not measured at ``commit``; nothing where it was not measured."""
    if row is None:
        return ""
    text = f"{float(row['forward_us']):.0f} / {float(row['backward_us']):.0f}"
    return text if row["commit"] == commit else f"*{text}*"


def curve_table() -> str:
    """Every term of the newest curves beside the plain path's, all begun alike; nothing where none was measured."""
    if not (rows := read("training_curve") if (RESULTS / "training_curve.csv").exists() else []):
        return ""
    found = newest([row for row in rows if row["trained"] == rows[-1]["trained"]], "variant", "term")
    variants = [name for name in CURVES if any(variant == name for variant, _ in found)]
    cells = [[name, *(c for v in variants for c in curve_cells(found[v, term]))] for term, name in TERMS.items()]
    columns = ("largest difference of its band", "at step", "mean difference ± its error")
    head = [f"{CURVES[variant]}: {column}" for variant in variants for column in columns]
    return markdown(["20 steps' mean of", *head], cells)


def curve_cells(row: Row) -> list[str]:
    """``0.280 of 0.241``, in bold where it leaves the band, where, and ``+0.4 ± 1.0 %``."""
    share = f"{float(row['difference']):.3f} of {float(row['band']):.3f}"
    percent = f"{100 * float(row['mean_difference']):+.1f} ± {100 * float(row['standard_error']):.1f} %"
    return [share if row["same"] == "yes" else f"**{share}**", row["at_step"], percent]


def kernel_table(largest: int = 12) -> str:
    """The kernels that take most of a step with one pass of one GPU, on the card that was profiled last."""
    rows = [row for row in read("dap_share_kernels") if (row["dap"], row["passes"]) == ("1", "1")]
    rows = [row for row in rows if (row["device"], row["commit"]) == (rows[-1]["device"], rows[-1]["commit"])]
    ours = sorted((row for row in rows if "::" not in row["kernel"]), key=lambda row: -float(row["total_ms"]))
    cells = [
        [f"`{row['kernel']}`", f"{float(row['total_ms']):.1f}", row["calls"], f"{float(row['mean_us']):.0f}"]
        for row in ours[:largest]
    ]
    if (whole := whole_share(rows[0]["device"], rows[0]["commit"])) is not None:
        busy = f"{float(whole['computing_ms']):.1f} of {float(whole['median_ms']):.1f}"
        cells.append(["all", busy, whole["kernels"], ""])
    return markdown([f"kernel ({card(rows[0])}, {rows[0]['commit']}, R = 1)", "ms", "calls", "µs each"], cells)


def whole_share(device: str, commit: str | None = None) -> Row | None:
    """The newest step of one GPU with one pass that was taken apart on a card, at a commit if one is named."""
    rows = [r for r in read("dap_share") if (r["dap"], r["passes"], r["device"]) == ("1", "1", device)]
    return next((row for row in reversed(rows) if commit in (None, row["commit"])), None)


# --- floor, budget, measured ------------------------------------------------------------------------------------------


def sub_layer_times(device: str) -> dict[str, tuple[Times, str]]:
    """Newest µs on a card, and the commit: of operations both directions, of parts and the optimizer one number."""
    found: dict[str, tuple[Times, str]] = {}
    for row in read("kernels"):
        if (row["device"], row["variant"]) == (device, "ours"):
            own = (float(row["forward_us"]), float(row["backward_us"]))
            found[f"{row['operation']} {row['shape']}"] = own, row["commit"]
    for row in read("small_kernels"):
        if (row["device"], row["variant"]) == (device, "ours"):
            found[row["part"]] = (float(row["us"]),), row["commit"]
    if (whole := whole_share(device)) is not None:
        found[OPTIMIZER] = (1000 * float(whole["optimizer_ms"]),), whole["commit"]
    return found


def pair(values: Sequence[float], digits: int = 0) -> str:
    """``38 / 81``."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def sub_layer_line(own: SubLayer) -> list[object]:
    """One row of the table."""
    needs = [pair([float(row["gflop"]) for row in own.work], 1), pair([1000 * float(row["gb"]) for row in own.work])]
    limits = [own.step_ms(own.floor), own.step_ms(own.budget)]
    line: list[object] = [own.name, own.calls, *needs, pair(own.floor), pair(own.budget)]
    if own.measured is None:
        return [*line, "not measured", pair(limits, 1) + f" / {NONE}", NONE]
    missing = "".join(f", `{name}` not measured" for name in own.measured.missing)
    ms = pair([*limits, own.step_ms(own.measured.us)], 1)
    return [*line, pair(own.measured.us) + missing, ms, ", ".join(own.measured.commits)]


def sub_layer_table() -> str:
    """Floor, budget and measured time of sub-layers on the card whose operations were measured last, of known ones."""
    cards = newest(read("cards"), "card")
    device = next(name for name in devices("kernels") if (card({"device": name}),) in cards)
    limits = cards[(card({"device": device}),)]
    found = sub_layers(read("sub_layers"), limits, sub_layer_times(device))
    sums = [sum(own.step_ms(own.floor) for own in found), sum(own.step_ms(own.budget) for own in found)]
    sums.append(sum(own.step_ms(own.measured.us) for own in found if own.measured is not None))
    step = steps(device)["1"]
    rows = [sub_layer_line(own) for own in found]
    rows.append(["**sum**", "", "", "", "", "", "", f"**{pair(sums, 1)}**", ""])
    rows.append(["the step itself", "", "", "", "", "", "", f"{float(step['median_ms']):.1f}", step["commit"]])
    head = [f"sub-layer on {limits['card']}", "calls", "GFLOP", "MB", "floor, µs", "budget, µs", "measured, µs"]
    return markdown([*head, "ms of a step, R = 1: floor / budget / measured", "commit"], rows)


def part_table() -> str:
    """Parts around the trunk: microseconds and, in brackets, kernels of each variant that was measured, by card."""
    found = newest(read("small_kernels"), "device", "part", "variant")
    names = [variant for variant in PARTS if any(v == variant for *_, v in found)]
    cells = []
    for device in devices("small_kernels"):
        for part in dict.fromkeys(part for own_device, part, _ in found if own_device == device):
            own = [found.get((device, part, variant)) for variant in names]
            figures = [f"{float(row['us']):.0f} ({row['kernels']})" if row else NONE for row in own]
            commits = dict.fromkeys(row["commit"] for row in own if row)
            cells.append([card({"device": device}), part.replace("_", "-"), *figures, ", ".join(commits)])
    return markdown(["card", "µs (kernels)", *(PARTS[name] for name in names), "commit"], cells)


def evaluation_table() -> str:
    """One evaluation chain by its padded length."""
    found = newest(read("evaluation_time"), "device", "variant", "length")
    lengths = sorted({int(length) for _, _, length in found})
    rows = []
    for device, variant in dict.fromkeys((device, variant) for device, variant, _ in reversed(found)):
        own = [found.get((device, variant, str(length))) for length in lengths]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in own if row))
        times = [f"{float(row['median_ms']):.0f}" if row else NONE for row in own]
        name = "one CUDA graph per length" if variant == "ours" else variant.removeprefix("ours_")
        rows.append([card({"device": device}), name.replace("_", " "), *times, commits])
    return markdown(["card", "launched", *map(str, lengths), "commit"], rows)


def run_table() -> str:
    """The newest start of the program in every layout, with what became of its second start."""
    rows, found = [], newest(read("gpu_runs"), "layout")
    columns = ("stop_to_exit_s", "start_to_first_step_s", "checkpoint_stall_ms", "step_over_ruler_percent")
    for layout, name in LAYOUTS.items():
        if (row := found.get((layout,))) is not None:
            numbers = [f"{float(row[column]):.1f}" if row[column] else NONE for column in columns]
            second = found.get((f"{layout} again",), row)
            bits = row["losses_equal"] or (second["losses_equal"] if second["commit"] == row["commit"] else "") or NONE
            rows.append([name, row["exit_status"], *numbers, bits, row["left_behind"], row["commit"]])
    head = ["start", "statuses", "stop to exit, s", "start to step, s", "stall, ms", "over ruler, %"]
    return markdown([*head, "same bits", "left", "commit"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline_table,
    "steps": step_table,
    "history": history_table,
    "goals": goal_table,
    "curve": curve_table,
    "operations": operation_table,
    "kernels": kernel_table,
    "sub_layers": sub_layer_table,
    "parts": part_table,
    "evaluation": evaluation_table,
    "runs": run_table,
}


if __name__ == "__main__":
    print_or_write(__doc__, TABLES)
