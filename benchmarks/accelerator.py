"""Times recipes on a CUDA device in turn with the published package airbench, and a step with and without graphs.

Commands: python benchmarks/accelerator.py steps [RECIPE]       (prints; profile of a step in $OUT/profile-RECIPE.txt)
          python benchmarks/accelerator.py race 94 ROUNDS [--SETTING VALUE ...]
          (fast94 against airbench's train94; also 96)
Needs: DYNACONV_DATA, a CUDA device, and for the race `pip install airbench` with the torchvision that it needs.

The clock of the race is airbench's: it includes the stem's computation, all epochs and the six views of the test
images; it excludes reading the images, and a warm-up before the first round. Accuracies are those of the six views.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import over_repeats, over_seeds, write_result

from dynaconv.arguments import parse_training
from dynaconv.data.batches import Batches
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import SourceOptions, load_images, options_of
from dynaconv.device import computing_in
from dynaconv.judging.evaluate import evaluate
from dynaconv.recipe import Recipe, sizes_of_epochs, with_settings
from dynaconv.recipes import RECIPES
from dynaconv.training.fit import fit
from dynaconv.training.loop import EpochState, Sums, training_epoch
from dynaconv.training.optim import build_optimizer
from dynaconv.training.replay import Replayed
from dynaconv.training.start import TrainingData, build_model, load_training_data, training_batches

DEVICE = torch.device("cuda")
OUT = Path(os.environ.get("OUT", "runs"))


def load(recipe: Recipe) -> tuple[Recipe, TrainingData]:
    recipe = with_settings(recipe, source="cifar10", validation_fraction=0.0)
    return recipe, load_training_data(recipe, DEVICE, lambda line: None)


def steps(name: str) -> None:
    """Tells the time of a step with the passes replayed and as they are, and how far the losses are apart."""
    recipe, data = load(RECIPES[name]())
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing)
    for side in sorted(set(sizes_of_epochs(recipe, recipe.train.epochs, data.train.images.shape[-1]))):
        told = []
        for replayed in (False, True):
            model = build_model(recipe, data.train, DEVICE)
            passes = Replayed(model) if replayed else model
            optimizer = build_optimizer(model, recipe.optim)
            with computing_in(torch.bfloat16, DEVICE):
                batches = list(
                    zip(
                        range(40), Batches(data.train, recipe.train.batch_size, recipe.augment, 0, [side]), strict=False
                    )
                )
                first = training_epoch(passes, [batch for _, batch in batches[:20]], criterion, optimizer, DEVICE)
                torch.cuda.synchronize()
                started = time.perf_counter()
                training_epoch(passes, [batch for _, batch in batches[20:]], criterion, optimizer, DEVICE)
                torch.cuda.synchronize()
            told.append((first.loss, (time.perf_counter() - started) / 20))
        (eager_loss, eager), (loss, graphed) = told
        print(
            f"{name} at {side}: {1e3 * eager:.2f} ms, passes replayed {1e3 * graphed:.2f} ms; "
            f"losses {eager_loss:.4f}, {loss:.4f}",
            flush=True,
        )
    with torch.profiler.profile() as profile, computing_in(torch.bfloat16, DEVICE):
        state = EpochState(Sums(DEVICE))
        training_epoch(passes, [batch for _, batch in batches[:5]], criterion, optimizer, DEVICE, 1, state)
    (OUT / f"profile-{name}.txt").write_text(profile.key_averages().table(sort_by="cuda_time_total", row_limit=45))


def ours(recipe: Recipe, data: TrainingData, test: ImageSet, seed: int) -> tuple[float, float]:
    """Returns seconds and the accuracy of one training."""
    recipe = with_settings(recipe, seed=seed)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with computing_in(torch.bfloat16, DEVICE):
        model = build_model(recipe, data.train, DEVICE)
        none_held_out = Batches(data.validation, recipe.train.batch_size, recipe.augment)
        fit(model, training_batches(recipe, data.train), none_held_out, recipe, DEVICE)
        accuracy = evaluate(model, test, with_settings(recipe, evaluation_batch_size=2000), "six").accuracy
    return time.perf_counter() - started, accuracy


def theirs(level: str) -> tuple[float, float]:
    """Returns what airbench prints of one training: seconds and the accuracy of the six views."""
    import airbench

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        getattr(airbench, f"train{level}")()
    row = next(line for line in reversed(printed.getvalue().splitlines()) if "eval" in line)
    accuracy, seconds = [float(number) for number in re.findall(r"\d+\.\d+", row)][-2:]
    return seconds, accuracy


def race(level: str, rounds: int, words: list[str]) -> None:
    recipe, data = load(parse_training([f"fast{level}", *words])[0])
    test = load_images("cifar10", "test", options_of(recipe.data)).to(DEVICE)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("cifar10").mkdir()
        for split in ("train", "test"):
            images = load_images("cifar10", split, SourceOptions())  # as they are, whatever ours trains on
            stored = {"images": images.images.permute(0, 2, 3, 1), "labels": images.labels}
            torch.save({**stored, "classes": list(images.classes)}, f"cifar10/{split}.pt")
        import airbench

        getattr(airbench, f"warmup{level}")()
        ours(with_settings(recipe, epochs=len(recipe.train.train_scales) or 1), data, test, 1000)
        outcomes: dict[str, list[tuple[float, float]]] = {f"fast{level}": [], f"airbench{level}": []}
        for seed in range(rounds):
            for name, values in outcomes.items():
                values.append(ours(recipe, data, test, seed) if name.startswith("fast") else theirs(level))
                print(f"{name}, round {seed}: {values[-1][0]:.2f} s, {values[-1][1]:.4f}", flush=True)
    mine, other = outcomes.values()
    metrics = {
        **{
            f"{name}_{figure}": over([value[place] for value in values])
            for name, values in outcomes.items()
            for place, (figure, over) in enumerate((("seconds", over_repeats), ("test_accuracy_tta", over_seeds)))
        },
        "times_airbench": over_repeats([a / b for (a, _), (b, _) in zip(mine, other, strict=True)]),
    }
    more = {"words": words, "recipe": dataclasses.asdict(recipe)}
    print(write_result(f"race-{level}", metrics, list(range(rounds)), DEVICE, **more))


def main() -> None:
    match sys.argv[1:]:
        case ["steps", *names]:
            for name in names or ["fast92"]:
                steps(name)
        case ["race", level, rounds, *words]:
            race(level, int(rounds), words)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
