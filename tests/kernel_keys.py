"""Which kernels a configuration asks Triton for: compiled ahead on tensors without data, or launched by a run's step.

    python tests/kernel_keys.py ahead|launched CONFIG [OVERRIDE ...]

Nothing is compiled: at the place where Triton would, the key is noted under which it files the kernel (types,
divisibility, constants, warps, stages), so both ways take seconds. Prints JSON: ``{program: [key, ...]}``.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from scalefold.config import Config, load_config
from scalefold.kernels import triton_ops
from scalefold.kernels.compiled import ahead
from scalefold.run import compile_ahead

found: dict[str, set[str]] = {}


class Kernel:
    """Stands for a compiled kernel: launching it does nothing."""

    function, packed_metadata = 0, None

    def launch_metadata(self, *_: Any) -> None:
        """None."""

    def run(self, *_: Any) -> None:
        """Nothing."""


def note(program: JITFunction, key: str, *_: Any, **__: Any) -> Kernel:
    """Instead of compiling; ``cache_key`` covers the source with everything that it calls."""
    found.setdefault(f"{program.fn.__module__}.{program.fn.__name__}", set()).add(f"{program.cache_key} {key}")
    return Kernel()


class Driver:
    """Answers as the driver of an H100 would."""

    get_current_device = lambda self: 0  # noqa: E731
    get_current_stream = lambda self, device: 0  # noqa: E731
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731


@contextlib.contextmanager
def no_launcher() -> Iterator[Callable[[Any], None]]:
    """Instead of a C launcher per kernel."""
    yield lambda kernel: None


def compile_all(config: Config) -> None:
    """As ``scalefold compile`` does."""
    ahead.stand_in_for_driver = no_launcher
    with ahead.compiling_for(90):
        compile_ahead.run_training_step(config, lambda text: None)
        compile_ahead.run_evaluations(config, lambda text: None)


def launch_all(config: Config) -> None:
    """As a run does before and after its clock starts: every number of passes, whole updates, evaluations."""
    from scalefold.data.configured import feature_settings
    from scalefold.data.made.synthetic import synthetic_batch
    from scalefold.eval.model import EvaluationModel
    from scalefold.kernels.choice import operations
    from scalefold.kernels.table import use_operations
    from scalefold.parallel.dap.collectives import Group
    from scalefold.parallel.dap.connect import unconnected
    from scalefold.parallel.dap.points import apply_dap
    from scalefold.step.build import build_model, build_optimizer, build_step, launches_early

    driver.set_active(Driver())
    triton_ops.device_obstacle = lambda device: None
    device = torch.device("cpu")
    ranks = dataclasses.replace(compile_ahead._ranks(config), device=device)
    ops, settings = operations("triton", launches_early(config)), feature_settings(config)
    model, group = build_model(config, 0, ranks), None if ranks.dap_group is None else Group(ranks.dap_group)
    if group is not None:
        group.direct = unconnected(group.rank, group.size, device)
    use_operations(model, ops)
    apply_dap(model, group)
    step = build_step(config, model, build_optimizer(config, model, ranks, ops), ranks)
    batch = synthetic_batch(settings, config.local_batch_size, device=device)
    step.warm_up(batch, config.data.num_recycling_iters + 1, lambda text: None)
    evaluation = EvaluationModel(config, device, ops)
    longest = settings.padded_length(config.data.val_max_sequence_length)
    for length in range(longest, 0, -settings.eval_length_multiple):
        chain = synthetic_batch(settings, 1, device=device, training=False, num_res=length)
        evaluation.predict(chain.features)


def main() -> None:
    """See above."""
    JITFunction._do_compile = note  # type: ignore[method-assign]
    way, file, *overrides = sys.argv[1:]
    {"ahead": compile_all, "launched": launch_all}[way](load_config(file, overrides).config)
    print(json.dumps({name: sorted(keys) for name, keys in found.items()}))


if __name__ == "__main__":
    main()
