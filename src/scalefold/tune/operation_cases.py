"""Calls of every operation at the benchmark's shapes and their shares under axial parallelism, on the device.

A case builds its inputs and calls one operation of any table, so the same list serves the search for launch parameters
and the comparison with other implementations (``benchmarks/measure/kernels.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from scalefold.config import ModelConfig
from scalefold.kernels.table import Operations, use_operations
from scalefold.model.structure import StructureModule

DEVICE = "cuda"
MSA, EXTRA, N, TEMPLATES = 128, 1024, 256, 4  # rows and residues of a training crop
ITERATED = ("ipa.", "layer_norm_ipa.", "transition.", "bb_update.")  # parameters of the structure module's iterations
PAIR_BLOCKS = 52  # Evoformer and extra-MSA stack


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Build inputs elsewhere inside the block: ``cpu`` for the interpreter, ``meta`` to compile without running."""
    global DEVICE
    before, DEVICE = DEVICE, name
    try:
        yield
    finally:
        DEVICE = before


@dataclass(frozen=True)
class Inputs:
    """Tensors that want gradients and the call that uses them."""

    leaves: list[Tensor]
    call: Callable[[Operations], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation at one shape; ``calls`` per training step with gradient at DAP 1 (0: evaluation, forward only)."""

    operation: str
    shape: str
    calls: int
    build: Callable[..., Inputs]  # optional argument: the type of the leaves, which hold the same bf16 values

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"


def triangle_multiplication(rows: "Rows", c: int, outgoing: bool, calls: int) -> Case:
    """The whole sub-layer, without dropout, as other libraries offer it."""

    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(True, dtype)
        z, norm_in, norm_out = draw(*rows, c), draw.norm(c), draw.norm(c)
        linears = [tensor for _ in range(6) for tensor in (draw.weight(c, c), draw(c))]
        mask = draw.ones(*rows)

        def call(ops: Operations) -> Tensor:
            z_, a, b = ops.triangle_project(z, mask, *norm_in, *linears[:8])
            x = ops.triangle_product(a, b, outgoing)
            return ops.triangle_output(z_, x, *norm_in, *norm_out, *linears[8:], None)

        return Inputs(draw.leaves, call)

    return Case("triangle_multiplication", f"{label(rows)}x{c}_{'outgoing' if outgoing else 'incoming'}", calls, build)


def outputs_of(inputs: Inputs, ops: Operations) -> list[Tensor]:
    """Forward pass; always a list."""
    result = inputs.call(ops)
    return [result] if isinstance(result, Tensor) else list(result)


class Draw:
    """Random tensors of one case with bf16 values, with gradients unless the case is for evaluation."""

    def __init__(self, wants_gradient: bool, dtype: torch.dtype) -> None:
        self.wants_gradient, self.dtype = wants_gradient, dtype
        self.leaves: list[Tensor] = []
        self.generator = None if DEVICE == "meta" else torch.Generator(device=DEVICE).manual_seed(1)

    def __call__(self, *shape: int, scale: float = 1.0, transposed: bool = False) -> Tensor:
        """A leaf; ``transposed``: stored with dimensions 1 and 2 exchanged."""
        stored = (shape[0], shape[2], shape[1], *shape[3:]) if transposed else shape
        value = torch.randn(stored, generator=self.generator, device=DEVICE).mul_(scale).bfloat16().to(self.dtype)
        value = value.transpose(1, 2) if transposed else value
        self.leaves.append(value.requires_grad_(self.wants_gradient))
        return value

    def weight(self, width: int, c: int) -> Tensor:
        return self(width, c, scale=c**-0.5)

    def norm(self, c: int) -> list[Tensor]:
        return [self(c, scale=0.3), self(c)]

    def dropout(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator, device=DEVICE) >= 0.25).float() / 0.75

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)


Rows = tuple[int, int, int]


def projections(rows: Rows, c: int, widths: list[int], calls: int, transposed: bool = False, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        x, norm = draw(*rows, c, transposed=transposed), draw.norm(c)
        weights = [draw.weight(width, c) for width in widths]
        biases = [draw(width) if n == 3 else None for n, width in enumerate(widths)]
        return Inputs(draw.leaves, lambda ops: ops.layer_norm_linear(x, *norm, weights, biases))

    return Case("layer_norm_linear", f"{label(rows, transposed)}x{c}to{'+'.join(map(str, widths))}", calls, build)


def attention(
    rows: Rows, heads: int, width: int, biased: bool, calls: int, transposed: bool = False, evaluate=False
) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        projected = [draw(*rows, heads * width, transposed=transposed) for _ in range(3)]
        bias = draw(rows[0], heads, rows[2], rows[2]) if biased else None
        mask = draw.ones(*rows)

        def call(ops: Operations) -> Tensor:  # views are made anew: a capture must not meet nodes of another stream
            return ops.attention(*(x.unflatten(-1, (heads, width)) for x in projected), mask, bias, 1e9)

        return Inputs(draw.leaves, call)

    kind = "bias" if biased else "plain"
    return Case("attention", f"{label(rows, transposed)}x{heads}h{width}_{kind}", calls, build)


def gated_output(
    rows: Rows, c: int, heads: int, width: int, calls: int, dropped: bool, transposed: bool = False, evaluate=False
) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        x, o, gate = (draw(*rows, size, transposed=transposed) for size in (c, heads * width, heads * width))
        dropout = draw.dropout(rows[0], 1, rows[2], c) if dropped and not evaluate else None
        weight, bias = draw.weight(c, heads * width), draw(c)
        return Inputs(
            draw.leaves,
            lambda ops: ops.gated_output(x, o.unflatten(-1, (heads, width)), gate, weight, bias, dropout),
        )

    return Case("gated_output", f"{label(rows, transposed)}x{c}from{heads * width}", calls, build)


def transition(rows: Rows, c: int, factor: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        x, norm = draw(*rows, c), draw.norm(c)
        linears = [draw.weight(factor * c, c), draw(factor * c), draw.weight(c, factor * c), draw(c)]
        return Inputs(draw.leaves, lambda ops: ops.transition(x, *norm, *linears))

    return Case("transition", f"{label(rows)}x{c}by{factor}", calls, build)


def triangle_project(rows: Rows, c: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        z, norm, mask = draw(*rows, c), draw.norm(c), draw.ones(*rows)
        linears = [tensor for _ in range(4) for tensor in (draw.weight(c, c), draw(c))]
        return Inputs(draw.leaves, lambda ops: ops.triangle_project(z, mask, *norm, *linears))

    return Case("triangle_project", f"{label(rows)}x{c}", calls, build)


def triangle_output(rows: Rows, c: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        z, x, norms = draw(*rows, c), draw(rows[0], c, *rows[1:]), [*draw.norm(c), *draw.norm(c)]
        linears = [tensor for _ in range(2) for tensor in (draw.weight(c, c), draw(c))]
        dropout = None if evaluate else draw.dropout(rows[0], 1, rows[2], c)
        return Inputs(draw.leaves, lambda ops: ops.triangle_output(z, x, *norms, *linears, dropout))

    return Case("triangle_output", f"{label(rows)}x{c}", calls, build)


def triangle_product(batch: int, c: int, rows: int, n: int, outgoing: bool, calls: int) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(True, dtype)
        a, b = draw(batch, c, rows, n), draw(batch, c, n, n)
        return Inputs(draw.leaves, lambda ops: ops.triangle_product(a, b, outgoing))

    return Case("triangle_product", f"{batch}x{c}x{rows}x{n}_{'outgoing' if outgoing else 'incoming'}", calls, build)


def outer_product_project(rows: Rows, c: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        m, norm, mask = draw(*rows, c), draw.norm(c), draw.ones(*rows)
        linears = [tensor for _ in range(2) for tensor in (draw.weight(32, c), draw(32))]
        return Inputs(draw.leaves, lambda ops: ops.outer_product_project(m, mask, *norm, *linears))

    return Case("outer_product_project", f"{label(rows)}x{c}", calls, build)


def outer_product_update(sequences: int, i: int, j: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        z, a, b = draw(1, i, j, 128), draw(1, sequences, i, 32), draw(1, sequences, j, 32)
        counts = torch.full((1, i, j), float(sequences), device=DEVICE)
        weight, bias = draw.weight(128, 1024), draw(128)
        return Inputs(draw.leaves, lambda ops: ops.outer_product_update(z, a, b, counts, weight, bias))

    return Case("outer_product_update", f"{sequences}x{i}x{j}", calls, build)


def global_attention(rows: Rows, c: int, calls: int, evaluate=False) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(not evaluate, dtype)
        m, mask, norm = draw(*rows, c), draw.ones(*rows), draw.norm(c)
        weights = [draw.weight(64, c), draw.weight(8, c), draw.weight(8, c), draw.weight(64, c), draw(64)]
        output = [draw.weight(c, 64), draw(c)]
        return Inputs(draw.leaves, lambda ops: ops.global_attention(m, mask, *norm, *weights, *output, 8, 1e9, 1e-10))

    return Case("global_attention", f"{label(rows)}x{c}", calls, build)


def layer_norm(rows: Rows, c: int, calls: int) -> Case:
    def build(dtype: torch.dtype = torch.bfloat16) -> Inputs:
        draw = Draw(True, dtype)
        x, norm = draw(*rows, c), draw.norm(c)
        return Inputs(draw.leaves, lambda ops: ops.layer_norm(x, *norm))

    return Case("layer_norm", f"{label(rows)}x{c}", calls, build)


def point_attention(n: int, calls: int, evaluate=False) -> Case:
    """Invariant point attention, which is fp32 for every variant."""

    def build(dtype: torch.dtype = torch.float32) -> Inputs:
        draw, heads = Draw(not evaluate, dtype), (1, n, 12)
        scalars, points = [draw(*heads, 16) for _ in range(3)], [draw(*heads, count, 3) for count in (4, 4, 8)]
        pairs, weights, mask = (draw(1, n, n, 12), draw(1, n, n, 128)), draw(12), torch.ones(1, n, device=DEVICE)
        return Inputs(
            draw.leaves, lambda ops: ops.invariant_point_attention(*scalars, *points, *pairs, weights, mask, 1e5)
        )

    return Case("invariant_point_attention", f"{n}x12", calls, build)


def structure_iterations(n: int, calls: int, evaluate=False) -> Case:
    """All iterations of the structure module, which is fp32 for every variant; without dropout.

    The bias of the pair bias gets no gradient here: it moves a row of logits as a whole, so what a backward pass gives
    it is rounding alone, which cannot be compared.
    """

    def build(dtype: torch.dtype = torch.float32) -> Inputs:
        draw, config = Draw(not evaluate, dtype), ModelConfig()
        module = StructureModule(config).to(DEVICE)
        own = [p for name, p in module.named_parameters() if name.startswith(ITERATED)]
        for parameter in own:
            parameter.data = draw(*parameter.shape, scale=0.5 * parameter.shape[-1] ** -0.5).detach()
        module.ipa.linear_b.bias.requires_grad_(False)
        s, z = draw(1, n, config.c_s), draw(1, n, n, config.c_z)
        mask = torch.ones(1, n, device=DEVICE)

        def call(ops: Operations) -> Sequence[Tensor]:
            use_operations(module, ops)
            return module.iterate(s, z, module.ipa.share(z), mask, None)

        return Inputs([s, z, *(p for p in own if p.requires_grad)], call)

    return Case("structure_iterations", f"{n}x384", calls, build)


def point_errors(repeat: int, frames: int, points: int, calls: int) -> Case:
    """Frame-aligned point error of ``repeat`` predictions of one truth, in fp32 for every variant."""

    def build(dtype: torch.dtype = torch.float32) -> Inputs:
        draw, true = Draw(True, dtype), Draw(False, dtype)
        own, shared = (1, repeat), (1, 1)
        frames_of = [(d(*lead, frames, 3, 3), d(*lead, frames, 3)) for d, lead in ((draw, own), (true, shared))]
        masks = [torch.ones(*shared, count, device=DEVICE) for count in (frames, points)]
        seen, truth = draw(*own, points, 3), true(*shared, points, 3)
        share = torch.full(own, 0.9, device=DEVICE)
        return Inputs(
            draw.leaves,
            lambda ops: ops.point_errors(*frames_of[0], *frames_of[1], masks[0], seen, truth, masks[1], share, 10.0),
        )

    return Case("point_errors", f"{repeat}x{frames}x{points}", calls, build)


def label(rows: Rows, transposed: bool = False) -> str:
    return "x".join(map(str, rows)) + ("t" if transposed else "")


def training_cases(dap: int) -> list[Case]:
    """Every operation at this rank's share of the training crop; structure module and losses are not shared out."""
    pair, msa, column = (1, N // dap, N), (1, MSA // dap, N), (1, N // dap, MSA)
    extra, template = (1, EXTRA // dap, N), (TEMPLATES, N // dap, N)
    heads = [128] * 4 + [4]
    return [
        projections(pair, 128, heads, PAIR_BLOCKS),
        projections(pair, 128, heads, PAIR_BLOCKS, transposed=True),
        attention(pair, 4, 32, True, PAIR_BLOCKS),
        attention(pair, 4, 32, True, PAIR_BLOCKS, transposed=True),
        gated_output(pair, 128, 4, 32, PAIR_BLOCKS, dropped=True),
        gated_output(pair, 128, 4, 32, PAIR_BLOCKS, dropped=True, transposed=True),
        triangle_project(pair, 128, 2 * PAIR_BLOCKS),
        *(triangle_product(1, 128 // dap, N, N, outgoing, PAIR_BLOCKS) for outgoing in (True, False) if dap != 2),
        triangle_output(pair, 128, 2 * PAIR_BLOCKS),
        transition(pair, 128, 4, PAIR_BLOCKS),
        projections(msa, 256, [256] * 4, 48),
        projections(column, 256, [256] * 4, 48, transposed=True),
        attention(msa, 8, 32, True, 48),
        attention(column, 8, 32, False, 48, transposed=True),
        gated_output(msa, 256, 8, 32, 48, dropped=True),
        gated_output(column, 256, 8, 32, 48, dropped=False, transposed=True),
        transition((1, MSA, N // dap), 256, 4, 48),
        outer_product_project((1, MSA, N // dap), 256, 48),
        outer_product_update(MSA, N // dap, N, 48),
        projections(pair, 128, [8], PAIR_BLOCKS),
        projections(extra, 64, [64] * 4, 4),
        attention(extra, 8, 8, True, 4),
        gated_output(extra, 64, 8, 8, 4, dropped=True),
        global_attention((1, EXTRA, N // dap), 64, 4),
        transition((1, EXTRA, N // dap), 64, 4, 4),
        outer_product_project((1, EXTRA, N // dap), 64, 4),
        outer_product_update(EXTRA, N // dap, N, 4),
        projections(template, 64, [64] * 4 + [4], 4),
        attention(template, 4, 16, True, 4),
        gated_output(template, 64, 4, 16, 4, dropped=True),
        triangle_project(template, 64, 4),
        triangle_output(template, 64, 4),
        transition(template, 64, 2, 2),
        layer_norm(pair, 128, 2),
        layer_norm(msa, 256, 1),  # its kernels serve where the library takes the products of projections, transitions
        layer_norm(extra, 64, 1),
        layer_norm(template, 64, 1),
        layer_norm((1, 1, N), 384, 10),
        structure_iterations(N, 1),
        point_attention(N, 8),
        point_errors(8, N, N, 1),
        point_errors(1, 8 * N, 14 * N, 1),
    ]


def evaluation_cases(length: int) -> list[Case]:
    """The same operations forward only, on an uncropped chain of ``length`` residues."""
    pair, msa, column, extra = (1, length, length), (1, MSA, length), (1, length, MSA), (1, EXTRA, length)
    return [
        projections(pair, 128, [128] * 4 + [4], 0, evaluate=True),
        attention(pair, 4, 32, True, 0, evaluate=True),
        gated_output(pair, 128, 4, 32, 0, dropped=False, evaluate=True),
        triangle_project(pair, 128, 0, evaluate=True),
        triangle_output(pair, 128, 0, evaluate=True),
        transition(pair, 128, 4, 0, evaluate=True),
        projections(msa, 256, [256] * 4, 0, evaluate=True),
        attention(msa, 8, 32, True, 0, evaluate=True),
        attention(column, 8, 32, False, 0, transposed=True, evaluate=True),
        gated_output(msa, 256, 8, 32, 0, dropped=False, evaluate=True),
        transition(msa, 256, 4, 0, evaluate=True),
        outer_product_project(msa, 256, 0, evaluate=True),
        outer_product_update(MSA, length, length, 0, evaluate=True),
        projections(extra, 64, [64] * 4, 0, evaluate=True),
        attention(extra, 8, 8, True, 0, evaluate=True),
        gated_output(extra, 64, 8, 8, 0, dropped=False, evaluate=True),
        global_attention(extra, 64, 0, evaluate=True),
        transition(extra, 64, 4, 0, evaluate=True),
        outer_product_project(extra, 64, 0, evaluate=True),
        outer_product_update(EXTRA, length, length, 0, evaluate=True),
        structure_iterations(length, 0, evaluate=True),
        point_attention(length, 0, evaluate=True),
    ]
