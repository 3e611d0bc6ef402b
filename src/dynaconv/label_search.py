"""The search for label errors as a whole: images in, a CSV file, a picture and a summary out."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaconv.data.sources import load_images, options_of, resolve
from dynaconv.device import computing_in, keep_freed_memory, pick_device, pick_precision, use_threads
from dynaconv.files import writing_whole
from dynaconv.judging.label_errors import judge_out_of_fold, rank_candidates, write_candidates
from dynaconv.recipe import Recipe
from dynaconv.reporting.figures import draw_pictures, save_figure
from dynaconv.rundir import RunDir

SHOWN = 40
"""Candidates on the picture."""


def search_label_errors(
    recipe: Recipe, folds: int, most: int, into: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Judges every training image by a network that did not see it, and writes the most doubtful labels.

    Args:
        recipe: How each network is trained; its source is searched. The test split is never opened.
        folds: Networks to train, at least 2.
        most: Rows of the CSV file at most.
        into: Folder that is made: candidates.csv, candidates.png, summary.json.
        say: Shows a line to the user.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the source cannot be used, or the folder holds something already.
    """
    RunDir.require_free(into, "--into")
    started = time.time()
    device = pick_device(recipe.train.device)
    precision = pick_precision(recipe.train.precision, device, say)
    keep_freed_memory()
    use_threads(recipe.train.threads)
    options = options_of(recipe.data, say)
    source = resolve(recipe.data.source, options)
    images = load_images(source, "train", options)
    say(f"{images.description}: {len(images)} images, {folds} trainings of {recipe.train.epochs} epochs.")
    with computing_in(precision, device):
        probabilities = judge_out_of_fold(images, recipe, folds, device, say)
    candidates = rank_candidates(probabilities, images.labels.cpu())
    into.mkdir(parents=True, exist_ok=True)
    rows = write_candidates(into / "candidates.csv", candidates, images, most)
    summary = {
        "source": source,
        "data_sha256": images.sha256(),
        "images": len(images),
        "folds": folds,
        "epochs": recipe.train.epochs,
        "out_of_fold_accuracy": float((probabilities.argmax(1) == images.labels.cpu()).double().mean()),
        "disputed": int((candidates.margin < 0).sum()),
        "written": rows,
        "seconds": time.time() - started,
    }
    with writing_whole(into / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if rows:
        first = candidates.order[: min(SHOWN, rows)]
        guesses = probabilities[first].argmax(1).tolist()
        captions = [
            f"image {index}\nlabel {images.classes[label]}\npredicted {images.classes[guess]}"
            for index, label, guess in zip(first.tolist(), images.labels[first].tolist(), guesses, strict=True)
        ]
        title = f"The {len(first)} most doubtful labels of {len(images)} training images"
        save_figure(draw_pictures(images.images[first], captions, title, columns=8), into / "candidates.png")
    return summary
