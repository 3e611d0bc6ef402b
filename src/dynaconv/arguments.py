"""From the words of a verb that trains to a Recipe. Imports no torch, so that a mistake is told at once."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dynaconv.errors import UserError, unknown
from dynaconv.options import dashed, folder, option, parse_options, take_folders, understand
from dynaconv.recipe import GROUPS, Recipe, with_settings
from dynaconv.recipe_json import load_recipe
from dynaconv.recipes import DEFAULT, RECIPES

LABEL_EPOCHS = 4
"""Epochs of the trainings that judge labels: enough to know a class, too few to learn a wrong label by heart."""
CHECK_HELP = "Instead of a run, a proof in a few updates on this machine: that a training %s, bit for bit."
RUN_DIR_HELP = "Folder of the run, which must not exist yet. None takes runs/RECIPE-TIME."


def parse_training(words: list[str]) -> tuple[Recipe, Any]:
    """Parses [RECIPE] [--run-dir DIR] [--seeds N] [--check-resume] [--check-repeat] [--SETTING VALUE ...].

    Args:
        words: What follows `train` on the command line.

    Returns:
        The complete recipe, and an object with the attributes run_dir (None if not named), seeds, check_resume and
        check_repeat.

    Raises:
        UserError: a recipe or a setting that does not exist, or a value that cannot be.
        SystemExit: with code 0, after --help was printed.
    """
    words = [_spell_out(word) for word in words]
    base = find_recipe(words.pop(0)) if words and not words[0].startswith("-") else RECIPES[DEFAULT]()
    description = (
        f"Trains a classifier. RECIPE is one of {', '.join(RECIPES)}, or a run's recipe.json. "
        f"The defaults shown are those of {base.name}."
    )
    recipe, options = _parse(
        words,
        "train [RECIPE]",
        description,
        base,
        option(Path | None, "run_dir", RUN_DIR_HELP),
        option(int, "seeds", "Trainings, from --seed and the seeds that follow, into one folder; 1 to 100.", 1),
        option(bool, "check_resume", CHECK_HELP % "that was stopped goes on as if it never was", False),
        option(bool, "check_repeat", CHECK_HELP % "repeats", False),
    )
    if not 1 <= options.seeds <= 100:
        raise UserError(f"--seeds must be from 1 to 100, received {options.seeds}.")
    return recipe, options


def parse_labels(words: list[str]) -> tuple[Recipe, Any]:
    """Parses SOURCE [--folds N] [--most N] [--into DIR] [--SETTING VALUE ...].

    Args:
        words: What follows `labels` on the command line.

    Returns:
        The recipe of the trainings, and an object with the attributes folds, most and into.

    Raises:
        As `parse_training`, and UserError where no source is named.
    """
    words = [_spell_out(word) for word in words]
    if words and not words[0].startswith("-"):
        words = ["--source", *words]
    elif "--help" not in words and "-h" not in words:
        raise UserError("`dynaconv labels` needs a source of images: dynaconv labels my-pictures.")
    base = with_settings(RECIPES["fast92"](), epochs=LABEL_EPOCHS)
    description = (
        "Finds training images whose label networks dispute that never saw them, and writes them to a CSV file and a "
        "picture. `dynaconv train --without FILE.csv` leaves them out."
    )
    recipe, parsed = _parse(
        words,
        "labels SOURCE",
        description,
        base,
        option(int, "folds", "Networks to train, each judging the images that it did not see; 2 to 20.", 3),
        option(int, "most", "Images to write at most, the most doubtful first; at least 1.", 1000),
        option(Path, "into", "Folder that is made for the results, and must not hold any yet.", Path("label-errors")),
    )
    if not 2 <= parsed.folds <= 20:
        raise UserError(f"--folds must be from 2 to 20, received {parsed.folds}.")
    if parsed.most < 1:
        raise UserError(f"--most must be at least 1, received {parsed.most}.")
    return recipe, parsed


def parse_resume(words: list[str]) -> Path:
    """Parses DIR, the folder of a run; raises UserError for anything else, and SystemExit after --help was printed."""
    example = "dynaconv resume runs/first"
    if "--help" in words or "-h" in words:
        sys.stdout.write(
            f"usage: {example}\n\nGoes on with a run that was stopped, with all the settings that it began with.\n"
        )
        raise SystemExit(0)
    if not words:
        raise UserError(f"`dynaconv resume` needs the folder of a run: {example}.")
    if len(words) > 1 or words[0].startswith("-"):
        extra = next((word for word in words if word.startswith("-")), words[-1])
        raise UserError(f"`dynaconv resume` takes the folder of a run and nothing else, received {extra!r}.")
    return Path(words[0])


def parse_check(words: list[str]) -> Any:
    """Parses SOURCE [--into DIR]; returns an object with the attributes source and into; errors as elsewhere."""
    words = take_folders(words, "check", "dynaconv check my-pictures", ["source"])
    return parse_options(
        words,
        "check SOURCE",
        "Looks for what should be mended before training: duplicates, contradicting labels, odd or damaged files.",
        ("source", Annotated[str, tyro.conf.arg(help="What `train --data` takes.")], dataclasses.field()),
        option(Path | None, "into", "Folder that is made for the findings as JSON, CSV and a sheet of pictures."),
    )


def parse_evaluate(words: list[str]) -> Any:
    """Parses RUN [--split S] [--views V] [--mixture] [--explain] [--robustness] [--neighbours] [...].

    Returns an object with the attributes run, split, views, mixture, explain, robustness, neighbours, cifar10_c,
    cifar10_1 and data; errors as `parse_training`.
    """
    words = take_folders(words, "evaluate", "dynaconv evaluate runs/first", ["run"])
    kinds = Literal["validation", "test"]
    return parse_options(
        words,
        "evaluate RUN",
        "Judges the network of a finished run, and stores the figures in its folder.",
        folder("run", "Folder of the run."),
        option(
            kinds, "split", "Images to judge on. Each look at the test images is recorded in the run.", "validation"
        ),
        option(Literal["one", "mirror", "six"], "views", "Views of an image whose logits are averaged.", "one"),
        option(bool, "mixture", "Describe the mixing weights of every block, and what is lost without them.", False),
        option(bool, "explain", "Show where the network looked in its surest mistakes (needs captum).", False),
        option(
            bool, "robustness", "Judge 2,000 images under 14 corruptions (grey: 13) at 5 severities as well.", False
        ),
        option(bool, "neighbours", "Keep training images in the run, so that `serve` shows the most alike.", False),
        option(Path | None, "cifar10_c", "Folder with the files of CIFAR-10-C, to judge on as well."),
        option(Path | None, "cifar10_1", "Folder with the files of CIFAR-10.1 v6, to judge on as well."),
        option(str | None, "data", "Where the run's images are now. None takes the source that the run names."),
    )


def parse_compare(words: list[str]) -> Any:
    """Parses A B [--split S] [--into DIR].

    Returns an object with the attributes first, second, split and into; errors as `parse_training`.
    """
    words = take_folders(words, "compare", "dynaconv compare runs/first runs/second", ["first", "second"])
    return parse_options(
        words,
        "compare A B",
        "Says whether one run, or several with different seeds, is really better than another on the same images.",
        folder("first", "Folder of a run, or of several as `train --seeds` makes it."),
        folder("second", "Another one."),
        option(Literal["test", "validation"], "split", "Images to compare on; both sides were judged on them.", "test"),
        option(Path | None, "into", "Folder that is made for the figures, and pictures of images that flipped."),
    )


def parse_report(words: list[str]) -> tuple[list[Path], Path | None]:
    """Parses RUN [RUN ...] [--into FILE]; returns the runs, and the file if one was named; errors as elsewhere."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    first = take_folders(words[:1] + words[len(folders) :], "report", "dynaconv report runs/first", ["run"])
    options = parse_options(
        first,
        "report RUN [RUN ...]",
        "Writes one HTML page about runs that opens anywhere, and model-card.md beside it.",
        folder("run", "Folder of a finished run; further ones are set beside it."),
        option(Path | None, "into", "The HTML file. None takes report.html in the first run's folder."),
    )
    return [Path(each) for each in folders], options.into


