"""How far a picture lies from the training images, measured at what the network's middle block sees of it.

The last layers cannot tell: they put noise among the classes as surely as a photograph. The first know colours only.
"""

from dataclasses import dataclass

import torch

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.model.network import Network
from dynaconv.recipe import Recipe

TRAINING_IMAGES = 5000
"""Whose spread is measured, at most."""
FEWEST = 200
"""Validation images without which no bound is set: it is where one in 200 of them lies beyond."""
BEYOND = 1 / 200
RIDGE = 1e-3
"""Added to every variance, as a share of their mean: no direction is so narrow that rounding lies far out in it."""
FARTHEST = 1e6
"""What is further away, or no number, is this far."""


@dataclass(frozen=True)
class Familiarity:
    """Where the training images lie, and how far away an image may be.

    Attributes:
        center: (D,) float32, mean of their features: what the middle block weighs its convolutions by.
        whitening: (D, D) float32: what makes their spread the same in all directions.
        bound: Root mean square of the whitened offset that one in 200 validation images exceeds.
    """

    center: torch.Tensor
    whitening: torch.Tensor
    bound: float

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """Returns how far images lie from the training images: 1 at the bound, above 1 beyond.

        Args:
            features: (N, D) float, from `see`.

        Returns:
            (N,) float32, 0 to `FARTHEST`. Source: Mahalanobis distance of one layer, as in Lee et al.
            (arXiv:1807.03888), of all classes together.
        """
        offset = (features.float() - self.center) @ self.whitening
        distance = offset.square().mean(1).sqrt() / self.bound
        return torch.where(distance <= FARTHEST, distance, FARTHEST)  # not so for what is no number

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the fields as tensors, to be stored."""
        return {"center": self.center, "whitening": self.whitening, "bound": torch.tensor([self.bound])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], network: Network, where: str) -> "Familiarity":
        """Reads what `as_tensors` returned; raises UserError, naming the file `where`, if it does not fit."""
        width = network.backbone.block(_place(network)).weigh.in_features
        shapes = {"center": (width,), "whitening": (width, width), "bound": (1,)}
        fits = set(tensors) == set(shapes) and all(
            tensors[name].shape == shape and tensors[name].dtype == torch.float32 and tensors[name].isfinite().all()
            for name, shape in shapes.items()
        )
        if not fits or tensors["bound"].item() <= 0:
            raise UserError(f"{where} does not belong to the network beside it; it was altered.")
        device = next(network.parameters()).device
        return cls(tensors["center"].to(device), tensors["whitening"].to(device), tensors["bound"].item())


def _place(network: Network) -> int:
    return len(network.backbone.blocks) // 2


def see(network: Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the network and looks at what its middle block sees.

    Args:
        network: In evaluation mode.
        images: (N, C, H, W) float, normalised.

    Returns:
        (N, classes) logits; (N, D) features, the mean of each channel of the maps that enter the middle block.
    """
    place, backbone = _place(network), network.backbone
    maps = backbone.run_blocks(backbone.run_stem(images), 0, place)
    features = backbone.block(place).pool(maps).flatten(1)
    return network.classifier(backbone.run_blocks(maps, place, len(backbone.blocks))), features


@torch.no_grad()
def measure_familiarity(
    network: Network, training: ImageSet, validation: ImageSet, recipe: Recipe
) -> Familiarity | None:
    """Measures where training images lie, and the bound on validation images; None if those are too few.

    The network is left in evaluation mode.
    """
    if len(validation) < FEWEST:
        return None
    network.eval()
    step = -(-len(training) // TRAINING_IMAGES)
    features = _features(network, training.subset(torch.arange(0, len(training), step)), recipe)
    center = features.mean(0)
    covariance = torch.cov((features - center).T) if len(features) > 1 else torch.zeros(len(center), len(center))
    variances, directions = torch.linalg.eigh(covariance.double())
    variances = variances.clamp_min(0) + RIDGE * variances.mean() + 1e-12
    whitening = (directions / variances.sqrt()) @ directions.T
    found = Familiarity(center.float(), whitening.float(), 1.0)
    bound = found.distance(_features(network, validation, recipe)).double().quantile(1 - BEYOND).item()
    return Familiarity(found.center, found.whitening, bound) if 0 < bound < FARTHEST else None


def _features(network: Network, images: ImageSet, recipe: Recipe) -> torch.Tensor:
    """Returns (N, D) float64 features on the images' device."""
    batches = Batches(images, recipe.evaluate.evaluation_batch_size, recipe.augment)
    return torch.cat([see(network, batch)[1].double() for batch, _ in batches])
