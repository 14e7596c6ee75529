"""All loss terms but FAPE in one operation, against their plain definitions."""

import pytest
import torch
from torch import Tensor

from kernel_accuracy import DEVICE, Draw
from scalefold.config import LossConfig
from scalefold.kernels import triton_ops
from scalefold.kernels.around import losses
from scalefold.kernels.table import REFERENCE, Operations
from scalefold.model import loss

LOGITS = ("distogram_logits", "masked_msa_logits", "lddt_logits", "experimentally_resolved_logits")
LEAVES = ("sm_angles", "sm_unnormalized_angles", *LOGITS)


def sample(batch: int, n: int, iterations: int = 2, rows: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and features of the shapes that the terms read; a chain of points a few angstroms apart."""
    draw = Draw(n)
    atoms = 4.0 * draw(batch, n, 1, 3).cumsum(1) + draw(batch, n, 37, 3)
    outputs = {
        "sm_angles": draw(batch, iterations, n, 7, 2),
        "sm_unnormalized_angles": draw(batch, iterations, n, 7, 2),
        "distogram_logits": 3.0 * draw(batch, n, n, 64),
        "masked_msa_logits": 3.0 * draw(batch, rows, n, 23),
        "lddt_logits": 3.0 * draw(batch, n, 50),
        "experimentally_resolved_logits": 5.0 * draw(batch, n, 37),
        "final_atom_positions": atoms + 0.7 * draw(batch, n, 37, 3),
    }
    generator = torch.Generator().manual_seed(n)
    torsions = torch.nn.functional.normalize(draw(batch, n, 4, 2), dim=-1)
    features = {
        "chi_angles_sin_cos": torsions,
        "chi_mask": draw.mask(batch, n, 4),
        "seq_mask": draw.mask(batch, n),
        "aatype": torch.randint(0, 21, (batch, n), generator=generator).to(DEVICE),
        "pseudo_beta": atoms[:, :, 3],
        "pseudo_beta_mask": draw.mask(batch, n),
        "true_msa": torch.randint(0, 23, (batch, rows, n, 2), generator=generator).to(DEVICE)[..., 1],
        "bert_mask": draw.mask(batch, rows, n),
        "all_atom_positions": atoms,
        "all_atom_mask": draw.mask(batch, n, 37),
        "atom37_atom_exists": draw.mask(batch, n, 37),
        "resolution": torch.tensor([2.0, 0.05][:batch], device=DEVICE),
    }
    return outputs, features


def evaluate(outputs: dict[str, Tensor], features: dict[str, Tensor], ops: Operations | None) -> list[Tensor]:
    """Values of the five terms, then gradients of their sum with different weights; None: plain definitions."""
    leaves = {key: value.clone().requires_grad_(key in LEAVES) for key, value in outputs.items()}
    found = loss.side_losses(leaves, features, ops) if ops else {}
    terms = loss.loss_terms(LossConfig())
    values = torch.stack([found[name] if ops else terms[name][1](leaves, features) for name in loss.SIDE_TERMS])
    weights = torch.arange(1.0, 1.0 + values.numel(), device=DEVICE).view(values.shape)
    (values * weights).sum().backward()
    return [values.detach(), *(leaves[key].grad for key in LEAVES)]


@pytest.mark.parametrize(("batch", "n"), [(1, 5), (1, 37), (2, 11)])
def test_values_and_gradients_are_those_of_the_definitions(batch: int, n: int) -> None:
    outputs, features = sample(batch, n)
    ours, plain = (evaluate(outputs, features, ops) for ops in (triton_ops.TRITON, None))
    for name, own, exact in zip(("values", *LEAVES), ours, plain, strict=True):
        torch.testing.assert_close(own, exact, rtol=2e-5, atol=1e-7, msg=name)


def test_equal_errors_of_both_torsions_share_the_gradient_and_a_length_of_one_has_none() -> None:
    outputs, features = sample(1, 5)
    features |= {"aatype": torch.full_like(features["aatype"], 3), "chi_mask": torch.ones(1, 5, 4, device=DEVICE)}
    outputs["sm_angles"][..., 4, :] = 0.0
    ours, plain = (evaluate(outputs, features, ops) for ops in (triton_ops.TRITON, None))
    torch.testing.assert_close(ours[1], plain[1], rtol=2e-5, atol=1e-7)
    assert not ours[1][..., 4, :].any()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("sm_angles", "supervised_chi"),
        ("distogram_logits", "distogram"),
        ("masked_msa_logits", "masked_msa"),
        ("lddt_logits", "plddt_loss"),
        ("experimentally_resolved_logits", "experimentally_resolved"),
    ],
)
def test_a_term_that_is_not_finite_leaves_no_gradient_and_the_others_theirs(place: str, name: str) -> None:
    outputs, features = sample(1, 7)
    terms = {key: loss.loss_terms(LossConfig(experimentally_resolved_loss_weight=0.1))[key] for key in loss.SIDE_TERMS}
    features |= {"seq_length": torch.tensor([7], device=DEVICE)}
    expected, found = [], []
    for ops, results in ((triton_ops.TRITON, found), (REFERENCE, expected)):
        leaves = {key: value.clone() for key, value in outputs.items()}
        leaves[place][0, 1, 2:] = torch.nan
        leaves = {key: value.requires_grad_(key in LEAVES) for key, value in leaves.items()}
        total, logged = loss.total_of_terms(leaves, features, terms, ops)
        total.backward()
        assert not logged[name].isfinite()
        assert logged["non_finite_terms"] == 1
        assert not leaves[place].grad.any()
        results += [total.detach(), *(leaves[key].grad for key in LEAVES)]
    for own, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(own, exact, rtol=2e-5, atol=1e-7)


def test_a_letter_that_is_no_class_makes_its_term_nan() -> None:
    outputs, features = sample(1, 5)
    features["true_msa"] = torch.full_like(features["true_msa"], 23)
    values = loss.side_losses(outputs, features, triton_ops.TRITON)
    assert values["masked_msa"].isnan().all()
    assert values["distogram"].isfinite().all()


def test_an_unknown_resolution_counts_neither_confidence_nor_presence() -> None:
    outputs, features = sample(1, 5)
    values = loss.side_losses(
        outputs, features | {"resolution": torch.full_like(features["resolution"], torch.nan)}, triton_ops.TRITON
    )
    assert values["plddt_loss"] == values["experimentally_resolved"] == 0.0


def test_what_the_kernels_do_not_take_is_named() -> None:
    x = torch.ones(1, 2)
    assert losses.obstacle(((x,), (x,)), x, ()) is None
    assert losses.obstacle(((x.double(),), (x,)), x, ()) == "not everything is float32"
    assert losses.obstacle(((x[:, :0],), (x,)), x, ()) == "an argument is empty"
