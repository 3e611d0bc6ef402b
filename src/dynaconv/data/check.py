"""What is wrong or odd with images before anything is trained on them, from the images and labels alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dynaconv.data.duplicates import exact_duplicates, near_duplicates
from dynaconv.data.images import ImageSet

BLANK = 2.0
"""Standard deviation of an image's values, 0 to 255, below which it is called nearly blank."""
FEW_SHARE, FEW_IMAGES = 0.05, 10
"""A class with less than this share of the largest one's images, or with fewer images, is called small."""
UNEVEN = 3.0
"""The largest class over the smallest, from which on classes are called uneven."""
SHOWN = 12
"""Examples of a finding that are kept."""


@dataclass(frozen=True)
class Place:
    """An image of a source: its split, and its place there from 0."""

    split: str
    index: int
    label: str


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        kind: Its name in JSON, as "near_duplicates_across".
        sentence: For people: what, how many.
        count: How often.
        act: Whether there is something to do about it; otherwise it is only good to know.
        remedy: What to do, as a sentence; empty where `act` is False.
        examples: Groups of images that show it, at most `SHOWN`.
        leave_out: Places among the training images that would mend it if they were left out.
    """

    kind: str
    sentence: str
    count: int
    act: bool = True
    remedy: str = ""
    examples: tuple[tuple[Place, ...], ...] = ()
    leave_out: frozenset[int] = field(default_factory=frozenset[int])

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding as JSON values."""
        groups = [[vars(place) for place in group] for group in self.examples]
        told = {name: getattr(self, name) for name in ("kind", "sentence", "count", "act", "remedy")}
        return {**told, "examples": groups, "leave_out": sorted(self.leave_out)}


def check_images(train: ImageSet, test: ImageSet | None) -> list[Finding]:
    """Looks for small classes, blank images, duplicates inside and across the splits, and labels that contradict.

    Args:
        train: Training images, on the CPU.
        test: Test images with the same classes and size; None where there are none of the source's own.
    """
    both = train.images if test is None else torch.cat([train.images, test.images])
    labels = train.labels if test is None else torch.cat([train.labels, test.labels])
    places = _Places(train, labels)
    exact = [group for group in exact_duplicates(both) if not _is_blank(both[group[0]])]
    near = [(pair.first, pair.second) for pair in near_duplicates(both)]
    pairs = [(group[0], other) for group in exact for other in group[1:]]
    found = [*_classes(train), *_blank(both, places)]
    found += _duplicates("exact", "the same pixels", pairs, places)
    found += _duplicates("near", "nearly the same pixels (shifted, compressed, brighter or darker)", near, places)
    found += _contradictions([*pairs, *near], places)
    return found


def glance(train: ImageSet) -> str | None:
    """Says in one line what is wrong with training images, as far as can be told at once; None where nothing is."""
    exact = sum(len(group) - 1 for group in exact_duplicates(train.images))
    said = [finding.sentence for finding in _classes(train) if finding.act]
    if exact:
        said.append(f"{exact} of {len(train)} training images repeat another's pixels")
    return f"{'; '.join(said)}. More: dynaconv check" if said else None


class _Places:
    """Tells where an image of both splits together stands."""

    def __init__(self, train: ImageSet, labels: torch.Tensor) -> None:
        self.of_train = len(train)
        self._labels, self._classes = labels, train.classes

    def at(self, index: int) -> Place:
        inside = index < self.of_train
        split = "train" if inside else "test"
        return Place(split, index if inside else index - self.of_train, self._classes[int(self._labels[index])])

    def groups(self, groups: Sequence[Sequence[int]]) -> tuple[tuple[Place, ...], ...]:
        return tuple(tuple(self.at(index) for index in group) for group in groups[:SHOWN])


def _classes(train: ImageSet) -> list[Finding]:
    counts = dict(zip(train.classes, torch.bincount(train.labels, minlength=len(train.classes)).tolist(), strict=True))
    most = max(counts.values())
    small = [name for name, count in counts.items() if count < max(FEW_IMAGES, FEW_SHARE * most)]
    least = min(counts, key=counts.__getitem__)
    if small:
        named = ", ".join(f"{name} ({counts[name]})" for name in small[:5])
        sentence = f"{len(small)} of {len(counts)} classes have very few training images: {named}"
        return [Finding("small_classes", sentence, len(small), True, "Add images to them, or remove a stray folder.")]
    if most >= UNEVEN * counts[least]:
        largest = max(counts, key=counts.__getitem__)
        sentence = f"Classes are uneven: {largest} has {most} training images, {least} {counts[least]}"
        return [Finding("uneven_classes", sentence, 1, False)]
    return []


def _is_blank(image: torch.Tensor) -> bool:
    return bool(image.float().std(correction=0) < BLANK)


def _blank(images: torch.Tensor, places: _Places) -> list[Finding]:
    spread = torch.cat([part.flatten(1).float().std(1, correction=0) for part in images.split(4096)])
    blank = (spread < BLANK).nonzero()[:, 0].tolist()
    if not blank:
        return []
    sentence = f"{len(blank)} images are nearly blank"
    remedy = "Leave them out, or find out what they should have been."
    inside = frozenset(index for index in blank if index < places.of_train)
    return [Finding("blank", sentence, len(blank), True, remedy, places.groups([[each] for each in blank]), inside)]


def _duplicates(kind: str, how: str, pairs: Sequence[tuple[int, int]], places: _Places) -> list[Finding]:
    """One finding for pairs inside the training images, one for those inside the test images, one across."""
    found: list[Finding] = []
    sides = {"train": [], "test": [], "across": []}  # pyright: ignore[reportUnknownVariableType]
    for one, other in pairs:
        inside = (one < places.of_train) + (other < places.of_train)
        sides[("test", "across", "train")[inside]].append((one, other))
    told = {
        "across": (
            "of a training and a test image show",
            "Leave the training images out: test is easier than it looks.",
        ),
        "train": ("of training images show", "Leave one of each pair out; held out for validation, it would be known."),
        "test": ("of test images show", "Count their figures once."),
    }
    for side, (words, remedy) in told.items():
        some = sides[side]
        if not some:
            continue
        out = (
            frozenset(other if side == "train" else one for one, other in some) if side != "test" else frozenset[int]()
        )
        sentence = f"{len(some)} pairs {words} {how}"
        examples = places.groups(some)
        found.append(Finding(f"{kind}_duplicates_{side}", sentence, len(some), True, remedy, examples, out))
    return found


def _contradictions(pairs: Sequence[tuple[int, int]], places: _Places) -> list[Finding]:
    odd = [pair for pair in pairs if places.at(pair[0]).label != places.at(pair[1]).label]
    if not odd:
        return []
    kinds = Counter(tuple(sorted((places.at(a).label, places.at(b).label))) for a, b in odd)
    (most, count), *_ = kinds.most_common(1)
    sentence = f"{len(odd)} pairs of duplicates have different labels, most often {most[0]} and {most[1]} ({count})"
    out = frozenset(index for pair in odd for index in pair if index < places.of_train)
    remedy = "At least one label of each is wrong: correct it, or leave both out."
    return [Finding("contradicting_labels", sentence, len(odd), True, remedy, places.groups(odd), out)]
