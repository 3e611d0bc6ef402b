"""The validation split: a stratified choice of training images, made once and stored with the run."""

from dataclasses import dataclass

import torch

from dynaconv.errors import UserError


@dataclass(frozen=True)
class Split:
    """Which training images train and which validate.

    Attributes:
        seed: Seed of the choice.
        train: (T,) int64, sorted indices into the source's training images.
        validation: (V,) int64, sorted; shares no index with `train`.
    """

    seed: int
    train: torch.Tensor
    validation: torch.Tensor


def split_stratified(labels: torch.Tensor, fraction: float, seed: int, limit: int | None = None) -> Split:
    """Holds out a share of every class for validation.

    Args:
        labels: (N,) int64.
        fraction: Share that validates, from 0 to below 1. Each class gives the rounded share, at least one image; with
            0 none is held out.
        seed: Seed of the choice; the same labels, fraction and seed give the same split.
        limit: Keep about this many images for training, the same share of every class; None keeps all.

    Raises:
        UserError: a class has one image, so it cannot be on both sides.
    """
    generator = torch.Generator().manual_seed(seed)
    train, validation = [], []
    total_train = 0
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2 and fraction:
            raise UserError(
                f"Class number {label + 1} has one training image; training and validation need one each: add images."
            )
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(fraction * len(members))), len(members) - 1) if fraction else 0
        validation.append(members[:held_out])
        train.append(members[held_out:])
        total_train += len(members) - held_out
    if limit is not None and limit < total_train:
        train = [members[: max(1, round(limit * len(members) / total_train))] for members in train]
    return Split(seed, torch.cat(train).sort().values, torch.cat(validation).sort().values)
