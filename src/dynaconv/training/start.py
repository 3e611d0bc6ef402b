"""What a training starts from: the untrained network, its stem computed from training images, and the batches."""

import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.model.network import Network, build_network
from dynaconv.recipe import Recipe, sizes_of_epochs

STEM_IMAGES = 1000
"""Training images from which the stem is computed: a million patches for twelve numbers each."""


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
