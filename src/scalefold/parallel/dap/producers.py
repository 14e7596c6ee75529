"""Operations that write their results to the peers themselves, in the place of an exchange behind them.

The model calls its operations and resharding points as ever. ``hand_over`` gives the modules of a finished model tables
whose operations know the point that follows: where ``Group.forms`` says so and their kernels take the arguments, they
take their results through it, and the point lets them pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

Point = Any  # an ``Exchange`` of ``points``, which calls ``hand_over``
LEAST_CHANNELS = 16  # of a part: what the matrix units take
ATTENTIONS = ("msa_att_row", "tri_att_start")  # their gated output stands before a block's ``rows_to_columns``


def hand_over(model: nn.Module) -> None:
    """Tell the operations of ``model``, whose points exchange, what follows them."""
    for module in model.modules():
        if hasattr(module, "rows_to_columns"):
            for name in ATTENTIONS:
                _adapt(getattr(module, name, None), _with_gated_output(module.rows_to_columns))
        if hasattr(module, "pair_transition") and hasattr(module, "end_columns_to_rows"):
            _adapt(module.pair_transition, _with_transition(module.columns_to_rows))
        if hasattr(module, "channels_to_rows"):
            _adapt(module, _with_product(module.rows_to_channels, module.channels_to_rows))


def _adapt(module: Any, adapted: Callable[[Any], Any]) -> None:
    """Let ``module`` make its own of every table of operations that it is given, and of the one that it has."""
    if module is not None:
        module.adapted = adapted
        module.ops = adapted(module.ops)


def _with_gated_output(point: Point) -> Callable[[Any], Any]:
    return lambda ops: replace(ops, gated_output=SentOutput(ops.gated_output, point, "gated_output"))


def _with_transition(point: Point) -> Callable[[Any], Any]:
    return lambda ops: replace(ops, transition=SentOutput(ops.transition, point, "transition"))


def _with_product(before: Point, after: Point) -> Callable[[Any], Any]:
    def adapted(ops: Any) -> Any:
        product = before.taker = SharedProduct(ops.triangle_product, before, after)
        project = SentOperands(ops.triangle_project, before, product)
        return replace(ops, triangle_project=project, triangle_product=product)

    return adapted


def _through(operation: Any, point: Point, form: str, *args: Any) -> Any:
    """What of an operation takes changes of layout, where exchanges have that form and it takes these arguments."""
    through = getattr(operation, "through", None) if point.group.takes_form(form) else None
    return through if through is not None and operation.reason(*args) is None else None


class SentOutput:
    """An operation of rows whose results every peer gets on its side of the point that follows."""

    def __init__(self, operation: Any, point: Point, form: str) -> None:
        self.operation, self.point, self.form = operation, point, form

    def __call__(self, *args: Any) -> Tensor:
        """Like the operation, but behind the point that follows where it can."""
        through = _through(self.operation, self.point, self.form, *args)
        return self.operation(*args) if through is None else self.point.passed(through(self.point.move, *args))


class SharedProduct:
    """``triangle_product`` of operands and with a result in rows, which all ranks compute by channels."""

    def __init__(self, operation: Any, before: Point, after: Point) -> None:
        self.operation, self.before, self.after = operation, before, after

    def takes(self, a: Tensor) -> bool:
        """Whether it moves operands like a itself: the point before it leaves them alone."""
        return _through(self.operation, self.after, "product", a) is not None

    def __call__(self, a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
        """Like the operation, but from before the one point to behind the other where it can."""
        if not self.takes(a):
            return self.operation(a, b, outgoing)
        there = self.before.is_behind(a)
        return self.after.passed(self.operation.through(a, b, outgoing, self.before.move, self.after.move, there))


class SentOperands:
    """``triangle_project`` whose operands every peer gets for its channels; ``product`` sends their gradients back."""

    def __init__(self, operation: Any, point: Point, product: SharedProduct) -> None:
        self.operation, self.point, self.product = operation, point, product

    def __call__(self, z: Tensor, mask: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like the operation, but with a and b behind the point that follows where it can."""
        through = _through(self.operation, self.point, "operands", z, mask, *parameters)
        wide = parameters[2].shape[0] >= LEAST_CHANNELS * self.point.group.size
        if through is None or not wide or not self.product.takes(z):
            return self.operation(z, mask, *parameters)
        z, a, b = through(self.point.move, z, mask, *parameters)
        return z, self.point.passed(a), b
