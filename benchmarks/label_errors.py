"""Plants wrong labels into CIFAR-10's training images and counts how many the search for label errors ranks first.

Command: python benchmarks/label_errors.py
Needs: DYNACONV_DATA. Takes: about half an hour on two cores. The test split is never opened. The labels that CIFAR-10
itself has wrong are ranked among the planted ones: they count against the search here. The first of them are drawn into
docs/figures/label-errors.png, to be judged by eye.
"""

import time
from dataclasses import replace

import torch
from record import ROOT, write_result

from dynaconv.arguments import parse_labels
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import computing_in, keep_freed_memory, pick_device, pick_precision, use_threads
from dynaconv.judging.label_errors import judge_out_of_fold, rank_candidates
from dynaconv.reporting.figures import draw_pictures, save_figure

FIGURES = ROOT / "docs" / "figures"
SHOWN = 24
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

    def say(line: str) -> None:
        print(line, flush=True)

    device = pick_device("cpu")
    precision = pick_precision(recipe.train.precision, device, say)
    with computing_in(precision, device):
        probabilities = judge_out_of_fold(replace(images, labels=labels), recipe, options.folds, device, say)
    seconds = time.perf_counter() - started
    order = rank_candidates(probabilities, labels).order
    found = {among: torch.isin(planted, order[:among]).double().mean().item() for among in AMONG}
    draw_unplanted(images, probabilities, order[~torch.isin(order, planted)][:SHOWN])
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
            precision=str(precision).removeprefix("torch."),
        )
    )


def draw_unplanted(images: ImageSet, probabilities: torch.Tensor, chosen: torch.Tensor) -> None:
    """Draws the most doubtful of CIFAR-10's own labels."""
    guesses = probabilities[chosen].argmax(1).tolist()
    captions = [
        f"image {place}\nlabel {images.classes[label]}\npredicted {images.classes[guess]}"
        for place, label, guess in zip(chosen.tolist(), images.labels[chosen].tolist(), guesses, strict=True)
    ]
    title = f"The {len(chosen)} most doubtful labels of CIFAR-10's {len(images)} training images"
    save_figure(draw_pictures(images.images[chosen], captions, title, columns=8), FIGURES / "label-errors.png")


if __name__ == "__main__":
    main()
