"""MLPerf result files for tests, rebuilt from the published runs' figures with the published times."""

import csv
import json
from pathlib import Path

from scalefold.mlperf.log.keys import PARAMETERS_COUNT
from scalefold.mlperf.log.published import PUBLISHED_RUNS


def published_rows(submitter: str, scaling: str = "strong") -> list[dict[str, str]]:
    with PUBLISHED_RUNS.open(newline="") as stream:
        return [r for r in csv.DictReader(stream) if r["submitter"] == submitter and r["scaling"] == scaling]


def write_result(path: Path, row: dict[str, str]) -> Path:
    """A log with the row's cycles and evaluations at the times its columns give, in time order."""
    start = int(row["run_start_ms"])
    lines = [_line(start - 240000, "init_start", None), _line(start - 1000, "init_stop", None)]
    lines += [_line(start - 200000, key, value) for key, value in _facts(row).items()]
    lines += [_line(start, "run_start", None), *_cycle_lines(row, start)]
    lines.append(_line(int(row["run_stop_ms"]), "run_stop", None, {"status": "success"}))
    lines.sort(key=lambda line: line["time_ms"])
    path.write_text("".join(f":::MLLOG {json.dumps(line)}\n" for line in lines))
    return path


def _cycle_lines(row: dict[str, str], start: int) -> list[dict]:
    clock = float(row["time_to_first_epoch_start_s"])
    values = dict(json.loads(row["eval_points"]))
    samples_per_cycle = 40 * int(row["global_batch"])
    lines = []
    for cycle in range(1, int(row["train_cycles"]) + 1):
        samples = cycle * samples_per_cycle
        gap = 0.0 if cycle == 1 else float(row["first_handoff_or_eval_gap_s" if cycle == 2 else "later_gap_median_s"])
        begin = clock + gap
        clock = begin + float(row["first_cycle_s" if cycle == 1 else "later_cycles_median_s"])
        seconds = float(row["first_eval_s" if cycle == 1 and row["eval_mode"] == "sync" else "later_eval_median_s"])
        at = {"epoch_num": samples, "instance": 0}
        stats = {"throughput": float(row["samples_per_s_median"])}
        if row["batch_wait_s_per_step_median"]:
            stats["avg_perf_next_batch"] = float(row["batch_wait_s_per_step_median"])
        last = cycle == int(row["train_cycles"])
        done = (int(row["run_stop_ms"]) - start) / 1000 if last else clock + seconds
        lines += [
            _line(start + begin * 1000, "epoch_start", None, at),
            _line(start + clock * 1000, "epoch_stop", None, at),
            _line(start + clock * 1000, "tracked_stats", stats, {"step": cycle, "instance": 0}),
            _line(start + clock * 1000, "eval_start", None, at),
            _line(start + done * 1000, "eval_accuracy", values[samples], at),
            _line(start + done * 1000, "eval_stop", None, at),
        ]
    return lines


def _facts(row: dict[str, str]) -> dict[str, object]:
    return {
        "submission_benchmark": "openfold",
        "submission_org": row["submitter"],
        "submission_platform": row["system"],
        "seed": int(row["seed"]),
        "number_of_ranks": int(row["ranks_logged"]),
        "global_batch_size": int(row["global_batch"]),
        "precision": row["precision"],
        "train_samples": 594595,
        "eval_samples": 180,
        "model_parameters_count": PARAMETERS_COUNT,
        "val_every_iters": 40,
        "target_avg_lddt_ca_value": 0.8,
    }


def _line(time_ms: float, key: str, value: object, metadata: dict | None = None) -> dict:
    place = {"file": "train.py", "lineno": 1} | (metadata or {})
    return {"namespace": "", "time_ms": int(time_ms), "key": key, "value": value, "metadata": place}
