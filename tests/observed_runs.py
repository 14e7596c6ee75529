"""Files that telemetry and profiler leave in a run folder, as a run on GPUs would."""

import json
from pathlib import Path
from typing import Any


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
