"""Which ranks of a run train, in which groups, and which evaluate: arithmetic only, for 2080 ranks on a laptop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankLayout:
    """Ranks 0..T-1 train, in groups of ``dap_size`` neighbours; the last ``num_eval_ranks`` evaluate."""

    world_size: int
    dap_size: int = 1
    num_eval_ranks: int = 0

    @classmethod
    def of_nodes(
        cls, nodes: int, gpus_per_node: int, ranks_per_node: int | None, dap_size: int, num_eval_ranks: int
    ) -> "RankLayout":
        """One rank per GPU, or ``ranks_per_node`` per node."""
        return cls(nodes * (ranks_per_node or max(gpus_per_node, 1)), dap_size, num_eval_ranks)

    @property
    def num_train_ranks(self) -> int:
        """Ranks that train."""
        return self.world_size - self.num_eval_ranks

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas; a replica is one axial-parallel group."""
        return self.num_train_ranks // self.dap_size

    @property
    def train_ranks(self) -> list[int]:
        """All training ranks."""
        return list(range(self.num_train_ranks))

    @property
    def eval_ranks(self) -> list[int]:
        """Ranks that only evaluate; empty if the training ranks evaluate themselves."""
        return list(range(self.num_train_ranks, self.world_size))

    def trains(self, rank: int) -> bool:
        """Whether ``rank`` trains."""
        return rank < self.num_train_ranks

    def dp_index(self, rank: int) -> int:
        """Replica of a training rank: the index that data order and dropout seeds depend on."""
        return rank // self.dap_size

    def dap_index(self, rank: int) -> int:
        """Place of a training rank inside its replica."""
        return rank % self.dap_size

    def dap_group(self, rank: int) -> list[int]:
        """The ranks that share the sample of training rank ``rank``."""
        first = rank - rank % self.dap_size
        return list(range(first, first + self.dap_size))
