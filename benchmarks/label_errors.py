"""Plants wrong labels into CIFAR-10's training images and counts how many the search for label errors ranks first.

Command: python benchmarks/label_errors.py
Needs: DYNACONV_DATA. Takes: about half an hour on two cores. The test split is never opened. The labels that CIFAR-10
itself has wrong are ranked among the planted ones: they count against the search here.
"""

import time
from dataclasses import replace

import torch
from record import write_result

from dynaconv.arguments import parse_labels
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import keep_freed_memory, pick_device, use_threads
from dynaconv.judging.label_errors import judge_out_of_fold, rank_candidates

PLANTED = 500
AMONG = (500, 1000, 2000)


def main() -> None:
    recipe, options = parse_labels(["cifar10"])
    keep_freed_memory()
    use_threads(recipe.train.threads)
    images = load_images("cifar10", "train", options_of(recipe.data))
    generator = torch.Generator().manual_seed(0)
    planted = torch.randperm(len(images), generator=generator)[:PLANTED]
    labels = images.labels.clone()
    # To another class, each as likely as the next.
    shift = torch.randint(1, len(images.classes), (PLANTED,), generator=generator)
    labels[planted] = (labels[planted] + shift) % len(images.classes)
    started = time.perf_counter()
    probabilities = judge_out_of_fold(
        replace(images, labels=labels), recipe, options.folds, pick_device("cpu"), lambda line: print(line, flush=True)
    )
    seconds = time.perf_counter() - started
    order = rank_candidates(probabilities, labels).order
    found = {among: torch.isin(planted, order[:among]).double().mean().item() for among in AMONG}
    metrics = {f"share_found_among_{among}": {"value": share} for among, share in found.items()}
    right = (probabilities.argmax(1) == images.labels).double().mean().item()
    print(found)
    print(
        write_result(
            "label_errors",
            {**metrics, "seconds": {"value": seconds}, "out_of_fold_accuracy": {"value": right}},
            seeds=[0],
            planted=PLANTED,
            images=len(images),
            folds=options.folds,
            epochs=recipe.train.epochs,
        )
    )


if __name__ == "__main__":
    main()
