"""The comparison of operations with other libraries: their parameters' order and layout, what is refused or absent.

The libraries are stood in for by small modules with their signatures.
"""

import contextlib
import csv
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from scalefold.tune.operation_cases import (  # noqa: E402
    attention,
    on_device,
    structure_iterations,
    transition,
    triangle_multiplication,
)

CASES = [triangle_multiplication((1, 6, 6), 8, outgoing, 1) for outgoing in (True, False)]


def update(z, direction, norm_in, norm_out, a, a_gate, b, b_gate, out, out_gate, mask):
    """Triangle multiplication without its residual, as both libraries define it; every argument is (weight, bias)."""
    functional = torch.nn.functional
    x = functional.layer_norm(z, z.shape[-1:], *norm_in)
    left = functional.linear(x, *a) * functional.linear(x, *a_gate).sigmoid() * mask[..., None]
    right = functional.linear(x, *b) * functional.linear(x, *b_gate).sigmoid() * mask[..., None]
    product = "bikc,bjkc->bijc" if direction == "outgoing" else "bkic,bkjc->bijc"
    y = functional.layer_norm(torch.einsum(product, left, right), left.shape[-1:], *norm_out)
    return functional.linear(y, *out) * functional.linear(x, *out_gate).sigmoid()


class Packed:
    """cuEquivariance's signature: operands of both sides in one weight, gates of both in another."""

    @staticmethod
    def triangle_multiplicative_update(z, direction, mask, **own):
        norm_in, norm_out, p_in, g_in, out, out_gate = (
            (own[f"{name}_weight"], own[f"{name}_bias"])
            for name in ("norm_in", "norm_out", "p_in", "g_in", "p_out", "g_out")
        )
        a, b = zip(*(part.chunk(2) for part in p_in), strict=True)
        a_gate, b_gate = zip(*(part.chunk(2) for part in g_in), strict=True)
        return update(z, direction, norm_in, norm_out, a, a_gate, b, b_gate, out, out_gate, mask)

    @staticmethod
    def triangle_attention(q, k, v, bias, mask, scale):
        scores = torch.einsum("brhqd,brhkd->brhqk", q, k).float() * scale + bias
        return torch.einsum("brhqk,brhkd->brhqd", scores.masked_fill(~mask, -1e9).softmax(-1).to(v.dtype), v)


