"""One recipe trained from several seeds: a folder of runs, and what they reach on average."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaconv.errors import UserError
from dynaconv.experiment import resume_experiment, run_experiment
from dynaconv.files import writing_whole
from dynaconv.judging.comparison import spread
from dynaconv.recipe import Recipe, with_settings
from dynaconv.recipe_json import load_recipe, to_json
from dynaconv.rundir import RESULT, RunDir
from dynaconv.training.tracked import Track, untracked

PLAN, SUMMARY = "seeds.json", "summary.json"
FIGURES = ("test_accuracy", "validation_accuracy", "test_accuracy_tta", "test_loss", "train_seconds")


def run_seeds(
    recipe: Recipe,
    seeds: int,
    path: Path | None = None,
    say: Callable[[str], None] = print,
    track: Track = untracked,
) -> dict[str, Any]:
    """Trains a recipe from `seeds` seeds, the recipe's own and those that follow, each into a folder of its own.

    Args:
        recipe: All settings.
        seeds: How many, at least 2.
        path: Folder that is made, with a run in seed-N for each; None takes runs/RECIPE-seeds-TIME.
        say: Shows a line to the user.
        track: Shows progress within an epoch.

    Returns:
        What summary.json holds: for every figure its values, mean, standard deviation and 95% interval of the mean.

    Raises:
        UserError, WorkError: as `run_experiment`. The seeds that ended are kept; `resume_seeds` goes on.
    """
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path = path or Path("runs") / f"{recipe.name}-seeds-{stamp}"
    RunDir.require_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be made: {error.strerror or error}.") from error
    _write(path / "recipe-of-all.json", to_json(recipe))
    _write(path / PLAN, json.dumps([recipe.train.seed + place for place in range(seeds)]) + "\n")
    return resume_seeds(path, say, track)


def resume_seeds(path: Path, say: Callable[[str], None] = print, track: Track = untracked) -> dict[str, Any]:
    """Goes on with what `run_seeds` began: finished seeds are kept, a stopped one is resumed.

    Arguments, result and errors as there.
    """
    recipe = load_recipe(path / "recipe-of-all.json")
    try:
        plan = json.loads((path / PLAN).read_text())
        sound = isinstance(plan, list) and all(isinstance(seed, int) for seed in plan) and plan
    except (OSError, ValueError) as error:
        raise UserError(f"{path / PLAN} cannot be read: {error}.") from error
    if not sound:
        raise UserError(f"{path / PLAN} is no list of seeds; it was altered.")
    results: list[dict[str, Any]] = []
    for place, seed in enumerate(plan, start=1):
        folder = path / f"seed-{seed}"
        if (folder / RESULT).exists():
            results.append(RunDir.open(folder).read_json(RESULT))
            continue
        say(f"Seed {seed}, {place} of {len(plan)}")
        if (folder / "recipe.json").exists():
            results.append(resume_experiment(folder, say, track))
        else:
            results.append(run_experiment(with_settings(recipe, seed=seed), folder, say, track))
    summary: dict[str, Any] = {"recipe": recipe.name, "seeds": plan}
    for name in FIGURES:
        values = [result.get(name) for result in results]
        if None not in values:
            most = 1.0 if "accuracy" in name else math.inf
            summary[name] = spread([float(value) for value in values if value is not None], most).as_dict()
    _write(path / SUMMARY, json.dumps(summary, indent=2) + "\n")
    found = summary["test_accuracy"]
    interval = (
        f", 95% interval of the mean {found['low']:.4f} to {found['high']:.4f}" if found["sd"] is not None else ""
    )
    deviation = f", standard deviation {found['sd']:.4f}" if found["sd"] is not None else ""
    say(f"Test accuracy over {len(plan)} seeds: mean {found['mean']:.4f}{deviation}{interval}")
    return {**summary, "run_dir": str(path)}


def _write(path: Path, text: str) -> None:
    with writing_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