def parse_export(words: list[str]) -> Any:
    """Parses RUN [--format F] [--int8] [--fold] [--into FILE] [--max-drop X] [--split S] [--data SOURCE] ...

    Returns an object with these attributes and the run as `run`; errors as `parse_training`.
    """
    words = take_folders(words, "export", "dynaconv export runs/first", ["run"])
    options = parse_options(
        words,
        "export RUN",
        "Writes a run's classifier as one file to run elsewhere, and its certificate beside it.",
        folder("run", "Folder of a finished run."),
        option(Literal["onnx", "pt2"], "format", "ONNX, or the file of torch.export.", "onnx"),
        option(bool, "int8", "8-bit weights and activations, their ranges taken from training images; ONNX.", False),
        option(
            bool,
            "fold",
            "One convolution in place of every mixture, its weights frozen to their means; refused where that costs "
            "accuracy.",
            False,
        ),
        option(Path | None, "into", "The file. None takes model.onnx, model-int8.onnx, ... in the run's folder."),
        option(float, "max_drop", "Share of images, 0 to 1, that may be lost in accuracy at most.", 0.003),
        option(
            Literal["validation", "test"],
            "split",
            "Images to prove it on. Each look at the test images is recorded in the run.",
            "validation",
        ),
        option(Literal["nchw", "nhwc"], "layout", "How the images lie that the file takes.", "nchw"),
        option(str | None, "data", "Where the run's images are now. None takes the source that the run names."),
        option(bool, "overwrite", "Replace a file that is there.", False),
    )
    if not 0 <= options.max_drop <= 1:
        raise UserError(f"--max-drop must be from 0 to 1, received {options.max_drop:g}.")
    return options


