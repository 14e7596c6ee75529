"""How many samples a batch size needs to reach lDDT-Cα 0.8: what was observed, and nothing beyond it."""

from dataclasses import dataclass
from typing import Literal

from scalefold.errors import ConfigError
from scalefold.mlperf.log.published import REFERENCE_CONVERGENCE

Basis = Literal["reference", "published"]

#: Effective batch -> mean and standard deviation of samples to converge. Reference: 20 runs each (MLPerf RCP records,
#: fp32, learning rate 1e-3). Published: all runs of NVIDIA's logs, 16 at 128 and 10 at 256.
POINTS: dict[Basis, dict[int, tuple[float, float]]] = {
    "reference": REFERENCE_CONVERGENCE,
    "published": {128: (87680.0, 10555.0), 256: (125952.0, 14522.0)},
}


@dataclass(frozen=True)
class Convergence:
    """Samples until the target at one effective batch (global batch x gradient accumulation)."""

    effective_batch: int
    mean_samples: float
    sd_samples: float
    source: str
    extrapolated: bool = False


def samples_to_converge(effective_batch: int, basis: Basis = "reference", extrapolate: bool = False) -> Convergence:
    """Mean and standard deviation of samples to converge.

    Between 128 and 256 both are interpolated linearly, as the RCP checker does. Outside, nothing was observed:
    ConfigError, unless ``extrapolate`` asks for the nearest point's samples (below 128) or the continued line (above
    256), which is then marked as extrapolated. (TACC's 96 x accumulation 2 is an effective batch of 192, inside.)
    """
    points = POINTS[basis]
    inside = min(points) <= effective_batch <= max(points)
    if not inside and not extrapolate:
        raise ConfigError(
            f"effective batch {effective_batch}: convergence is known between {min(points)} and {max(points)} only; "
            "--extrapolate allows a guess"
        )
    weight = max(0.0, (effective_batch - 128) / 128)
    mean, sd = (low + weight * (high - low) for low, high in zip(points[128], points[256], strict=True))
    where = {True: "", False: ", EXTRAPOLATED"}[inside]
    names = {"reference": "reference convergence points (RCP)", "published": "NVIDIA's published runs"}
    at = f"at {effective_batch}" if effective_batch in points else f"interpolated to {effective_batch}"
    return Convergence(effective_batch, mean, sd, f"{names[basis]} {at if inside else ''}{where}".rstrip(), not inside)
