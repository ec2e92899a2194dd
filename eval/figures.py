"""What all pictures share: colours that are told apart, sizes, and how a figure is made and written."""

import math
from pathlib import Path

from checkpoint import write_atomically

# Okabe and Ito 2008, without the yellow, which is lost on white: told apart with every common colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", ":", "-."]  # the second, third, .. time round the colours
MARKERS = "osD^vPX"
INK, CHANGED, MONO = "#222222", "#D55E00", "DejaVu Sans Mono"
WIDTH, DPI = 11.5, 100  # inches and dots an inch: 1,150 pixels, what a README shows without shrinking it much


def new_figure(width: float, height: float):
    """An empty figure in inches, without pyplot: no window, no state that outlives it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def plain(panel) -> None:
    """Axes without a box, with pale lines across."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", lw=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=10)


def glyphs():
    """Whether the font of MONO has a glyph for a character; without one matplotlib draws a box and warns."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(MONO))
    return lambda char: font.get_char_index(ord(char)) != 0


def blue(chance: float) -> tuple[float, float, float]:
    """White at 0, the blue of COLOURS at 1: one hue that only darkens, so it reads the same in grey. Grey for nan."""
    if math.isnan(chance):
        return 0.93, 0.93, 0.93
    return tuple(1 - chance * (1 - int(COLOURS[0][i : i + 2], 16) / 255) for i in (1, 3, 5))


def save_figure(figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