class Halves(torch.nn.Module):
    """fast-trimul's module: parameters in fp16, the output's gate before the output."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        shapes = [(width,), (width,)] * 2 + [(width, width), (width,)] * 6
        self.own = torch.nn.ParameterList(torch.zeros(shape, dtype=torch.float16) for shape in shapes)

    @property
    def _impl(self):
        return self

    def _params(self):
        return list(self.own)


def in_half(z, module):
    norm_in, norm_out, a, a_gate, b, b_gate, gate, out = zip(*[iter(module._params())] * 2, strict=True)
    half = z.half()
    mask = torch.ones_like(half[..., 0])
    return (half + update(half, module.mode, norm_in, norm_out, a, a_gate, b, b_gate, out, gate, mask)).to(z.dtype)


LIBRARIES = {
    "cuequivariance": Packed,
    "fast_trimul": SimpleNamespace(
        FastTriangleMultiplication=Halves, functional=SimpleNamespace(triangle_multiplication=in_half)
    ),
}


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    found = __import__("kernels")
    monkeypatch.setattr(found, "graph_microseconds", lambda call, replays, warm_up: 1.0 if call() else 0.0)
    monkeypatch.setattr(found, "TRITON", found.REFERENCE)
    with on_device("cpu"):
        yield found


def rows_of(script, case, libraries) -> dict[str, float]:
    return {row["variant"]: float(row["max_rel_error"]) for row in script.quick_variants(case, libraries)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.shape)
def test_every_library_gets_its_own_layout_and_is_compared_with_fp32_in_it(script, case) -> None:
    found = rows_of(script, case, LIBRARIES)
    assert list(found) == ["ours", "plain", *LIBRARIES]
    assert all(0 < error < 0.03 for error in found.values()), found


def test_only_operations_that_a_library_has_are_asked_of_it(script) -> None:
    assert list(rows_of(script, attention((1, 4, 6), 2, 4, True, 1), LIBRARIES)) == ["ours", "plain", "cuequivariance"]
    assert list(rows_of(script, attention((1, 4, 6), 2, 4, False, 1), LIBRARIES)) == ["ours", "plain"]
    assert list(rows_of(script, transition((1, 4, 6), 8, 2, 1), LIBRARIES)) == ["ours", "plain"]


def test_a_library_that_computes_something_else_is_named_and_not_timed(script, capsys) -> None:
    class Other(Packed):
        @staticmethod
        def triangle_multiplicative_update(z, direction, mask, **own):
            return Packed.triangle_multiplicative_update(z, "incoming", mask, **own)

    assert list(rows_of(script, CASES[0], {"cuequivariance": Other})) == ["ours", "plain"]
    said = capsys.readouterr().out
    assert "cuequivariance cannot be measured" in said
    assert "not the operation" in said


def test_a_library_that_cannot_be_set_up_costs_no_other_row(script, capsys) -> None:
    def without_compiler(width, mode):
        raise ModuleNotFoundError("No module named 'cutlass'")

    broken = SimpleNamespace(FastTriangleMultiplication=without_compiler)
    assert list(rows_of(script, CASES[1], {"fast_trimul": broken})) == ["ours", "plain"]
    assert "fast_trimul cannot be measured: ModuleNotFoundError: No module named 'cutlass'" in capsys.readouterr().out


def test_a_library_that_breaks_the_context_ends_the_script_and_costs_no_row_before(
    script, monkeypatch, tmp_path, capsys
) -> None:
    broken = []

    class Wild(Packed):
        @staticmethod
        def triangle_multiplicative_update(z, direction, mask, **own):
            broken.append(direction)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name, own in {"is_initialized": lambda: True, "synchronize": synchronize, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(script.torch.cuda, name, own)
    monkeypatch.setattr(script.torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(script.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(script, "chosen_cases", lambda daps, only: CASES)
    monkeypatch.setattr(script, "libraries", lambda: LIBRARIES | {"cuequivariance": Wild})
    monkeypatch.setattr("sys.argv", ["kernels.py", "--csv", str(tmp_path / "kernels.csv")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert len(broken) == 1, "nothing is tried after it"
    assert f"{CASES[0].name}: cuequivariance BROKE the GPU's context" in capsys.readouterr().out
    with (tmp_path / "kernels.csv").open() as stream:
        assert [row["variant"] for row in csv.DictReader(stream)] == ["ours", "plain"]


def test_no_gradient_of_the_structure_iterations_is_rounding_alone(script) -> None:
    """Such a one has no direction: another implementation's is as far away from it as it is long."""
    case = structure_iterations(8, 1)
    exact = script.exact_results(case)
    norms = [float(gradient.norm()) for gradient in exact.gradients]
    assert len(norms) == len(case.build().leaves) > 20
    assert min(norms) > 1e-6 * max(norms)


def test_libraries_that_are_not_there_are_named(script, monkeypatch, capsys) -> None:
    import rivals

    monkeypatch.setattr(rivals, "MODULES", {"cuequivariance": "json", "fast_trimul": "not_there_at_all"})
    assert list(rivals.libraries()) == ["cuequivariance"]
    assert "without fast_trimul: No module named 'not_there_at_all'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["compile_targets", "compile_hopper", "hopper_attention"])
def test_scripts_that_compile_leave_the_environment_of_whoever_imports_them(repository, monkeypatch, name) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "measure"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    __import__(name)
    assert os.environ["TRITON_INTERPRET"] == "1"
