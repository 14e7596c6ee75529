"""The measurement of what lies around the trunk: which kernels are small, and that its parts run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    return __import__("small_kernels")


def test_products_and_our_programs_are_not_small_kernels(script) -> None:
    names = {
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>": True,
        "Memset (Unknown)": True,
        "triton_poi_fused_add_0": True,
        "nvjet_sm90_tst_64x64_64x13_1x2_h_bz_NTT": False,
        "void cublasLt::splitKreduce_kernel<32, 16, int, float": False,
        "norm_backward_kernel": False,
    }
    assert {name: script.is_small(name) for name in names} == names
    row = script.row_of(7.0, {name: [2.0, 1.0] for name in names})
    assert (row["us"], row["kernels"], row["small"], row["small_us"]) == (7.0, 12, 6, 9.0)


def test_an_error_is_judged_by_its_own_norm_unless_that_vanishes(script) -> None:
    import torch

    exact = [torch.full((4,), 50.0), torch.tensor([0.0])]
    assert script.largest_error([exact[0] * 1.01, exact[1]], exact) == pytest.approx(0.01)
    assert script.largest_error([exact[0], torch.tensor([1e-3])], exact) == pytest.approx(0.01)


@pytest.mark.long
def test_every_part_runs_on_the_cpu_and_repeats_its_bits(repository: Path) -> None:
    command = [sys.executable, "benchmarks/measure/small_kernels.py", "--small", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--variants", "plain", "ours"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("iterations", "read_out", "heads", "losses", "embedders", "templates"):
        assert f"  {part} ours " in done.stdout
