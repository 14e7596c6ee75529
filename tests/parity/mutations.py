"""Plants ten defects, one at a time, in a copy of the package, and shows that a test catches each.

PYTHONPATH=tests python -m parity.mutations
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY, find_shared

TESTS_FAILED = 1  # pytest's exit status; anything else is not a test that failed


@dataclass(frozen=True)
class Mutation:
    """One defect: in ``file`` the text ``old``, which occurs once, becomes ``new``; ``test`` must notice."""

    title: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "clusters are summarised before masking instead of after it",
        "data/features/transforms.py",
        "self._summarise(chosen, extra, masked)",
        "self._summarise(chosen, extra, original)",
        "test_features.py::test_benchmark_sizes_equal_the_plain_definition",
    ),
    Mutation(
        "triangle multiplication drops the mask of one operand",
        "kernels/reference.py",
        "F.linear(normed, weight_b, bias_b) * keep",
        "F.linear(normed, weight_b, bias_b)",
        "test_model_modules.py::test_module_and_its_gradients_equal_the_reference[tri_mul_out]",
    ),
    Mutation(
        "outer product mean divides with a wrong eps",
        "model/evoformer.py",
        "OUTER_PRODUCT_EPS = 1e-3",
        "OUTER_PRODUCT_EPS = 1e-5",
        "test_model_whole.py::test_all_outputs_equal_the_reference[r0]",
    ),
    Mutation(
        "the pair bias of row attention is transposed",
        "model/msa.py",
        "self.gather_bias(bias).permute(0, 3, 1, 2)",
        "self.gather_bias(bias).permute(0, 3, 2, 1)",
        "test_model_modules.py::test_module_and_its_gradients_equal_the_reference[msa_row_att]",
    ),
    Mutation(
        "attention around the ending node forgets to transpose its mask",
        "model/triangle.py",
        "attention(z.transpose(1, 2), mask.transpose(1, 2), dropout)",
        "attention(z.transpose(1, 2), mask, dropout)",
        "test_model_properties.py::test_masked_edges_have_no_influence_on_triangle_attention[ending]",
    ),
    Mutation(
        "rotations are not detached between structure iterations",
        "model/structure.py",
        "quaternion = quaternion.detach()",
        "quaternion = quaternion + 0.0",
        "test_model_whole.py::test_stored_gradients_equal_the_reference[r0]",
    ),
    Mutation(
        "recycled distances below the first edge fall into the first bin",
        "model/embedders.py",
        "(distance_sq > edges) & (distance_sq < upper)",
        "(distance_sq > edges * (torch.arange(RECYCLING_BINS) > 0)) & (distance_sq < upper)",
        "test_model_embedders.py::test_recycling_bins_are_open_intervals[3.0-None]",
    ),
    Mutation(
        "dropout of pair rows is drawn per row instead of shared by them",
        "model/layers.py",
        "(x.shape[0], 1, x.shape[2], x.shape[3])",
        "(x.shape[0], x.shape[1], 1, x.shape[3])",
        "test_model_properties.py::test_dropout_of_templates_and_samples_is_drawn_independently",
    ),
    Mutation(
        "lDDT-Cα is averaged over residues instead of pooled over pairs",
        "model/metrics.py",
        "return _share(score.sum((-1, -2)), counted.sum((-1, -2)))",
        "return lddt_ca_per_residue(predicted, true, mask).mean(-1)",
        "test_metrics.py::test_score_is_pooled_over_pairs_not_averaged_over_residues",
    ),
    Mutation(
        "Adam adds eps before the bias correction instead of after it",
        "kernels/reference.py",
        "exp_avg_sq.sqrt().div_(correction_2_sqrt).add_(eps)",
        "exp_avg_sq.sqrt().add_(eps).div_(correction_2_sqrt)",
        "test_optim.py::test_five_steps_equal_torch_adam_with_clipping_and_averaging",
    ),
)


class Workshop:
    """A copy of the package and its tests in which defects can be planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "src" / "scalefold"
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for name in ("src", "tests"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
        shutil.copy(REPOSITORY / "pyproject.toml", folder)

    def run(self, *tests: str) -> int:
        """Exit status of pytest on the copy; the copied package shadows the installed one."""
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        shared = find_shared()
        if shared is not None:
            environment["SCALEFOLD_SHARED"] = str(shared)
        names = [f"tests/{test}" for test in tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=False).returncode

    def origin(self) -> Path:
        """Folder from which the tests import the package."""
        command = [sys.executable, "-c", "import scalefold; print(scalefold.__path__[0])"]
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        output = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=True, text=True)
        return Path(output.stdout.strip())

    def catches(self, mutation: Mutation) -> bool:
        """Plant, test, take out again.

        Raises:
            SystemExit: the text to replace is not there exactly once: the mutation must follow the code.
        """
        file = self.package / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"error: {mutation.file}: '{mutation.old}' occurs {text.count(mutation.old)} times, not once"
            )
        file.write_text(text.replace(mutation.old, mutation.new))
        try:
            return self.run(mutation.test) == TESTS_FAILED
        finally:
            file.write_text(text)


def main() -> int:
    """Check that the tests pass without a defect and fail with each; one summary line; status 1 if one is missed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if workshop.origin().resolve() != workshop.package.resolve():
            raise SystemExit(f"error: tests would import {workshop.origin()}, not the copy in {workshop.package}")
        if workshop.run(*(mutation.test for mutation in MUTATIONS)) != 0:
            raise SystemExit("error: the tests fail without any defect (or are absent); run `make test` first")
        caught = 0
        for mutation in MUTATIONS:
            found = workshop.catches(mutation)
            caught += found
            print(f"{'caught' if found else 'MISSED'}  {mutation.title}: {mutation.test}", flush=True)
    print(f"mutations: {caught} of {len(MUTATIONS)} caught in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(MUTATIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
