"""A training step whose parts around the trunk are stitched, against the same step without."""

import dataclasses

import torch
from torch import Tensor

from kernel_accuracy import DEVICE
from parity import golden
from scalefold.config import LossConfig
from scalefold.kernels.around import embedding
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.kernels.triton_ops import TRITON
from scalefold.model import loss, select_slice

EMBEDDERS = ("embed_pairs", "embed_letters", "embed_extra", "embed_template_pairs")
STITCHED = {name: getattr(embedding, name) for name in EMBEDDERS}  # the table leaves fp32 to the library
STITCHED |= {name: getattr(TRITON, name) for name in ("place_residues", "side_losses")}


def step(ops: Operations) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logged values and gradients with two passes and dropout."""
    model = golden.small_model().train().to(DEVICE)
    batch = {key: value.to(DEVICE) for key, value in golden.small_batch().items()}
    use_operations(model, ops)
    torch.manual_seed(3)
    outputs, terms = model(batch, 2), loss.loss_terms(LossConfig(), ops)
    total, logged = loss.total_of_terms(outputs, select_slice(batch, 1), terms, ops)
    total.backward()
    return logged, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_stitched_step_gives_the_same_losses_and_gradients() -> None:
    stitched = dataclasses.replace(REFERENCE, **STITCHED)
    (plain, plain_gradients), (found, gradients) = step(REFERENCE), step(stitched)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert gradients.keys() == plain_gradients.keys()
    scale = max(value.norm() for value in plain_gradients.values())
    for name, value in plain_gradients.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-7 * scale, name
