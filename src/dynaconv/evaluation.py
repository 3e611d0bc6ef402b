"""The judgement of runs: one after its training or whenever it is asked for, and two against each other."""

import base64
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.cifar10 import CLASSES
from dynaconv.data.images import ImageSet
from dynaconv.data.pictures import change_form
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import keep_freed_memory, pick_device, use_threads
from dynaconv.errors import UserError
from dynaconv.files import making_whole
from dynaconv.judging.comparison import Comparison, compare, tell_classes, tell_scope, tell_test, tell_verdict
from dynaconv.judging.evaluate import Evaluation, evaluate
from dynaconv.judging.explain import METHODS, overlay
from dynaconv.judging.explain import explain as explain_images
from dynaconv.judging.familiarity import measure_familiarity
from dynaconv.judging.judgement import Calibration, calibrate, judge, tell, worst_mistakes
from dynaconv.judging.mixing import view_mixture
from dynaconv.judging.neighbours import collect_neighbours
from dynaconv.judging.robustness import (
    Block,
    Robustness,
    judge_blocks,
    judge_robustness,
    read_cifar10_1,
    read_cifar10_c,
)
from dynaconv.judging.trained import (
    Trained,
    identify,
    load_judged_images,
    load_trained,
    read_side,
    require_finished,
    runs_in,
    with_source,
)
from dynaconv.model.judged import as_judged
from dynaconv.model.network import Network
from dynaconv.recipe import Recipe
from dynaconv.reporting.figures import draw_mixture, draw_pictures, save_figure, to_png
from dynaconv.rundir import CALIBRATION, FAMILIARITY, NEIGHBOURS, RunDir
from dynaconv.training.start import load_training_data

SHOWN = 20
"""Pictures on a sheet."""
EXPLAINED = 8
"""Mistakes for which it is shown where the network looked."""


def store_judgement(
    run: RunDir, split: str, evaluation: Evaluation, images: ImageSet, calibration: Calibration, recipe: Recipe
) -> dict[str, Any]:
    """Writes what a run's network says about a split: figures, predictions, and its surest mistakes as a picture.

    Args:
        run: The run.
        split: "validation" or "test".
        evaluation: Of the network on `images`, one view each.
        images: The images of the split, in the classes of the network.
        calibration: Fitted on the validation images.
        recipe: Says where the images came from; its seed chooses random pictures.

    Returns:
        What evaluation-SPLIT.json holds.
    """
    document = {"split": split, "views": "one", **judge(evaluation, images.classes, calibration)}
    run.write_json(f"evaluation-{split}.json", document)
    digest = identify(run, split, images, recipe)
    run.write_predictions(split, evaluation.logits, evaluation.labels, images.classes, digest)
    worst = worst_mistakes(evaluation, SHOWN)
    chosen = random_places(len(images), SHOWN, recipe.train.seed)
    pictures = {"random": _picture(images, evaluation, chosen), "mistakes": _picture(images, evaluation, worst)}
    run.write_json(f"pictures-{split}.json", pictures)
    if len(worst):
        sure = evaluation.logits.softmax(1).amax(1)
        captions = [
            f"{images.classes[evaluation.predictions[place]]}, {sure[place]:.0%} sure\n"
            f"actual: {images.classes[evaluation.labels[place]]}"
            for place in worst
        ]
        title = f"The {len(worst)} surest mistakes on the {split} images"
        shown = images.images[worst.to(images.images.device)]
        save_figure(draw_pictures(shown, captions, title, 5), run.figure(f"mistakes-{split}"))
    return document


def store_familiarity(run: RunDir, network: Network, training: ImageSet, validation: ImageSet, recipe: Recipe) -> None:
    """Writes where the training images lie, so that pictures unlike them are told; not without validation images."""
    found = measure_familiarity(network, training, validation, recipe)
    if found is not None:
        run.write_tensors(FAMILIARITY, found.as_tensors())


