"""The ruler: time, memory and correctness of a whole training step at the benchmark's full shapes.

    python benchmarks/measure/step_time.py                # ours, R = 1..4, appended to benchmarks/results/step_time.csv
    # plain PyTorch operations with activation checkpointing
    python benchmarks/measure/step_time.py --variant plain_ckpt
    # compare with the fp32 reference first; kernels at R = 1
    python benchmarks/measure/step_time.py --check --profile 1
    python benchmarks/measure/step_time.py --dap-share 2 4 8    # one rank's share at DAP P, alone: dap_share.py

A step is everything between two batches on the device: casts, forward with R passes, losses, backward, gradient norm,
clip, Adam, weight averaging, refresh of the bf16 copy. The batch is synthetic, with plausible geometry. One process,
one device; dropout is on while timing and off while comparing. ``--check`` appends to ``precision.csv``, ``--profile``
to ``step_profile.csv`` (host time, launches, idle share) and ``step_kernels.csv`` (every kernel), beside ``--csv``.
"""

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import FOLDER, ROOT, Timing, append_rows, device_events, facts, print_table, time_calls
from scalefold.config import Config, RankLayout, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.table import Operations, use_operations
from scalefold.model.alphafold import AlphaFold
from scalefold.parallel.ranks import Ranks, prepare_process
from scalefold.step.build import build_model, build_optimizer, build_step, choose_operations
from scalefold.step.graphs import TrainStep

PLAIN = ["execution.kernels=reference"]
VARIANTS = {
    "ours": [],
    "ours_ckpt": ["execution.activation_checkpointing=true"],
    "ours_fused": ["execution.compile=true"],
    "plain_ckpt": [*PLAIN, "execution.activation_checkpointing=true"],
    "plain": PLAIN,
    "plain_eager_ckpt": [
        *PLAIN,
        "execution.activation_checkpointing=true",
        "execution.cuda_graphs=false",
    ],
    "fp32": [*PLAIN, "execution.precision=fp32", "execution.activation_checkpointing=true"],
}
CLASSES = {
    "attention": ("attention", "attn", "softmax"),
    "matmul": ("gemm", "cutlass", "cublas", "nvjet", "sm90_xmma", "bmm", "splitk"),
    "layer norm": ("layer_norm", "layernorm", "norm"),
    "optimizer": ("adam", "multi_tensor"),
    "copy": ("copy", "memcpy", "memset", "fill", "cat", "transpose"),
    "reduction": ("reduce", "sum"),
    "elementwise": ("elementwise", "vectorized", "unrolled"),
}


def configuration(variant: str, extra: list[str]) -> Config:
    """The one-GPU system file with a variant's changes."""
    file = ROOT / "configs" / "base.yaml"
    return load_config(file, [*VARIANTS[variant], *extra]).config


def single_rank() -> Ranks:
    """This process as the only rank."""
    return Ranks(RankLayout(1), 0, 0, torch.device("cuda", 0))


def build(config: Config, ops: Operations | None = None) -> tuple[AlphaFold, TrainStep]:
    """Model and step as a run would build them; final layers are not zero, so that every gradient is alive.

    ``ops``: instead of those that the configuration chooses.
    """
    prepare_process(config)
    ranks = single_rank()
    ops = ops or choose_operations(config, ranks)
    model = build_model(config, 0, ranks)
    enliven(model)
    use_operations(model, ops)
    return model, build_step(config, model, build_optimizer(config, model, ranks, ops), ranks)