def parse_serve(words: list[str]) -> Any:
    """Parses RUN [--host H] [--port P] [--max-wait-ms T] [--max-batch N] [--most-waiting N].

    Returns an object with these attributes, the run or file as `run`; errors as `parse_training`.
    """
    words = take_folders(words, "serve", "dynaconv serve runs/first", ["run"])
    options = parse_options(
        words,
        "serve RUN",
        "Answers over HTTP, with a page at /, until it is stopped.",
        folder("run", "Folder of a finished run, or an exported .onnx file."),
        option(
            str, "host", "Address to listen at; another than this machine's own asks for DYNACONV_TOKEN.", "127.0.0.1"
        ),
        option(int, "port", "Port to listen at.", 8000),
        option(float, "max_wait_ms", "Milliseconds that a request waits for others, to be computed together.", 5.0),
        option(
            int | None,
            "max_batch",
            "Pictures computed together at most; 1 batches nothing. None measures at the start what is enough.",
        ),
        option(int, "most_waiting", "Pictures that may wait; requests beyond are refused with 503.", 256),
    )
    for name, low, high in (
        ("port", 0, 65535),
        ("max_batch", 1, 4096),
        ("most_waiting", 1, 10**6),
        ("max_wait_ms", 0, 1e4),
    ):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high:g}, received {value:g}.")
    return options


def parse_verify(words: list[str]) -> Any:
    """Parses FILE [--data SOURCE] [--split S].

    Returns an object with the attributes file, data and split; errors as `parse_training`.
    """
    words = take_folders(words, "verify", "dynaconv verify model.onnx --data cifar10", ["file"])
    return parse_options(
        words,
        "verify FILE",
        "Repeats the proof of an exported file on this machine, by onnxruntime alone.",
        folder("file", "The .onnx file, its certificate beside it."),
        option(
            str | None,
            "data",
            "cifar10, digits, or a folder or file of pictures that `train --data` takes. None takes what the "
            "certificate names.",
        ),
        option(
            Literal["validation", "test"] | None,
            "split",
            "Images to verify on. None takes those that the certificate was made on.",
        ),
    )


