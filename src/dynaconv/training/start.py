"""What a training starts from: the images, the untrained network, its stem computed from them, and the batches."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.batches import Batches
from dynaconv.data.exclusions import read_exclusions
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, load_in_own_form, options_of, resolve
from dynaconv.data.split import Split, split_stratified
from dynaconv.errors import UserError
from dynaconv.model.network import Network, build_network
from dynaconv.recipe import Recipe, sizes_of_epochs, with_settings

STEM_IMAGES = 1000
"""Training images from which the stem is computed: a million patches for twelve numbers each."""


@dataclass(frozen=True)
class TrainingData:
    """The training images of a run on its device, split.

    Attributes:
        source: The source that was read, never "auto".
        train: Images that train.
        validation: Images that validate.
        split: Where both stand among the source's training images.
        sha256: Hash of all training images of the source, before the split.
    """

    source: str
    train: ImageSet
    validation: ImageSet
    split: Split
    sha256: str


def load_training_data(recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> TrainingData:
    """Reads the training images of the recipe's source and splits them; never opens the test split.

    Raises:
        UserError: the source is not there or holds what cannot be trained on.
    """
    options = options_of(recipe.data, say)
    source = resolve(recipe.data.source, options)
    images = load_images(source, "train", options)
    if recipe.data.image_size is not None:  # a recipe may bring it along, and shrink images without being asked to
        say(f"Images of another size are resized to {recipe.data.image_size} pixels (--image-size).")
    split = split_stratified(
        images.labels, recipe.data.validation_fraction, recipe.data.split_seed, recipe.data.max_train_images
    )
    if recipe.data.without is not None:
        left_out = read_exclusions(
            Path(recipe.data.without), images, lambda: load_in_own_form(source, "train", options)
        )
        kept = split.train[~torch.isin(split.train, left_out)]
        say(f"Left out: {len(split.train) - len(kept)} of {len(split.train)} training images ({recipe.data.without}).")
        split = dataclasses.replace(split, train=kept)
    if len(split.train) < 2:
        raise UserError(
            f"Of {images.description} {len(split.train)} images are left to train on, two are the least; add images, "
            "or leave out fewer."
        )
    return TrainingData(
        source=source,
        train=images.subset(split.train).to(device),
        validation=images.subset(split.validation).to(device),
        split=split,
        sha256=images.sha256(),
    )


def fit_batches(recipe: Recipe, images: int, say: Callable[[str], None]) -> Recipe:
    """Returns the recipe, with an update for every quarter of the images where a batch would hold more than all.

    Recipes are made for tens of thousands of images, and a single update an epoch would hardly train a network.
    """
    if images >= recipe.train.batch_size:
        return recipe
    smaller = max(2, math.ceil(images / 4))
    say(
        f"{images} training images are fewer than --batch-size {recipe.train.batch_size}: batches of {smaller} instead."
    )
    return with_settings(recipe, batch_size=smaller, accumulation_steps=1)


def build_model(recipe: Recipe, images: ImageSet, device: torch.device) -> Network:
    """Makes the untrained network of a recipe for the training `images`, on `device`; computes its stem, if any."""
    _, channels, side, _ = images.images.shape
    model = build_network(recipe.model, channels, len(images.classes), side, recipe.train.seed)
    model.to(device)
    if model.backbone.stem is not None:
        # Images from all over the set: a folder of class folders is sorted by class.
        some = images.images[:: max(1, len(images) // STEM_IMAGES)].to(device)
        model.backbone.stem.fit(normalize(to_tensor(some), recipe.augment))
    return model


def training_batches(recipe: Recipe, images: ImageSet) -> Batches:
    """Returns the batches that the recipe trains on: shuffled, augmented, scaled as each epoch wants it."""
    sizes = sizes_of_epochs(recipe, recipe.train.epochs, images.images.shape[-1])
    return Batches(images, recipe.train.batch_size, recipe.augment, recipe.train.seed, sizes)
