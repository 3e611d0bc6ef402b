"""A whole run: images in, a trained and judged classifier out, with everything that its folder holds."""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.batches import Batches
from dynaconv.data.check import glance
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import computing_in, peak_memory_bytes
from dynaconv.errors import UserError, WorkError
from dynaconv.evaluation import random_places, store_familiarity, store_judgement
from dynaconv.judging.evaluate import Evaluation, evaluate
from dynaconv.judging.judgement import calibrate
from dynaconv.judging.mixing import CollapseWatch
from dynaconv.model.network import Network, count_flops
from dynaconv.recipe import Recipe, parse_duration, sizes_of_epochs, with_settings
from dynaconv.reporting.events import EventWriter
from dynaconv.reporting.figures import draw_curves, draw_grid, save_figure
from dynaconv.rundir import CALIBRATION, RESULT, RunDir
from dynaconv.training.budget import plan_epochs
from dynaconv.training.fit import Epoch, fit
from dynaconv.training.keeping import Keeper
from dynaconv.training.loop import DivergedError
from dynaconv.training.machine import describe_machine, set_up_machine
from dynaconv.training.proof import prove_repeat, prove_resume
from dynaconv.training.start import TrainingData, build_model, fit_batches, load_training_data, training_batches
from dynaconv.training.state import State
from dynaconv.training.tracked import Track, Tracked, untracked

WATCHED_IMAGES = 100
"""Training images that are looked at after every epoch, to see whether a mixture has collapsed."""


def run_experiment(
    recipe: Recipe,
    path: Path | None = None,
    say: Callable[[str], None] = print,
    track: Track = untracked,
    started: float | None = None,
    expect: Callable[[Recipe], str | None] = lambda recipe: None,
) -> dict[str, Any]:
    """Trains, judges and draws; leaves the folder of the run.

    The test split is opened once, after the training has ended.

    Args:
        recipe: All settings.
        path: Folder of the run, made here; None takes runs/RECIPE-TIME.
        say: Shows a line to the user.
        track: Shows progress within an epoch.
        started: When the process began, by `time.time()`; None for now.
        expect: Tells what a recipe whose epochs were planned for a budget can be expected to reach.

    Returns:
        What result.json holds, with the folder under "run_dir".

    Raises:
        UserError: the user must change something; told before any training wherever it can be known then.
        WorkError: the loss became NaN. The weights of the last good epoch are kept.
    """
    started = time.time() if started is None else started
    path = path or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    RunDir.require_free(path)
    device, precision = set_up_machine(recipe, say)
    data = load_training_data(recipe, device, say)
    # Absolute, so that the stored recipe names the same from wherever it is trained again.
    without = recipe.data.without and str(Path(recipe.data.without).expanduser().resolve())
    recipe = fit_batches(with_settings(recipe, source=data.source, without=without), len(data.train), say)
    if seen := glance(data.train):
        say(f"{seen} {data.source}.")
    clock = _Clock(started)
    model = build_model(recipe, data.train, device)
    if recipe.train.budget is not None:
        with computing_in(precision, device):
            recipe = plan_epochs(recipe, model, data.train, len(data.validation), device, say)
        if told := expect(recipe):
            say(told)
    run = RunDir.create(path)
    with run.locked():
        _write_beginning(run, recipe, data, model, describe_machine(recipe, device, precision))
        say(f"{data.train.description}: {len(data.train)} training and {len(data.validation)} validation images.")
        return _train_and_judge(_Work(run, recipe, data, model, precision, say, track, clock))


def resume_experiment(
    path: Path, say: Callable[[str], None] = print, track: Track = untracked, started: float | None = None
) -> dict[str, Any]:
    """Goes on with a run that was stopped, from its last stored state, to the result of a run that never was.

    That result is the same bit for bit on the same device, thread count and versions; where these differ, it is said.
    Where no state was stored yet, the training starts anew, from the same seed.

    Args:
        path: Folder of the run.
        say: Shows a line to the user.
        track: Shows progress within an epoch.
        started: When the process began, by `time.time()`; None for now.

    Returns:
        As `run_experiment`.

    Raises:
        UserError: there is no such run, it has ended, another process is in it, or its images are no longer the same.
        WorkError: as in `run_experiment`.
    """
    started = time.time() if started is None else started
    run = RunDir.open(path)
    if (path / RESULT).exists():
        raise UserError(f"The run in {path} has ended; there is nothing to go on with.")
    with run.locked():
        recipe = run.read_recipe()
        device, precision = set_up_machine(recipe, say)
        data = load_training_data(recipe, device, say)
        model = build_model(recipe, data.train, device)
        run.remove_unfinished()
        if run.has_begun:
            _note_changes(run, data, describe_machine(recipe, device, precision), say)
        else:
            _write_beginning(run, recipe, data, model, describe_machine(recipe, device, precision))
        stored = run.read_state(say)
        begin = State(*stored) if stored else None
        facts: dict[str, Any] = begin.facts if begin else {"history": [], "train_seconds": 0.0}
        run.write_metrics(facts["history"])
        if begin:
            say(f"Going on in epoch {facts['epoch']} of {recipe.train.epochs}, after {facts['updates']} updates.")
        else:
            say("No state was stored yet: the training starts anew.")
        clock = _Clock(started, facts["train_seconds"])
        return _train_and_judge(_Work(run, recipe, data, model, precision, say, track, clock, begin))


