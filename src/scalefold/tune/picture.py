"""Best time over trials, of searches with and without history, as one figure."""

from collections.abc import Sequence
from pathlib import Path

from scalefold.tune.trials import Trial

LABELS = {"history": "with history", "alone": "without history", "sweep": "in the order of the candidates"}


def progress(rows: Sequence[Trial]) -> list[float]:
    """Summed best times of all problems after each trial, over those of their first ones; starts with 1.

    Rows in the order of time, of one search. An operation counts as often as a training step calls it.
    """
    timed = [row for row in rows if row.is_sound]
    best: dict[tuple[str, str], float] = {}
    calls: dict[tuple[str, str], int] = {}
    for row in timed:
        best.setdefault(row.key, row.us or 0.0)
        calls[row.key] = max(1, row.calls)
    first = sum(best[key] * calls[key] for key in best)
    found, seen = [1.0], set()
    for row in timed:
        if row.key in seen:
            best[row.key] = min(best[row.key], row.us or 0.0)
            found.append(sum(best[key] * calls[key] for key in best) / first)
        seen.add(row.key)
    return found


def draw(rows: Sequence[Trial], file: Path) -> None:
    """The newest search of each kind among the trials of one GPU, as .svg or .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for mode, label in LABELS.items():
        own = [row for row in rows if row.search == mode]
        own = [row for row in own if (row.code, row.torch) == (own[-1].code, own[-1].torch)]
        if own:
            curve = progress(own)
            axes.step(range(len(curve)), curve, where="post", label=label)
    axes.set_xlabel("trials after the first of each problem")
    axes.set_ylabel("summed best times / summed first times")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    pyplot.close(figure)