def _keep_neighbours(trained: Trained, device: torch.device, say: Callable[[str], None]) -> None:
    data = load_training_data(trained.recipe, device, lambda line: None)
    if data.sha256 != trained.run.read_json("environment.json").get("data_sha256"):
        raise UserError(f"The images of {data.source} are not those that {trained.run.path} was trained on.")
    training = data.train.with_classes(trained.classes)
    found = collect_neighbours(trained.network, training, trained.recipe)
    trained.run.write_tensors(NEIGHBOURS, found.as_tensors())
    store_familiarity(trained.run, trained.network, training, data.validation, trained.recipe)
    say(f"Kept {len(found.labels)} training images in {trained.run.path / NEIGHBOURS}.")


def random_places(images: int, count: int, seed: int) -> torch.Tensor:
    """Returns the places of `count` random images, fewer where there are fewer; the seed chooses them."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count]


def _picture(images: ImageSet, evaluation: Evaluation, places: torch.Tensor) -> list[dict[str, Any]]:
    """Returns the pictures at some places with what is said about them, as JSON values."""
    sure = evaluation.logits.softmax(1).amax(1)
    return [
        {
            "place": place,
            "label": images.classes[int(evaluation.labels[place])],
            "prediction": images.classes[int(evaluation.predictions[place])],
            "confidence": float(sure[place]),
            "png": base64.b64encode(to_png(images.images[place])).decode(),
        }
        for place in places.tolist()
    ]


def evaluate_run(
    path: Path,
    split: str = "validation",
    views: str = "one",
    mixture: bool = False,
    explain: bool = False,
    robustness: bool = False,
    neighbours: bool = False,
    cifar10_c: Path | None = None,
    cifar10_1: Path | None = None,
    source: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judges the network of a finished run again, and stores what was found in its folder.

    Args:
        path: Folder of the run.
        split: "validation", or "test", which is recorded in the run as a look at the test images.
        views: "one", "mirror" or "six": the views whose logits are averaged.
        mixture: Describe what the mixtures of the network do, and what is lost with fixed weights.
        explain: Show where the network looked in its surest mistakes.
        robustness: Judge 2,000 images under this project's own corruptions as well.
        neighbours: Keep training images and where the network puts them, so that `serve` shows the most alike.
        cifar10_c: Folder with the files of CIFAR-10-C, judged as well.
        cifar10_1: Folder with the files of CIFAR-10.1, judged as well.
        source: Where the run's images are now; None takes the source that the run names.
        say: Shows a line to the user.

    Returns:
        The figures, as `judge` has them; more under "mixture", and under "robustness" by name, where asked for.

    Raises:
        UserError: no finished run, other images than those of the run, or files that are not what they should be.
    """
    device = pick_device("auto")
    trained = load_finished(path, device)
    if source is not None:
        trained = with_source(trained, source)
    keep_freed_memory()
    use_threads(trained.recipe.train.threads)
    others = _read_others(trained, cifar10_c, cifar10_1)
    with trained.run.locked():  # two at once would lose looks, and mix what they found
        document = _judge_split(trained, split, views, device, say)
        images = _load(trained, split, device) if robustness or mixture or explain else None
        view = view_mixture(trained.network, images, trained.recipe).as_dict() if images and mixture else None
        if images is not None and explain:
            _explain_mistakes(trained, split, images, say)
        if neighbours:
            _keep_neighbours(trained, device, say)
        found: dict[str, Robustness] = {}
        predict = _predictor(trained, device)
        if images is not None and robustness:
            found["own"] = judge_robustness(predict, images.images, images.labels)
        found |= {name: judge_blocks(predict, blocks, name) for name, blocks in others}
        if view is not None:
            _store_mixture(trained.run, view, split, say)
            document = {**document, "mixture": view}
        return {**document, **_store_robustness(trained.run, split, found, say)}


def _read_others(trained: Trained, cifar10_c: Path | None, cifar10_1: Path | None) -> list[tuple[str, Iterator[Block]]]:
    if (cifar10_c or cifar10_1) and trained.classes != CLASSES:
        raise UserError(
            f"The classes of {trained.run.path} are not those of CIFAR-10; it cannot be judged on their images."
        )
    others = [("CIFAR-10-C", read_cifar10_c(cifar10_c))] if cifar10_c else []
    return others + ([("CIFAR-10.1 v6", read_cifar10_1(cifar10_1))] if cifar10_1 else [])


