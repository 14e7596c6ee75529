"""Who does what: training and evaluation ranks, data-parallel replicas and axial-parallel groups.

``start`` turns a configuration's ``RankLayout`` into process groups, under Slurm (``srun``), ``torchrun`` or ``mpirun``
alike.
"""

import datetime
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from scalefold.config import Config, RankLayout
from scalefold.errors import ConfigError, RankLostError
from scalefold.parallel.watch import GRACE_S, Watch, bounded


@dataclass(frozen=True)
class Environment:
    """Rank facts that the launcher states in environment variables."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str


_LAUNCHERS = (
    ("torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


def read_environment(variables: dict[str, str] | None = None) -> Environment:
    """Rank, local rank and world size as torchrun, srun or mpirun state them; one process if none does."""
    env = dict(os.environ) if variables is None else variables
    for launcher, rank, local_rank, world_size in _LAUNCHERS:
        inside_step = launcher != "slurm" or "SLURM_STEP_ID" in env
        if rank in env and world_size in env and inside_step:
            return Environment(int(env[rank]), int(env.get(local_rank, 0)), int(env[world_size]), launcher)
    return Environment(0, 0, 1, "single")


@dataclass
class Ranks:
    """This process among all others, with the groups it talks in."""

    layout: RankLayout
    rank: int
    local_rank: int
    device: torch.device
    train_group: dist.ProcessGroup | None = None
    dap_group: dist.ProcessGroup | None = None
    eval_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None
    train_control_group: dist.ProcessGroup | None = None
    dap_control_group: dist.ProcessGroup | None = None
    hand_over_group: dist.ProcessGroup | None = None
    watch: Watch = field(default_factory=Watch)
    launcher: str = "single"
    host: str = field(default_factory=socket.gethostname)

    @property
    def trains(self) -> bool:
        """Whether this process trains."""
        return self.layout.trains(self.rank)

    @property
    def is_root(self) -> bool:
        """Rank 0, which owns log, record and checkpoints."""
        return self.rank == 0

    @property
    def is_eval_root(self) -> bool:
        """First evaluation rank, or rank 0 where the training ranks evaluate."""
        return self.rank == (self.layout.eval_ranks or [0])[0]

    @property
    def dp_index(self) -> int:
        """Replica of this rank."""
        return self.layout.dp_index(self.rank)

    def broadcast_in_replica(self, values: torch.Tensor) -> None:
        """Overwrite a CPU tensor with the first rank's, on every rank of this axial-parallel group."""
        dist.broadcast(values, src=self.layout.dap_group(self.rank)[0], group=self.dap_control_group)

    def barrier_in_replica(self) -> None:
        """Wait for all ranks of this axial-parallel group."""
        dist.barrier(group=self.dap_control_group)

    def barrier(self) -> None:
        """Wait for all ranks of the run."""
        if self.layout.world_size > 1:
            dist.barrier(group=self.control_group)

    def stop(self) -> None:
        """Leave the process groups in an orderly way; safe to call in a single process."""
        self.watch.stop()
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def describe(self) -> str:
        """``rank 3 of 8 on node07``: the start of every message about a rank."""
        return f"rank {self.rank} of {self.layout.world_size} on {self.host}"


def prepare_process(config: Config) -> None:
    """Settings that must precede the first use of a device: threads, matrix precision, determinism."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # the watch names the collective that does not end
    if config.execution.cpu_threads:
        torch.set_num_threads(config.execution.cpu_threads)
    torch.backends.cuda.matmul.allow_tf32 = config.execution.precision != "fp32"
    torch.backends.cudnn.allow_tf32 = config.execution.precision != "fp32"
    if config.execution.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The device of this process: CUDA device ``local_rank`` or the CPU.

    Raises:
        ConfigError: the configuration demands CUDA and this process has no such device.
    """
    wanted = config.execution.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= max(count, 1) or not torch.cuda.is_available():
        raise ConfigError(
            f"execution.device: cuda, but local rank {local_rank} finds {count} CUDA devices on "
            f"{socket.gethostname()}; set parallel.gpus_per_node to what a node has, or execution.device: cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(config: Config) -> Ranks:
    """Join the run that the launcher started and build its groups.

    Raises:
        ConfigError: the launcher started another number of processes than the configuration states.
    """
    environment = read_environment()
    p = config.parallel
    if environment.world_size != p.world_size:
        raise ConfigError(
            f"{environment.launcher} started {environment.world_size} processes, but parallel: nodes {p.nodes} x "
            f"{p.world_size // p.nodes} per node = {p.world_size}; start {p.world_size} or change the configuration"
        )
    layout = p.layout
    device = choose_device(config, environment.local_rank)
    ranks = Ranks(layout, environment.rank, environment.local_rank, device, launcher=environment.launcher)
    if layout.world_size > 1:
        _rendezvous(environment)
        with _bounded(ranks, 2 * p.startup_timeout_s + GRACE_S):
            store = _open_store(ranks, p.startup_timeout_s)
            _join(ranks, store, datetime.timedelta(seconds=p.startup_timeout_s))
            _start_watch(ranks, store, p.startup_timeout_s, p.step_timeout_s)
    return ranks


@contextmanager
def _bounded(ranks: Ranks, limit_s: float) -> Iterator[None]:
    """End this process if what is inside stands: a store on a frozen host takes connections and answers nothing."""

    def give_up() -> None:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(
            f"error: {ranks.describe()}: rank 0 at {place} took the connection and has not answered within "
            f"{limit_s:.0f} s (2 x parallel.startup_timeout_s): it stands still or its node is gone; look there",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RankLostError.exit_status)

    with bounded(limit_s, give_up):
        yield


def _rendezvous(environment: Environment) -> None:
    """Fill in what torch.distributed expects where the launcher does not."""
    os.environ.setdefault("RANK", str(environment.rank))
    os.environ.setdefault("WORLD_SIZE", str(environment.world_size))
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    if environment.launcher == "mpirun" and "MASTER_ADDR" not in os.environ:
        address, port = _share_address()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"{environment.launcher}: {' and '.join(missing)} must be set; `scalefold launch` does it")


