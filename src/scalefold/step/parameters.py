"""A model's parameters as views of flat buffers: one fp32 master, and a copy for each type they compute in."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 16


# Parameters of one module that kernels read as one tensor.
NEIGHBOURS = (
    ("linear_q.weight", "linear_k.weight", "linear_v.weight", "linear_g.weight"),
    ("outer_product_mean.linear_1.weight", "outer_product_mean.linear_2.weight"),
    ("outer_product_mean.linear_1.bias", "outer_product_mean.linear_2.bias"),
)


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Move the parameters of ``model`` into one buffer per type, in ``storage_order``; values are kept.

    Weights that share a product are then neighbours, and no call puts them together again.
    """
    parameters = dict(model.named_parameters())
    order = storage_order(list(parameters))
    for dtype in {parameter.dtype for parameter in parameters.values()}:
        own = [parameters[name] for name in order if parameters[name].dtype == dtype]
        buffer = torch.empty(sum(_aligned(p.numel()) for p in own), dtype=dtype, device=own[0].device)
        for parameter, place in zip(own, buffer.split([_aligned(p.numel()) for p in own]), strict=True):
            view = place[: parameter.numel()].view(parameter.shape)
            parameter.data = view.copy_(parameter)


@dataclass(frozen=True)
class Slot:
    """Place of one parameter in the flat buffers."""

    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        """First element behind the parameter."""
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class Segment:
    """A contiguous range of parameters that share compute type and gradient scale.

    ``gradient_scale`` makes the sum over all training ranks, which the flat gradient holds, the data-parallel mean.
    """

    start: int
    stop: int
    dtype: torch.dtype
    gradient_scale: float


def storage_order(names: list[str]) -> list[str]:
    """Registration order, except that ``NEIGHBOURS`` lie next to each other, where the first of them is.

    One matrix product then serves all of them without copying weights together.
    """
    known, order = set(names), {}
    for name in names:
        group = next((group for group in NEIGHBOURS if name.endswith(group)), (name,))
        first = next(member for member in group if name.endswith(member))
        prefix = name.removesuffix(first)
        order |= dict.fromkeys(prefix + member for member in group if prefix + member in known)
    return list(order)


class FlatLayout:
    """Where each parameter of a model lies in a flat buffer; parameters of one kind lie together.

    Args:
        model: names and shapes of its parameters count, nothing else.
        compute_dtype: type in which parameters compute, by name.
        gradient_scale: factor on a parameter's gradient summed over all training ranks, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
        gradient_scale: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        parameters = dict(model.named_parameters())
        kinds = {name: (compute_dtype(name), gradient_scale(name)) for name in parameters}
        self.slots: list[Slot] = []
        self.segments: list[Segment] = []
        position = 0
        for kind in sorted(set(kinds.values()), key=lambda k: (str(k[0]), k[1])):
            start = position
            for name in storage_order([name for name in parameters if kinds[name] == kind]):
                self.slots.append(Slot(name, parameters[name].shape, position))
                position += _aligned(parameters[name].numel())
            self.segments.append(Segment(start, position, *kind))
        self.size = position

    def segment_of(self, slot: Slot) -> Segment:
        """The segment that holds ``slot``."""
        return next(s for s in self.segments if s.start <= slot.start < s.stop)

    def view(self, flat: Tensor, slot: Slot, offset: int = 0) -> Tensor:
        """The parameter's part of a flat buffer that begins at element ``offset`` of the layout, in its own shape."""
        return flat[slot.start - offset : slot.stop - offset].view(slot.shape)

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every parameter of a flat fp32 buffer, in storage order."""
        for slot in self.slots:
            yield slot.name, self.view(flat, slot)


class FlatParameters(FlatLayout):
    """The parameters of ``model`` as views of flat buffers.

    Args:
        model: its parameters are re-pointed to the buffers; values are kept.
        device: where the buffers live.
        compute_dtype, gradient_scale: see ``FlatLayout``.
        gradient_dtype: type of the flat gradient; None means the compute type (what the all-reduce transports).

    ``piece``: most elements that collecting gradients moves as one tensor: a launch of the library takes some dozen
    tensors, and as long as its longest one.
    """

    piece = 16384

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        compute_dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
        gradient_scale: Callable[[str], float] = lambda name: 1.0,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, compute_dtype, gradient_scale)
        parameters = dict(model.named_parameters())
        self.master = torch.zeros(self.size, dtype=torch.float32, device=device)
        self.parameters = [parameters[slot.name] for slot in self.slots]
        self._copies = {
            segment: torch.zeros(segment.stop - segment.start, dtype=segment.dtype, device=device)
            for segment in self.segments
            if segment.dtype != torch.float32
        }
        self.gradients = {
            segment: torch.zeros(segment.stop - segment.start, dtype=gradient_dtype or segment.dtype, device=device)
            for segment in self.segments
        }
        with torch.no_grad():
            for slot, parameter in zip(self.slots, self.parameters, strict=True):
                self.view(self.master, slot).copy_(parameter)
        self.refresh()
        for slot, parameter in zip(self.slots, self.parameters, strict=True):
            parameter.data = self._compute_view(slot)

    def compute_copy(self, segment: Segment) -> Tensor | None:
        """The low-precision buffer of a segment, or None where the master itself computes."""
        return self._copies.get(segment)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master into the low-precision buffers."""
        for segment, copy in self._copies.items():
            copy.copy_(self.master[segment.start : segment.stop])

    @torch.no_grad()
    def collect_gradients(self, accumulate: bool = False) -> None:
        """Move ``.grad`` of all parameters into the flat gradient (absent: zero) and drop the tensors."""
        for segment, flat in self.gradients.items():
            self.collect_range(segment, flat, segment.start, segment.stop, accumulate)

    @torch.no_grad()
    def collect_range(self, segment: Segment, flat: Tensor, start: int, stop: int, accumulate: bool) -> None:
        """The same for the parameters that begin in [start, stop) of one segment."""
        targets, sources = [], []
        for slot, parameter in self._members(start, stop):
            target = self.view(flat, slot, segment.start)
            if parameter.grad is not None:
                targets += self._pieces(target)
                sources += self._pieces(parameter.grad)
                parameter.grad = None
            elif not accumulate:
                target.zero_()
        if targets:
            if accumulate:
                torch._foreach_add_(targets, [s.to(targets[0].dtype) for s in sources])
            else:
                torch._foreach_copy_(targets, sources)

    def gradients_from(self, start: int, stop: int) -> list[Tensor]:
        """Gradients of the parameters that begin in [start, stop) and have one."""
        return [p.grad for _, p in self._members(start, stop) if p.grad is not None]

    def _pieces(self, x: Tensor) -> Sequence[Tensor]:
        """A dense tensor in views of at most ``piece`` elements."""
        return (x,) if x.numel() <= self.piece else x.reshape(-1).split(self.piece)

    def _members(self, start: int, stop: int) -> list[tuple[Slot, nn.Parameter]]:
        first = bisect.bisect_left(self.slots, start, key=lambda slot: slot.start)
        last = bisect.bisect_left(self.slots, stop, key=lambda slot: slot.start)
        return list(zip(self.slots[first:last], self.parameters[first:last], strict=True))

    def _compute_view(self, slot: Slot) -> Tensor:
        segment = self.segment_of(slot)
        copy = self._copies.get(segment)
        return self.view(self.master, slot) if copy is None else self.view(copy, slot, segment.start)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
