"""What a device did in a step, from the spans of its kernels: computing, exchanging, both, neither; who is faster."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXCHANGE_KINDS = {  # parts of kernel names: the library's, then those of parallel/dap/direct.py
    "all_to_all": ("sendrecv", "alltoall"),
    "all_gather": ("allgather",),
    "reduce_scatter": ("reducescatter",),
    "all_reduce": ("allreduce",),
    "direct": ("_send_parts", "_copy_parts", "_sum_parts"),
    "barrier": ("barrier_kernel",),
}
AGREEMENT = 0.05  # relative, between computing and gaps of a share alone and of two GPUs
Row = Mapping[str, Any]  # of a table


@dataclass(frozen=True)
class Span:
    """A kernel on the device, microseconds."""

    name: str
    start_us: float
    stop_us: float

    @property
    def is_exchange(self) -> bool:
        """Whether it only moves data between GPUs, or waits for them."""
        words = ("nccl", *EXCHANGE_KINDS["direct"], *EXCHANGE_KINDS["barrier"])
        return any(word in self.name.lower() for word in words)


def breakdown(spans: list[Span], wall_ms: float) -> dict[str, object]:
    """Milliseconds of computing, of exchanges by kind, of exchanges alone, and of nothing at all.

    ``gaps_ms`` uses the step's time without the profiler, which widens gaps. Exchanges beside computing (sums of
    gradients) count in ``exchange_ms``, not in ``exchange_alone_ms``.
    """
    exchanges, others = [s for s in spans if s.is_exchange], [s for s in spans if not s.is_exchange]
    all_ms, computing_ms = covered_ms(spans), covered_ms(others)
    found: dict[str, object] = {
        "wall_ms": round(wall_ms, 2),
        "computing_ms": round(computing_ms, 2),
        "exchange_ms": round(summed_ms(exchanges), 2),
        "exchange_alone_ms": round(all_ms - computing_ms, 2),
        "gaps_ms": round(max(0.0, wall_ms - all_ms), 2),
        "kernels": len(others),
        "exchanges": len(exchanges),
    }
    by_kind: Mapping[str, list[Span]] = defaultdict(list)
    for span in exchanges:
        name = span.name.lower()
        by_kind[next((k for k, words in EXCHANGE_KINDS.items() if any(w in name for w in words)), "other")].append(span)
    return found | {f"{kind}_ms": round(summed_ms(by_kind[kind]), 2) for kind in (*EXCHANGE_KINDS, "other")}


def summed_ms(spans: Iterable[Span]) -> float:
    """Sum of all durations."""
    return sum(span.stop_us - span.start_us for span in spans) / 1e3


def covered_ms(spans: Iterable[Span]) -> float:
    """Time in which at least one of the spans is under way."""
    total_us, until = 0.0, float("-inf")
    for start, stop in sorted((span.start_us, span.stop_us) for span in spans):
        total_us += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total_us / 1e3


def against_two_gpus(
    shares: Sequence[Mapping[str, Any]], breakdowns: Sequence[Mapping[str, str]]
) -> list[dict[str, object]]:
    """Computing and gaps of the share at DAP 2 beside those of two GPUs: newest row of each number of passes."""
    known = {row["passes"]: row for row in breakdowns if (row["gpus"], row["dap"]) == ("2", "2")}
    rows: list[dict[str, object]] = []
    for share in shares:
        real = known.get(str(share["passes"]))
        if int(share["dap"]) != 2 or real is None or "computing_ms" not in share:
            continue
        alone, both = (float(row["computing_ms"]) + float(row["gaps_ms"]) for row in (share, real))
        rows.append(
            {
                "passes": share["passes"],
                "alone_ms": round(alone, 2),
                "two_gpus_ms": round(both, 2),
                "percent": round(100 * (alone / both - 1), 1),
                "within": "yes" if abs(alone / both - 1) <= AGREEMENT else "NO",
                "kernels": f"{share['kernels']} / {real['kernels']}",
                "commits": f"{share['commit']} / {real['commit']}",
            }
        )
    return rows


def summary(means: dict[tuple[int, int], dict[int, float]]) -> list[str]:
    """Mean over passes of GPUs, DAP size; speed and efficiency against one GPU, which does one sample per step too.

    Where one GPU was not timed they are left out.
    """
    one = mean(means[1, 1]) if (1, 1) in means else None
    lines = []
    for (gpus, dap), times in means.items():
        now = mean(times)
        if one is None or gpus == 1:
            against = ""
        elif dap == 1:
            against = f", data parallel efficiency {100 * one / now:.1f} %"
        else:
            efficiency = 100 * one / now / dap
            against = f", one sample {one / now:.2f} times faster than on one GPU, efficiency {efficiency:.1f} %"
        lines.append(f"gpus {gpus} dap {dap}: mean over R = {', '.join(map(str, times))}: {now:.1f} ms{against}")
    return lines


def mean(times: dict[int, float]) -> float:
    """Mean over numbers of passes."""
    return sum(times.values()) / len(times)
