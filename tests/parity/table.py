"""Regenerates the table of ``docs/equivalence.md`` and fails if any error lies outside its bound.

PYTHONPATH=tests python -m parity.table
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from conftest import REPOSITORY
from parity import golden, modules, training, whole
from scalefold.model import select_slice
from scalefold.model.embedders import extra_msa_features
from scalefold.model.rigid import Rigid, frame_from_three_points, quaternion_to_rotation, update_frame
from scalefold.model.templates import template_angle_features, template_pair_features

DOCUMENT = REPOSITORY / "docs" / "equivalence.md"
BEGIN, END = "<!-- table: begin (generated, do not edit) -->", "<!-- table: end -->"
MODULE_BOUNDS = (2e-5, 1e-4)
WHOLE_BOUNDS = (2e-4, 5e-3)
LOSS_BOUNDS = (2e-5, 1e-4)


@dataclass(frozen=True)
class Row:
    """One line of the table: errors relative to the tensor's maximum, and their bounds."""

    title: str
    forward: float
    forward_bound: float
    gradient: float | None = None
    gradient_bound: float | None = None

    @property
    def passes(self) -> bool:
        """Within both bounds; a NaN is not."""
        forward = self.forward <= self.forward_bound
        if self.gradient is None or self.gradient_bound is None:
            return forward
        return forward and self.gradient <= self.gradient_bound

    def __str__(self) -> str:
        gradient = "" if self.gradient is None else f"{self.gradient:.1e}"
        gradient_bound = "" if self.gradient_bound is None else f"{self.gradient_bound:.0e}"
        cells = (self.title, f"{self.forward:.1e}", f"{self.forward_bound:.0e}", gradient, gradient_bound)
        return "| " + " | ".join((*cells, "yes" if self.passes else "**NO**")) + " |"


def rows() -> Iterator[Row]:
    """Everything that is compared, from single modules to whole training steps."""
    for name, case in modules.CASES.items():
        errors = modules.measure(name)
        yield Row(case.title, errors.forward, MODULE_BOUNDS[0], errors.gradient, MODULE_BOUNDS[1])
    for title, error in builder_errors().items():
        yield Row(title, error, 0.0)
    for title, error in rigid_errors().items():
        yield Row(title, error, MODULE_BOUNDS[0])
    for name, found in whole.measure_structure_and_heads().items():
        yield Row(f"Small model: {name} alone", max(found.values()), WHOLE_BOUNDS[0])
    yield from loss_rows()
    yield from whole_rows()
    yield from step_rows()


def builder_errors() -> dict[str, float]:
    """Features that the model builds from the batch; exact."""
    arrays, batch = golden.load(golden.locate("feature_builders.npz")), golden.small_batch()
    pair = template_pair_features(select_slice(batch, 0))
    angle = template_angle_features(select_slice(batch, 0))
    expected = torch.stack([arrays[f"template_pair_feat_{i}"] for i in range(2)], dim=1)
    extra = extra_msa_features(select_slice(batch, 2))
    return {
        "Template pair features": golden.relative_error(pair, expected),
        "Template angle features": golden.relative_error(angle, arrays["template_angle_feat"]),
        "Extra MSA features": golden.relative_error(extra, arrays["extra_msa_feat"]),
    }


def rigid_errors() -> dict[str, float]:
    """Frame update (23) and frames from three points (21)."""
    a = golden.load(golden.locate("rigid.npz"))
    quats = a["quats"] / a["quats"].norm(dim=-1, keepdim=True)
    quaternion, translation = update_frame(quats, Rigid(quaternion_to_rotation(quats), a["trans"]), a["update6"])
    matrix = Rigid(quaternion_to_rotation(quaternion), translation).to_matrix()
    frame = frame_from_three_points(a["p_neg_x"], a["origin"], a["p_xy"])
    return {
        "Backbone frame update (23)": golden.relative_error(matrix, a["after_4x4"]),
        "Frames from three points (21)": golden.relative_error(frame.to_matrix(), a["from_3_points_4x4"]),
    }


def loss_rows() -> Iterator[Row]:
    """Every loss term on the reference's outputs: value per sample, gradient by the outputs."""
    fape = whole.measure_fape()
    values, gradients = (fape["clamped10"], fape["unclamped"]), (fape["grad_clamped"], fape["grad_unclamped"])
    yield Row("Loss: bare FAPE (28)", max(values), LOSS_BOUNDS[0], max(gradients), LOSS_BOUNDS[1])
    for name, (value, gradient) in whole.measure_terms().items():
        yield Row(f"Loss: {name}", value, LOSS_BOUNDS[0], gradient, LOSS_BOUNDS[1])


def whole_rows() -> Iterator[Row]:
    """The small model end to end."""
    for run, title in (("r0", "no recycling"), ("r2", "two recycles")):
        errors = whole.measure(run)
        gradient = max(max(errors.gradients.values()), max(errors.gradient_norms.values()))
        yield Row(
            f"Small model, {title}: outputs; all gradients",
            max(errors.outputs.values()),
            WHOLE_BOUNDS[0],
            gradient,
            WHOLE_BOUNDS[1],
        )
        yield Row(f"Small model, {title}: losses", max(errors.losses.values()), LOSS_BOUNDS[0])
    yield Row("Small model, evaluation: outputs and lDDT-Cα", max(whole.measure_evaluation().values()), WHOLE_BOUNDS[0])


def step_rows() -> Iterator[Row]:
    """Four optimizer steps: losses, clip norm, weights and averaged weights after each."""
    for step, errors in enumerate(training.measure(), start=1):
        worst = max((errors.grad_norm, *errors.losses.values(), *errors.parameters.values(), *errors.averages.values()))
        yield Row(f"Training step {step}: losses, norm, weights, averaged weights", worst, LOSS_BOUNDS[0])


def render(table: list[Row]) -> str:
    """The table in Markdown."""
    head = (
        "| what (Supplement algorithm) | forward error | bound | gradient error | bound | within |",
        "|---|---|---|---|---|---|",
    )
    return "\n".join((*head, *map(str, table)))


def write(document: Path, table: str) -> None:
    """Replace the generated part of the document.

    Raises:
        SystemExit: the document has lost its markers.
    """
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {document}: the lines '{BEGIN}' and '{END}' must occur once each")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    temporary = document.with_suffix(".md.tmp")
    temporary.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    os.replace(temporary, document)


def main() -> int:
    """Measure, write, summarise in one line; status 1 if a bound is exceeded, 2 if numbers are absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure and compare with the bounds, write nothing")
    arguments = parser.parse_args()
    try:
        table = list(rows())
    except FileNotFoundError as error:
        print(f"error: {error}")
        return 2
    if not arguments.check:
        write(DOCUMENT, render(table))
    outside = [row.title for row in table if not row.passes]
    for row in table:
        if not row.passes:
            print(row)
    forward, gradient = max(r.forward for r in table), max(r.gradient for r in table if r.gradient is not None)
    verdict = f"{len(outside)} outside their bounds" if outside else "all within their bounds"
    largest = f"largest errors {forward:.1e} forward, {gradient:.1e} gradient"
    print(f"equivalence: {len(table)} comparisons, {largest}, {verdict}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
