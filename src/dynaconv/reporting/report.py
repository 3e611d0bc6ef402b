"""The report of one run or several: one HTML page that needs nothing else, and a model card, from run folders alone."""

import contextlib
import io
import math
import re
import shlex
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from dynaconv import __version__
from dynaconv.errors import UserError
from dynaconv.files import writing_whole
from dynaconv.judging.comparison import compare
from dynaconv.judging.diagnosis import Facts, diagnose
from dynaconv.judging.trained import read_side, require_finished
from dynaconv.reporting.figures import QUANTITIES, draw_coverage, draw_curve, draw_mixture, draw_reliability
from dynaconv.rundir import RESULT, RunDir

WATTS_PER_THREAD = 8.0
"""What a busy thread of a server draws, roughly: for an estimate of the energy, which is marked as one."""
JOULES_PER_WATT_HOUR = 3600
MARKS = {
    "report.html": '<meta name="generator" content="dynaconv">',
    "model-card.md": "A dynamic-convolution image classifier with",
}
"""What stands in every file that `write_report` wrote, by its template."""


def write_report(paths: Sequence[Path], into: Path | None = None) -> list[Path]:
    """Writes the report of runs, and the model card of the first.

    Args:
        paths: Folders of finished runs, at least one. The first is told in full, the others are set beside it.
        into: The HTML file; None takes report.html in the first run's folder.

    Returns:
        The files that were written: the report, and model-card.md beside it.

    Raises:
        UserError: a folder is no run, or one that has not finished, or holds no judgement, or is named twice; or the
            file's name is not that of a page, or what stands there is no report.
    """
    page = into or paths[0] / "report.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--into takes the name of a page, ending in .html, received {page}.")
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1]:
        raise UserError(f"{twice[-1]} is named twice; name each run once.")
    files = {"report.html": page, "model-card.md": page.with_name("model-card.md")}
    if into is not None:
        _require_ours(files)
    with _refusing_altered(paths):
        runs = [_read(path) for path in paths]
        facts = {"run": runs[0], "runs": runs, "comparisons": _compare(paths), "version": __version__}
        texts = {name: _templates().get_template(name).render(facts) for name in files}
    for name, path in files.items():
        with writing_whole(path) as temporary:
            temporary.write_text(texts[name], encoding="utf-8")
    return list(files.values())