@torch.no_grad()
def enliven(model: AlphaFold) -> None:
    """Small random weights where training starts from zero."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not bool(parameter.any()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.2 * parameter.shape[1] ** -0.5
            parameter.copy_(noise)


def measure(variant: str, extra: list[str], passes: list[int], repeats: int, each: bool) -> list[dict[str, object]]:
    """One CSV row per number of passes. each: with a step of its own, whose peak is that of graphs for 1..R passes."""
    rows = []
    for group in [[r] for r in passes] if each else [passes]:
        rows += measure_together(variant, extra, group, repeats)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def measure_together(variant: str, extra: list[str], passes: list[int], repeats: int) -> list[dict[str, object]]:
    """Rows of one step, whose graphs for up to the largest number of passes all stay in memory."""
    config = configuration(variant, extra)
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    _, step = build(config)
    torch.cuda.reset_peak_memory_stats()
    step.warm_up(batch, max(passes), lambda text: print(f"  {variant}: {text}", flush=True))
    rows = []
    for r in passes:
        timing = time_calls(lambda r=r: step(batch, r, 1), repeats)
        rows.append(row(config, variant, r, timing))
    return rows


def row(config: Config, variant: str, passes: int, timing: Timing, gpus: int = 1, dap: int = 1) -> dict[str, object]:
    """One line of step_time.csv."""
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        **facts(),
        "variant": variant,
        "gpus": gpus,
        "dap": dap,
        "precision": config.execution.precision,
        "passes": passes,
        "median_ms": round(timing.median_ms, 2),
        "p10_ms": round(timing.p10_ms, 2),
        "p90_ms": round(timing.p90_ms, 2),
        "peak_gib": round(peak, 2),
    }


def without_dropout(model: AlphaFold) -> None:
    """Dropout rates to zero: two implementations may draw different numbers."""
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0  # type: ignore[assignment]


def gradients(variant: str, passes: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss terms and all gradients (fp32, on the CPU) of one step without graphs and dropout."""
    config = configuration(variant, ["execution.cuda_graphs=false"])
    model, step = build(config)
    without_dropout(model)
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    loss, terms = step.objective(batch.features, passes)
    loss.backward()
    values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
    grads = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    del model, step
    gc.collect()
    torch.cuda.empty_cache()
    return values, grads


def module_of(name: str) -> str:
    """Group of a parameter for the cosine table: stack and sub-layer, blocks pooled."""
    parts = [part for part in name.split(".")[:-1] if not part.isdigit() and part not in ("blocks", "core")]
    return ".".join(parts[:2])


