"""The figures: what is in them, told without looking."""

import pytest
import torch

from dynaconv.reporting.figures import draw_curves, draw_grid, save_figure

EPOCHS = [
    {
        "epoch": n,
        "training_loss": 2 / n,
        "training_accuracy": 0.3 * n,
        "validation_loss": 3 / n,
        "validation_accuracy": 0.2 * n,
    }
    for n in (1, 2, 3)
]


@pytest.mark.parametrize("count", [1, 3])
def test_curves_show_both_splits(count):
    loss, accuracy = draw_curves(EPOCHS[:count]).axes
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        training, validation = axes.lines
        assert list(training.get_ydata()) == [epoch[f"training_{quantity}"] for epoch in EPOCHS[:count]]
        assert list(validation.get_ydata()) == [epoch[f"validation_{quantity}"] for epoch in EPOCHS[:count]]
        assert training.get_linestyle() != validation.get_linestyle()  # told apart without colour
        assert axes.get_xlabel() == "epoch"


@pytest.mark.parametrize(("count", "channels"), [(20, 3), (3, 1), (1, 3)])
def test_grid_marks_wrong_ones_in_words_and_by_the_frame(count, channels):
    images = torch.randint(256, (count, channels, 8, 8), dtype=torch.uint8)
    predicted, actual = ["cat"] * count, ["dog", *["cat"] * (count - 1)]
    figure = draw_grid(images, predicted, actual, "title")
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == count
    assert shown[0].get_title() == "✗ WRONG\npredicted cat\nactual dog"
    widths = [axes.spines["left"].get_linewidth() for axes in shown]
    assert all(width < widths[0] for width in widths[1:])
    if count > 1:
        assert shown[1].get_title() == "✓\npredicted cat\nactual cat"
    assert torch.equal(torch.from_numpy(shown[0].get_images()[0].get_array()[..., 0].copy()), images[0, 0])


def test_figures_are_written_as_png(tmp_path):
    save_figure(draw_curves(EPOCHS), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
