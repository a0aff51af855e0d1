"""How every figure looks: colours that everybody tells apart, type that is read at the width of a page, SVG and PNG."""
import importlib.util
from pathlib import Path

from helpers import common

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"  # of Okabe and Ito
INK = "#222222"  # of text in a picture
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, GREY]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1))]  # beside colours, for print and for eyes that see none


def load():
    """matplotlib's pyplot, drawing into files alone. Raises UserError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise common.UserError("figures need matplotlib: pip install -r requirements-dev.txt")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.4, "lines.linewidth": 1.8,
        "legend.frameon": False, "svg.hashsalt": "latentrevise"})  # the same file every time
    return plt


def save(fig, path: Path) -> None:
    """path.svg, and path.png for pages that take no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(f"{path}.svg", metadata={"Date": None})
    fig.savefig(f"{path}.png", dpi=160)