def check_training(recipe: Recipe, resume: bool, repeat: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Proves in a few updates that a training of the recipe can be resumed, or repeated, on this machine.

    Returns:
        What was proved, in a sentence each, under "resume" and "repeat". No run is made.

    Raises:
        UserError: as `run_experiment`.
        WorkError: it is not so; names the first update and tensor that differ.
    """
    device, precision = set_up_machine(recipe, say)
    images = load_training_data(recipe, device, say).train
    recipe = fit_batches(recipe, len(images), say)
    proved: dict[str, Any] = {}
    with computing_in(precision, device):
        for name, wanted, prove in (("resume", resume, prove_resume), ("repeat", repeat, prove_repeat)):
            if wanted:
                proved[name] = prove(recipe, images, say)
                say(proved[name])
    return proved


class _Clock:
    """The times of a run, those before a stop included."""

    def __init__(self, started: float, trained_before: float = 0.0) -> None:
        """Starts the time of training now; the process began at `started`."""
        self.started = started
        self.training_started = time.time()
        self.trained_before = trained_before

    def trained(self) -> float:
        """Returns the seconds of training so far."""
        return self.trained_before + time.time() - self.training_started


@dataclass(frozen=True)
class _Work:
    """A run at its beginning, or where it goes on."""

    run: RunDir
    recipe: Recipe
    data: TrainingData
    model: Network
    precision: torch.dtype
    say: Callable[[str], None]
    track: Track
    clock: _Clock
    begin: State | None = None


def _note_changes(run: RunDir, data: TrainingData, now: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuses other images than those of the run's beginning; says and stores what else is not as it was then."""
    then = run.read_json("environment.json")
    if not isinstance(then, dict) or then.get("data_sha256") != data.sha256:
        raise UserError(
            f"The training images of {data.source} are not those that the run in {run.path} began with; "
            "bring them back, or start a new run."
        )
    # Runs that do not tell had torch's transforms, and were judged by nobody knows whom.
    before = {"transforms": "torch", "judging": now["judging"], **then}
    machine = ("device_name", "cpu_capability", "threads", "precision", "packages")
    changed = [name for name in (*machine, "convolutions", "transforms", "judging") if before.get(name) != now[name]]
    if changed:
        say(f"Not as at the run's beginning: {', '.join(changed)}. The result may differ in its last digits.")
    run.write_json("environment.json", {**then, "resumed": [*then.get("resumed", []), now]})


def _train_and_judge(work: _Work) -> dict[str, Any]:
    """Trains to the end, judges, draws, and writes the result."""
    run, recipe, data, model = work.run, work.recipe, work.data, work.model
    with computing_in(work.precision, data.train.images.device):
        history = _train(work)
    training_seconds = work.clock.trained()
    run.add_look("the end of the training")
    test_images, evaluations, judging_seconds = _judge(recipe, data, model)
    _draw(run, recipe, history, test_images, evaluations["test"])
    calibration = calibrate(evaluations.get("validation"), recipe.evaluate.wanted_precision)
    run.write_json(CALIBRATION, calibration.as_dict())
    store_familiarity(run, model, data.train, data.validation, recipe)
    for split, images in (("validation", data.validation), ("test", test_images)):
        if split in evaluations:
            store_judgement(run, split, evaluations[split], images, calibration, recipe)
    result = {
        **_describe_outcome(recipe, data, model, history, evaluations),
        "test_looks": len(run.looks()),
        "train_seconds": training_seconds + judging_seconds,
        "startup_seconds": work.clock.training_started - work.clock.started,
        "wall_seconds": time.time() - work.clock.started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run.write_json(RESULT, result)
    run.remove_state()
    return {**result, "run_dir": str(run.path)}


def _judge(recipe: Recipe, data: TrainingData, model: Network) -> tuple[ImageSet, dict[str, Evaluation], float]:
    """Opens the test split; returns its images, the evaluation of either split, and the seconds of all evaluations.

    It is judged in float32, whatever it was trained in, so that what is shipped is what was judged. With test-time
    augmentation, there is a second evaluation of either split, its name continued by "_tta".
    """
    # What there was to say about the source was said when its training images were read.
    options = options_of(recipe.data)
    device = data.validation.images.device
    test_images = load_images(data.source, "test", options).with_classes(data.train.classes).to(device)
    started = time.time()
    evaluations: dict[str, Evaluation] = {}
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
    _, channels, side, _ = data.train.images.shape
    # Backward costs twice the forward pass: one product towards the input, one towards the kernel.
    passes = [count_flops(model, channels, size) for size in sizes_of_epochs(recipe, len(history), side)]
    averaged = {split: each for split, each in evaluations.items() if split.endswith("_tta")}
    return {
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "source": data.source,
        "data_sha256": data.sha256,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_flops": count_flops(model, channels, side),
        "training_flops": 3 * len(data.train) * sum(passes),
        "images_per_second": statistics.harmonic_mean([epoch.images_per_second for epoch in history]),
        "train_accuracy": history[-1].training_accuracy,
        "train_loss": history[-1].training_loss,
        "validation_accuracy": validation.accuracy if validation else None,
        "validation_loss": validation.loss if validation else None,
        "validation_images": len(data.validation),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_images": len(test.labels),
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


def _train(work: _Work) -> list[Epoch]:
    """Fits the model, and writes metrics and weights after every epoch, and the state from time to time."""
    run, recipe, model, say = work.run, work.recipe, work.model, work.say
    epochs = recipe.train.epochs
    device = work.data.train.images.device
    training = training_batches(recipe, work.data.train)
    validation = Batches(work.data.validation, recipe.evaluate.evaluation_batch_size, recipe.augment)
    watch = CollapseWatch(normalize(to_tensor(work.data.train.images[:WATCHED_IMAGES]), recipe.augment), say)
    finished = work.begin.facts["epoch"] - 1 if work.begin else 0
    started = time.time()
    keeper = Keeper(run, parse_duration(recipe.train.checkpoint_every), work.clock.trained, say)
    say(f"Training {recipe.name} on {device} ({torch.get_num_threads()} threads) into {run.path}")

    def on_epoch(epoch: Epoch) -> None:
        nonlocal finished
        finished = epoch.epoch
        metrics = dataclasses.asdict(epoch)
        run.append_metrics(metrics)
        run.write_weights(model.state_dict())
        events.write(metrics)
        watch.look(model)
        if epoch.epoch % recipe.train.log_every == 0 or epoch.epoch == epochs:
            say(epoch.line(epochs))

    def kept() -> str:
        return f"the weights of epoch {finished}" if finished else "the untrained weights"

    with contextlib.closing(EventWriter(run.tensorboard)) as events, keeper.stopping_gently():
        try:
            tracked = Tracked(training, work.track)
            history = fit(model, tracked, validation, recipe, device, on_epoch, say, keeper, work.begin)
        except DivergedError as error:
            raise WorkError(
                f"{error} of epoch {finished + 1}. {kept().capitalize()} are kept in {run.path}. "
                f"Try a smaller --learning-rate than {recipe.optim.learning_rate:g}."
            ) from error
        except KeyboardInterrupt:
            say(f"Stopped in epoch {finished + 1} of {epochs}; {kept()} are kept in {run.path}.")
            say(f"Go on with: dynaconv resume {run.path}")
            raise
    say(f"Training finished in {time.time() - started:.2f} seconds")
    return history


def _draw(run: RunDir, recipe: Recipe, history: list[Epoch], images: ImageSet, evaluation: Evaluation) -> None:
    """Draws the curves, and random test images with predicted and actual class."""
    save_figure(draw_curves([dataclasses.asdict(epoch) for epoch in history]), run.figure("curves"))
    count = min(recipe.evaluate.num_grid_images, len(images))
    if count == 0:
        return
    chosen = random_places(len(images), count, recipe.train.seed)
    predicted = [images.classes[index] for index in evaluation.predictions[chosen].tolist()]
    actual = [images.classes[index] for index in evaluation.labels[chosen].tolist()]
    right = sum(guess == truth for guess, truth in zip(predicted, actual, strict=True))
    title = f"{count} random test images, {right} right (of all {len(images)}: {evaluation.accuracy:.2%})"
    save_figure(draw_grid(images.images[chosen.to(images.images.device)], predicted, actual, title), run.figure("grid"))
