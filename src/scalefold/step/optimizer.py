"""Adam, gradient clipping, learning-rate schedule and weight averaging on flat buffers.

All parameters of a model live in one fp32 master buffer; the averaged (SWA) weights and the two Adam moments have the
same layout. Parameters that compute in bf16 get a second, bf16 buffer that the model's tensors are views of; all
others are views of the master itself. So a step is a few kernels whatever the number of tensors, a snapshot of the
averaged weights is one copy, and clip coefficient and norm never leave the device.

Update of iteration t (training specification, sections 3 to 5), g the gradient averaged over data-parallel replicas,
which is a segment's sum over all ranks times its scale; the scale is part of the clip and never applied on its own:

    c = min(1, clip / (|g| + 1e-6));  m = b1 m + (1 - b1) c g;  v = b2 v + (1 - b2) (c g)^2
    p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    swa = p at the first update of a run, else swa + (1 - decay) (p - swa)
"""

import numpy as np
import torch

from scalefold.config import TrainingConfig
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.step.parameters import ALIGNMENT, FlatParameters


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of iteration ``step`` (from 1): linear from warm-up init to base over the warm-up steps, then constant.

    Rounded to ten decimals within the warm-up as the reference does.
    """
    warmup = config.opt_learning_rate_warmup_steps
    if step > warmup:
        return config.opt_base_learning_rate
    ramp = np.linspace(config.opt_learning_rate_warmup_init, config.opt_base_learning_rate, warmup)
    return round(float(ramp[step - 1]), 10)


class Optimizer:
    """Clip, Adam and weight averaging over the flat buffers of one model.

    ``grad_norm`` is that of the scaled gradient; a row of ``scalars`` belongs to a segment (``reference.adam_swa``).
    """

    def __init__(self, flat: FlatParameters, config: TrainingConfig, ops: Operations = REFERENCE) -> None:
        self.flat, self.config, self.ops = flat, config, ops
        self.exp_avg = torch.zeros_like(flat.master)
        self.exp_avg_sq = torch.zeros_like(flat.master)
        self.averaged = flat.master.clone()
        self.adam_step = 0
        self.num_averaged = 0
        self.grad_norm = torch.zeros((), device=flat.master.device)
        scales = [segment.gradient_scale for segment in flat.segments]
        self.scales = torch.tensor(scales, dtype=torch.float32, device=flat.master.device)
        self.scalars = torch.zeros(len(scales), ALIGNMENT, device=flat.master.device)[:, :5]

    def prepare(self, step: int) -> None:
        """Send the numbers of iteration ``step`` to the device: rate, bias corrections, copy-or-average."""
        c, t = self.config, self.adam_step + 1
        values = [
            learning_rate(step, c),
            1.0 - c.opt_adam_beta_1**t,
            (1.0 - c.opt_adam_beta_2**t) ** 0.5,
            float(self.num_averaged == 0),
        ]
        self.scalars[:, 1:].copy_(torch.tensor(values).expand(len(self.scalars), -1), non_blocking=True)

    @torch.no_grad()
    def apply(self) -> None:
        """Scale, clip, Adam, average, refresh the compute copies; device work only, so it can be captured."""
        c, flat = self.config, self.flat
        squares = [self.ops.sum_of_squares(flat.gradients[segment]) for segment in flat.segments]
        self.grad_norm.copy_((torch.stack(squares) * self.scales.square()).sum().sqrt())
        clip = (c.opt_gradient_clip_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        self.scalars[:, 0] = clip * self.scales
        for segment, scalars in zip(flat.segments, self.scalars, strict=True):
            part = slice(segment.start, segment.stop)
            self.ops.adam_swa(
                flat.master[part],
                flat.gradients[segment],
                self.exp_avg[part],
                self.exp_avg_sq[part],
                self.averaged[part],
                flat.compute_copy(segment),
                scalars,
                c.opt_adam_beta_1,
                c.opt_adam_beta_2,
                c.opt_adam_epsilon,
                c.swa_decay_rate,
            )

    def count(self) -> None:
        """Note on the host that one update has been applied."""
        self.adam_step += 1
        self.num_averaged += 1