def cosines_by_module(truth: dict[str, Tensor], found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Cosine of each variant's gradient with the true one, per module."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: {v: [0.0, 0.0, 0.0] for v in found})
    for name, exact in truth.items():
        for variant, grads in found.items():
            own, other = sums[module_of(name)][variant], grads[name]
            for i, value in enumerate(((exact * other).sum(), exact.square().sum(), other.square().sum())):
                own[i] += float(value)
    return {
        module: {v: s[0] / max((s[1] * s[2]) ** 0.5, 1e-30) for v, s in by_variant.items()}
        for module, by_variant in sums.items()
    }


def compare(csv: Path, passes: int = 1) -> bool:
    """Ours and plain bf16 against the fp32 reference: losses and gradient cosine per module."""
    truth_terms, truth = gradients("fp32", passes)
    found = {variant: gradients(variant, passes) for variant in ("ours", "plain_ckpt")}
    cosines = cosines_by_module(truth, {variant: grads for variant, (_, grads) in found.items()})
    rows: list[dict[str, object]] = [
        precision_row("term", name, f"{value:.6f}", *(f"{found[v][0][name]:.6f}" for v in found))
        for name, value in truth_terms.items()
    ]
    rows += [precision_row("module", m, "", *(f"{c:.5f}" for c in own.values())) for m, own in cosines.items()]
    append_rows(csv, rows)
    print_table([{key: row[key] for key in ("kind", "name", "fp32", "ours_bf16", "plain_bf16")} for row in rows])
    low = [m for m, c in cosines.items() if c["ours"] < 0.99 and 1 - c["ours"] > 2 * (1 - c["plain_ckpt"])]
    ours, plain = (abs(found[v][0]["loss"] / truth_terms["loss"] - 1) for v in found)
    good = not low and ours <= max(1e-3, 2 * plain)
    print(f"relative difference of the loss: ours {ours:.2e}, plain bf16 {plain:.2e}")
    print(f"modules below 0.99 and worse than plain bf16: {', '.join(low) or 'none'}: {'ok' if good else 'FAILED'}")
    return good


def precision_row(kind: str, name: str, fp32: str, ours: str, plain: str) -> dict[str, object]:
    """One line of precision.csv: a loss term, or the cosine of a module's gradient with the fp32 one."""
    return {**facts(), "kind": kind, "name": name, "fp32": fp32, "ours_bf16": ours, "plain_bf16": plain}


def host_time(call: Callable[[], object], repeats: int) -> Timing:
    """Time until the call returns to Python, the device idle before each."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return Timing.of(times)


def profile(variant: str, extra: list[str], passes: int, csv: Path, trace: Path | None) -> None:
    """Host time of a step; kernels of one replayed step: number, time by class, the longest ones, idle share."""
    config = configuration(variant, extra)
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    _, step = build(config)
    step.warm_up(batch, passes, lambda text: None)
    host = host_time(lambda: step(batch, passes, 1), 10)
    step_ms = time_calls(lambda: step(batch, passes, 1), 5).median_ms  # profiling itself widens the gaps
    by_name = kernel_times(lambda: step(batch, passes, 1), trace)
    busy_ms = sum(map(sum, by_name.values())) / 1e3
    of_run = {**facts(), "variant": variant, "passes": passes}
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    whole: dict[str, object] = {
        **of_run,
        "step_ms": round(step_ms, 2),
        "host_ms": round(host.median_ms, 2),
        "host_p90_ms": round(host.p90_ms, 2),
        "kernels": sum(map(len, by_name.values())),
        "busy_ms": round(busy_ms, 2),
        "idle_percent": round(100 * max(0.0, 1 - busy_ms / step_ms), 2),
    }
    append_rows(csv.with_name("step_profile.csv"), [whole])
    kernels: list[dict[str, object]] = [
        {**of_run, "total_ms": f"{sum(times) / 1e3:.4f}", "calls": len(times), "kernel": name[:120]}
        for name, times in longest
    ]
    append_rows(csv.with_name("step_kernels.csv"), kernels)
    print_table([whole])
    for name, total in by_class(by_name).items():
        print(f"  {name:14s} {total / 1e3:8.2f} ms")
    for name, times in longest[:45]:
        print(f"  {sum(times) / 1e3:8.3f} ms  {len(times):5d} x {sum(times) / len(times):8.1f} us  {name[:110]}")


def kernel_times(call: Callable[[], object], trace: Path | None) -> dict[str, list[float]]:
    """Microseconds of every kernel of one call, by name; ``trace``: also keep the timeline there."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in device_events(call, trace):
        by_name[event.name].append(event.time_range.end - event.time_range.start)
    return by_name


def by_class(by_name: dict[str, list[float]]) -> dict[str, float]:
    """Kernel time in microseconds per class of name, longest first."""
    totals: dict[str, float] = defaultdict(float)
    for name, times in by_name.items():
        low = name.lower()
        kind = next((c for c, words in CLASSES.items() if any(word in low for word in words)), "other")
        totals[kind] += sum(times)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def main() -> int:
    """Measure what the command line asks for; exit status 1 if a comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=sorted(VARIANTS), help="may be repeated; default ours")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--each", action="store_true", help="a step of its own for each R: peak_gib tells R's need")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="compare with the fp32 reference first")
    parser.add_argument("--profile", type=int, nargs="*", metavar="R", help="profile these numbers of passes")
    parser.add_argument("--trace", type=Path, help="keep the timeline of the profiled step here (.json.gz)")
    parser.add_argument("--dap-share", type=int, nargs="+", metavar="P", help="instead: shares, see dap_share.py")
    parser.add_argument("--minutes", type=float, default=8.5, help="with --dap-share: begin none that would end later")
    parser.add_argument("--small", action="store_true", help="with --dap-share: tiny model on the CPU")
    parser.add_argument("--csv", type=Path, help="default: step_time.csv, of shares dap_share.csv")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    if arguments.dap_share:
        import dap_share  # which needs this script

        return dap_share.run(arguments)
    arguments.csv = arguments.csv or FOLDER / "step_time.csv"
    prepare_process(configuration("ours", arguments.set))
    status = 0
    if arguments.check:
        status = int(not compare(arguments.csv.with_name("precision.csv")))
    rows = []
    for variant in arguments.variant or ["ours"]:
        own = measure(variant, arguments.set, arguments.passes, arguments.repeats, arguments.each)
        append_rows(arguments.csv, own)  # at once: what comes after may be cut short
        rows += own
    print_table(rows)
    for r in arguments.profile or []:
        profile((arguments.variant or ["ours"])[0], arguments.set, r, arguments.csv, arguments.trace)
    for variant in arguments.variant or ["ours"]:
        medians = [float(str(r["median_ms"])) for r in rows if r["variant"] == variant]
        print(f"{variant}: mean over R = {arguments.passes}: {sum(medians) / len(medians):.1f} ms")
    return status


if __name__ == "__main__":
    sys.exit(main())
