"""Who evaluates: the training ranks between two cycles, or ranks of their own while training goes on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scalefold.config import Config
from scalefold.data.features import FeatureSettings
from scalefold.data.loader import EvalSet, to_device
from scalefold.data.synthetic import synthetic_batch
from scalefold.evaluate import Evaluation, gather_scores, place_chains, score_chains
from scalefold.kernels import Operations, use_operations
from scalefold.metrics import prediction_lddt_ca
from scalefold.mlperf.events import Events
from scalefold.model.alphafold import AlphaFold, cast_trunk
from scalefold.optim import FlatParameters, Optimizer, lay_out
from scalefold.parallel.ranks import Ranks
from scalefold.parallel.snapshots import SnapshotReceiver, SnapshotSender, run_store
from scalefold.phases import Schedule
from scalefold.report.console import Progress
from scalefold.report.record import EvalRow, Record


class Evaluator(Protocol):
    """What the training loop asks of an evaluation."""

    last: float | None

    def warm_up(self) -> None:
        """Before the clock: whatever is slow and needs no data."""

    def spawn(self) -> None:
        """Before the clock: start the processes that will build features."""

    def open_data(self, lengths: dict[str, int]) -> None:
        """After ``run_start``: the evaluation chains with their lengths."""

    def submit(self, step: int) -> bool:
        """Evaluate the averaged weights as of ``step``; True if the target is known to be reached."""
        ...

    def poll(self) -> bool:
        """Between steps, without waiting: True if an evaluation elsewhere has reached the target (rank 0 only)."""
        ...

    def finish(self) -> bool:
        """After the last step: wait for evaluations under way; True if one of them reaches the target."""
        ...

    def use(self, ops: Operations) -> None:
        """Go on with another operations table."""

    def close(self) -> None:
        """Let go of workers and memory."""

    def release_device(self) -> None:
        """Let go of what the device holds."""


@dataclass(frozen=True)
class CapturedChain:
    """Forward of one padded length: the graph, the buffers it reads and the score that it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: dict[str, Tensor]
    score: Tensor


