"""Tables of docs/scaling.md about what one rank does alone: its share of a step, and the hours that follow from it."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measure"))
from common import FOLDER, ROOT
from dap_estimate import HIGH, LOW, SHARES, Scenario, read
from pages import card, markdown, spread
from scalefold.scaling.from_config import plan_config
from scalefold.scaling.plan import Plan
from spans import against_two_gpus

NONE = "None measured yet."


def share_table() -> str:
    """Measured shares of one rank alone, the newest of every card, DAP size and number of passes, ms."""
    newest = {(card(r), r["dap"], r["passes"]): r for r in read(SHARES)}
    names = ("median_ms", "computing_ms", "repeated_ms", "exchange_alone_ms", "gaps_ms", "kernels", "commit")
    rows = [[*key, *(newest[key][name] for name in names)] for key in sorted(newest)]
    head = [
        "card",
        "DAP",
        "R",
        "step without the wire",
        "computing",
        "of it repeated",
        "exchanges inside",
        "gaps",
        "kernels",
    ]
    return markdown([*head, "commit"], rows) if rows else NONE


def agreement_table() -> str:
    """The share at DAP 2 beside two GPUs."""
    newest = {r["passes"]: r for r in read(SHARES) if r["dap"] == "2" and "H100" in r["device"]}
    rows = against_two_gpus(list(newest.values()), [r for r in read("step_breakdown.csv") if "H100" in r["device"]])
    head = ["R", "alone: computing and gaps", "two GPUs", "%", "within 5 %", "kernels, alone / two", "commits"]
    return markdown(head, [list(row.values()) for row in rows]) if rows else NONE


def scratch_table() -> str:
    """Hours of the systems that train from scratch, by the tables of both estimates."""
    rows = []
    for file in sorted((ROOT / "configs").glob("from_scratch_*.yaml")):
        plans = [estimated_plan(file, scenario) for scenario in (LOW, HIGH)]
        hours = [[p.value(f"hours from scratch, {n} steps") for p in plans] for n in ("fewest", "most")]
        known = [plans[0].value(name) for name in ("published", "AlphaFold")]
        rows.append([f"`{file.stem}`", *(spread(*ends, 1) for ends in hours), *(f"{value:.0f}" for value in known)])
    return markdown(["system", "50,000 steps, h", "60,000 steps, h", "ScaleFold, h", "AlphaFold, h"], rows)


def estimated_plan(file: Path, scenario: Scenario) -> Plan:
    """The plan of a file with the tables of ``dap_estimate.py``."""
    steps, evaluations = (FOLDER / f"{name}_estimate_{scenario.name}.csv" for name in ("step", "eval"))
    return plan_config(file, (), steps, evaluations)


SHARE_TABLES: dict[str, Callable[[], str]] = {
    "shares": share_table,
    "agreement": agreement_table,
    "scratch": scratch_table,
}
