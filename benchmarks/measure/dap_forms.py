"""A step whose sample two GPUs share, with the forms of its exchanges in turn: ``parallel.dap.collectives.FORMS``.

    torchrun --nproc-per-node 2 benchmarks/measure/dap_forms.py --csv /tmp/dap_forms.csv    # each form in turn
    torchrun --nproc-per-node 2 benchmarks/measure/dap_forms.py --forms early+product all --profile --minutes 1.6
    torchrun --nproc-per-node 2 benchmarks/measure/dap_forms.py --small     # on the CPU, where no form has an effect

Without --forms each choice adds a form to those before; none again at the end tells how much the machine has drifted.
Before it is timed, each choice is compared with none, which comes first, dropout off, uncaptured: loss and gradient
norm within what bf16 sums in another order explain (``gpus 2 dap 2: ... ok``), and whether their bits are equal. Then
two captured steps from the same state and seed, dropout on, must give equal bits. Exit status 1 if a choice fails; it
is not timed.
``--profile``: the breakdown of a step with the first and the last choice goes to ``step_breakdown.csv`` beside --csv.
A choice that would not end within --minutes is left out and named.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import FOLDER, facts
from multi_gpu import Host, agree, agrees, build, first_values, join, let_go, profile, set_dropout, tell
from scalefold.data.loading.loader import Batch
from scalefold.parallel.dap.collectives import FORMS, Group
from scalefold.step.graphs import TrainStep, preserved

SEED = 11
NONE: tuple[str, ...] = ()
CHOICES = [*(FORMS[: n + 1] for n in range(len(FORMS))), NONE]


def choice(text: str) -> tuple[str, ...]:
    """What --forms calls a choice: ``none``, ``all``, or names joined by +."""
    named = {"none": NONE, "all": FORMS}
    forms = named[text] if text in named else tuple(text.split("+"))
    if unknown := set(forms) - set(FORMS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: forms are {', '.join(FORMS)}")
    return forms


def group_of(step: TrainStep) -> Group:
    """The group by which the model of ``step`` exchanges."""
    return next(m.group for m in step.model.modules() if isinstance(getattr(m, "group", None), Group))  # type: ignore


def same_bits(step: TrainStep, batch: Batch, passes: int) -> bool:
    """Whether two steps from the same state and seed give the same finite values on this rank."""
    found = []
    for _ in range(2):
        torch.manual_seed(SEED)
        with preserved(step.optimizer):
            found.append(step(batch, passes, 1).clone())
    return bool(torch.isfinite(found[0]).all()) and torch.equal(*found)


def on_all(host: Host, good: bool) -> bool:
    """Whether something holds on every rank."""
    answers = [good] * host.world
    dist.all_gather_object(answers, good, group=host.control)
    return all(answers)


def measure(host: Host, step: TrainStep, batch: Batch, arguments: argparse.Namespace, deadline: float) -> bool:
    """Check and time every choice of forms; whether all are what they must be."""
    group, truth, good, longest_s = group_of(step), None, True, 0.0
    tell(host, f"direct exchanges: {group.direct is not None}")
    choices = [NONE, *(arguments.forms or CHOICES)]
    for n, forms in enumerate(choices):
        begin, name = time.monotonic(), "+".join(forms) or "none"
        if not agree(host, begin + longest_s < deadline):
            tell(host, f"{name}: LEFT OUT, the time of --minutes is used up")
            continue
        group.forms = frozenset(forms)
        step.close()
        let_go(host)
        set_dropout(step, False)
        values = first_values(step, batch)
        truth = truth or values
        tell(host, f"{name}: bits {'equal' if values == truth else 'differ from those of none'}")
        right = on_all(host, agrees(host, values, truth, host.world, host.world))
        set_dropout(step, True)
        step.warm_up(batch, max(arguments.passes), lambda text: None)
        if right and on_all(host, same_bits(step, batch, arguments.passes[0])):
            with preserved(step.optimizer):  # the next choice begins where this one did
                rows = timed(host, step, batch, arguments)
                if arguments.profile and not host.small and n in (0, len(choices) - 1):
                    keep_breakdown(host, step, batch, name, rows[0])
            equal = {"forms": name, "bits_of_none": values == truth}
            host.keep(arguments.csv.name, [{**facts(), "gpus": host.world, **equal, **row} for row in rows])
        else:
            tell(host, f"{name}: FAILED, not timed")
            good = False
        longest_s = max(longest_s, time.monotonic() - begin)
        tell(host, f"{name}: {time.monotonic() - begin:.0f} s")
    return good


def timed(host: Host, step: TrainStep, batch: Batch, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a step by number of passes."""
    times = {r: host.time(lambda r=r: step(batch, r, 1), arguments.repeats) for r in arguments.passes}
    return [{"passes": r, **{k: round(v, 2) for k, v in vars(timing).items()}} for r, timing in times.items()]


def keep_breakdown(host: Host, step: TrainStep, batch: Batch, name: str, row: dict[str, Any]) -> None:
    """The breakdown of a step, in the columns of ``multi_gpu.py``."""
    found = profile(host, lambda: step(batch, row["passes"], 1), row["median_ms"])
    known = {"variant": f"ours, {name}", "gpus": host.world, "dap": host.world, "passes": row["passes"]}
    host.keep("step_breakdown.csv", [{**facts(), **known, **found}])


def compile_together(host: Host) -> None:
    """Rank 0 compiles the operations at these shapes on all cores; the others find them."""
    if host.rank == 0 and not host.small:
        from dap_share import compile_beforehand

        compile_beforehand([host.world])
    host.barrier()


def main() -> int:
    """Measure on all ranks, print and write on rank 0; exit status 1 if a choice is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=choice, nargs="+", help="choices: none, all, or names joined by +")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no choice that would end later")
    parser.add_argument("--profile", action="store_true", help="the breakdown of the first and the last choice")
    parser.add_argument("--small", action="store_true", help="tiny model on the CPU, to try the script")
    parser.add_argument("--csv", type=Path, default=FOLDER / "dap_forms.csv")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override")
    arguments = parser.parse_args()
    started = time.monotonic()
    host = join(arguments.small, arguments.csv.parent)
    compile_together(host)
    tell(host, f"operations have compiled after {time.monotonic() - started:.0f} s")
    step, batch, _ = build(host, host.world, host.world, arguments.set)
    good = measure(host, step, batch, arguments, started + 60 * arguments.minutes)
    host.barrier()
    dist.destroy_process_group()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