def _require_ours(files: dict[str, Path]) -> None:
    """Raises UserError where something would be replaced that no report wrote."""
    for name, path in files.items():
        try:
            own = not path.exists() or (path.is_file() and MARKS[name] in path.read_text("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        if not own:
            raise UserError(f"{path} was not written by `dynaconv report`; name a page elsewhere with --into.")


def render_card(path: Path, source: str) -> str:
    """Returns the model card of a run as Markdown that names no folder of this machine.

    Args:
        path: The run's folder.
        source: What to call its images.

    Raises:
        UserError: as `write_report`.
    """
    with _refusing_altered([path]):
        run = _read(path)
        run["result"]["source"] = source
        run["again"] = "dynaconv train recipe.json"
        return _templates().get_template("model-card.md").render(run=run)


@contextlib.contextmanager
def _refusing_altered(paths: Sequence[Path]) -> Generator[None]:
    """Turns what comes of JSON that is sound, but not as a run writes it, into a sentence.

    A report tells nearly every figure of a dozen files: to check the form of each would be to write all of it twice.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, jinja2.UndefinedError) as error:
        where = " or ".join(map(str, paths))
        raise UserError(
            f"A file in {where} is not as a run writes it ({type(error).__name__}: {error}); it was altered, or is of "
            "another version."
        ) from error


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dynaconv.reporting", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=_percent, duration=_duration, span=_span, name=_name)
    return environment


def _read(path: Path) -> dict[str, Any]:
    """Returns all that the templates tell about a run."""
    run = RunDir.open(path)
    require_finished(path)
    recipe = run.read_recipe()
    result, environment = run.read_json(RESULT), run.read_json("environment.json")
    history, split = run.read_metrics(), run.read_json("split.json")
    test = _optional(run, "evaluation-test.json")
    if test is None:
        raise UserError(
            f"The run in {path} holds no judgement, being older than this version; `dynaconv evaluate {path} --split "
            "test` makes one."
        )
    training_accuracy = result.get("train_accuracy")
    found = diagnose(
        Facts(
            epochs=history,
            recipe=recipe,
            start=f"{path}/recipe.json",
            validation_accuracy=result.get("validation_accuracy"),
            validation_images=result.get("validation_images") or None,
            training_accuracy=training_accuracy if _is_unaugmented(recipe) else None,
        )
    )
    mixture = _optional(run, "mixture-test.json") or _optional(run, "mixture-validation.json")
    seconds, threads = result["train_seconds"], environment["threads"]
    return {
        "name": path.name or str(path),
        "path": str(path),
        "result": result,
        "environment": environment,
        "recipe": recipe,
        "history": history,
        "test": test,
        "validation": _optional(run, "evaluation-validation.json"),
        "pictures": _optional(run, "pictures-test.json"),
        "explained": _explained(run),
        "robustness": _optional(run, "robustness-test.json") or _optional(run, "robustness-validation.json"),
        "mixture": mixture,
        "mixture_figure": _as_svg(draw_mixture(mixture)) if mixture and _mixes(mixture) else None,
        "looks": run.looks(),
        "diagnosis": found,
        "training_images": split.get("num_train"),
        "curves": [_as_svg(draw_curve(history, quantity)) for quantity in QUANTITIES],
        "reliability": _as_svg(draw_reliability(test["calibration"])),
        "coverage": _as_svg(draw_coverage(test["coverage"])),
        "most_confusion": max((max(row) for row in test["confusion"]), default=1),
        "watt_hours": seconds * threads * WATTS_PER_THREAD / JOULES_PER_WATT_HOUR,
        "again": shlex.join(["dynaconv", "train", f"{path}/recipe.json", "--run-dir", f"{path}-again"]),
    }


def _is_unaugmented(recipe: Any) -> bool:
    augment = recipe.augment
    colours = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    zoom = (augment.scale_min != 1, augment.scale_max != 1)
    return not any((augment.degrees, augment.translate, augment.flip, augment.cutout, augment.cutmix, *colours, *zoom))


def _mixes(mixture: dict[str, Any]) -> bool:
    return any(len(block["kernel_sizes"]) > 1 for block in mixture["blocks"])


def _explained(run: RunDir) -> tuple[str, list[dict[str, Any]]] | None:
    """Returns the split whose mistakes were explained, the test images before the validation images, and these."""
    for split in ("test", "validation"):
        pictures = _optional(run, f"pictures-{split}.json") or {"mistakes": []}
        if told := [each for each in pictures["mistakes"] if "explained" in each]:
            return split, told
    return None


def _optional(run: RunDir, name: str) -> Any:
    return run.read_json(name) if (run.path / name).exists() else None


def _compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Compares every further run with the first, on the test images."""
    found: list[dict[str, Any]] = []
    for other in paths[1:]:
        names = (str(paths[0]), str(other))
        try:
            found.append(compare(read_side(paths[0], "test"), read_side(other, "test"), names).as_dict())
        except UserError as error:
            found.append({"names": list(names), "words": [f"Cannot be compared: {error}"]})
    return found


def _as_svg(figure: Figure) -> str:
    """Returns a figure as SVG inside a page: its text is text, in the page's colour."""
    buffer = io.StringIO()
    # A fixed salt, so that the same run gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dynaconv", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", drawn, count=1)
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"([^>]*?) height="[^"]*"', r"\1\2", drawn, count=1)
    drawn = re.sub(r"stroke: #(000000|b0b0b0|cccccc)", "stroke: currentColor", drawn)
    drawn = drawn.replace("fill: #ffffff; opacity: 0.8", "fill: var(--paper); opacity: 0.8")  # behind a legend
    drawn = drawn.replace("fill: #ffffff", "fill: none")
    # Every figure counts its parts from 1; in a page each name may stand once.
    prefix = f"f{zlib.crc32(drawn.encode()):08x}-"
    drawn = re.sub(r'((?: id="|href="#|url\(#))', rf"\1{prefix}", drawn)
    drawn = drawn.replace("<svg ", '<svg aria-hidden="true" focusable="false" fill="currentColor" ', 1)
    return drawn


def _percent(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:.{digits}%}"


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2%} to {interval[1]:.2%}"


def _name(source: str) -> str:
    """A folder or a file without the folders that it lies in."""
    return Path(source).name if Path(source).is_absolute() else source


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{math.floor(minutes / 60)} h {minutes % 60:.0f} min"
