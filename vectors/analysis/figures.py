"""Figures of vectors: radius curves, cosines between vectors or effects, learning curves, behaviours.

Each function writes a PNG and a PDF under a path without suffix (`stem`) and returns their paths.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from jaxtyping import Float  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.font_manager import FontProperties, findfont, get_font  # noqa: E402
from matplotlib.image import AxesImage  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter  # noqa: E402
from torch import Tensor  # noqa: E402

from vectors.radius.rule import RadiusChoice  # noqa: E402

# Okabe & Ito 2008: told apart by colour-blind readers.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"
LABELLED = 32  # number of vectors up to which each has its own label
LONGEST = 60  # number of characters of a behaviour that are shown
INNER = 0.18  # inches per labelled row of a matrix
STEPS = [1, 2, 5, 10]  # distances between ticks, times powers of ten


def radius_curve(choice: RadiusChoice, stem: Path) -> list[Path]:
    """What a rule measured at each radius it tried, and what it chose.

    Raises:
        ValueError: nothing was tried.
    """
    if not choice.tried:
        raise ValueError(f"rule {choice.rule!r} tried no radius; there is no curve to draw")
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    axes.plot(choice.tried, choice.values, color=BLUE, marker="o", markersize=4, linewidth=1.5, label="measured")
    for index, radius in enumerate(choice.radii):
        label = None if index else "chosen: " + ", ".join(f"{radius:.3g}" for radius in choice.radii)
        axes.axvline(radius, color=VERMILION, linestyle="--", linewidth=1.3, label=label)
    if choice.threshold is not None:
        label = f"threshold: {choice.threshold:.3g}"
        axes.axhline(choice.threshold, color=GREY, linestyle=":", linewidth=1.5, label=label)
    axes.set(xscale="log", xlabel="radius (fraction of mean residual norm)", title=choice.rule)
    axes.set_ylabel(_axis(choice.quantity))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _save(figure, stem)


def heatmaps(named: dict[str, Float[Tensor, "k k"]], stem: Path) -> list[Path]:
    """Matrices of cosines between k vectors or their effects, side by side on one scale; keys are the titles.

    Vectors are numbered one by one up to 32 of them.

    Raises:
        ValueError: no matrix, or one without vectors.
    """
    if not named:
        raise ValueError("got no matrices; give at least one")
    for title, cosines in named.items():
        if len(cosines) == 0:
            raise ValueError(f"{title!r} has no vectors; give at least one")
    largest = max(map(len, named.values()))
    side = max(3.2, INNER * largest + 0.8) if largest <= LABELLED else 4.6
    figure, grid = plt.subplots(1, len(named), figsize=(side * len(named) + 0.9, side + 0.5), squeeze=False)
    images = [_matrix(axes, cosines, title) for axes, (title, cosines) in zip(grid[0], named.items(), strict=True)]
    grid[0][0].set_ylabel("vector")
    figure.colorbar(images[-1], ax=list(grid[0]), label="cosine", ticks=[-1, -0.5, 0, 0.5, 1], shrink=0.8, pad=0.02)
    return _save(figure, stem)


def learning_curves(values: Float[Tensor, "steps k"], stem: Path, *, quantity: str) -> list[Path]:
    """Objective of k vectors per optimizer step: each thin, the median thick; `quantity` names it with its unit."""
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    rows = values.detach().float().cpu()
    steps = range(1, len(rows) + 1)
    axes.plot(steps, rows.numpy(), color=BLUE, linewidth=0.6, alpha=max(0.15, min(0.6, 8 / rows.shape[1])))
    axes.plot([], [], color=BLUE, linewidth=0.8, label=f"each vector ({rows.shape[1]})")
    axes.plot(steps, rows.quantile(0.5, dim=1).numpy(), color=VERMILION, linewidth=2.4, label="median")
    axes.set(xlabel="optimizer step")
    axes.set_ylabel(_axis(quantity))
    axes.xaxis.set_major_locator(MaxNLocator(steps=STEPS, integer=True))
    axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return _save(figure, stem)


def behaviour_bars(labels: list[str], scores: list[float], stem: Path, *, quantity: str) -> list[Path]:
    """One bar per behaviour, best on top; long texts are shortened.

    Raises:
        ValueError: no behaviour, or scores of another number.
    """
    if not labels or len(labels) != len(scores):
        raise ValueError(f"got {len(labels)} labels and {len(scores)} scores; give one score per label, at least one")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    figure, axes = plt.subplots(figsize=(7.2, 1.1 + 0.3 * len(labels)))
    bars = axes.barh(range(len(order)), [scores[index] for index in order], color=BLUE, height=0.7)
    axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize="small")
    axes.set_yticks(range(len(order)), [_short(labels[index]) for index in order], fontsize="small")
    axes.set(xlabel=quantity, ylim=(len(order) - 0.4, -0.6))
    axes.margins(x=0.12)  # room for the numbers
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, stem)


def _matrix(axes: Axes, cosines: Tensor, title: str) -> AxesImage:
    """One matrix; white is 0, and both ends of the colours differ in lightness from it."""
    count = len(cosines)
    image = axes.imshow(cosines.detach().float().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(title=title, xlabel="vector")
    if count <= LABELLED:
        numbers = [str(index) for index in range(count)]
        axes.set_xticks(range(count), numbers, fontsize="x-small")
        axes.set_yticks(range(count), numbers, fontsize="x-small")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True))
    return image


def _axis(quantity: str) -> str:
    """Label of an upright axis, with the unit on its own line where both are too long for one."""
    return quantity if len(quantity) <= 34 else quantity.replace(" (", "\n(", 1)


def _short(text: str) -> str:
    """One line of at most `LONGEST` characters that the font has; a dollar sign would begin a formula."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    line = "".join(
        letter if ord(letter) in glyphs else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )
    line = line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"
    return line.replace("$", r"\$")


def _save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and PDF beside each other; the suffix is appended, for a stem such as R-0.5 has none of its own."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    figure.set_layout_engine("constrained")
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