def parse_publish(words: list[str]) -> Any:
    """Parses RUN --into DIR [--license ID] [--overwrite] [--push OWNER/NAME] [--public].

    Returns an object with these attributes and the run as `run`; errors as `parse_training`.
    """
    words = take_folders(words, "publish", "dynaconv publish runs/first --into my-model", ["run"])
    options = parse_options(
        words,
        "publish RUN",
        "Writes a run's classifier as a folder for others, in the layout of the Hugging Face hub.",
        folder("run", "Folder of a finished run."),
        option(Path | None, "into", "The folder, which is made."),
        option(str | None, "license", "Identifier of the licence that you give it, as the hub knows it: mit, cc0-1.0."),
        option(bool, "overwrite", "Replace what this verb wrote into the folder before.", False),
        option(str | None, "push", "OWNER/NAME on the hub to upload it to as well; HF_TOKEN says who you are."),
        option(bool, "public", "Let everybody see what is uploaded; without it, only its owner.", False),
    )
    if options.into is None:
        raise UserError("`dynaconv publish` needs a folder to write: dynaconv publish runs/first --into my-model.")
    return options


def parse_predict(words: list[str]) -> tuple[list[str], Any]:
    """Parses RUN PICTURE [PICTURE ...] [--top N] [--form F] [--into FILE] [--explain DIR].

    Returns what names the pictures, and an object with the attributes run, top, form, into and explain; errors as
    elsewhere.
    """
    example = "dynaconv predict runs/first cat.jpg"
    # "-" alone is a picture as well: their paths come from standard input.
    named = list(itertools.takewhile(lambda word: not word.startswith("-") or word == "-", words))
    first = take_folders(words[:1] + words[len(named) :] if named else words, "predict", example, ["run"])
    options = parse_options(
        first,
        "predict RUN PICTURE [PICTURE ...]",
        "Classifies pictures: files, folders, patterns, or - for paths from standard input.",
        folder("run", "Folder of a finished run."),
        option(int, "top", "Likeliest classes to tell, at least 1.", 1),
        option(
            Literal["table", "jsonl", "csv", "parquet"],
            "form",
            "A table for people, JSON lines, CSV, or a parquet file.",
            "table",
        ),
        option(Path | None, "into", "File to write to. None writes to standard output; parquet needs one."),
        option(
            Path | None,
            "explain",
            "Folder for a picture of what the network saw and what spoke for its answer, for each; not from .onnx.",
        ),
    )
    if len(named) < 2:
        raise UserError(f"`dynaconv predict` needs pictures: {example}.")
    if options.top < 1:
        raise UserError(f"--top must be at least 1, received {options.top}.")
    if options.form == "parquet" and options.into is None:
        raise UserError("--form parquet needs a file to write to: --into predictions.parquet.")
    return named[1:], options


def _parse(words: list[str], usage: str, description: str, base: Recipe, *options: Any) -> tuple[Recipe, Any]:
    """Returns the settings as a recipe that starts from `base`, and an object whose attributes are the options."""
    _check_names(words, [f"--{name.replace('_', '-')}" for name, _, _ in options])
    groups = [(name, kind, dataclasses.field(default=getattr(base, name))) for name, kind in GROUPS.items()]
    parsed = understand(words, usage, description, [*options, *groups])
    settings = {
        field.name: getattr(getattr(parsed, group), field.name)
        for group, kind in GROUPS.items()
        for field in dataclasses.fields(kind)
    }
    return with_settings(base, **settings), parsed


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of that name, or the one stored in that file.

    Raises:
        UserError: neither a known name (nearest names are offered) nor a file with a recipe.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return load_recipe(Path(name))
    if Path(name).is_dir():
        return load_recipe(Path(name) / "recipe.json")
    raise unknown("recipe", name, RECIPES)


def _spell_out(word: str) -> str:
    """`--data` is short for the setting `source`."""
    name, equals, value = dashed(word).partition("=")
    return f"{'--source' if name == '--data' else name}{equals}{value}"


def _check_names(words: list[str], options: list[str]) -> None:
    """Refuses an option that is no setting before anything else, with the nearest names."""
    settings = [field for kind in GROUPS.values() for field in dataclasses.fields(kind)]
    known = ["--data", *options, *(f"--{field.name.replace('_', '-')}" for field in settings)]
    switched_off = [f"--no-{field.name.replace('_', '-')}" for field in settings if isinstance(field.default, bool)]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in (*known, *switched_off, "--help"):
            raise unknown("setting", name, [option for option in known if option != "--source"])
