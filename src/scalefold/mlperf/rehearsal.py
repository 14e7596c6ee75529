"""Rehearsal logs: what a full benchmark run would log, made by the real event writer with a fake clock."""

from scalefold.mlperf.events import Hyperparameters
from scalefold.mlperf.keys import EXPECTED


def benchmark_hyperparameters(
    *, global_batch_size: int, precision: str = "bf16", gradient_accumulation_steps: int = 1
) -> Hyperparameters:
    """The closed division's values, with the reference's learning rate (1e-3, no warm-up)."""
    fixed = {name: value for name, value in EXPECTED.items() if name in Hyperparameters.__dataclass_fields__}
    return Hyperparameters(
        **fixed,
        global_batch_size=global_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        precision=precision,
        opt_base_learning_rate=1e-3,
        opt_learning_rate_warmup_init=1e-5,
        opt_learning_rate_warmup_steps=0,
    )
