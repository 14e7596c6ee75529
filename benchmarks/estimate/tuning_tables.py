"""Tables of docs/tuning.md, from ``benchmarks/results/tuning_*.csv``.

python benchmarks/estimate/tuning_tables.py                           # prints all of them
python benchmarks/estimate/tuning_tables.py --write docs/tuning.md    # after new rows
"""

from collections.abc import Callable

from pages import markdown, print_or_write
from tables import NONE, Row, read

SCENARIOS = ("new shape", "new kernel")
METHODS = {  # name in tuning_replay.csv -> name in the table
    "ours": "ours",
    "TPE": "TPE of Optuna, from nothing",
    "today": "today's order",
    "random": "random",
    "ours, no transfer": "ours, no transfer",
    "ours, no augmentation": "ours, no augmentation",
    "ours, no assistant": "ours, no assistant",
    "history that does not fade": "history that does not fade",
}


def replay_table(name: str) -> str:
    """Every method over all sweeps of a set: summed medians, and ours over it with intervals, in both scenarios."""
    own = [row for row in read("tuning_replay") if (row["set"], row["sweep"]) == (name, "all")]
    found = {(row["scenario"], row["method"]): row for row in own}
    lines = []
    for method, title in METHODS.items():
        cells = []
        for scenario in SCENARIOS:
            row = found[scenario, method]
            cells += [row["p10_to_p90"].removeprefix("sum "), *(with_interval(row, ratio) for ratio in RATIOS)]
        lines.append([title, *cells])
    head = [cell for s in SCENARIOS for cell in (f"sum, {s}", "ratio of sums", "median of ratios")]
    return markdown(["", *head], lines)


RATIOS = ("ratio_of_sums", "median_ratio")


def with_interval(row: Row, ratio: str) -> str:
    """``0.19 (0.14 to 0.23)``; nothing for ours."""
    return f"{row[ratio]} ({row[f'{ratio}_95']})" if row[ratio] else ""


def trial_table() -> str:
    """Median trials of each new sweep by the methods that are compared."""
    rows = read("tuning_replay")
    found = {(row["scenario"], row["sweep"], row["method"]): row["median_trials"] for row in rows}
    lines = []
    for sweep in (row for row in read("tuning_spills") if row["set"] == "new"):
        key = sweep["sweep"]
        others = [found["new shape", key, method] for method in ("random", "TPE", "today")]
        ours = [found[scenario, key, "ours"] for scenario in SCENARIOS]
        lines.append([title_of(sweep), sweep["sound"], *others, *ours])
    head = ["random", "TPE", "today's order", "ours, new shape", "ours, new kernel"]
    return markdown(["kernel and operation", "candidates", *head], lines)


def title_of(row: Row) -> str:
    """Kernel, operation and share of a sweep; no share in evaluations."""
    place = f"DAP {row['dap']}" if row["dap"] != "0" else "evaluation"
    return f"`{row['sweep'].split(' ')[0]}` in {row['operation']} ({place})"


OVER_BEST = ("without_spills_over_best", "allowed_spills_over_best")


def spill_table() -> str:
    """What the fastest candidate of each older sweep spills, and how much slower those are that the rules leave."""
    lines = [
        [
            *(row["set"], title_of(row), f"{float(row['best_us']):.1f}", f"{float(row['median_us']):.1f}"),
            *(row[name] or NONE for name in ("best_spills_bytes", *OVER_BEST, "differing")),
        ]
        for row in read("tuning_spills")
        if row["set"] in ("development", "held-out")
    ]
    head = ["best µs", "median µs", "best spills, bytes", "without spills", "up to 512 bytes", "bits differ"]
    return markdown(["set", "kernel and operation", *head], lines)


TABLES: dict[str, Callable[[], str]] = {
    "replay_new": lambda: replay_table("new"),
    "replay_flat": lambda: replay_table("new, flat"),
    "replay_first_draw": lambda: replay_table("first draw"),
    "replay_held_out": lambda: replay_table("held-out"),
    "replay_development": lambda: replay_table("development"),
    "replay_trials": trial_table,
    "spills": spill_table,
}


if __name__ == "__main__":
    print_or_write(__doc__, TABLES)
