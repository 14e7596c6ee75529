"""Gluon programs of compute capability 9.0: what stands in their way, that they compile, that they agree on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import hopper_cases
import operation_cases
from bits import repeat
from hopper_rows import LARGEST_RATIO, LEAST_ERROR, errors
from scalefold.kernels import tuning
from scalefold.kernels.hopper import host, pairs, projections

C = 128
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def squares(count: int, c: int = C) -> list[torch.Tensor]:
    return [empty(c, c) for _ in range(count)]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU of capability 9.0 without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    with tuning.assume_capability(90):
        yield


def test_other_capabilities_the_interpreter_and_fp32_keep_the_triton_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with tuning.assume_capability(90):
        assert "interpreter" in str(host.device_obstacle(empty(64, C)))
    monkeypatch.delenv("TRITON_INTERPRET")
    with tuning.assume_capability(100):
        assert "9.0" in str(host.device_obstacle(empty(64, C)))
    with tuning.assume_capability(90):
        assert "bf16" in str(host.device_obstacle(empty(64, C, dtype=torch.float32)))
        monkeypatch.setattr("triton.__version__", "3.7.0")
        assert "Triton 3.6" in str(host.device_obstacle(empty(64, C)))


@pytest.mark.parametrize("transposed", [False, True])
def test_projections_of_whole_tiles_have_no_obstacle(on_hopper, transposed):
    x = empty(1, 256, 128, C).transpose(1, 2) if transposed else empty(1, 128, 256, C)
    assert projections.projections_obstacle(x, None, [*squares(4), empty(4, C)]) is None


@pytest.mark.parametrize(
    ("x", "masked", "weights", "word"),
    [
        (empty(1, 5, 13, C), False, squares(4), "tiles"),
        (empty(1, 64, 64, C), True, squares(4), "row mask"),
        (empty(1, 64, 64, 64), False, squares(4, 64), "channels"),
        (empty(1, 64, 64, C), False, [empty(16, C)] * 2, "square"),
        (empty(1, 64, 64, C), False, [*squares(4), empty(12, C)], "narrow"),
        (empty(1, 64, 64, 2 * C)[..., :C].transpose(1, 2)[:, :32], False, squares(4), "densely"),
    ],
    ids=["ragged", "masked", "64 channels", "outer product", "wide bias", "strided"],
)
def test_what_stands_in_the_way_of_projections_is_named(on_hopper, x, masked, weights, word):
    mask = empty(*x.shape[:-1]) if masked else None
    assert word in str(projections.projections_obstacle(x, mask, weights))


def test_an_input_gradient_takes_four_projections_a_residual_and_channels_first(on_hopper):
    x, ds = empty(1, 64, 64, C), [empty(1, 64, 64, C)] * 4
    biased = [False, False, False, True]
    assert projections.input_gradient_obstacle(x, None, squares(4), ds, biased, x) is None
    assert "last" in str(projections.input_gradient_obstacle(x, None, squares(4), ds, [True] * 4, x))
    assert "four" in str(projections.input_gradient_obstacle(x, None, squares(5), ds * 2, [False] * 5, x))
    lying = empty(1, C, 64, 64).permute(0, 2, 3, 1)
    assert projections.input_gradient_obstacle(lying, None, squares(1), ds[:1], [True], None) is None
    assert "channels first" in str(projections.input_gradient_obstacle(lying, None, squares(1), ds[:1], [True], x))


def test_a_table_entry_keeps_the_triton_kernel(on_hopper):
    x = empty(1, 64, 64, C)
    assert projections.projections_obstacle(x, None, squares(4)) is None
    with tuning.override("hopper_projections", {"USED": 0}):
        assert "faster" in str(projections.projections_obstacle(x, None, squares(4)))


def test_operations_on_pairs_ask_for_dense_rows_of_128_channels(on_hopper):
    z, scales = empty(1, 64, 64, C), empty(1, 1, 64, C, dtype=torch.float32)
    assert pairs.operands_obstacle(z, squares(4)) is None
    assert pairs.output_obstacle(z, empty(1, C, 64, 64), squares(2), scales) is None
    assert pairs.gated_obstacle(z.transpose(1, 2), z.transpose(1, 2), z.transpose(1, 2), squares(1)[0], None) is None
    assert "128 x 128" in str(pairs.operands_obstacle(z, squares(4, 64)))
    assert "densely" in str(pairs.gated_obstacle(z, z.transpose(1, 2), z, squares(1)[0], scales))
    assert "fp32" in str(pairs.output_obstacle(z, empty(1, C, 64, 64), squares(2), scales.bfloat16()))


def test_rows_and_channels_become_matrices_for_the_copy_engine():
    x = torch.arange(2 * 3 * 8).view(1, 2, 3, 8)
    assert host.dense_rows(x.transpose(1, 2), (0, 2, 1)).equal(x.view(6, 8))  # type: ignore[union-attr]
    assert host.dense_rows(x.transpose(1, 2), (0, 1, 2)) is None
    half = torch.arange(4 * 32).view(1, 2, 2, 32).chunk(2, -1)[1]
    assert host.dense_rows(half, (0, 1, 2)).equal(half.reshape(4, 16))  # type: ignore[union-attr]
    first = torch.arange(8 * 2 * 8).view(1, 8, 2, 8)
    assert host.channel_rows(first.permute(0, 2, 3, 1), (0, 1, 2)).equal(first.view(8, 16))  # type: ignore[union-attr]


def test_a_program_compiles_for_capability_9_without_a_gpu(repository, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "benchmarks/measure/compile_targets.py", "--modules", "cases", "--only", "hopper_gated"]
    finished = subprocess.run(
        [*command, "--targets", "90"], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[1] for line in finished.stdout.splitlines()[1:]] == ["gated_program"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("case", hopper_cases.cases((1, 17, 64), (1, 9, 64)), ids=lambda case: case.name)
def test_a_program_is_as_accurate_as_its_twin_and_gives_the_same_bits_again(case):
    with operation_cases.on_device("cuda"), torch.no_grad(), tuning.override(case.kernel, case.configs()[0]):
        ways = case.build()
        assert ways.obstacle is None
        exact = ways.exact()
        own, twin = errors(ways.gluon(), exact), errors(ways.twin(), exact)
        assert all(a <= max(LARGEST_RATIO * b, LEAST_ERROR) for a, b in zip(own, twin, strict=True)), (own, twin)
        assert repeat(ways.gluon, 20) == []