def _share_address() -> tuple[str, int]:
    """Rank 0 chooses a free port and tells the others through MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"mpirun started this process, but mpi4py is missing ({error}): pip install 'scalefold[mpi]' against this "
            "MPI, or set MASTER_ADDR and MASTER_PORT to a free port of the node of rank 0"
        ) from None

    with socket.socket() as probe:
        probe.bind(("", 0))
        mine = (socket.gethostname(), probe.getsockname()[1])
    return MPI.COMM_WORLD.bcast(mine if MPI.COMM_WORLD.rank == 0 else None, root=0)


def _open_store(ranks: Ranks, timeout_s: float) -> Store:
    """The run's key-value store on rank 0 (under torchrun: its agent), once every rank has announced itself.

    Raises:
        RankLostError: naming the ranks that did not come within ``parallel.startup_timeout_s``.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = ranks.is_root and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout, me, size = datetime.timedelta(seconds=timeout_s), ranks.describe(), ranks.layout.world_size
    try:
        fd = _listen(address, port) if serves else None
        server = TCPStore(address, port, None, serves, timeout, wait_for_workers=False, master_listen_fd=fd)
    except (dist.DistError, RuntimeError) as error:
        raise RankLostError(
            f"{me}: no connection to rank 0 at {address}:{port} within {timeout_s} s (parallel.startup_timeout_s): "
            f"{str(error).splitlines()[0]}"
        ) from None
    attempt, token = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SCALEFOLD_TOKEN"))
    store = PrefixStore(f"attempt_{attempt or '0'}{token}", server)  # keys of other runs and strays do not reach ours
    store.set(f"joined_{ranks.rank}", ranks.host)
    try:
        if ranks.is_root:
            store.wait([f"joined_{rank}" for rank in range(size)], timeout)
            store.set("all_joined", "1")
        store.wait(["all_joined"], timeout)
    except (dist.DistError, RuntimeError):
        missing = [rank for rank in range(size) if not store.check([f"joined_{rank}"])]
        raise RankLostError(
            f"{me}: {len(missing)} of {size} ranks did not come to {address}:{port} within {timeout_s} s "
            f"(parallel.startup_timeout_s): ranks {', '.join(map(str, missing[:16]))}"
            f"{', ...' if len(missing) > 16 else ''}; look at their first lines"
        ) from None
    return store


def _listen(address: str, port: int) -> int | None:
    """Descriptor of a socket that listens on the interface of ``address`` alone; None leaves it to the store.

    The store itself listens on all interfaces, which it must where the address is a name (that may mean the loopback
    interface on its own host) or is not one of this host's.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=2048).detach()
    except (ValueError, OSError):
        return None


def _start_watch(ranks: Ranks, store: Store, startup_timeout_s: float, step_timeout_s: float) -> None:
    """Begin to watch over each other; the groups of the training loop get the short timeout after its first step."""
    layout = ranks.layout
    peers = layout.train_ranks if ranks.trains else layout.eval_ranks
    ranks.watch = Watch(ranks.rank, layout.world_size, store, startup_timeout_s, step_timeout_s, peers)
    if ranks.trains:
        groups = (ranks.train_group, ranks.train_control_group, ranks.dap_group, ranks.dap_control_group)
        ranks.watch.groups = [group for group in groups if group is not None]
    ranks.watch.start()
    ranks.barrier()


def _join(ranks: Ranks, store: Store, timeout: datetime.timedelta) -> None:
    layout, cuda = ranks.layout, ranks.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=PrefixStore("groups", store),
        rank=ranks.rank,
        world_size=layout.world_size,
    )
    ranks.control_group = _new_group(None, timeout, "gloo")
    ranks.train_group = _new_group(layout.train_ranks, timeout)
    ranks.train_control_group = _new_group(layout.train_ranks, timeout, "gloo")
    if layout.num_eval_ranks:
        ranks.eval_group = _new_group(layout.eval_ranks, timeout)
        ranks.hand_over_group = _new_group([0, layout.eval_ranks[0]], timeout)
    if layout.dap_size > 1:
        for first in range(0, layout.num_train_ranks, layout.dap_size):
            group = _new_group(layout.dap_group(first), timeout)
            control = _new_group(layout.dap_group(first), timeout, "gloo")
            if ranks.trains and ranks.rank in layout.dap_group(first):
                ranks.dap_group, ranks.dap_control_group = group, control


def _new_group(
    members: list[int] | None, timeout: datetime.timedelta, backend: str | None = None
) -> dist.ProcessGroup | None:
    """A process group, or None on ranks outside it; every rank of the run must call this in the same order."""
    group = dist.new_group(members, backend=backend, timeout=timeout)
    return group if isinstance(group, dist.ProcessGroup) else None
