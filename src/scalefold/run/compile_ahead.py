"""Compile every kernel of a configuration without its GPU: a training step and an evaluation on tensors without data.

Model, losses, optimizer and axial sharding are those of the run; only their tensors are on ``device="meta"`` and the
process group answers by itself; the GPUs of a DAP group exchange as if they could map each other's memory. What cannot
be compiled here: Inductor's code (``execution.compile``), CUDA graphs (captured anew at every start).
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalefold.config import Config
from scalefold.errors import ConfigError

if TYPE_CHECKING:
    from scalefold.parallel.ranks import Ranks

MANIFEST = "scalefold_kernels.json"
CAPABILITIES = {"A100": 80, "A800": 80, "H100": 90, "H200": 90, "H800": 90, "GH200": 90, "B200": 100, "GB200": 100}


@dataclass(frozen=True)
class Compiled:
    """What was found in the cache and what was added to it."""

    hits: int
    misses: int
    seconds: float

    def text(self) -> str:
        """One line."""
        return (
            f"{self.hits + self.misses} kernels: {self.hits} were there, {self.misses} compiled, {self.seconds:.0f} s"
        )


def capability_of(gpu: str) -> int:
    """80 for ``A100`` or ``A100-SXM-80GB``, 90 for ``H100``, 100 for ``B200``; ConfigError for any other GPU."""
    name = gpu.split("-")[0].upper()
    if name not in CAPABILITIES:
        raise ConfigError(f"--gpu {gpu}: must be one of {', '.join(CAPABILITIES)}")
    return CAPABILITIES[name]


def compile_kernels(
    config: Config, gpu: str, out: Path, note: Callable[[str], None] = print, workers: int = 1
) -> Compiled:
    """Fill the Triton cache ``out`` for a configuration on ``gpu``. A second call finds everything there.

    What a step and evaluations ask for is listed first; then ``workers`` processes compile it, 1: this one.

    Raises:
        ConfigError: no such GPU, plain kernels only, no Triton, or its interpreter is on in this process.
    """
    capability = capability_of(gpu)
    if config.execution.kernels == "reference":
        raise ConfigError(f"{config.system}: execution.kernels is reference: there is nothing to compile")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out.resolve())
    try:
        from scalefold.kernels.compiled.ahead import compile_wanted, compiling_for, only_recorded
    except ImportError as error:
        raise ConfigError(f"Triton cannot be imported: {error}") from None
    start = time.monotonic()
    with compiling_for(capability):
        with only_recorded() as wanted:
            run_training_step(config, note)
            run_evaluations(config, note)
        note(f"{len(wanted)} kernels are needed, after {time.monotonic() - start:.0f} s")
        count = compile_wanted(wanted.values(), workers, note)
    write_manifest(out, f"{config.system} sm_{capability}", count.folders)
    return Compiled(count.hits, count.misses, time.monotonic() - start)


def write_manifest(cache: Path, system: str, folders: set[str]) -> None:
    """Add a system's kernels to the list of what a cache holds, for ``doctor``."""
    file = cache / MANIFEST
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known[system] = {"triton": importlib.metadata.version("triton"), "folders": sorted(folders)}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)


def run_training_step(config: Config, note: Callable[[str], None]) -> None:
    """One update: with and without recycling, and with as many parts as differ."""
    from scalefold.data.configured import feature_settings
    from scalefold.data.made.synthetic import synthetic_batch
    from scalefold.kernels.choice import operations
    from scalefold.kernels.table import use_operations
    from scalefold.parallel.dap.collectives import Group
    from scalefold.parallel.dap.connect import unconnected
    from scalefold.parallel.dap.points import apply_dap
    from scalefold.step.build import build_model, build_optimizer, build_step, launches_early

    note("training step")
    ranks = _ranks(config)
    ops, model = operations("triton", launches_early(config)), build_model(config, 0, ranks)
    use_operations(model, ops)
    group = None if ranks.dap_group is None else Group(ranks.dap_group)
    if group is not None and config.execution.dap_exchange != "library":
        group.direct = unconnected(group.rank, group.size, ranks.device)
    apply_dap(model, group)
    optimizer = build_optimizer(config, model, ranks, ops)
    step = build_step(config, model, optimizer, ranks)
    parts = min(2, config.local_batch_size // config.micro_batch_size)
    batch = synthetic_batch(feature_settings(config), parts * config.micro_batch_size, device="meta")
    passes = min(2, config.data.num_recycling_iters + 1)
    for number in sorted({1, config.training.gradient_accumulation_steps}):
        step(batch, passes, number)


def run_evaluations(config: Config, note: Callable[[str], None]) -> None:
    """Two passes over one chain of every padded length, as the warm-up does."""
    import torch

    from scalefold.data.configured import feature_settings
    from scalefold.data.made.synthetic import synthetic_batch
    from scalefold.eval.model import EvaluationModel
    from scalefold.kernels.choice import operations
    from scalefold.step.build import launches_early

    settings, device = feature_settings(config), torch.device("meta")
    model = EvaluationModel(config, device, operations("triton", launches_early(config)))
    longest = settings.padded_length(config.data.val_max_sequence_length)
    for length in range(longest, 0, -settings.eval_length_multiple):
        note(f"evaluation of {length} residues")
        batch = synthetic_batch(settings, 1, num_passes=2, training=False, num_res=length).features
        model.predict({key: value.to(device) for key, value in batch.items()})


def _ranks(config: Config) -> "Ranks":
    """Rank 0 of one replica; its process group does nothing and is never waited for."""
    import torch
    import torch.distributed as dist

    from scalefold.config import RankLayout
    from scalefold.parallel.ranks import Ranks

    size, group = config.parallel.dap_size, None
    if size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        group = dist.group.WORLD
    return Ranks(RankLayout(size, size), 0, 0, torch.device("meta"), dap_group=group)