def _store_robustness(
    run: RunDir, split: str, found: dict[str, Robustness], say: Callable[[str], None]
) -> dict[str, Any]:
    if not found:
        return {}
    for each in found.values():
        _tell_robustness(each, say)
    stored = {name: each.as_dict() for name, each in found.items()}
    run.write_json(f"robustness-{split}.json", stored)
    return {"robustness": stored}


def _store_mixture(run: RunDir, view: dict[str, Any], split: str, say: Callable[[str], None]) -> None:
    run.write_json(f"mixture-{split}.json", view)
    if any(len(block["kernel_sizes"]) > 1 for block in view["blocks"]):
        save_figure(draw_mixture(view), run.figure(f"mixture-{split}"))
    for line in view["words"]:
        say(line)


def _explain_mistakes(trained: Trained, split: str, images: ImageSet, say: Callable[[str], None]) -> None:
    """Writes where the network looked in its surest mistakes: what spoke for the class it took them for."""
    document = trained.run.read_json(f"pictures-{split}.json")
    told = document["mistakes"][:EXPLAINED]
    if not told:
        say("No image is misclassified: there is no mistake to explain.")
        return
    chosen = images.images[torch.tensor([each["place"] for each in told]).to(images.images.device)]
    targets = torch.tensor([images.classes.index(each["prediction"]) for each in told], device=chosen.device)
    found = explain_images(trained.network, normalize(to_tensor(chosen), trained.recipe.augment), targets)
    shown: list[torch.Tensor] = []
    captions: list[str] = []
    for place, each in enumerate(told):
        plain = chosen[place].cpu().expand(3, -1, -1).repeat_interleave(3, 1).repeat_interleave(3, 2)
        maps = {name: overlay(chosen[place].cpu(), getattr(found, name)[place]) for name in METHODS}
        each["explained"] = {
            METHODS[name]: base64.b64encode(to_png(picture)).decode() for name, picture in maps.items()
        }
        shown += [plain, *maps.values()]
        captions += [f"{each['prediction']}, {each['confidence']:.0%} sure\nactual: {each['label']}", *METHODS.values()]
    trained.run.write_json(f"pictures-{split}.json", document)
    path = trained.run.figure(f"explained-{split}")
    title = "What spoke for (orange) and against (blue) the predicted class"
    save_figure(draw_pictures(torch.stack(shown), captions, title, 4), path)
    say(f"Where the network looked in its {len(told)} surest mistakes: {path}")


def load_finished(path: Path, device: torch.device) -> Trained:
    """Reads the network of a run that has ended; raises UserError for one that has not."""
    trained = load_trained(path, device)
    require_finished(path)
    return trained


