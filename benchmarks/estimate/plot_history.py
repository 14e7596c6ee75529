"""The step's way from the published program to today, as one picture of docs/performance.md.

    python benchmarks/estimate/plot_history.py                       # docs/figures/step_history.svg and its dark twin
    python benchmarks/estimate/plot_history.py --png --figures FOLDER    # try it elsewhere

From ``step_time.csv``, ``peer_figures.csv``, ``cards.csv`` (gate, aim) and ``step_causes.csv``, which names what came
with a commit. Each card has its own rows: no bar spans two cards.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

import drawings
from scalefold.report.plots import PALETTE, Plot, draw
from tables import ROOT, card, devices, read, step_history

COLOURS, OTHER = {"H200": PALETTE["c1"], "H100": PALETTE["c0"]}, PALETTE["c5"]
PUBLISHED, LIMITS = PALETTE["c7"], {"gate": PALETTE["c2"], "aim": PALETTE["c3"]}
TICKS = (200, 300, 400, 600, 900)
UNNAMED = "not named yet"


@dataclass(frozen=True)
class Fall:
    """One row: what came with a commit, and the mean step before (None: the first known) and after, in ms."""

    what: str
    commit: str
    before: float | None
    after: float

    def words(self) -> str:
        """``307.6 (-22.2)``."""
        return f"{self.after:.1f}" + ("" if self.before is None else f" ({self.after - self.before:+.1f})")


def published_ms() -> dict[str, float]:
    """Card -> mean step of the published program at its best."""
    own = [row for row in read("peer_figures") if row["what"] == "training step, mean over R = 1 to 4"]
    return {card(row): float(row["value"]) for row in own}


def falls(device: str) -> list[Fall]:
    """All rows of a card, oldest first; the first is the published program where that was measured on this card."""
    named = {row["commit"]: row["what"] for row in read("step_causes")}
    before = published_ms().get(card({"device": device}))
    rows = [] if before is None else [Fall("published program at its best", "", None, before)]
    for commit, text in step_history(device).items():
        what = named.get(commit, UNNAMED) if before is not None else "first measured on this card"
        rows.append(Fall(what, commit, before, float(text)))
        before = float(text)
    return rows


def sections() -> list[tuple[str, list[Fall]]]:
    """Cards and their rows, the card of the published program first."""
    found = [(card({"device": device}), falls(device)) for device in devices("step_time")]
    return sorted(found, key=lambda section: section[0] not in published_ms())


def paint_section(axes: Axes, name: str, rows: Sequence[Fall], top: int) -> None:
    """Bars of one card from row ``top`` on, with its gate and aim."""
    own = COLOURS.get(name, OTHER)
    for place, row in enumerate(rows, top):
        if row.before is None:
            axes.plot(row.after, place, "D", ms=6, color=own if row.commit else PUBLISHED)
        else:
            faint = 0.45 if row.after > row.before else 1.0
            axes.barh(place, row.after - row.before, 0.62, left=row.before, color=own, alpha=faint)
        axes.text(max(row.after, row.before or 0) * 1.03, place, row.words(), va="center", fontsize=8)
    for limits in (row for row in read("cards") if row["card"] == name):
        paint_limits(axes, {kind: float(limits[f"{kind}_ms"]) for kind in LIMITS}, top - 0.5, len(rows))


def paint_limits(axes: Axes, ms: Mapping[str, float], top: float, rows: int) -> None:
    """Gate and aim of one card, beside its rows."""
    for kind, value in ms.items():
        axes.plot([value, value], [top, top + rows], "--", lw=1.2, color=LIMITS[kind])
        axes.text(value, top - 0.05, f"{value:.0f}", ha="center", fontsize=7, color=LIMITS[kind])


def labels(found: Sequence[tuple[str, Sequence[Fall]]]) -> Iterator[tuple[int, str]]:
    """Places and words of the vertical axis; a card's name stands above its rows."""
    top = 1
    for name, rows in found:
        yield top - 1, f"{name}:"
        for place, row in enumerate(rows, top):
            yield place, f"{row.what}, {row.commit}" if row.commit else row.what
        top += len(rows) + 1


def step_history_plot() -> Plot:
    """The waterfall."""
    found = sections()

    def paint(axes: Axes) -> None:
        top = 1
        for name, rows in found:
            paint_section(axes, name, rows, top)
            top += len(rows) + 1
        for kind, colour in LIMITS.items():
            axes.plot([], [], "--", lw=1.2, color=colour, label=f"{kind} of the card")
        axes.set_xscale("log")
        axes.set_xticks(TICKS, list(map(str, TICKS)), fontsize=8)
        axes.minorticks_off()
        places, words = zip(*labels(found), strict=True)
        axes.set_yticks(places, words, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlim=(175, 1150))
        axes.set_xlabel("ms per step, mean over 1 to 4 passes", fontsize=8)
        axes.figure.legend(loc="outside upper right", ncols=2, fontsize=8)

    rows = sum(len(own) + 1 for _, own in found)
    return draw(paint, "step_history", "The step, commit by commit", "", height=1.2 + 0.23 * rows, width=6.6)


def main() -> int:
    """Draw, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--png", action="store_true", help="a PNG file as well")
    arguments = parser.parse_args()
    arguments.figures.mkdir(parents=True, exist_ok=True)
    print(*drawings.write(step_history_plot(), arguments.figures, arguments.png))
    return 0


if __name__ == "__main__":
    sys.exit(main())
