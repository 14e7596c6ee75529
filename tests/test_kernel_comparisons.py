"""Two commits' kernels side by side: machine code without a GPU, bits and times with one."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from processes import compiling_environment

pytest.importorskip("triton")


@pytest.fixture
def machine_code(repository: Path, tmp_path: Path):
    """Run the script in a process of its own: the interpreter, in which kernel tests run, compiles nothing."""
    environment = compiling_environment(tmp_path / "cache")

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "benchmarks/measure/machine_code.py", *map(str, arguments)]
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    return run


def changed(table: Path, other: Path, **values: object) -> None:
    """Copy a table with other values in its first row."""
    rows = list(csv.DictReader(table.read_text().splitlines()))
    rows[0] |= {name: str(value) for name, value in values.items()}
    with other.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.long
def test_machine_code_is_written_once_and_differences_are_named(machine_code, tmp_path: Path) -> None:
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    first = machine_code("--dap", 8, "--only", "layer_norm 1x1x", "--out", before)
    assert first.returncode == 0, first.stderr
    rows = list(csv.DictReader(before.read_text().splitlines()))
    assert [row["kernel"].rpartition(".")[2] for row in rows] == ["_forward_kernel", "_backward_kernel", "_sum_kernel"]
    assert all(int(row["global_reads"]) and int(row["global_writes"]) and int(row["registers"]) for row in rows)
    again = machine_code("--dap", 8, "--only", "layer_norm 1x1x", "--out", before)
    assert "0 kernels compiled for 9.0, 3 were in" in again.stdout
    assert machine_code("--compare", before, before).returncode == 0
    changed(before, after, hash="other", counts=rows[0]["counts"].replace("EXIT:2", "EXIT:3 LDL:4"))
    compared = machine_code("--compare", before, after)
    assert compared.returncode == 1
    assert "EXIT +1 LDL +4" in compared.stdout
    assert "3 kernels in both tables, 2 with equal machine code, 1 with other instructions" in compared.stdout


def test_a_kernel_that_only_one_table_has_is_no_success(machine_code, tmp_path: Path) -> None:
    header, row = (
        "case,kernel,turn,registers,stack,shared,instructions,global_reads,global_writes,hash,counts",
        ",0" * 8,
    )
    (tmp_path / "a.csv").write_text(f"{header}\nx,k{row},MOV:1\ny,k{row},MOV:1\n")
    (tmp_path / "b.csv").write_text(f"{header}\nx,k{row},MOV:1\n")
    compared = machine_code("--compare", tmp_path / "a.csv", tmp_path / "b.csv")
    assert compared.returncode == 1
    assert "a.csv: y k 0" in compared.stdout


def test_bits_and_times_of_two_commits_stand_side_by_side(
    repository: Path, monkeypatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import kernel_digests

    (tmp_path / "a.csv").write_text("case,sha256,median_us\np,1,2.0\nq,2,4.0\n")
    (tmp_path / "b.csv").write_text("case,sha256,median_us\np,1,2.2\nq,3,4.0\n")
    assert kernel_digests.compare(tmp_path / "a.csv", tmp_path / "a.csv") == 0
    assert kernel_digests.compare(tmp_path / "a.csv", tmp_path / "b.csv") == 1
    assert "2 cases, 1 with other bits; time after/before 1.050" in capsys.readouterr().out


def test_digests_see_bits_shapes_and_types(repository: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    import torch

    from kernel_digests import digest

    x = torch.zeros(4, 2)
    others = (-x, x.view(2, 4), x.to(torch.int32), torch.full((4, 2), float("nan")))
    assert digest([x]) == digest([x.t().contiguous().t()])
    assert len({digest([x])} | {digest([other]) for other in others}) == 5
