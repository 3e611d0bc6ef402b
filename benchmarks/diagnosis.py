"""Counts how often "undertrained" is right: the same training again with twice the epochs, on the same images.

Command: python benchmarks/diagnosis.py
Needs: DYNACONV_DATA. Takes: about half an hour on one core. Small networks on parts of CIFAR-10, with Adam and a cosine
and with Muon and a line, from lengths at which they have hardly begun to lengths at which they know their images by
heart; judged on 5,000 validation images. Better is what McNemar's exact test calls so at 5%. The test split is never
opened.
"""

import itertools
from collections import Counter
from typing import Any

import torch
from record import write_result

from dynaconv.data.batches import Batches
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.judging.diagnosis import Facts, diagnose
from dynaconv.judging.evaluate import evaluate
from dynaconv.judging.paired import Right, paired_difference
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipes import RECIPES
from dynaconv.training.fit import fit
from dynaconv.training.start import build_model, load_training_data, training_batches

NAMES = ("coursework", "fast92")
IMAGES = (1000, 6000)
EPOCHS = (4, 8, 16, 32)
"""Each is judged by the next."""
SEEDS = (0, 1)
DEVICE = torch.device("cpu")


def main() -> None:
    keep_freed_memory()
    use_threads(1)
    rows = [row for name, images, seed in itertools.product(NAMES, IMAGES, SEEDS) for row in follow(name, images, seed)]
    counts = {
        limit: {
            "trainings": len(found),
            "better_with_twice_the_epochs": sum(row["sign"] > 0 for row in found),
            "not_distinguishable": sum(row["sign"] == 0 for row in found),
            "worse": sum(row["sign"] < 0 for row in found),
            "least_gain": min(row["gain"] for row in found),
            "mean_gain": sum(row["gain"] for row in found) / len(found),
        }
        for limit in Counter(row["limit"] for row in rows)
        if (found := [row for row in rows if row["limit"] == limit])
    }
    for limit, count in counts.items():
        print(f"{limit}: {count}")
    print(write_result("diagnosis", counts, SEEDS, rows=rows))


def follow(name: str, images: int, seed: int) -> list[dict[str, Any]]:
    """Trains for each length; returns what is said about each but the last, and what the next length gains."""
    trained = [train(name, images, seed, epochs) for epochs in EPOCHS]
    rows: list[dict[str, Any]] = []
    for (epochs, limit, right, accuracy), (_, _, longer, _) in itertools.pairwise(trained):
        gain = paired_difference(right, longer)
        row = {"recipe": name, "images": images, "seed": seed, "epochs": epochs, "training_accuracy": accuracy}
        rows.append(row | {"limit": limit, "gain": gain.value, "p_value": gain.p_value, "sign": gain.sign})
        print(rows[-1], flush=True)
    return rows


def train(name: str, images: int, seed: int, epochs: int) -> tuple[int, str, Right, float]:
    """Trains once and diagnoses.

    Returns:
        The epochs; the limit that is diagnosed; (1, N) whether each validation image is right; the accuracy of the last
        epoch on training images.
    """
    recipe = small(name, images, seed, epochs)
    data = load_training_data(recipe, DEVICE, lambda line: None)
    model = build_model(recipe, data.train, DEVICE)
    validation = Batches(data.validation, recipe.evaluate.evaluation_batch_size, recipe.augment)
    history = fit(model, training_batches(recipe, data.train), validation, recipe, DEVICE)
    found = diagnose(
        Facts(
            epochs=[vars(epoch) for epoch in history],
            recipe=recipe,
            start=name,
            validation_accuracy=history[-1].validation_accuracy,
            validation_images=len(data.validation),
        )
    )
    judged = evaluate(model, data.validation, recipe)
    right = (judged.predictions == judged.labels)[None].cpu().numpy()
    return epochs, found.limit if found else "nothing is said", right, history[-1].training_accuracy


def small(name: str, images: int, seed: int, epochs: int) -> Recipe:
    settings = {"widths": (16, 32, 64), "num_convolutions": (2,), "pool_after": (1, 2), "batch_size": 50}
    settings |= {"source": "cifar10", "max_train_images": images, "seed": seed, "epochs": epochs}
    return with_settings(RECIPES[name](), **settings)


if __name__ == "__main__":
    main()
