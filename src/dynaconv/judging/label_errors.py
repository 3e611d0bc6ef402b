"""Label errors: training images whose label a network disputes that never saw them.

Every image is judged by a network that was trained on the other folds alone, so that none can have learned its label by
heart. The images are ranked by how much likelier another class is than their label.
Source: Northcutt, Jiang and Chuang, Confident Learning (arXiv:1911.00068); the ranking is their "normalized margin".
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.files import writing_whole
from dynaconv.judging.evaluate import evaluate
from dynaconv.recipe import Recipe
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, fit_batches, training_batches

COLUMNS = ("index", "label", "predicted", "margin", "probability_of_label", "probability_of_predicted", "data")
"""Columns of the CSV. `data` holds the first digits of the hash of the images that `index` counts in."""
HASH_DIGITS = 16


@dataclass(frozen=True)
class Candidates:
    """All images of a set, the most doubtful label first.

    Attributes:
        order: (N,) int64, indices into the set.
        margin: (N,) float, by image: probability of its label less that of the likeliest other class, -1 to 1.
        probabilities: (N, classes) float, by image, from the network that did not see it.
    """

    order: torch.Tensor
    margin: torch.Tensor
    probabilities: torch.Tensor


def assign_folds(labels: torch.Tensor, folds: int, seed: int) -> torch.Tensor:
    """Deals the images of every class out to the folds by turns.

    Args:
        labels: (N,) int64.
        folds: At least 2.
        seed: Seed of the order in which a class is dealt out.

    Returns:
        (N,) int64, each from 0 to folds - 1.

    Example:
        >>> assign_folds(torch.tensor([0, 0, 0, 0, 1, 1]), 2, seed=0).bincount().tolist()
        [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty_like(labels)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        result[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % folds
    return result


def judge_out_of_fold(
    images: ImageSet,
    recipe: Recipe,
    folds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> torch.Tensor:
    """Trains one network per fold on all other folds, and judges the fold with it.

    Args:
        images: The images to judge; at least `folds` of every class.
        recipe: How each network is trained.
        folds: At least 2; the more, the more each network has learned from, and the longer it takes.
        device: Where to train.
        say: Shows a line per fold.

    Returns:
        (N, classes) float32: class probabilities of every image, on the CPU.

    Raises:
        UserError: there are too few images.
    """
    smallest = int(torch.bincount(images.labels.cpu()).clamp(min=0)[images.labels.unique().cpu()].min())
    if smallest < folds:
        raise UserError(
            f"A class of {images.description} has {smallest} images, too few for {folds} folds; add images."
        )
    fold_of = assign_folds(images.labels.cpu(), folds, recipe.data.split_seed)
    probabilities = torch.zeros(len(images), len(images.classes))
    for fold in range(folds):
        others = images.subset((fold_of != fold).nonzero().flatten()).to(device)
        inside = (fold_of == fold).nonzero().flatten()
        one = fit_batches(recipe, len(others), say if fold == 0 else lambda line: None)
        model = build_model(one, others, device)
        history = fit(model, training_batches(one, others), [], one, device, say=say)
        judged = evaluate(model, images.subset(inside).to(device), one, "mirror" if one.augment.flip else "one")
        probabilities[inside] = functional.softmax(judged.logits, dim=1)
        say(
            f"Fold {fold + 1} of {folds}: training accuracy {history[-1].training_accuracy:.4f}, "
            f"{judged.accuracy:.4f} of the {len(inside)} images it did not see."
        )
    return probabilities


def rank_candidates(probabilities: torch.Tensor, labels: torch.Tensor) -> Candidates:
    """Ranks images by how much likelier another class is than their label; equal ones stay in order.

    Args:
        probabilities: (N, classes) float, out of fold.
        labels: (N,) int64.

    Example:
        >>> rank_candidates(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1])).order.tolist()
        [1, 0]
    """
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    others = probabilities.scatter(1, labels[:, None], -1.0).max(1).values
    margin = own - others
    return Candidates(margin.argsort(stable=True), margin, probabilities)


def write_candidates(path: Path, candidates: Candidates, images: ImageSet, most: int) -> int:
    """Writes the images whose label is not the likeliest class, the most doubtful first, `most` of them at most.

    `train --without` reads the file (data/exclusions.py).

    Returns:
        The number of rows.
    """
    doubtful = candidates.order[candidates.margin[candidates.order] < 0][:most].tolist()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    digits = images.sha256()[:HASH_DIGITS]
    for index in doubtful:
        label, predicted = int(images.labels[index]), int(candidates.probabilities[index].argmax())
        chances = [f"{float(candidates.probabilities[index, place]):.4f}" for place in (label, predicted)]
        names = (images.classes[label], images.classes[predicted])
        rows.writerow([index, *names, f"{float(candidates.margin[index]):.4f}", *chances, digits])
    with writing_whole(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    return len(doubtful)
