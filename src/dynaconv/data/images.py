"""ImageSet: labelled images of one size as one uint8 tensor, the one form in which images travel."""

import hashlib
from dataclasses import dataclass

import torch

from dynaconv.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size.

    Attributes:
        images: (N, C, H, W) uint8, C is 1 (grey) or 3 (RGB), values 0 to 255, contiguous.
        labels: (N,) int64, each from 0 to len(classes) - 1.
        classes: Class names; a label is an index into them. Names, never indices, identify a class.
        description: Where the images came from, for people: "CIFAR-10, train, 5 parquet files".
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    description: str

    def __post_init__(self) -> None:
        """Refuses tensors that are not what the attributes promise."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (N, 1 or 3, H, W) uint8, got {self.images.shape} {self.images.dtype}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be (N,) int64, got {self.labels.shape} {self.labels.dtype}")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def subset(self, indices: torch.Tensor, description: str | None = None) -> "ImageSet":
        """Returns the images at `indices`, (M,) int64, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes, description or self.description)

    def to(self, device: torch.device) -> "ImageSet":
        """Returns the same images on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes, self.description)

    def sha256(self) -> str:
        """Returns the hash of pixels, labels, shape and class names, as 64 hexadecimal digits."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def with_classes(self, classes: tuple[str, ...]) -> "ImageSet":
        """Returns the same images with labels that index `classes`, matched by name.

        Raises:
            UserError: the two sets of names differ; the message names what is missing and what is extra.
        """
        if classes == self.classes:
            return self
        missing, extra = sorted(set(classes) - set(self.classes)), sorted(set(self.classes) - set(classes))
        if missing or extra:
            told = "; ".join(
                f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("extra", extra)) if names
            )
            raise UserError(f"The classes of {self.description} are not those of the model ({told}).")
        new_index = torch.tensor([classes.index(name) for name in self.classes], device=self.labels.device)
        return ImageSet(self.images, new_index[self.labels], classes, self.description)
