"""The figures of a run: curves of loss and accuracy, and a grid of pictures with predicted and actual class."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dynaconv.files import writing_whole

TRAINING, VALIDATION = "#0072B2", "#D55E00"
"""Blue and vermilion of the Okabe-Ito palette, which people with any colour vision can tell apart."""

PICTURE, PICTURE_CELL = 1.75, 2.1
"""Inches, of a picture's longer side and of what it has of a row."""
LINE = 34
"""Letters of a caption beside which the next one fits."""

QUANTITIES = {"loss": "Cross-entropy per image", "accuracy": "Accuracy"}


def draw_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Draws loss and accuracy of both splits over the epochs.

    Args:
        history: One dictionary per epoch, as in metrics.jsonl; at least one.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        _draw_curve(axes, history, quantity)
    return figure


def draw_curve(history: Sequence[dict[str, Any]], quantity: str) -> Figure:
    """Draws one half of `draw_curves`, "loss" or "accuracy", for a page where both would be too wide."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    _draw_curve(figure.subplots(), history, quantity)
    return figure


def _draw_curve(axes: Axes, history: Sequence[dict[str, Any]], quantity: str) -> None:
    epochs = [epoch["epoch"] for epoch in history]
    training = [epoch[f"training_{quantity}"] for epoch in history]
    validation = [epoch[f"validation_{quantity}"] for epoch in history]
    # Marker and dash tell the curves apart without colour; markers only where they do not run into each other.
    marked: dict[str, Any] = {"markevery": max(1, len(epochs) // 12), "markersize": 4}
    axes.plot(epochs, training, "--o", color=TRAINING, label="training (on augmented images)", **marked)
    if None not in validation:  # a run may hold no image out
        axes.plot(epochs, validation, "-s", color=VALIDATION, label="validation", **marked)
    axes.set(title=QUANTITIES[quantity], xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """Draws accuracy against confidence, before and after the temperature, as `judge` stores them."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="#888888", label="as sure as right")
    for name, form, colour in (("before", "--o", TRAINING), ("after", "-s", VALIDATION)):
        bins = calibration[name]["bins"]
        label = f"{name} the temperature: error {calibration[name]['error']:.4f}"
        points = [each["confidence"] for each in bins], [each["accuracy"]["value"] for each in bins]
        axes.plot(*points, form, color=colour, markersize=4, label=label)
    axes.set(title="Reliability", xlabel="confidence", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_coverage(coverage: Sequence[dict[str, Any]]) -> Figure:
    """Draws the accuracy of the surest images against their share, with its interval, as `judge` stores them."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    shares = [point["covered"] for point in coverage]
    low, high = zip(*(point["accuracy"]["interval"] for point in coverage), strict=True)
    axes.fill_between(shares, low, high, color=TRAINING, alpha=0.2, linewidth=0, label="95% interval")
    axes.plot(shares, [point["accuracy"]["value"] for point in coverage], "-o", color=TRAINING, markersize=4)
    axes.set(title="Accuracy of the surest images", xlabel="share of the images that is decided", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def draw_mixture(view: dict[str, Any]) -> Figure:
    """Draws the mixing weights by class, a panel per block that mixes, as `MixtureView.as_dict` has them.

    A cell shows the mean weight of a convolution over a class's images; its colour, how far that lies from the mean
    over all images, in standard deviations between images.
    """
    blocks = [block for block in view["blocks"] if len(block["kernel_sizes"]) > 1]
    counts = [len(block["kernel_sizes"]) for block in blocks]
    figure = Figure(figsize=(1.6 + 0.62 * sum(counts) + 0.25 * len(counts), 1.2 + 0.3 * len(view["classes"])))
    figure.set_layout_engine("constrained")
    panels: list[Axes] = list(figure.subplots(1, len(blocks), squeeze=False, width_ratios=counts).flat)
    for place, (axes, block) in enumerate(zip(panels, blocks, strict=True)):
        rows = [row if row is not None else [math.nan] * counts[place] for row in block["by_class"]]
        columns = zip(*rows, block["mean"], block["spread"], strict=True)
        apart = [[(value - mean) / (spread or 1.0) for value in values] for *values, mean, spread in columns]
        axes.imshow([list(row) for row in zip(*apart, strict=True)], cmap="PuOr", vmin=-1.5, vmax=1.5, aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = abs(apart[x][y]) > 1.0
                # Not pure black or white: those follow the page, light or dark, where the cell behind them does not.
                colour = "#f8f8f8" if dark else "#111111"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(counts[place]), [f"{side}x{side}" for side in block["kernel_sizes"]], fontsize=7)
        axes.set_yticks(range(len(rows)), view["classes"] if place == 0 else [""] * len(rows), fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(f"block {block['block']}", fontsize=9)
    return figure


def draw_grid(
    images: torch.Tensor, predicted: Sequence[str], actual: Sequence[str], title: str, columns: int = 5
) -> Figure:
    """Draws pictures with their predicted and actual class.

    A wrong prediction is marked by a cross, a thick frame and words, not by colour alone.

    Args:
        images: (N, C, H, W) uint8, at least one.
        predicted: N class names.
        actual: N class names.
        title: Line above the grid.
        columns: Pictures in a row.
    """
    wrong = [guess != truth for guess, truth in zip(predicted, actual, strict=True)]
    captions = [
        f"{'✗ WRONG' if is_wrong else '✓'}\npredicted {guess}\nactual {truth}"
        for guess, truth, is_wrong in zip(predicted, actual, wrong, strict=True)
    ]
    return draw_pictures(images, captions, title, columns, wrong)


def draw_pictures(
    images: torch.Tensor, captions: Sequence[str], title: str, columns: int, framed: Sequence[bool] = ()
) -> Figure:
    """Draws pictures in rows, each below its caption.

    Args:
        images: (N, C, H, W) uint8, at least one.
        captions: N texts.
        title: Line above the grid.
        columns: Pictures in a row.
        framed: N times whether a picture gets a thick, broken frame; empty for none.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    above = 0.06 + 0.15 * max(caption.count("\n") + 1 for caption in captions)  # inches, of a caption of 8 points
    height = 0.5 + (above + PICTURE + 0.15) * rows
    width = max(PICTURE_CELL * columns, 0.4 + 0.1 * len(title))  # a title of 12 points has a tenth per letter at most
    # One pair of axes in inches from the upper left corner, as a pair for each picture takes five times as long.
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    figure.text(0.5, 1 - 0.25 / height, title, ha="center", va="center", fontsize=12)
    frames = framed or [False] * len(images)
    for place, (image, caption, is_framed) in enumerate(zip(images.cpu(), captions, frames, strict=True)):
        row, column = divmod(place, columns)
        pixels = image.permute(1, 2, 0)
        high, wide = (PICTURE * side / max(pixels.shape[:2]) for side in pixels.shape[:2])
        left = width / 2 + PICTURE_CELL * (column + 0.5 - columns / 2) - wide / 2
        top = 0.5 + (above + PICTURE + 0.15) * row + above
        box = (left, left + wide, top + high, top)
        axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="nearest", extent=box, aspect="auto")
        frame = Rectangle((left, top), wide, high, fill=False, edgecolor=TRAINING)
        if is_framed:
            frame.set(edgecolor=VALIDATION, linewidth=4, linestyle=(0, (2, 1)))
        axes.add_patch(frame)
        short = "\n".join(line if len(line) <= LINE else f"{line[: LINE - 1]}…" for line in caption.splitlines())
        axes.text(left + wide / 2, top - 0.08, short, ha="center", va="bottom", fontsize=8, color="black")
    return figure


def to_png(image: torch.Tensor) -> bytes:
    """Encodes one (C, H, W) uint8 image, C 1 or 3, as PNG."""
    pixels = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with writing_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
