"""The training images that look most alike to a network: by the features that its classifier decides on."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.model.network import Network
from dynaconv.recipe import Recipe

MOST = 10_000
"""Training images that are kept: 30 MB of pictures at 32 x 32."""


@dataclass(frozen=True)
class Neighbours:
    """Training images, and where the network puts them.

    Attributes:
        features: (M, W) float16, each of length 1.
        images: (M, C, H, W) uint8.
        labels: (M,) int64.
    """

    features: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor

    def nearest(self, features: torch.Tensor, count: int) -> list[tuple[int, float]]:
        """Finds the training images most alike to one image.

        Args:
            features: (W,) float, of any length.
            count: How many, at least 1.

        Returns:
            Their places here and the cosine of the angle between their features and those given, -1 to 1; the most
            alike first. Empty where the features are no direction.
        """
        direction = functional.normalize(features.float(), dim=0)
        if not direction.isfinite().all():
            return []
        cosines, places = (self.features.float() @ direction).topk(min(count, len(self.labels)))
        return list(zip(places.tolist(), cosines.tolist(), strict=True))

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the fields as tensors, to be stored."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], network: Network, side: int, where: str) -> "Neighbours":
        """Reads what `as_tensors` returned; raises UserError, naming the file `where`, if it does not fit."""
        if set(tensors) != {"features", "images", "labels"}:
            raise UserError(f"{where} does not belong to the network beside it; it was altered.")
        found, head = cls(**tensors), network.classifier.linear
        kept = len(found.labels) if found.labels.ndim else 0
        fits = (
            (found.features.dtype, found.images.dtype, found.labels.dtype) == (torch.float16, torch.uint8, torch.int64)
            and kept > 0
            and found.labels.ndim == 1
            and found.features.shape == (kept, head.in_features)
            and found.images.shape in [(kept, channels, side, side) for channels in (1, 3)]
            and 0 <= int(found.labels.min()) <= int(found.labels.max()) < head.out_features
        )
        if not fits:
            raise UserError(f"{where} does not belong to the network beside it; it was altered.")
        return found


@torch.no_grad()
def find_features(network: Network, batch: torch.Tensor) -> torch.Tensor:
    """Returns (N, W) float32: what the classifier's linear layer takes, for (N, C, H, W) normalised images."""
    return network.backbone(batch).float().mean((2, 3))


def collect_neighbours(network: Network, training: ImageSet, recipe: Recipe) -> Neighbours:
    """Looks at up to `MOST` training images, taken evenly from all of them; the network is left in evaluation mode."""
    network.eval()
    chosen = training.subset(torch.arange(0, len(training), -(-len(training) // MOST)))
    batches = Batches(chosen, recipe.evaluate.evaluation_batch_size, recipe.augment)
    features = torch.cat([find_features(network, batch).cpu() for batch, _ in batches])
    return Neighbours(functional.normalize(features, dim=1).half(), chosen.images.cpu(), chosen.labels.cpu())
