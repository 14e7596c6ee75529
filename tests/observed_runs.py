"""Files that record, telemetry and profiler leave in a run folder, as a run on GPUs would."""

import json
from pathlib import Path
from typing import Any

from scalefold.report.record import EvalRow, Record, StepRow


def write_own_run(run_dir: Path) -> None:
    """Record and configuration of a run of eight steps and two evaluations."""
    with Record(run_dir, rank0=True) as record:
        record.run(config="tiny", target=0.6, environment={"torch": "2.11"}, global_batch_size=2)
        for step in range(1, 9):
            phases = {"fwd": 40.0 * step, "bwd": 30.0}
            record.step(
                StepRow(
                    step=step,
                    loss=9.0 / step,
                    terms={"fape": 1.0 / step},
                    step_ms=100.0 + 40 * step,
                    data_ms=10.0,
                    passes=1 + step % 4,
                    samples=2 * step,
                    time_s=float(step),
                    phases_ms=phases,
                )
            )
            if step % 4 == 0:
                record.evaluation(EvalRow(step=step, samples=2 * step, lddt_ca=0.07 * step, time_s=step + 0.5))
        record.event("loader", workers=2, prefetch=4, slowest=[{"chain": "1abc_A", "seconds": 0.25}])
    (run_dir / "config.yaml").write_text("system: tiny <laptop>\n")


def event(category: str, name: str, start_ms: float, stop_ms: float, thread: int = 1) -> dict[str, Any]:
    """One stretch of time of a Chrome trace."""
    times = {"ts": 1e3 * start_ms, "dur": 1e3 * (stop_ms - start_ms)}
    return {"ph": "X", "cat": category, "name": name, "tid": thread, "pid": 1, **times}


def write_gpu_trace(run_dir: Path) -> Path:
    """Two steps of 10 ms: the host launches for 4 ms each, the GPU works beside and after it."""
    events = []
    for begin in (0.0, 10.0):
        events += [
            event("user_annotation", f"step {1 + int(begin)}", begin, begin + 4),
            event("user_annotation", "data wait", begin, begin + 1),
            event("user_annotation", "replay", begin + 1, begin + 3),
            event("gpu_user_annotation", "replay", begin + 1, begin + 3, 9),
            event("kernel", "backward_rows", begin + 2, begin + 6, 7),
            event("kernel", "ncclDevKernel_AllReduce_Sum_bf16", begin + 5, begin + 8, 8),
            event("kernel", "sm90_xmma_gemm_bf16", begin + 8, begin + 9, 7),
            event("gpu_memcpy", "Memcpy HtoD", begin + 9, begin + 10, 7),
        ]
    file = run_dir / "profile" / "steps_1-11_rank_0.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"traceEvents": events}))
    return file


def write_slow_ranks(run_dir: Path, result: str = "result_0") -> None:
    """Rank 1 waits for data, rank 3 runs at three quarters of the clock; rank 4 evaluates. All GPUs used 1 kWh."""
    values = {0: (2.0, 1600), 1: (30.0, 1600), 2: (2.0, 1600), 3: (2.0, 1200)}
    (run_dir / "telemetry").mkdir(parents=True, exist_ok=True)
    for rank, (data, clock) in values.items():
        facts = {"rank": rank, "role": "train", "steps": 40, "step_ms": 102.0, "data_ms": data, "clock_mhz": clock}
        line = {"time": 1.0, "result": result, "energy_j": 9e5, "slowest": [["1abc_A", 0.5]], **facts}
        with (run_dir / "telemetry" / f"node{rank // 2}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    line = {"time": 1.0, "result": result, "rank": 4, "role": "evaluate", "evaluation_s": 9.0, "energy_j": 0.0}
    (run_dir / "telemetry" / "node2.jsonl").write_text(json.dumps(line) + "\n")
