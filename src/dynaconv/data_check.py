"""The check of a source: what its files, images and labels have wrong, told, drawn and written down."""

import csv
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynaconv.data.check import Finding, Place, check_images
from dynaconv.data.decoding import BadPictureError, read_about
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import SourceOptions, find_splits, load_images, resolve
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.files import writing_whole
from dynaconv.reporting.figures import draw_pictures, save_figure
from dynaconv.rundir import RunDir

COLUMNS = 8
GROUPS = 4
"""Groups of each finding on the contact sheet."""


def check_source(source: str, into: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Looks through a source of images for what should be mended before anything is trained on it.

    Args:
        source: What `train --data` takes.
        into: Folder that is made for check.json, a sheet of examples and leave-out.csv; None writes nothing.
        say: Shows a line to the user.

    Returns:
        What was found, as JSON values; "to_act_on" counts the findings that ask for something.

    Raises:
        UserError: the source is not there, or cannot be read at all.
    """
    started = time.perf_counter()
    if into is not None:
        RunDir.require_free(into, "--into")
    keep_freed_memory()
    use_threads(0)
    notices: list[str] = []
    options = SourceOptions(on_bad_file="skip", notify=notices.append)
    source = resolve(source, options)
    train = load_images(source, "train", options)
    files = _look_at_files(source, options)  # after what refuses a source: it may be a folder of a million files
    test = load_images(source, "test", SourceOptions(on_bad_file="skip"))  # its own, or those that `train` holds out
    found = [*_bad_files(notices), *_odd_files(files), *check_images(train, test)]
    acts = [finding for finding in found if finding.act]
    counts = dict(zip(train.classes, torch.bincount(train.labels, minlength=len(train.classes)).tolist(), strict=True))
    document = {
        "source": source,
        "description": train.description,
        "data_sha256": train.sha256(),
        "training_images": len(train),
        "test_images": len(test),
        "image_size": train.images.shape[-1],
        "channels": train.images.shape[1],
        "classes": counts,
        "files": files,
        "findings": [finding.as_dict() for finding in found],
        "to_act_on": len(acts),
        "seconds": time.perf_counter() - started,
    }
    _tell(document, found, say)
    if into is not None:
        _write(into, document, found, train, test, say)
    return document


def _look_at_files(source: str, options: SourceOptions) -> dict[str, dict[str, int]]:
    """Counts forms, modes, sizes and EXIF orientations of the pictures as they are stored."""
    forms, modes, sizes, turned = Counter[str](), Counter[str](), Counter[str](), 0
    for split in find_splits(source, options).values():
        pictures = split.read().pictures
        if not isinstance(pictures, list | tuple):
            continue  # arrays have none of these
        for picture in pictures:
            try:
                form, mode, (width, height), orientation = read_about(picture)
            except BadPictureError:
                continue  # told when the pixels are read
            forms[form] += 1
            modes[mode] += 1
            sizes[f"{width}x{height}"] += 1
            turned += orientation not in (None, 1)
    told = {"forms": forms, "modes": modes, "sizes": sizes}
    return {
        **{name: dict(counter.most_common(20)) for name, counter in told.items()},
        "odd": {"turned_by_exif": turned, "different_sizes": len(sizes)},
    }


def _bad_files(notices: list[str]) -> list[Finding]:
    once = dict.fromkeys(notices)  # each split tells of the folder that both come from
    left_out = [notice for notice in once if notice.startswith("Left out") or "left out of class" in notice]
    remedy = "Repair or remove them; `train` stops at a picture that cannot be read unless --on-bad-file skip is said."
    return [
        Finding("unreadable" if notice.startswith("Left out") else "no_pictures", notice.rstrip("."), 1, True, remedy)
        for notice in left_out
    ]


def _odd_files(files: dict[str, dict[str, int]]) -> list[Finding]:
    found: list[Finding] = []
    modes, sizes = files["modes"], files["odd"]["different_sizes"]
    if len(modes) > 1:
        told = ", ".join(f"{mode} ({count})" for mode, count in modes.items())
        found.append(Finding("modes", f"Pictures are stored in {len(modes)} modes: {told}", len(modes), False))
    if sizes > 1:
        found.append(Finding("sizes", f"Pictures have {sizes} different sizes; they are resized to one", sizes, False))
    if turned := files["odd"]["turned_by_exif"]:
        found.append(Finding("turned", f"{turned} pictures are turned upright as their EXIF data says", turned, False))
    return found


def _tell(document: dict[str, Any], found: list[Finding], say: Callable[[str], None]) -> None:
    side, form = document["image_size"], "colour" if document["channels"] == 3 else "grey"
    say(
        f"{document['description']}: {document['training_images']} training images, {document['test_images']} test "
        f"images, {side}x{side}, {form}, {len(document['classes'])} classes."
    )
    for finding in found:
        say(f"{'!' if finding.act else '-'} {finding.sentence}.{f' {finding.remedy}' if finding.remedy else ''}")
    if not found:
        say("Nothing was found.")
    elif document["to_act_on"] == 0:
        say("Nothing to act upon.")


def _write(
    into: Path,
    document: dict[str, Any],
    found: list[Finding],
    train: ImageSet,
    test: ImageSet,
    say: Callable[[str], None],
) -> None:
    into.mkdir(parents=True, exist_ok=True)
    with writing_whole(into / "check.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    reasons: dict[int, str] = {}
    for finding in found:
        for index in finding.leave_out:
            reasons.setdefault(index, finding.kind)
    with writing_whole(into / "leave-out.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "label", "reason", "data"])
        digits = document["data_sha256"][:16]
        writer.writerows([i, train.classes[int(train.labels[i])], reasons[i], digits] for i in sorted(reasons))
    shown = [(finding, group) for finding in found for group in finding.examples[:GROUPS]]
    if shown:
        _draw(shown, train, test, into / "examples.png")
    if reasons:
        say(f"{len(reasons)} training images would be left out by `dynaconv train --without {into / 'leave-out.csv'}`.")
    say(f"Written to {into}: check.json, leave-out.csv{', examples.png' if shown else ''}")


def _draw(shown: list[tuple[Finding, tuple[Place, ...]]], train: ImageSet, test: ImageSet, path: Path) -> None:
    """Draws examples two by two, each under what was found."""
    pictures: list[torch.Tensor] = []
    captions: list[str] = []
    for finding, group in shown:
        told = finding.kind.replace("_", " ").replace("duplicates ", "dup. ")
        for place in (group * 2)[:2]:
            images = train if place.split == "train" else test
            pictures.append(images.images[place.index])
            captions.append(f"{told}\n{place.split} {place.index}\n{place.label}")
    title = "What the check found, each with its partner"
    save_figure(draw_pictures(torch.stack(pictures), captions, title, COLUMNS), path)
