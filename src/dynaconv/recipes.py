"""The named recipes: functions that return a complete Recipe, each with its command, cost and measured result."""

import math
from collections.abc import Callable
from dataclasses import replace

from dynaconv.recipe import Recipe, with_settings


def coursework() -> Recipe:
    """The coursework system: six mixed blocks, Adam, cosine annealing, 50 epochs, batches of 75 and 50.

    RandomAffine also mirrors, unlike the coursework's; `--flip 0` leaves it out (docs/decisions/0008-mirror.md).

    Command: dynaconv train coursework --data cifar10
    Cost: 14 minutes on two cores with matrix tiles (AMX); 43 minutes with AVX2 in float32, alone, 1.1 GB of memory;
    59 minutes in the mean of the measured runs, two of which shared the machine.
    Result on CIFAR-10: 87.91% of the test images, 88.35% of the validation images, 3 seeds in float32
    (benchmarks/results/coursework.json); 88.05% in bfloat16, 1 seed (coursework-bfloat16.json).
    """
    return Recipe(name="coursework")


def fast92() -> Recipe:
    """A network that learns in few epochs: whitening stem, Muon, growing images, two kernel sizes in the smallest maps.

    Command: dynaconv train fast92 --data cifar10
    Cost: 134 seconds on two cores with matrix tiles (AMX), 1.5 GB of memory.
    Result on CIFAR-10: 92.72% in the mean of 5 seeds with all images used, `--validation-fraction 0`
    (benchmarks/results/fast92-all.json). With `--epochs 8 --train-scales 0.5 0.5 0.5 0.75 0.75 0.75 1 1`, 92.55% in the
    mean of 5 seeds, in 117 seconds (fast92-short.json); with AVX-512 and bfloat16, but without matrix tiles, 92.46% in
    the mean of 5 seeds, in 239 seconds, 2.0 GB (fast92-avx512.json). With a tenth held out for validation, 92.50% of
    the test images, 93.20% by six views, 1 seed, in 167 seconds with the views, 1.6 GB (fast92.json).
    """
    return with_settings(
        Recipe(name="fast92"),
        # Shifts of whole pixels and a mirror by turns; turned, zoomed and recoloured images take longer to learn from.
        degrees=0.0,
        translate=0.0625,
        scale_min=1.0,
        scale_max=1.0,
        alternate_flip=True,
        interpolation="nearest",
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        # 64 channels as long as a map is large, 256 where it is small, and convolved before it is pooled: more accurate
        # for its operations than widths that double at every pooling (docs/log.md).
        stem_side=2,
        widths=(64, 64, 256, 256, 256, 256),
        num_convolutions=(1, 1, 1, 1, 1, 2),
        pool_after=(1, 3, 5),
        activation="silu",
        norm_momentum=0.4,
        optimizer="muon",
        learning_rate=0.03,
        kernel_learning_rate=0.2,
        kernel_momentum=0.75,
        schedule="linear",
        label_smoothing=0.2,
        epochs=9,
        batch_size=1000,
        # Sides that leave whole tiles of Winograd's algorithm behind every pooling: 20 costs as much as 24.
        train_scales=(0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 1.0, 1.0),
        evaluation_batch_size=500,
    )


def fast94() -> Recipe:
    """fast92's network on larger images from the start, with less label smoothing, judged by six views of each image.

    Command: dynaconv train fast94 --data cifar10
    Cost: 257 seconds on two cores with matrix tiles (AMX), the views included; 1.4 GB of memory.
    Result on CIFAR-10: 93.46% of the test images, 94.22% by six views, in the mean of 5 seeds with all images used
    (benchmarks/results/fast94.json). On an H100, 8 epochs of full size: 93.85% by six views in the mean of 5 seeds,
    2.7 seconds each with `--compile`, warmed up (race-94.json).
    """
    # Label smoothing of 0.1 instead of 0.2 is what a search among 24 settings on validation images found (docs/log.md).
    return with_settings(
        replace(fast92(), name="fast94"),
        label_smoothing=0.1,
        epochs=11,
        train_scales=(0.75, 1.0, 1.0),
        views="six",
    )


