"""Which part of the model a kernel of a captured step belongs to: small kernels mark where parts begin and end.

A kernel inside a CUDA graph is known by its name alone. So every part of interest is entered and left, forward and
backward, by a kernel whose name says what follows; a profile in order of time then tells the parts apart. Marks are
launched only while ``on``: a step is timed without them.
"""

# pyright: reportCallIssue=false

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils import _pytree

from scalefold.step.graphs import TrainStep
from spans import Span

PARTS = ("embedders", "stacks", "structure", "heads", "losses", "collecting", "optimizer")
SHARED = "stacks"  # by the ranks of a group; all the rest every rank computes in full
MODULES = {  # path: part inside, part after
    "template_pair_stack": ("stacks", "embedders"),
    "extra_msa_stack": ("stacks", "embedders"),
    "evoformer_stack": ("stacks", "embedders"),
    "structure_module": ("structure", "embedders"),
    "auxiliary_heads": ("heads", "losses"),
}
_NAME = "_mark_of_part_"


@triton.jit(repr=lambda specialization: f"{_NAME}{specialization.constants['PART']}")
def _mark_of_part(place, PART: tl.constexpr):
    tl.store(place, PART)


class Marks:
    """Launches marks while ``on``; ``seen``: the parts that began, in order."""

    def __init__(self, device: torch.device) -> None:
        self.on, self.part = False, PARTS[0]
        self.seen: list[str] = []
        self._place = torch.zeros(1, dtype=torch.int32, device=device)

    def begin(self, part: str) -> None:
        """What is launched from now on belongs to ``part``."""
        self.part = part
        if self.on:
            self.seen.append(part)
            if self._place.is_cuda:
                _mark_of_part[(1,)](self._place, PARTS.index(part), num_warps=1)

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``call`` as a part of its own; the part that it interrupts goes on afterwards."""

        def marked(*args: Any) -> Any:
            before = self.part
            self.begin(part)
            result = call(*args)
            self.begin(before)
            return result

        return marked


class _Mark(torch.autograd.Function):
    """Begins one part in the forward and another one when the gradients of all tensors have come back."""

    @staticmethod
    def forward(ctx: Any, marks: Marks, ahead: str, back: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.marks, ctx.back = marks, back
        ctx.set_materialize_grads(False)  # no zeros for what the loss does not use
        marks.begin(ahead)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.marks.begin(ctx.back)
        return None, None, None, *grads


def marked(values: Any, marks: Marks, ahead: str, back: str) -> Any:
    """The same tensors in the same containers, with a mark behind them."""
    leaves, tree = _pytree.tree_flatten(values)
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places or not torch.is_grad_enabled():
        marks.begin(ahead)
        return values
    for n, x in zip(places, _Mark.apply(marks, ahead, back, *(leaves[n] for n in places)), strict=True):
        leaves[n] = x
    return _pytree.tree_unflatten(leaves, tree)


def mark_parts(model: nn.Module, step: TrainStep) -> Marks:
    """Hooks around the parts of a model and its update; nothing is launched until ``on`` is set.

    What is collected aside, before the backward ends, counts to the part that goes on meanwhile: a mark there would
    come late, and be taken for one of the chain.
    """
    marks = Marks(step.optimizer.flat.master.device)
    for path, (inside, after) in MODULES.items():
        module = model.get_submodule(path)
        module.register_forward_pre_hook(_entry(marks, inside, before(after)))
        module.register_forward_hook(_exit(marks, after, inside))
    flat, optimizer = step.optimizer.flat, step.optimizer
    flat.collect_gradients = marks.around(flat.collect_gradients, "collecting")
    optimizer.apply = marks.around(optimizer.apply, "optimizer")
    forward = step.objective
    step.objective = lambda features, passes: (marks.begin("embedders"), forward(features, passes))[1]
    return marks


def _entry(marks: Marks, ahead: str, back: str) -> Callable[..., Any]:
    return lambda module, inputs: marked(inputs, marks, ahead, back)


def _exit(marks: Marks, ahead: str, back: str) -> Callable[..., Any]:
    return lambda module, inputs, outputs: marked(outputs, marks, ahead, back)


def before(after: str) -> str:
    """What the backward comes to when it leaves a part whose forward is followed by ``after``."""
    return "structure" if after == "losses" else "embedders"


def by_part(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Kernels other than exchanges and marks by the part whose mark came last; those before any are left out."""
    found: dict[str, list[Span]] = defaultdict(list)
    part = None
    for span in sorted(spans, key=lambda span: span.start_us):
        if is_mark(span):
            part = PARTS[int(span.name.partition(_NAME)[2])]
        elif part is not None and not span.is_exchange:
            found[part].append(span)
    return found


def is_mark(span: Span) -> bool:
    """Whether a kernel is one of ours."""
    return _NAME in span.name
