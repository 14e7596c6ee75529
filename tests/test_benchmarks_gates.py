"""The verdict on a step: from rows of this commit and device only."""

import csv
import sys

import pytest


@pytest.fixture
def gates(repository, monkeypatch, tmp_path):
    """The script, with an empty folder of figures."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import gates

    monkeypatch.setattr(gates, "FOLDER", tmp_path)
    monkeypatch.setattr(gates, "facts", lambda: {"commit": "abc", "device": "GPU"})
    yield gates
    for name in ("gates", "common"):
        sys.modules.pop(name, None)


def write(folder, file, rows):
    with (folder / file).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["commit", "device", *rows[0]])
        writer.writeheader()
        writer.writerows({"commit": "abc", "device": "GPU", **row} for row in rows)


def verdicts(gates):
    return {line["line"]: line["verdict"] for line in map(gates.verdict, gates.GATES)}


def test_nothing_counts_as_met_without_a_measurement(gates):
    assert set(verdicts(gates).values()) == {"not measured"}


def test_the_newest_rows_of_this_commit_and_device_are_judged(gates, tmp_path):
    rows = [{"variant": "ours", "passes": r, "median_ms": ms, "peak_gib": 35} for ms in (900, 300) for r in range(1, 5)]
    write(tmp_path, "step_time.csv", rows)
    assert verdicts(gates)["mean step over R = 1..4, ms"] == "met"
    write(tmp_path, "step_time.csv", [{**row, "commit": "other"} for row in rows])
    assert verdicts(gates)["mean step over R = 1..4, ms"] == "not measured"


def test_a_slow_operation_and_a_failed_measurement_are_missed(gates, tmp_path, capsys):
    other = [("ours", 10, 30), ("compiled", 12, 20)]
    rows = [
        {"operation": "attention", "shape": "s", "variant": v, "forward_us": f, "backward_us": b} for v, f, b in other
    ]
    write(tmp_path, "kernels.csv", rows)
    write(tmp_path, "gates.csv", [{"measurement": "curve", "status": 1, "seconds": 5}])
    found = verdicts(gates)
    assert found["operations slower than another implementation"] == "MISSED"
    assert found["500-step curve leaves the band (exit status)"] == "MISSED"
    assert "lost: attention s" in capsys.readouterr().out


def test_a_module_is_low_only_if_plain_bf16_is_better(gates, tmp_path):
    values = [("a", "0.999", "0.9"), ("b", "0.95", "0.96"), ("c", "0.95", "0.99")]
    write(
        tmp_path,
        "precision.csv",
        [{"kind": "module", "name": n, "fp32": "", "ours_bf16": o, "plain_bf16": p} for n, o, p in values],
    )
    assert gates.low_modules() == 1.0
