"""The figures: what is in them, told without looking."""

import itertools

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
    (axes,) = figure.axes
    assert len(axes.get_images()) == len(axes.patches) == len(axes.texts) == count
    widths = [frame.get_linewidth() for frame in axes.patches]
    assert all(width < widths[0] for width in widths[1:])
    assert [text.get_text() for text in axes.texts[:2]] == [
        "✗ WRONG\npredicted cat\nactual dog",
        "✓\npredicted cat\nactual cat",
    ][:count]
    for picture, frame, text, image in zip(axes.get_images(), axes.patches, axes.texts, images, strict=True):
        assert torch.equal(torch.from_numpy(picture.get_array()[..., 0].copy()), image[0])
        left, right, _, top = picture.get_extent()
        assert (frame.get_x(), frame.get_y()) == (left, top)
        assert text.get_position() == (pytest.approx((left + right) / 2), pytest.approx(top, abs=0.1))


@pytest.mark.parametrize("count", [1, 7])
def test_pictures_of_any_form_stand_apart_and_inside_the_figure(count):
    names = ["a_class_of_a_single_word_that_goes_on_and_on_and_on_and_on", "cat"]
    images = torch.zeros(count, 3, 12, 20, dtype=torch.uint8)
    figure = draw_grid(
        images, [names[0]] * count, [names[1]] * count, "A title that is wider than a picture of the grid"
    )
    figure.draw_without_rendering()  # places the texts
    (axes,) = figure.axes
    boxes = [part.get_window_extent() for part in (*figure.texts, *axes.texts, *axes.get_images())]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_figures_are_written_as_png(tmp_path):
    save_figure(draw_curves(EPOCHS), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
