"""A whole run: images in, a trained and judged classifier out, with everything that its folder holds."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dynaconv.data.batches import Batches
from dynaconv.data.exclusions import read_exclusions
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, options_of, resolve
from dynaconv.data.split import Split, split_stratified
from dynaconv.device import (
    computing_in,
    describe_environment,
    keep_freed_memory,
    peak_memory_bytes,
    pick_device,
    pick_precision,
    use_threads,
)
from dynaconv.errors import UserError, WorkError
from dynaconv.judging.evaluate import Evaluation, evaluate
from dynaconv.model.network import Network
from dynaconv.recipe import Recipe, with_settings
from dynaconv.reporting.events import EventWriter
from dynaconv.reporting.figures import draw_curves, draw_grid, save_figure
from dynaconv.rundir import RESULT, RunDir
from dynaconv.training.budget import plan_epochs
from dynaconv.training.fit import Epoch, fit
from dynaconv.training.loop import Batch, DivergedError
from dynaconv.training.start import build_model, training_batches


class Track(Protocol):
    """Shows the progress of a pass over batches."""

    def __call__(self, batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        """Yields the batches unchanged; `total` is their number."""
        ...


def _untracked(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    return batches


@dataclass(frozen=True)
class TrainingData:
    """The training images of a run on its device, split.

    Attributes:
        source: The source that was read, never "auto".
        train: Images that train.
        validation: Images that validate.
        split: Where both stand among the source's training images.
        sha256: Hash of all training images of the source, before the split.
    """

    source: str
    train: ImageSet
    validation: ImageSet
    split: Split
    sha256: str


def load_training_data(recipe: Recipe, device: torch.device, say: Callable[[str], None]) -> TrainingData:
    """Reads the training images of the recipe's source and splits them; never opens the test split.

    Raises:
        UserError: the source is not there or holds what cannot be trained on.
    """
    options = options_of(recipe.data, say)
    source = resolve(recipe.data.source, options)
    images = load_images(source, "train", options)
    split = split_stratified(
        images.labels, recipe.data.validation_fraction, recipe.data.split_seed, recipe.data.max_train_images
    )
    if recipe.data.without is not None:
        left_out = read_exclusions(Path(recipe.data.without), images)
        kept = split.train[~torch.isin(split.train, left_out)]
        say(f"Left out: {len(split.train) - len(kept)} of {len(split.train)} training images ({recipe.data.without}).")
        split = dataclasses.replace(split, train=kept)
    if len(split.train) < recipe.train.batch_size:
        raise UserError(
            f"--batch-size {recipe.train.batch_size} is more than the {len(split.train)} training images of "
            f"{images.description}; set --batch-size {max(2, len(split.train))} or less, or add images."
        )
    return TrainingData(
        source=source,
        train=images.subset(split.train).to(device),
        validation=images.subset(split.validation).to(device),
        split=split,
        sha256=images.sha256(),
    )


def run_experiment(
    recipe: Recipe,
    path: Path | None = None,
    say: Callable[[str], None] = print,
    track: Track = _untracked,
    started: float | None = None,
) -> dict[str, Any]:
    """Trains, judges and draws; leaves the folder of the run.

    The test split is opened once, after the training has ended.

    Args:
        recipe: All settings.
        path: Folder of the run, made here; None takes runs/RECIPE-TIME.
        say: Shows a line to the user.
        track: Shows progress within an epoch.
        started: When the process began, by `time.time()`; None for now.

    Returns:
        What result.json holds, with the folder under "run_dir".

    Raises:
        UserError: the user must change something; told before any training wherever it can be known then.
        WorkError: the loss became NaN. The weights of the last good epoch are kept.
    """
    started = time.time() if started is None else started
    path = path or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    RunDir.require_free(path)
    device = pick_device(recipe.train.device)
    precision = pick_precision(recipe.train.precision, device, say)
    keep_freed_memory()
    use_threads(recipe.train.threads)
    data = load_training_data(recipe, device, say)
    recipe = with_settings(recipe, source=data.source)
    training_started = time.time()
    model = build_model(recipe, data.train, device)
    if recipe.train.budget is not None:
        with computing_in(precision, device):
            recipe = plan_epochs(recipe, model, data.train, len(data.validation), device, say)
    run = RunDir.create(path)
    _write_beginning(run, recipe, data, model, describe_environment(device, precision))
    say(f"{data.train.description}: {len(data.train)} training and {len(data.validation)} validation images.")

    with computing_in(precision, device):
        history = _train(run, recipe, data, model, device, say, track)
    training_seconds = time.time() - training_started

    test_images, evaluations, judging_seconds = _judge(recipe, data, model, precision)
    _draw(run, recipe, history, test_images, evaluations["test"])
    result = {
        **_describe_outcome(recipe, data, model, history, evaluations),
        "train_seconds": training_seconds + judging_seconds,
        "startup_seconds": training_started - started,
        "wall_seconds": time.time() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run.write_json(RESULT, result)
    return {**result, "run_dir": str(path)}


def _judge(
    recipe: Recipe, data: TrainingData, model: Network, precision: torch.dtype
) -> tuple[ImageSet, dict[str, Evaluation], float]:
    """Opens the test split; returns its images, the evaluation of either split, and the seconds of all evaluations.

    With test-time augmentation, there is a second evaluation of either split, its name continued by "_tta".
    """
    # What there was to say about the source was said when its training images were read.
    options = options_of(recipe.data)
    device = data.validation.images.device
    test_images = load_images(data.source, "test", options).with_classes(data.train.classes).to(device)
    started = time.time()
    evaluations: dict[str, Evaluation] = {}
    with computing_in(precision, device):
        for split, images in (("validation", data.validation), ("test", test_images)):
            if len(images) == 0:  # no image was held out
                continue
            evaluations[split] = evaluate(model, images, recipe)
            if recipe.evaluate.views != "one":
                evaluations[f"{split}_tta"] = evaluate(model, images, recipe, recipe.evaluate.views)
    return test_images, evaluations, time.time() - started


def _describe_outcome(
    recipe: Recipe,
    data: TrainingData,
    model: Network,
    history: list[Epoch],
    evaluations: dict[str, Evaluation],
) -> dict[str, Any]:
    """Returns what was trained and what it reached; training figures as in the last epoch, on augmented images."""
    validation, test = evaluations.get("validation"), evaluations["test"]
    averaged = {split: each for split, each in evaluations.items() if split.endswith("_tta")}
    return {
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "source": data.source,
        "data_sha256": data.sha256,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_second": sum(epoch.images_per_second for epoch in history) / len(history),
        "train_accuracy": history[-1].training_accuracy,
        "train_loss": history[-1].training_loss,
        "validation_accuracy": validation.accuracy if validation else None,
        "validation_loss": validation.loss if validation else None,
        "validation_images": len(data.validation),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_images": len(test.labels),
        "test_looks": 1,
        **{split.replace("_tta", "_accuracy_tta"): each.accuracy for split, each in averaged.items()},
    }


def _write_beginning(
    run: RunDir, recipe: Recipe, data: TrainingData, model: Network, environment: dict[str, Any]
) -> None:
    """Writes all that is known before the first step, the untrained weights included."""
    run.write_recipe(recipe)
    run.write_json("environment.json", {**environment, "data_sha256": data.sha256})
    run.write_json(
        "split.json",
        {
            "seed": data.split.seed,
            "validation": data.split.validation.tolist(),
            "num_train": len(data.split.train),
            "max_train_images": recipe.data.max_train_images,
        },
    )
    images = data.train.images
    run.write_json(
        "model.json",
        {
            "architecture": dataclasses.asdict(recipe.model),
            "classes": list(data.train.classes),
            "channels": images.shape[1],
            "image_size": images.shape[2],
            "normalize_mean": recipe.augment.normalize_mean,
            "normalize_std": recipe.augment.normalize_std,
        },
    )
    run.write_weights(model.state_dict())


def _train(
    run: RunDir,
    recipe: Recipe,
    data: TrainingData,
    model: Network,
    device: torch.device,
    say: Callable[[str], None],
    track: Track,
) -> list[Epoch]:
    """Fits the model, and writes metrics and weights after every epoch."""
    epochs = recipe.train.epochs
    training = training_batches(recipe, data.train)
    validation = Batches(data.validation, recipe.evaluate.evaluation_batch_size, recipe.augment)
    finished = 0
    started = time.time()
    say(f"Training {recipe.name} on {device} ({torch.get_num_threads()} threads) into {run.path}")

    def on_epoch(epoch: Epoch) -> None:
        nonlocal finished
        finished = epoch.epoch
        metrics = dataclasses.asdict(epoch)
        run.append_metrics(metrics)
        run.write_weights(model.state_dict())
        events.write(metrics)
        if epoch.epoch % recipe.train.log_every == 0 or epoch.epoch == epochs:
            say(epoch.line(epochs))

    with contextlib.closing(EventWriter(run.tensorboard)) as events:
        try:
            history = fit(model, _Tracked(training, track), validation, recipe, device, on_epoch, say)
        except DivergedError as error:
            kept = f"the weights of epoch {finished}" if finished else "the untrained weights"
            raise WorkError(
                f"{error} of epoch {finished + 1}. {kept.capitalize()} are kept in {run.path}. "
                f"Try a smaller --learning-rate than {recipe.optim.learning_rate:g}."
            ) from error
        except KeyboardInterrupt:
            kept = f"the weights of epoch {finished}" if finished else "the untrained weights"
            say(f"Stopped in epoch {finished + 1} of {epochs}; {kept} are kept in {run.path}.")
            raise
    say(f"Training finished in {time.time() - started:.2f} seconds")
    return history


class _Tracked:
    """Batches whose every pass is shown as progress."""

    def __init__(self, batches: Batches, track: Track) -> None:
        self._batches, self._track = batches, track

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._track(self._batches, len(self._batches)))


def _draw(run: RunDir, recipe: Recipe, history: list[Epoch], images: ImageSet, evaluation: Evaluation) -> None:
    """Draws the curves, and random test images with predicted and actual class."""
    save_figure(draw_curves([dataclasses.asdict(epoch) for epoch in history]), run.figure("curves"))
    count = min(recipe.evaluate.num_grid_images, len(images))
    if count == 0:
        return
    generator = torch.Generator().manual_seed(recipe.train.seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    predicted = [images.classes[index] for index in evaluation.predictions[chosen].tolist()]
    actual = [images.classes[index] for index in evaluation.labels[chosen].tolist()]
    right = sum(guess == truth for guess, truth in zip(predicted, actual, strict=True))
    title = f"{count} random test images, {right} right (of all {len(images)}: {evaluation.accuracy:.2%})"
    save_figure(draw_grid(images.images[chosen.to(images.images.device)], predicted, actual, title), run.figure("grid"))
