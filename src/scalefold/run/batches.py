"""The batches of a training rank: which samples, built by whom, and their way to the device."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from scalefold.config import Config
from scalefold.data.configured import batch_limits_s
from scalefold.data.features.features import FeatureSettings
from scalefold.data.loading.loader import Batch, TrainLoader, to_device
from scalefold.data.loading.sampler import Delivered, TrainingSampler
from scalefold.data.loading.shared_loader import SharedLoader
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.data.store.selection import TrainingSet
from scalefold.parallel.ranks import Ranks
from scalefold.phases import Schedule


class Batches:
    """What the loop takes its batches from, from one phase to the next.

    Args:
        schedule: the phase that counts is the present one.
        ranks: this process among all.
        seed: the run's, as logged.
        settings: of the features.
        left_over: places in the stream of samples that the part of the run before has passed over.
        note_copy: told that a batch's copy to a device is under way.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Ranks,
        seed: int,
        settings: FeatureSettings,
        left_over: Sequence[int],
        note_copy: Callable[[], None],
    ) -> None:
        self.schedule, self.ranks, self.seed, self.settings = schedule, ranks, seed, settings
        self.left_over, self.note_copy = left_over, note_copy
        self.loader = make_loader(schedule.config, ranks, settings)
        self._training_set: TrainingSet | None = None
        self._sampler: TrainingSampler | None = None
        self._copies: torch.cuda.Stream | None = None

    def open(self, training_set: TrainingSet, first_step: int) -> None:
        """Deliver batches from iteration ``first_step`` on. Only after ``run_start``."""
        self._training_set = training_set
        self._start(first_step)

    def change(self, step: int) -> None:
        """Go on with the phase that begins after iteration ``step``, with another loader."""
        self.left_over = self.left_over_after(step)
        self.loader.close()
        self.loader.release_memory()
        self.loader = make_loader(self.schedule.config, self.ranks, self.settings)
        self._start(step + 1)

    def _start(self, first_step: int) -> None:
        c, train = self.schedule.config, self._training_set
        assert train is not None, "open comes first"
        self._sampler = TrainingSampler(
            train.rows,
            train.weights,
            self.seed,
            self.ranks.dp_index,
            self.ranks.layout.dp_size,
            c.local_batch_size,
            c.data.num_recycling_iters,
            c.training.gradient_accumulation_steps,
            first_step - 1,
            self.schedule.samples(first_step - 1),
            self.left_over,
        )
        self.loader.start(self._sampler, first_step, self.schedule.last_step)

    def left_over_after(self, step: int) -> list[int]:
        """Places in the stream of samples that were passed over by iteration ``step``; every training rank calls this.

        In the order of draws nothing is. Else only the loaders know.
        """
        assert self._sampler is not None, "open comes first"
        found: list[Delivered | None] = [Delivered(step)] * self.ranks.layout.dp_size
        if self.schedule.config.data.dataloader == "pq":
            found = [mine := self.loader.delivered()] * self.ranks.layout.num_train_ranks
            if len(found) > 1:
                dist.all_gather_object(found, mine, group=self.ranks.train_control_group)
        return self._sampler.passed_over([delivered for delivered in found if delivered is not None])

    def synthetic(self) -> Batch:
        """A batch of true shapes and plausible geometry that touches no data."""
        return synthetic_batch(self.settings, self.schedule.config.local_batch_size, device=self.ranks.device)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device, by one asynchronous copy beside the step before."""
        if self.ranks.device.type == "cpu":
            return batch
        if self._copies is None:
            self._copies = torch.cuda.Stream()
        moved = to_device(batch, self.ranks.device, self._copies)
        self.note_copy()
        return moved


def make_loader(config: Config, ranks: Ranks, settings: FeatureSettings) -> TrainLoader | SharedLoader:
    """The training loader of one rank; in a DAP group the first rank's workers build for all."""
    d, grouped = config.data, ranks.dap_group is not None
    page_locked, own = d.pin_memory and ranks.device.type == "cuda", None
    if ranks.layout.dap_index(ranks.rank) == 0:
        own = TrainLoader(
            d.store_dir,
            settings,
            num_workers=d.num_workers,
            prefetch_factor=d.prefetch_factor,
            in_order=d.dataloader == "pt",
            pin_memory=page_locked and not grouped,
            limits_s=batch_limits_s(config),
        )
    if grouped or own is None:
        return SharedLoader(own, ranks, settings, config.local_batch_size, page_locked)
    return own