def fast96() -> Recipe:
    """A deeper and wider network for images enlarged to 40 pixels, a covered square in each: for an hour, or a GPU.

    Command: dynaconv train fast96 --data cifar10
    Cost: 61 minutes on two cores with matrix tiles (AMX), the views included; 3.7 GB of memory.
    Result on CIFAR-10: 95.64% of the test images, 96.11% by six views, in the mean of 3 seeds with all images used
    (benchmarks/results/fast96.json). With 30 epochs on images of their own size (`--image-size 32 --epochs 30`), on an
    H100 with `--compile`: 95.78% by six views in the mean of 2 seeds, 19 seconds each, warmed up (race-96.json). All
    pictures are resized to 40 pixels: give larger ones an `--image-size` of their own.
    """
    # 27 epochs at 30 and 40 pixels reached more in an hour than 48 at 16 to 32 did (docs/log.md).
    return with_settings(
        replace(fast94(), name="fast96"),
        image_size=40,
        widths=(128, 128, 128, 384, 384, 384, 512, 512, 512),
        num_convolutions=(1, 1, 1, 1, 1, 1, 1, 2, 2),
        pool_after=(1, 4, 7),
        translate=0.125,
        cutout=0.375,
        epochs=27,
        kernel_learning_rate=0.12,
    )


def strong() -> Recipe:
    """fast96's network on images of their own size, for as long as it learns anything, and longer: for a GPU.

    Command: dynaconv train strong --data cifar10 --compile
    Cost: 123 seconds on an H100; not measured on a CPU.
    Result on CIFAR-10: 96.25% of the test images by six views, 1 seed with all images used
    (benchmarks/results/strong.json). It knows its training images by then; more epochs are not what it lacks.
    """
    return with_settings(replace(fast96(), name="strong"), image_size=None, epochs=130)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (coursework, fast92, fast94, fast96, strong)
}
"""Every recipe by name."""

DEFAULT = "fast92"
"""The recipe of `dynaconv train` without a name."""

REACHED: dict[str, dict[int, float]] = {
    "fast92": {5: 0.9052, 9: 0.922, 14: 0.9296},
    "fast94": {10: 0.9292},
}
"""Share of the CIFAR-10 validation images, one view, by recipe and epochs: benchmarks/results/frontier.json."""


def expected_accuracy(recipe: Recipe) -> str | None:
    """Tells what a recipe can be expected to reach on CIFAR-10, from the lengths that were measured.

    Between two of them the error is taken to fall as a power of the epochs.

    Returns:
        A sentence; None for other data, other settings than those of a named recipe, or one that was not measured.

    Example:
        >>> expected_accuracy(with_settings(fast92(), source="cifar10", epochs=9))
        'fast92 reached 92.2% of the CIFAR-10 validation images in 9 epochs.'
    """
    reached = REACHED.get(recipe.name)
    if reached is None or not _is_as_named(recipe):
        return None
    epochs, shortest, longest = recipe.train.epochs, min(reached), max(reached)
    if epochs in reached:
        return f"{recipe.name} reached {reached[epochs]:.1%} of the CIFAR-10 validation images in {epochs} epochs."
    if epochs < shortest:
        return f"Expect less than {reached[shortest]:.1%} of the validation images, which takes {shortest} epochs."
    if epochs > longest:
        return f"Expect about {reached[longest]:.1%} of the validation images, measured with {longest} epochs."
    below, above = (max(each for each in reached if each < epochs), min(each for each in reached if each > epochs))
    share = math.log(epochs / below) / math.log(above / below)
    error = (1 - reached[below]) ** (1 - share) * (1 - reached[above]) ** share
    return (
        f"Expect about {1 - error:.1%} of the validation images: {reached[below]:.1%} were reached in {below} epochs, "
        f"{reached[above]:.1%} in {above}."
    )


def _is_as_named(recipe: Recipe) -> bool:
    """Whether all that decides what is learned, its epochs apart, is that of the named recipe on CIFAR-10."""
    named = with_settings(RECIPES[recipe.name](), source="cifar10")
    data = ("source", "image_size", "channels", "max_train_images", "without")
    steps = ("batch_size", "accumulation_steps", "train_scales")
    return (recipe.augment, recipe.model, recipe.optim) == (named.augment, named.model, named.optim) and all(
        getattr(mine, name) == getattr(theirs, name)
        for mine, theirs, names in ((recipe.data, named.data, data), (recipe.train, named.train, steps))
        for name in names
    )
