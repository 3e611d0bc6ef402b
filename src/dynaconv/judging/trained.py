"""What a run has trained, read back from its folder: the network with its weights, and what it was trained on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dynaconv.data.images import ImageSet
from dynaconv.data.sources import NAMED, SourceOptions, load_images, load_in_own_form, options_of
from dynaconv.errors import UserError
from dynaconv.judging.comparison import Judged
from dynaconv.model.network import Network, build_network
from dynaconv.recipe import ModelSettings, Recipe, with_settings
from dynaconv.recipe_json import read_settings
from dynaconv.rundir import RESULT, RunDir


@dataclass(frozen=True)
class Trained:
    """The outcome of a run.

    Attributes:
        run: Its folder.
        recipe: All settings of the run.
        network: In evaluation mode, with the weights that the run ended with.
        classes: Class names in the order of the network's outputs.
        channels: 1 or 3.
        image_size: Side of the images in pixels.
    """

    run: RunDir
    recipe: Recipe
    network: Network
    classes: tuple[str, ...]
    channels: int
    image_size: int


def load_trained(path: Path, device: torch.device) -> Trained:
    """Reads a run's recipe, architecture and weights.

    Args:
        path: The run's folder.
        device: Where the network will be.

    Raises:
        UserError: no run's folder, or a file of it is missing, damaged, or does not fit the others.
    """
    run = RunDir.open(path)
    recipe = run.read_recipe()
    model = run.read_json("model.json")
    where = str(path / "model.json")
    if not isinstance(model, dict):
        raise UserError(f"{where} does not describe a model; it was altered.")
    architecture = read_settings(ModelSettings, _part(model, "architecture", dict, where), where)
    classes = _part(model, "classes", list, where)
    channels, side = (_part(model, name, int, where) for name in ("channels", "image_size"))
    if len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: classes must be two names or more, received {classes!r}.")
    if channels not in (1, 3) or not 4 <= side <= 512:
        raise UserError(f"{where}: {channels} channels of {side} pixels a side are no images of this program.")
    network = build_network(architecture, channels, len(classes), side, seed=0)
    _fill(network, run.read_weights(), path)
    return Trained(run, recipe, network.to(device).eval(), tuple(classes), channels, side)


def require_finished(path: Path) -> None:
    """Raises UserError if the run in `path` has not ended."""
    if not (path / RESULT).exists():
        raise UserError(f"The run in {path} has not finished; go on with it: dynaconv resume {path}.")


def runs_in(path: Path) -> list[Path]:
    """Returns the run in a folder, or the runs with several seeds in it; raises UserError if there is none."""
    runs = (
        [path] if (path / "recipe.json").is_file() else sorted(each.parent for each in path.glob("seed-*/recipe.json"))
    )
    if not runs:
        raise UserError(f"{path} is not the folder of a run, and holds none (seed-*).")
    return runs


def read_side(path: Path, split: str) -> list[Judged]:
    """Reads what the run in a folder, or the runs with several seeds in it, predict for a split.

    Raises:
        UserError: there is none, or one has not finished or was not judged on that split.
    """
    side: list[Judged] = []
    for each in runs_in(path):
        require_finished(each)
        logits, labels, classes, digest = RunDir.open(each).read_predictions(split)
        side.append(Judged(logits.argmax(1), labels, classes, digest))
    return side


def with_source(trained: Trained, source: str) -> Trained:
    """Returns the outcome of a run whose images are elsewhere by now: what `train --data` takes."""
    return replace(trained, recipe=with_settings(trained.recipe, source=source))


def load_judged_images(trained: Trained, split: str, options: SourceOptions) -> ImageSet:
    """Reads the images that a run validated on, or the test images of its source.

    Args:
        trained: The run.
        split: "validation" or "test".
        options: How to read the source; image size and channels are those of the run.

    Raises:
        UserError: the source's images are no longer those of the run, or it held none out for validation.
    """
    source = trained.recipe.data.source
    if split == "test":
        return _load_images(trained, "test", options).with_classes(trained.classes)
    chosen = trained.run.read_json("split.json").get("validation", [])
    if not chosen:
        raise UserError(f"The run {trained.run.path} held no image out for validation; judge it with --split test.")
    images = _load_images(trained, "train", options)
    expected = trained.run.read_json("environment.json").get("data_sha256")
    if images.sha256() != expected:
        raise UserError(
            f"The images of {source} are not those that {trained.run.path} was trained on; its validation images "
            "cannot be told from its training images."
        )
    if not isinstance(chosen, list) or not all(type(place) is int and 0 <= place < len(images) for place in chosen):
        raise UserError(f"{trained.run.path / 'split.json'} names images that there are not; it was altered.")
    return images.subset(torch.tensor(chosen)).with_classes(trained.classes)


def identify(run: RunDir, split: str, images: ImageSet, recipe: Recipe) -> str:
    """Returns a hash of a split by which runs are told to have been judged on the same images, in whatever form.

    Args:
        run: Its split tells which of the training images validated.
        split: "validation" or "test".
        images: The images as they were judged.
        recipe: Says where they came from, and whether their form was changed.

    Returns:
        The hash of the images in their source's own size and channels, if those can be read again, else of `images`.
    """
    if recipe.data.image_size is None and recipe.data.channels is None:
        return images.sha256()
    own = load_in_own_form(recipe.data.source, "test" if split == "test" else "train", options_of(recipe.data))
    if own is None or set(own.classes) != set(images.classes):
        return images.sha256()
    if split == "validation":
        places = torch.tensor(run.read_json("split.json")["validation"])
        if int(places.max()) >= len(own):
            return images.sha256()
        own = own.subset(places)
    own = own.with_classes(images.classes)
    return own.sha256() if torch.equal(own.labels, images.labels.cpu()) else images.sha256()


def _load_images(trained: Trained, split: Literal["train", "test"], options: SourceOptions) -> ImageSet:
    """Reads a split of the run's source; where that is not there any more, says what can be done."""
    source = trained.recipe.data.source
    try:
        return load_images(source, split, options)
    except UserError as error:
        if source in NAMED or source.startswith("hf:") or Path(source).exists():
            raise
        raise UserError(
            f"There is no {source}, where the images of {trained.run.path} should be; name where they are with --data."
        ) from error


def _part(document: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = document.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {name} is missing or of the wrong type; it was altered.")
    return value


def _fill(network: Network, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Loads the weights; raises UserError unless they are exactly those of the network."""
    wanted = network.state_dict()
    if set(weights) != set(wanted):
        odd = sorted(set(weights) ^ set(wanted))
        raise UserError(f"The weights in {path} are not those of its model.json: {odd[0]} is on one side only.")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise UserError(
                f"The weights in {path} are not those of its model.json: {name} is {tuple(tensor.shape)} "
                f"{tensor.dtype}, not {tuple(wanted[name].shape)} {wanted[name].dtype}."
            )
    network.load_state_dict(weights)