def _judge_split(
    trained: Trained, split: str, views: str, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    run, recipe = trained.run, trained.recipe

    def look(which: str) -> tuple[ImageSet, Evaluation]:
        images = _load(trained, which, device)
        return images, evaluate(trained.network, images, recipe, views)

    held_out = bool(run.read_json("split.json").get("validation"))
    if split == "test" and views == "one" and (run.path / CALIBRATION).exists():
        validation = None
        calibration = Calibration.from_dict(run.read_json(CALIBRATION), str(run.path / CALIBRATION))
    else:
        validation = look("validation") if held_out else None
        calibration = calibrate(validation and validation[1], recipe.evaluate.wanted_precision)
    if split == "test":
        count = run.add_look(shlex.join(["dynaconv", *sys.argv[1:]]))
        say(f"This is look {count} at the test images by this run; each is recorded.")
        images, evaluation = look("test")
    elif validation is None:
        raise UserError(f"The run {run.path} held no image out for validation; judge it with --split test.")
    else:
        images, evaluation = validation
    if views == "one":
        run.write_json(CALIBRATION, calibration.as_dict())
        document = store_judgement(run, split, evaluation, images, calibration, recipe)
    else:
        document = {"split": split, "views": views, **judge(evaluation, images.classes, calibration)}
        run.write_json(f"evaluation-{split}-{views}.json", document)
    for line in tell(document, split if views == "one" else f"{split}, {views} views averaged"):
        say(line)
    return document


def _load(trained: Trained, split: str, device: torch.device) -> ImageSet:
    return load_judged_images(trained, split, options_of(trained.recipe.data)).to(device)


def _predictor(trained: Trained, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    forward = as_judged(trained.network)

    def predict(batch: torch.Tensor) -> torch.Tensor:
        seen = change_form(batch, trained.image_size, trained.channels)  # files of others know nothing of the run's
        return forward(normalize(to_tensor(seen.to(device)), trained.recipe.augment)).float().cpu()

    return predict


def _tell_robustness(found: Robustness, say: Callable[[str], None]) -> None:
    clean = f", {found.clean.value:.2%} uncorrupted" if found.clean else ""
    say(f"{found.name}: {found.mean:.2%} on average{clean}; worst: {found.worst.corruption}, severity "
        f"{found.worst.severity}, {found.worst.score.value:.2%}")  # fmt: skip
    for name, accuracy in found.by_corruption.items():
        say(f"  {name:<22} {accuracy:.2%}")


def compare_runs(
    first: Path, second: Path, split: str = "test", into: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Says whether one run, or one recipe with several seeds, is really better than another on the same images.

    Args:
        first: Folder of a finished run, or one that holds several as `train --seeds` makes it.
        second: As `first`.
        split: The images to compare on: "test" or "validation". Their predictions were stored when they were judged.
        into: Folder that is made for comparison.json and a picture of images that flipped; None writes nothing.
        say: Shows a line to the user.

    Returns:
        `Comparison.as_dict`.

    Raises:
        UserError: no finished runs, not judged on the same images, or a run on both sides.
    """
    if into is not None:
        RunDir.require_free(into, "--into")
    names = (str(first), str(second))
    if first.resolve() == second.resolve():
        raise UserError(f"{first} and {second} are the same folder; compare two runs.")
    sides = read_side(first, split), read_side(second, split)
    if shared := {each.resolve() for each in runs_in(first)} & {each.resolve() for each in runs_in(second)}:
        raise UserError(f"The run {min(shared)} is on both sides; compare runs that differ.")
    found = compare(*sides, names)
    for line in (tell_verdict(found), tell_scope(found), tell_test(found), *tell_classes(found)):
        say(line)
    if into is not None:
        with making_whole(into) as draft:
            (draft / "comparison.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n")
            _draw_flips(found, first, second, split, draft / "flips.png", say)
        say(f"Written to {into}: {', '.join(sorted(path.name for path in into.iterdir()))}")
    return found.as_dict()


def _draw_flips(
    found: Comparison, first: Path, second: Path, split: str, path: Path, say: Callable[[str], None]
) -> None:
    """Draws images that one side has right and the other wrong, where the images are at hand."""
    half = SHOWN // 2
    lost, gained = found.right_to_wrong.indices[:half], found.wrong_to_right.indices[:half]
    if not lost and not gained:
        return
    run = RunDir.open(runs_in(first)[0])
    recipe = run.read_recipe()
    options = options_of(recipe.data)
    logits, _, classes, digest = run.read_predictions(split)
    try:
        images = load_images(recipe.data.source, "test" if split == "test" else "train", options)
    except UserError as error:
        say(f"The images that flipped are not drawn: {error}")
        return
    if split == "validation":
        images = images.subset(torch.tensor(run.read_json("split.json")["validation"]))
    images = images.with_classes(classes)
    if identify(run, split, images, recipe) != digest:
        return  # the source has changed since; the figures hold all the same
    other, *_ = RunDir.open(runs_in(second)[0]).read_predictions(split)
    places = torch.tensor([*lost, *gained])
    captions = [
        f"actual: {classes[label]}\nA {classes[mine]}, B {classes[theirs]}"
        for label, mine, theirs in _told(images.labels, logits.argmax(1), other.argmax(1), places)
    ]
    title = f"Right in A ({first}) alone: the first {len(lost)}; in B ({second}) alone: the rest"
    save_figure(draw_pictures(images.images[places], captions, title, 5), path)


def _told(*columns: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Yields the values of the columns at the places in the last one."""
    *values, places = columns
    return zip(*(column[places].tolist() for column in values), strict=True)
