"""The faults that are rehearsed: what is done to which run, and how it must end."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py

from scalefold.data.store.store import Store

STEP_TIMEOUT_S = 120
SOON = ("parallel.step_timeout_s=12",)  # where nothing but a timeout tells
KILLED, LOST, STOPPED, ERROR = -9, 5, 4, 2
TWO = ("parallel.ranks_per_node=2", "parallel.step_timeout_s=16")
APART = (*TWO, "parallel.num_eval_ranks=1")
WORKERS = ("data.num_workers=1",)
#: a small store is in memory once it is open: the workers of the second phase open it again
REOPENED = (*WORKERS, "training.num_train_iters=8", "phases=[{name: first, until_step: 4}, {name: second}]")
LONG = ("training.num_train_iters=2000", "training.val_every_iters=1000")

Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Scenario:
    """One fault.

    Args:
        name: of its row in ``docs/faults.md``.
        inject: ``FAULT@STEP``; empty where the store is damaged from outside.
        statuses: exit statuses by rank; a rank that the fault stops is killed by the test at last.
        says: pattern of the error line; ``{host}`` stands for this host.
        speaker: the rank that prints it; None: nobody has anything to say.
        layout: overrides.
        before, during: damage done to the store before the run, or once it has trained a step.
        checkpoint: iteration of the newest one that must load afterwards; None: none is there.
        log: what the log says of the end; None: it cannot be written any more.
        sigterm: sent to rank 0 a moment after the fault.
    """

    name: str
    inject: str
    statuses: tuple[int, ...]
    says: str
    speaker: int | None = 0
    layout: tuple[str, ...] = ()
    before: Damage | None = None
    during: Damage | None = None
    checkpoint: int | None = 2
    log: str | None = "aborted"
    sigterm: bool = False

    @property
    def frozen(self) -> int | None:
        """The rank that the fault stops."""
        where = {"freeze-root": 0, "freeze-rank": 1, "freeze-evaluation": 1}
        return where.get(self.inject.partition("@")[0])


def shards(store: Path) -> list[Path]:
    """The files that hold the records."""
    return sorted((store / "structures").glob("*.h5")) + sorted((store / "alignments").glob("*.h5"))


def truncate(store: Path) -> None:
    """Cut every shard to a third, as a failing file server does."""
    for shard in shards(store):
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 3)


def flip(store: Path) -> None:
    """Invert every hundredth byte of every shard behind its header."""
    for shard in shards(store):
        data = bytearray(shard.read_bytes())
        for position in range(2048, len(data), 100):
            data[position] ^= 0xFF
        with shard.open("r+b") as file:
            file.write(data)


def spoil_evaluation_chain(store: Path) -> None:
    """Overwrite the structure of an evaluation chain."""
    opened = Store(store)
    _, entry, chain = (store / "evaluation_targets.csv").read_text(encoding="utf-8").split()[1].split(",")
    row = opened.index_of(f"{entry}_{chain}")
    columns = (opened.table.structure_shard, opened.table.structure_offset, opened.table.structure_bytes)
    shard, offset, size = (int(column[row]) for column in columns)
    opened.close()
    with h5py.File(store / "structures" / f"{shard:05d}.h5", "r+") as file:
        file["records"][offset : offset + size] = 0  # pyright: ignore[reportIndexIssue]


def copy_store(store: Path, target: Path) -> Path:
    """A store that may be damaged."""
    shutil.copytree(store, target)
    return target


SCENARIOS = (
    Scenario("kill rank 0", "kill-root@3", (KILLED, LOST), "rank 0 has ended or its node is gone", 1, TWO),
    Scenario(
        "kill another rank",
        "kill-rank@3",
        (LOST, KILLED),
        r"last seen: rank 1 on {host} \(pid \d+\) at step 3, waiting for a batch",
        0,
        TWO,
    ),
    Scenario(
        "kill an evaluation rank",
        "kill-evaluation@2",
        (LOST, KILLED),
        r"last seen: rank 1 on {host} \(pid \d+\) at step 2, evaluation",
        0,
        (*APART, *LONG, *SOON, "training.val_every_iters=2"),
        checkpoint=4,
    ),
    Scenario("kill a loader worker", "kill-worker@3", (ERROR,), "a data loader worker ended unexpectedly", 0, WORKERS),
    Scenario(
        "freeze rank 0",
        "freeze-root@3",
        (KILLED, LOST),
        r"the run's key-value store has not answered for \d+ s: rank 0 on {host} \(pid \d+\), which holds it",
        1,
        (*TWO, *SOON),
    ),
    Scenario(
        "freeze another rank",
        "freeze-rank@3",
        (LOST, KILLED),
        r"last seen: rank 1 on {host} \(pid \d+\) at step 3, waiting for a batch",
        0,
        (*TWO, *SOON),
    ),
    Scenario(
        "freeze an evaluation rank",
        "freeze-evaluation@2",
        (LOST, KILLED),
        r"last seen: rank 1 on {host} \(pid \d+\) at step 2, evaluation",
        0,
        (*APART, *LONG, *SOON, "training.val_every_iters=2"),
        checkpoint=4,
    ),
    Scenario(
        "freeze the loader workers",
        "freeze-worker@3",
        (ERROR,),
        r"iteration \d+: no batch within 11 s: loader worker \d+ is stopped",
        0,
        (*WORKERS, *SOON),
    ),
    Scenario(
        "freeze the loader workers, then SIGTERM",
        "freeze-worker@3",
        (STOPPED,),
        "signal SIGTERM: stopping after this step",
        0,
        WORKERS,
        sigterm=True,
    ),
    Scenario(
        "NaN in a gradient",
        "nan-gradient@3",
        (ERROR, ERROR),
        r"rank 0 of 2 on {host}, step 3: not finite: grad_norm; it began on rank 1 on {host}",
        0,
        TWO,
    ),
    Scenario(
        "NaN in a loss",
        "nan-loss@3",
        (ERROR, ERROR),
        r"rank 1 of 2 on {host}, step 3, chains \S+: not finite: loss, grad_norm\. Last good checkpoint",
        1,
        TWO,
    ),
    Scenario(
        "disk full at a checkpoint",
        "full-disk-checkpoint@3",
        (ERROR,),
        "/000003: cannot write the checkpoint, is the disk",
    ),
    Scenario(
        "disk full at the log",
        "full-disk-log@3",
        (ERROR,),
        r"/metrics\.jsonl: cannot write the record: No space left on device",
        log=None,
    ),
    Scenario(
        "store truncated under the run",
        "",
        (ERROR,),
        r"chain \S+ \(row \d+, seed \d+\)",
        layout=REOPENED,
        during=truncate,
    ),
    Scenario("store flipped under the run", "", (ERROR,), r"chain \S+ \(row \d+, seed \d+\)", layout=LONG, during=flip),
    Scenario("slow storage", "slow-storage@3", (STOPPED,), "", None, WORKERS, checkpoint=4),
    Scenario("clock jump", "clock-jump@3", (STOPPED,), "", None, checkpoint=4),
    Scenario(
        "out of memory in an evaluation",
        "evaluation-memory@2",
        (ERROR,),
        r"rank 0 of 1 on {host}, step 2, evaluation: chain \S+: out of memory",
        checkpoint=1,
    ),
    Scenario(
        "unreadable evaluation chain",
        "",
        (ERROR,),
        r"sample of iteration \d+ cannot be built: chain \S+ \(row \d+, seed \d+\)",
        before=spoil_evaluation_chain,
        checkpoint=1,
    ),
    Scenario("no descriptors left", "open-files@3", (ERROR,), r"open files", layout=WORKERS),
)
CORE = ("kill another rank", "freeze another rank", "NaN in a loss")


def pattern(text: str, host: str) -> re.Pattern[str]:
    """A scenario's message on this host."""
    return re.compile(text.replace("{host}", re.escape(host)))