class EvaluationModel:
    """A second copy of the model, in evaluation mode and evaluation precision."""

    def __init__(self, config: Config, device: torch.device, ops: Operations) -> None:
        self.config, self.device, self.ops = config, device, ops
        self.model = AlphaFold(config.model).to(device).eval().requires_grad_(False)
        use_operations(self.model, ops)
        if config.execution.eval_precision == "bf16":
            cast_trunk(self.model, torch.bfloat16)
        lay_out(self.model)
        self._graphs: dict[int, CapturedChain] = {}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    @torch.no_grad()
    def load(self, flat: FlatParameters, weights: Tensor) -> None:
        """Take the weights of a flat fp32 buffer with the layout of ``flat``."""
        parameters = dict(self.model.named_parameters())
        sources = dict(flat.named_views(weights))
        torch._foreach_copy_([parameters[name] for name in sources], list(sources.values()))

    def use(self, ops: Operations) -> None:
        """Go on with another operations table, without the graphs of this one."""
        if ops is not self.ops:
            use_operations(self.model, ops)
            self.ops, self._graphs = ops, {}

    def close(self) -> None:
        """Destroy the graphs."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs = {}

    @torch.no_grad()
    def capture(self, features: dict[str, Tensor]) -> None:
        """Predict chains of this padded length from a CUDA graph from now on; a length is eager before.

        Called with one chain of the length. It runs once uncaptured, on the stream of the capture: kernels compile,
        constants reach the device, and the libraries' workspaces of that stream lie outside the graphs' memory.
        Uncaptured, launching 4 passes takes 1.7 s of host time whatever the length (H100, 2026-11-24).
        """
        assert self._stream is not None, "graphs need a CUDA device"
        pool = next((chain.graph.pool() for chain in self._graphs.values()), None)
        graph, inputs = torch.cuda.CUDAGraph(), {key: value.clone() for key, value in features.items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._score(inputs)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            score = self._score(inputs)  # entering the context has waited for the device
        self._graphs[features["aatype"].shape[1]] = CapturedChain(graph, inputs, score)

    @torch.no_grad()
    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """lDDT-Cα of one chain, a device scalar [1].

        Graphs share memory and are replayed one after another on the current stream; the score is copied out of it.
        """
        captured = self._graphs.get(features["aatype"].shape[1])
        if captured is None:
            return self._score(features)
        for key, buffer in captured.inputs.items():
            buffer.copy_(features[key], non_blocking=True)
        captured.graph.replay()
        return captured.score.clone()

    def _score(self, features: dict[str, Tensor]) -> Tensor:
        with precision(self.config.execution.eval_precision):
            outputs = self.model(features)
        return prediction_lddt_ca(outputs["final_atom_positions"], features)


class precision:
    """Context: matrix products of fp32 tensors in TF32 or full fp32."""

    def __init__(self, name: str) -> None:
        self._allow = name != "fp32"

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self._allow

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before


class ChainScorer:
    """This rank's share of the evaluation chains: features built once, kept in memory, scored on demand."""

    def __init__(
        self, config: Config, ranks: Ranks, settings: FeatureSettings, ops: Operations, group: dist.ProcessGroup | None
    ) -> None:
        self.config, self.settings, self.group = config, settings, group
        self.model = EvaluationModel(config, ranks.device, ops)
        self.names: list[str] = []
        d = config.data
        self._chains = EvalSet(
            d.store_dir,
            settings,
            num_workers=d.num_eval_workers,
            pin_memory=d.pin_memory and self.model.device.type == "cuda",
        )

    def spawn(self) -> None:
        """Start the processes that build features; they touch no data yet."""
        self._chains.spawn()

    def warm_up(self, note: Callable[[str], None]) -> None:
        """Synthetic chains through the model, unless the configuration leaves warm-up out.

        On a GPU one of every padded length, so that nothing compiles on the clock, and captured in a CUDA graph where
        the configuration wants graphs; the longest first, whose memory then serves the others.
        """
        execution, device = self.config.execution, self.model.device
        if not execution.warm_up:
            return
        lengths = [self.settings.train_sequence_crop_size]
        if device.type == "cuda":
            step = self.settings.eval_length_multiple
            longest = self.settings.padded_length(self.config.data.val_max_sequence_length)
            lengths = list(range(longest, 0, -step))
        prepare = self.model.capture if device.type == "cuda" and execution.cuda_graphs else self.model.predict
        for number, length in enumerate(lengths, 1):
            note(f"evaluation {number}/{len(lengths)}: a chain of {length} residues")
            prepare(synthetic_batch(self.settings, 1, device=device, training=False, num_res=length).features)

    def open_data(self, lengths: dict[str, int]) -> None:
        """Place the chains over the ranks of the group and start to build features."""
        self.names = list(lengths)
        size, rank = (dist.get_world_size(self.group), dist.get_rank(self.group)) if self.group else (1, 0)
        padded = {name: self.settings.padded_length(length) for name, length in lengths.items()}
        self._chains.start(place_chains(padded, size)[rank])

    def score(self, flat: FlatParameters, weights: Tensor) -> Evaluation:
        """Evaluate ``weights`` on all chains; the same result on every rank of the group."""
        start = time.monotonic()
        self.model.load(flat, weights)
        local = score_chains(self.model.predict, self._on_device())
        chains = gather_scores(local, self.names, self.group)
        return Evaluation(chains, time.monotonic() - start)

    def _on_device(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for batch in self._chains:
            yield batch.chain_ids[0], to_device(batch, self.model.device).features

    def close(self) -> None:
        """End the workers that build features."""
        self._chains.close()


class EvaluationHere:
    """Training ranks evaluate together, between two cycles."""

    def __init__(
        self,
        config: Config,
        scorer: ChainScorer,
        optimizer: Optimizer,
        events: Events,
        record: Record,
        progress: Progress,
        schedule: Schedule,
    ) -> None:
        self.config, self.scorer, self.optimizer, self.schedule = config, scorer, optimizer, schedule
        self.events, self.record, self.progress = events, record, progress
        self.last: float | None = None

    def warm_up(self) -> None:
        """Synthetic chains of all padded lengths."""
        self.scorer.warm_up(self.progress.note)

    def spawn(self) -> None:
        """Start the feature workers."""
        self.scorer.spawn()

    def open_data(self, lengths: dict[str, int]) -> None:
        """Start to build features."""
        self.scorer.open_data(lengths)

    def submit(self, step: int) -> bool:
        """Evaluate now."""
        self.events.eval_start(step)
        result = self.scorer.score(self.optimizer.flat, self.optimizer.averaged)
        self.events.eval_accuracy(step, result.lddt_ca)
        self.events.eval_stop(step)
        write_evaluation(self.schedule, self.record, self.progress, step, result)
        self.last = result.lddt_ca
        return result.lddt_ca >= self.config.training.target_avg_lddt_ca_value

    def poll(self) -> bool:
        """Nothing goes on elsewhere."""
        return False

    def finish(self) -> bool:
        """Nothing is under way."""
        return False

    def use(self, ops: Operations) -> None:
        """Evaluate with another operations table, prepared as the first one was."""
        if ops is not self.scorer.model.ops:
            self.scorer.model.use(ops)
            self.warm_up()

    def close(self) -> None:
        """End the feature workers."""
        self.scorer.close()

    def release_device(self) -> None:
        """Destroy the graphs."""
        self.scorer.model.close()


class EvaluationElsewhere:
    """Training side of asynchronous evaluation: rank 0 hands snapshots over, all others do nothing."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        optimizer: Optimizer,
        record: Record,
        progress: Progress,
        schedule: Schedule,
    ) -> None:
        self.config, self.ranks, self.optimizer, self.schedule = config, ranks, optimizer, schedule
        self.record, self.progress = record, progress
        self.last: float | None = None
        self._sender: SnapshotSender | None = None

    def warm_up(self) -> None:
        """Connect: the first message between two ranks is slow."""
        if self.ranks.is_root:
            assert self.ranks.hand_over_group is not None
            target = self.ranks.layout.eval_ranks[0]
            dist.send(torch.zeros(1, device=self.ranks.device), target, group=self.ranks.hand_over_group)
            p = self.config.parallel
            self._sender = SnapshotSender(
                run_store(),
                self.ranks.hand_over_group,
                target,
                p.eval_queue_depth,
                p.when_evaluation_is_behind,
                self.record.event,
            )

    def open_data(self, lengths: dict[str, int]) -> None:
        """The evaluation ranks open the data themselves."""

    def submit(self, step: int) -> bool:
        """Hand a snapshot over; the answer comes later."""
        if self._sender is not None:
            self._sender.submit(step, self.optimizer.averaged)
        return False

    def poll(self) -> bool:
        """Send what waits, write what has been reported."""
        if self._sender is None:
            return False
        self._sender.poll()
        self._write_results(self._sender)
        return self._sender.target_reached()

    def finish(self) -> bool:
        """Wait for the last evaluations; the same answer on all training ranks."""
        reached = [False]
        if self._sender is not None:
            self._sender.drain(self.config.parallel.startup_timeout_s)
            self._write_results(self._sender)
            reached = [self._sender.target_reached()]
        if self.ranks.layout.num_train_ranks > 1:
            dist.broadcast_object_list(reached, src=0, group=self.ranks.train_control_group)
        return reached[0]

    def use(self, ops: Operations) -> None:
        """The evaluation ranks keep theirs: with them, every phase is a process of its own."""

    def spawn(self) -> None:
        """Features are built elsewhere."""

    def close(self) -> None:
        """Nothing to let go of."""

    def release_device(self) -> None:
        """Nothing on the device."""

    def _write_results(self, sender: SnapshotSender) -> None:
        for report in sender.results():
            result = Evaluation(report["chains"], report["seconds"])
            write_evaluation(self.schedule, self.record, self.progress, report["step"], result)
            self.last = result.lddt_ca


def write_evaluation(schedule: Schedule, record: Record, progress: Progress, step: int, result: Evaluation) -> None:
    """One evaluation to the record and the screen."""
    row = EvalRow(
        step=step,
        samples=schedule.samples(step),
        lddt_ca=result.lddt_ca,
        seconds=result.seconds,
        chains=result.chains,
    )
    record.evaluation(row)
    progress.evaluation(row)


def make_evaluator(
    config: Config,
    ranks: Ranks,
    settings: FeatureSettings,
    optimizer: Optimizer,
    events: Events,
    record: Record,
    progress: Progress,
    ops: Operations,
    schedule: Schedule,
) -> Evaluator:
    """The evaluator of a training rank."""
    if ranks.layout.num_eval_ranks:
        return EvaluationElsewhere(config, ranks, optimizer, record, progress, schedule)
    group = ranks.train_group if ranks.layout.world_size > 1 else None
    scorer = ChainScorer(config, ranks, settings, ops, group)
    return EvaluationHere(config, scorer, optimizer, events, record, progress, schedule)


def serve_evaluations(
    config: Config, ranks: Ranks, scorer: ChainScorer, flat: FlatParameters, events: Events
) -> float | None:
    """An evaluation rank's life after ``run_start``: score snapshots until training ends or the target is reached."""
    layout = ranks.layout
    assert ranks.eval_group is not None
    receiver = SnapshotReceiver(run_store(), ranks.hand_over_group, ranks.eval_group, 0, layout.eval_ranks[0])
    target, last = config.training.target_avg_lddt_ca_value, None
    while True:
        ranks.watch.at("waiting for weights")
        step = receiver.next(flat.master)
        if step is None:
            break
        ranks.watch.at("evaluation", step)
        events.eval_start(step)
        result = scorer.score(flat, flat.master)
        last = result.lddt_ca
        events.eval_accuracy(step, last)
        events.eval_stop(step)
        reached = last >= target
        if reached:
            events.run_stop("success")
        receiver.done({"step": step, "chains": result.chains, "seconds": result.seconds}, reached)
        if reached:
            break
    return last


def accept_connection(ranks: Ranks) -> None:
    """The evaluation root's end of ``EvaluationElsewhere.warm_up``."""
    if ranks.is_eval_root:
        dist.recv(torch.zeros(1, device=ranks.device), 0, group=ranks.hand_over_group)
