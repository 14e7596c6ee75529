"""Figures of the pages as files: the light drawing and its twin for dark pages."""

import re
from pathlib import Path

from scalefold.report.page import DARK, DARK_GROUND
from scalefold.report.plots import PALETTE, Plot

_DARK_OF = {colour: DARK[name] for name, colour in PALETTE.items()}


def write(figure: Plot, folder: Path, with_png: bool) -> list[Path]:
    """The drawing and its dark twin, as files of ``folder``."""
    svg, png = figure.save(folder)
    if not with_png:
        png.unlink()
    return [svg, dark_twin(svg)]


def dark_twin(light: Path) -> Path:
    """The same drawing in the colours of dark pages, beside it."""
    text = light.read_text(encoding="utf-8").replace('fill="white"/>', f'fill="{DARK_GROUND}"/>', 1)
    twin = light.with_name(f"{light.stem}_dark.svg")
    twin.write_text(re.sub("|".join(PALETTE.values()), lambda found: _DARK_OF[found[0]], text), encoding="utf-8")
    return twin
