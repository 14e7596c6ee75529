"""Exchanges of axial parallelism in one pass: how many, of which kind and size, forward and backward. Needs no GPU.

    # DAP 2, 4, 8 of the full model -> benchmarks/results/exchange_counts.csv
    python benchmarks/measure/exchange_counts.py
    python benchmarks/measure/exchange_counts.py --dap 8 --set model.evoformer.num_blocks=1 --csv one_block.csv

Model, losses and backward run on tensors without storage; the collectives of ``parallel/dap/collectives.py`` are
replaced by counters. ``mib_per_rank`` is what a rank puts in, as in ``benchmarks/results/exchange.csv``; ``copies`` and
``copied_mib`` are what the rearrangements before and after these exchanges write, all calls together. A step with R
passes has R times the forward exchanges (the passes without gradient included) and once those of the backward.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import FOLDER, ROOT, append_rows, facts, print_table
from scalefold.config import Config, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.model.alphafold import AlphaFold, cast_trunk, select_slice
from scalefold.model.loss import loss_terms, total_of_terms
from scalefold.parallel.dap import collectives
from scalefold.parallel.dap import points as dap

MIB = 2**20
COPIES = (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
Kind = tuple[str, str, int]  # direction, collective, bytes that a rank puts in


class AbsentGroup:
    """Rank 0 of a group whose other ranks do not exist. Stands in for the group and for ``torch.distributed``."""

    ProcessGroup = object

    def __init__(self, size: int) -> None:
        self.size = size

    def get_world_size(self, group: Any) -> int:
        """Ranks of the group."""
        return self.size

    def get_rank(self, group: Any) -> int:
        """This rank's place in it."""
        return 0

    def all_gather_into_tensor(self, *_: Any, group: Any, async_op: bool = False) -> None:
        """Outputs have no storage: nothing to fill."""

    all_to_all_single = all_gather_into_tensor

    def reduce_scatter(self, x: Tensor, dim: int, _: Any) -> Tensor:
        """What ``collectives.reduce_scatter`` does on a GPU; elsewhere it is made of other exchanges."""
        front = x.movedim(dim, 0).contiguous()
        return front.new_empty((front.shape[0] // self.size, *front.shape[1:])).movedim(0, dim)


class Tally(TorchDispatchMode):
    """Calls of every kind, and the copies inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = "forward"
        self.calls: Counter[Kind] = Counter()
        self.copies: Counter[Kind] = Counter()
        self.copied_bytes: Counter[Kind] = Counter()
        self._inside: Kind | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if self._inside is not None and function in COPIES:
            self.copies[self._inside] += 1
            self.copied_bytes[self._inside] += out.numel() * out.element_size()
        return out

    def counted(self, name: str, exchange: Callable[..., Any], begins: bool = True) -> Callable[..., Any]:
        """``exchange`` with its calls counted, or (not ``begins``) the end of one, whose copies still count."""

        def call(x: Any, *args: Any) -> Any:
            sent = [x.sent] if not begins else [x] if isinstance(x, Tensor) else x
            self._inside = (self.direction, name, sum(own.numel() * own.element_size() for own in sent))
            self.calls[self._inside] += int(begins)
            result = exchange(x, *args)
            self._inside = None
            return result

        return call

    def rows(self, size: int) -> list[dict[str, object]]:
        """Lines of the table, forward first, most bytes first."""
        order = sorted(self.calls, key=lambda kind: (kind[0] != "forward", -kind[2] * self.calls[kind]))
        return [
            {
                "dap": size,
                "direction": direction,
                "exchange": name,
                "mib_per_rank": round(count / MIB, 4),
                "calls": self.calls[direction, name, count],
                "copies": self.copies[direction, name, count],
                "copied_mib": round(self.copied_bytes[direction, name, count] / MIB, 2),
            }
            for direction, name, count in order
        ]


@contextmanager
def counting(size: int) -> Iterator[Tally]:
    """Exchanges of a group of ``size`` ranks are counted instead of done."""
    group, tally = AbsentGroup(size), Tally()
    new = {name: tally.counted(name, getattr(collectives, name)) for name in ("all_to_all", "all_gather")}
    new["begin_all_to_all"] = tally.counted("all_to_all", collectives.begin_all_to_all)
    new["end_all_to_all"] = tally.counted("all_to_all", collectives.end_all_to_all, begins=False)
    new["reduce_scatter"] = tally.counted("reduce_scatter", group.reduce_scatter)
    before = {name: getattr(collectives, name) for name in new}
    torch_distributed = collectives.dist
    try:
        vars(collectives).update(new, dist=group)
        with tally:
            yield tally
    finally:
        vars(collectives).update(before, dist=torch_distributed)


def count(config: Config, size: int) -> list[dict[str, object]]:
    """Exchanges of one pass with gradient at DAP ``size``: model in bf16 as it trains, losses, backward."""
    model = AlphaFold(config.model).to("meta").train()
    cast_trunk(model, torch.bfloat16)
    model.checkpoint_blocks = config.execution.activation_checkpointing
    features = synthetic_batch(feature_settings(config), 1, seed=1).features
    batch = {key: value.to("meta") for key, value in features.items()}
    with counting(size) as tally:
        dap.apply_dap(model, collectives.Group(AbsentGroup(size)))  # type: ignore[arg-type]
        outputs = model(batch, 1)
        loss, _ = total_of_terms(outputs, select_slice(batch, 0), loss_terms(config.loss))
        tally.direction = "backward"
        loss.backward()
    return tally.rows(size)


def summarise(rows: list[dict[str, Any]]) -> None:
    """Exchanges and MiB per pass and per mean step."""
    for size in dict.fromkeys(row["dap"] for row in rows):
        calls, mib = {}, {}
        for direction in ("forward", "backward"):
            own = [row for row in rows if row["dap"] == size and row["direction"] == direction]
            calls[direction] = sum(row["calls"] for row in own)
            mib[direction] = sum(row["calls"] * row["mib_per_rank"] for row in own)
        step = [2.5 * part["forward"] + part["backward"] for part in (calls, mib)]
        print(
            f"DAP-{size}: forward {calls['forward']} exchanges, {mib['forward']:.0f} MiB per rank; "
            f"backward {calls['backward']}, {mib['backward']:.0f} MiB; "
            f"mean step (2.5 forward, 1 backward) {step[0]:.0f} exchanges, {step[1]:.0f} MiB"
        )


def main() -> int:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dap", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--csv", type=Path, default=FOLDER / "exchange_counts.csv", help="file to write anew")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    config = load_config(ROOT / "configs" / "base.yaml", arguments.set).config
    rows = [row for size in arguments.dap for row in count(config, size)]
    known = {name: value for name, value in facts().items() if name != "device"}
    arguments.csv.unlink(missing_ok=True)
    append_rows(arguments.csv, [{**known, **row} for row in rows])
    print_table(rows)
    summarise(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
