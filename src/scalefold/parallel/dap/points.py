"""Dynamic axial parallelism: replaces the named resharding points of a finished model by exchanges.

The layouts and points are listed in ``model/evoformer.py``. Compared with the published scheme, triangle
multiplications are sharded by channel (all-to-all of the projected operands, whole products for 1/P of the channels,
all-to-all of the result) instead of gathering an operand; between two ranks they stay rows (``halves``), which moves a
third less. Every gather whose result feeds different work has a reduce-scatter as backward instead of an all-reduce and
a slice. Three exchanges of a block run beside other work, in both directions: that of the MSA at its end, the gather of
row attention's bias, and the pairs' way to rows. A point may have a ``Destination``: whoever makes its operand writes
it there, and the point only waits for all.

Lengths that P does not divide are padded at a stack's entry: masks with zeros, so padding never reaches real
positions, and cut off at its exit.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from scalefold.config import ModelConfig
from scalefold.errors import ConfigError
from scalefold.kernels.destination import Destination, OfOperands
from scalefold.parallel.dap.collectives import Group, exchange_destinations, gather_destination
from scalefold.parallel.dap.exchanges import (
    Flights,
    begin_exchange,
    begin_gather,
    end_exchange,
    end_gather,
    exchange,
    exchange_all,
    gather_same,
    gather_shared,
    scatter,
)
from scalefold.parallel.dap.halves import TWO, ProductOfTwo

SHARDED_PARAMETERS = "_stack.blocks."


class Paddings:
    """Original sizes of what was padded at the entry of a stack, by padded size and width.

    The width tells MSA and pair representation apart where both pad to the same size; ``check_shares`` sees to it.
    """

    def __init__(self) -> None:
        self._original: dict[tuple[int, ...], tuple[int, int]] = {}

    def pad(self, x: Tensor, size: int) -> Tensor:
        """Zeros behind dimensions 1 and 2 up to multiples of ``size``."""
        rows, columns = x.shape[1:3]
        add_rows, add_columns = -rows % size, -columns % size
        padded = F.pad(x, [0, 0] * (x.dim() - 3) + [0, add_columns, 0, add_rows]) if add_rows or add_columns else x
        key = tuple(padded.shape[1:])
        if x.dim() > 3:
            self._original[key] = (rows, columns)
        return padded

    def cut(self, x: Tensor) -> Tensor:
        """Back to the size before :meth:`pad`."""
        rows, columns = self._original[tuple(x.shape[1:])]
        return x[:, :rows, :columns]


class Shard(nn.Module):
    """full -> rows (``dim`` 1) or columns (2)."""

    def __init__(self, group: Group, dim: int, paddings: Paddings) -> None:
        super().__init__()
        self.group, self.dim, self.paddings = group, dim, paddings

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, J, ...], padded to multiples of P -> this rank's P-th along ``dim``."""
        return scatter(self.paddings.pad(x, self.group.size), self.dim, self.group)


class GatherSame(Shard):
    """rows or columns -> full, for work that all ranks repeat."""

    def forward(self, x: Tensor) -> Tensor:
        """The whole tensor [B, I, J, ...] on every rank, without padding."""
        return self.paddings.cut(gather_same(x, self.dim, self.group))


class GatherShared(nn.Module):
    """Slices along ``dim`` -> full, for work that the ranks share.

    Whoever makes the operand may write it to all ranks. channels_first: that is how it lies then; else as what it is
    made from.
    """

    def __init__(self, group: Group, dim: int, channels_first: bool = False) -> None:
        super().__init__()
        self.group, self.dim, self.channels_first = group, dim, channels_first
        self._destination: Destination | None = None

    def destination(self, x: Tensor, channels: int) -> Destination | None:
        """Where an operand made from x [B, .., c], with so many channels, goes; that gather comes next here."""
        shape, (first, *rows, last) = [*x.shape[:-1], channels], range(x.dim())
        order = [first, *sorted(rows, key=lambda n: -x.stride(n)), last]
        if self.channels_first:
            order = [first, last, *rows]
        operand = x.new_empty([shape[n] for n in order], device="meta")
        operand = operand.permute([order.index(n) for n in range(x.dim())])
        self._destination = gather_destination(operand, self.dim, self.group)
        return self._destination

    def forward(self, x: Tensor) -> Tensor:
        """The whole tensor on every rank."""
        return gather_shared(x, self.dim, self.group, self._taken())

    def _taken(self) -> Destination | None:
        destination, self._destination = self._destination, None
        return destination


class BeginGather(GatherShared):
    """The first half of a ``GatherShared`` whose second half comes later: other work goes on in between."""

    def __init__(self, group: Group, dim: int, flights: Flights, channels_first: bool = False) -> None:
        super().__init__(group, dim, channels_first)
        self.flights = flights

    def forward(self, x: Tensor) -> Tensor:
        """What the second half takes; nothing else may read it."""
        return begin_gather(x, self.dim, self.group, self.flights, self._taken())


class EndGather(BeginGather):
    """The second half of a ``GatherShared``."""

    def forward(self, x: Tensor) -> Tensor:
        """The whole tensor on every rank."""
        return end_gather(x, self.dim, self.group, self.flights)


class Exchange(nn.Module):
    """Shards move from ``concat_dim`` to ``split_dim``."""

    def __init__(self, group: Group, split_dim: int, concat_dim: int) -> None:
        super().__init__()
        self.group, self.split_dim, self.concat_dim = group, split_dim, concat_dim

    def forward(self, x: Tensor) -> Tensor:
        """Same tensor, other axis sharded."""
        return exchange(x, self.split_dim, self.concat_dim, self.group)


