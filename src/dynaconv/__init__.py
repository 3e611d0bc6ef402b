"""dynaconv: trains, judges and ships image classifiers for small images.

The public names are imported when they are first used, so that the command line and `dynaconv.recipe` start without
torch. Every name here is listed in `__all__` and lives in the module named beside it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaconv.data.augment import augment as augment
    from dynaconv.data.batches import Batches as Batches
    from dynaconv.data.images import ImageSet as ImageSet
    from dynaconv.data.sources import SourceOptions as SourceOptions
    from dynaconv.data.sources import load_images as load_images
    from dynaconv.data.sources import resolve as resolve
    from dynaconv.data.split import split_stratified as split_stratified
    from dynaconv.errors import UserError as UserError
    from dynaconv.errors import WorkError as WorkError
    from dynaconv.experiment import run_experiment as run_experiment
    from dynaconv.judging.evaluate import evaluate as evaluate
    from dynaconv.model.network import Backbone as Backbone
    from dynaconv.model.network import Block as Block
    from dynaconv.model.network import Classifier as Classifier
    from dynaconv.model.network import Network as Network
    from dynaconv.model.network import build_network as build_network
    from dynaconv.recipe import Recipe as Recipe
    from dynaconv.recipe import with_settings as with_settings
    from dynaconv.recipes import RECIPES as RECIPES
    from dynaconv.reporting.figures import draw_curves as draw_curves
    from dynaconv.reporting.figures import draw_grid as draw_grid
    from dynaconv.training.loop import training_epoch as training_epoch
    from dynaconv.training.loop import validation_epoch as validation_epoch

__version__ = "0.1.0"

_HOMES = {
    "augment": "data.augment",
    "Batches": "data.batches",
    "ImageSet": "data.images",
    "SourceOptions": "data.sources",
    "load_images": "data.sources",
    "resolve": "data.sources",
    "split_stratified": "data.split",
    "UserError": "errors",
    "WorkError": "errors",
    "run_experiment": "experiment",
    "evaluate": "judging.evaluate",
    "Backbone": "model.network",
    "Block": "model.network",
    "Classifier": "model.network",
    "Network": "model.network",
    "build_network": "model.network",
    "Recipe": "recipe",
    "with_settings": "recipe",
    "RECIPES": "recipes",
    "draw_curves": "reporting.figures",
    "draw_grid": "reporting.figures",
    "training_epoch": "training.loop",
    "validation_epoch": "training.loop",
}

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynaconv' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dynaconv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
