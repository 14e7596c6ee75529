"""Fusion of the small operations around the trunk: embedders, structure module, heads and losses, by Inductor.

The trunk's blocks have kernels of their own (``scalefold.kernels``). Everything else is many small element-wise
operations and reductions; here each region of them, a finished callable, is replaced from outside by its compiled
form. Shapes are static, so only the training model is fused: evaluation sees another length with every chain. Random
numbers are drawn outside the regions, so seeding has the same effect with and without fusion. The compiler is imported
where something is fused: it takes a second.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from scalefold.kernels.table import REFERENCE, use_operations
from scalefold.processors import processors

log = logging.getLogger(__name__)

Terms = dict[str, tuple[float, Callable[..., Any]]]

# Submodule -> methods that become one compiled region each; an iteration is compiled once and used by all of them.
REGIONS = {
    "": ("embed_sample", "embed_templates", "add_templates", "embed_extra_msa"),
    "structure_module": ("enter", "iteration", "read_out"),
    "auxiliary_heads": ("forward",),
}
# Parts that lie wholly inside regions: the compiler sees through plain operations, not through launches of kernels.
PLAIN_INSIDE = (
    "input_embedder",
    "recycling_embedder",
    "extra_msa_embedder",
    "template_pair_embedder",
    "template_pointwise_attention",
    "structure_module.layer_norm_s",
    "structure_module.layer_norm_z",
    "structure_module.layer_norm_ipa",
    "structure_module.ipa",
    "structure_module.transition",
    "structure_module.place_atoms",
    "auxiliary_heads",
)
# A region is compiled with and without gradients and for the first iteration; several models may live in one process.
MAX_VARIANTS = 64
MAX_COMPILE_THREADS = 8  # per rank: a node has several


class Region:
    """A callable that compiles itself when first called, and stays plain, with a warning, if it cannot be compiled."""

    def __init__(self, name: str, plain: Callable[..., Any], backend: str = "inductor") -> None:
        from torch._dynamo.exc import TorchDynamoException

        self.name, self.plain, self._refusal = name, plain, TorchDynamoException
        self.compiled: Callable[..., Any] | None = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, *args: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*args)
            except self._refusal as error:
                self.compiled = None
                log.warning("fusion: %s stays plain: %s", self.name, first_line(error))
        return self.plain(*args)


def can_fuse(device: torch.device) -> bool:
    """Whether the compiler works here: a small function, forward and backward; the reason is logged if not."""
    from torch._dynamo import config as dynamo_config
    from torch._inductor import config as inductor_config

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor_config.compile_threads = min(MAX_COMPILE_THREADS, processors())
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_VARIANTS)
    inductor_config.deterministic = True  # tiles of reductions by rule, not by stopwatch: same bits in every process
    start = time.monotonic()
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(_probe, fullgraph=True, dynamic=False)(x).backward()
    except Exception as error:  # a missing compiler shows in many ways, none of which may end the run
        log.warning("fusion: everything stays plain, because the compiler fails: %s", first_line(error))
        return False
    log.info("fusion: the compiler works (%.1f s)", time.monotonic() - start)
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).sum()


def first_line(error: Exception) -> str:
    """Kind and first line of a message that may be pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def fuse_model(model: nn.Module, backend: str = "inductor") -> None:
    """Replace the model's methods in ``REGIONS`` by compiled ones, once; call after ``use_operations``."""
    for path in PLAIN_INSIDE:
        use_operations(model.get_submodule(path), REFERENCE)
    for path, methods in REGIONS.items():
        module = model.get_submodule(path)
        for method in methods:
            if isinstance(getattr(module, method), Region):
                continue
            setattr(module, method, Region(f"{path}.{method}".lstrip("."), getattr(module, method), backend))


def fuse_terms(terms: Terms, backend: str = "inductor") -> Terms:
    """Loss terms (name -> weight, function) with compiled functions, one region each."""
    return {name: (weight, Region(f"loss {name}", function, backend)) for name, (weight, function) in terms.items()}