class ExchangeAhead(Exchange):
    """An ``Exchange`` whose operand may be written to where it belongs by whoever makes it."""

    _destinations: Sequence[Destination] = ()

    def destination(self, x: Tensor, channels: int) -> Destination | None:
        """Where an operand like x, with its ``channels``, goes; that exchange comes next here."""
        self._destinations = exchange_destinations(x, self.split_dim, self.concat_dim, self.group)
        return self._destinations[0] if self._destinations else None

    def forward(self, x: Tensor) -> Tensor:
        """Same tensor, other axis sharded."""
        return exchange(x, self.split_dim, self.concat_dim, self.group, self._taken())

    def _taken(self) -> Sequence[Destination]:
        destinations, self._destinations = self._destinations, ()
        return destinations


class ExchangeOperands(ExchangeAhead):
    """The same of both operands of a triangle multiplication in one go."""

    def destinations(self, z: Tensor, channels: int) -> OfOperands:
        """Where a and b [B, channels, I, J], made from z [B, I, J, c_z], go; that exchange comes next here."""
        operand = z.new_empty(len(z), channels, *z.shape[1:3], device="meta")
        self._destinations = exchange_destinations(operand, self.split_dim, self.concat_dim, self.group, number=2)
        return (self._destinations[0], self._destinations[1]) if self._destinations else (None, None)

    def forward(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Same tensors, other axis sharded."""
        return exchange_all(xs, self.split_dim, self.concat_dim, self.group, self._taken())


class BeginExchange(Exchange):
    """The first half of an ``Exchange`` whose second half comes later: other work goes on in between."""

    def __init__(self, group: Group, split_dim: int, concat_dim: int, flights: Flights) -> None:
        super().__init__(group, split_dim, concat_dim)
        self.flights = flights

    def forward(self, x: Tensor) -> Tensor:
        """What the second half takes; nothing else may read it."""
        return begin_exchange(x, self.split_dim, self.concat_dim, self.group, self.flights)


class EndExchange(BeginExchange):
    """The second half of an ``Exchange``."""

    def forward(self, x: Tensor) -> Tensor:
        """Same tensor as given to the first half, other axis sharded."""
        return end_exchange(x, self.split_dim, self.concat_dim, self.group, self.flights)


def apply_dap(model: nn.Module, group: Group | None) -> None:
    """Shard the trunk of ``model`` over the ranks of ``group``; None leaves it whole."""
    if group is None:
        return
    model.register_forward_pre_hook(lambda *_: group.begin())
    points = _points(group)
    for module in list(model.modules()):
        for name, point in points.items():
            if isinstance(getattr(module, name, None), nn.Identity):
                setattr(module, name, point)
        product = getattr(module, "product", None)
        if group.size == TWO and isinstance(product, nn.Module):
            module.product = ProductOfTwo(group, bool(product.outgoing))


def _points(group: Group) -> dict[str, nn.Module]:
    paddings = Paddings()
    of_msa, of_pairs, of_bias = {}, {}, {}
    points = {
        "shard_rows": Shard(group, 1, paddings),
        "shard_columns": Shard(group, 2, paddings),
        "gather_rows": GatherSame(group, 1, paddings),
        "gather_all_columns": GatherSame(group, 2, paddings),
        "gather_bias": GatherShared(group, 1, channels_first=True),
        "begin_gather_bias": BeginGather(group, 2, of_bias, channels_first=True),
        "end_gather_bias": EndGather(group, 2, of_bias),
        "gather_columns": GatherShared(group, 2),
        "rows_to_columns": ExchangeAhead(group, split_dim=2, concat_dim=1),
        "columns_to_rows": Exchange(group, split_dim=1, concat_dim=2),
        "begin_columns_to_rows": BeginExchange(group, 1, 2, of_msa),
        "end_columns_to_rows": EndExchange(group, 1, 2, of_msa),
        "begin_pair_to_rows": BeginExchange(group, 1, 2, of_pairs),
        "end_pair_to_rows": EndExchange(group, 1, 2, of_pairs),
    }
    if group.size > TWO:
        points["rows_to_channels"] = ExchangeOperands(group, split_dim=1, concat_dim=2)
        points["channels_to_rows"] = Exchange(group, split_dim=2, concat_dim=1)
    return points


def gradient_scale(name: str, dp_size: int, dap_size: int) -> float:
    """Factor on a parameter's gradient summed over all training ranks, to give the data-parallel mean.

    Parameters of the sharded blocks receive one part of their gradient on each of the P ranks of a replica, all others
    receive the whole gradient P times.
    """
    return 1.0 / dp_size if SHARDED_PARAMETERS in name else 1.0 / (dp_size * dap_size)


def check_shares(model: ModelConfig, dap_size: int) -> None:
    """Refuse models whose trunk cannot be shared by ``dap_size`` ranks.

    Raises:
        ConfigError: naming the key to change.
    """
    if dap_size == 1:
        return
    for stack in ("template", "extra_msa", "evoformer"):
        width = getattr(model, stack).c_hidden_tri_mul
        if width % dap_size:
            raise ConfigError(f"model.{stack}.c_hidden_tri_mul {width} must be a multiple of dap_size {dap_size}")
    if model.c_z in (model.c_m, model.c_e):
        raise ConfigError(
            f"model.c_z {model.c_z} must differ from model.c_m {model.c_m} and model.c_e {model.c_e} when "
            f"parallel.dap_size is {dap_size}: padding tells the representations apart by their width"
        )
