"""Counts how often a classifier of CIFAR-10 tells pictures unlike those that trained, and how often it does so wrongly.

Command: python benchmarks/familiar.py RUN
Needs: DYNACONV_DATA. Takes: half a minute on two cores. Counts a look at the test images in the run: give it a copy.
"""

import random
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from record import write_result

from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.shipping.classifier import load_classifier

Images = npt.NDArray[np.uint8]
SEED, COUNT, SIDE = 0, 500, 32


def main() -> None:
    classifier = load_classifier(Path(sys.argv[1]))
    classifier.trained.run.add_look("benchmarks/familiar.py")
    test = load_images("cifar10", "test", SourceOptions()).images
    digits = load_images("digits", "train", SourceOptions(image_size=SIDE, channels=3)).images
    sets = {"test images": test.numpy(), **make(test[:COUNT].numpy()), "handwritten digits": digits[:COUNT].numpy()}
    found = {}
    for name, images in sets.items():
        parts = [
            classifier.answer(np.ascontiguousarray(part)) for part in np.array_split(images, len(images) // 100 + 1)
        ]
        told = np.concatenate(parts)[:, -1] > 1
        found[name] = {"images": len(told), "told": int(told.sum()), "share": float(told.mean())}
        print(f"{name:<24} {told.mean():.1%}")
    print(write_result("familiar", found, [SEED]))


def make(photographs: Images) -> dict[str, Images]:
    """Returns sets of images that no photograph of the ten classes looks like, and two that do."""
    numbers = np.random.default_rng(SEED)
    chance = random.Random(SEED)  # noqa: S311 -- drawings, no secrets
    coarse = numbers.integers(0, 256, (COUNT, 3, SIDE // 4, SIDE // 4), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    noisy = np.clip(photographs + numbers.normal(0, 20, photographs.shape), 0, 255).astype(np.uint8)
    return {
        "noise": numbers.integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8),
        "coarse noise": coarse,
        "printed text": np.stack([draw(write, chance) for _ in range(COUNT)]),
        "coloured discs": np.stack([draw(fill, chance) for _ in range(COUNT)]),
        "photographs with noise": noisy,
        "photographs as negatives": 255 - photographs,
        "photographs upside down": photographs[:, :, ::-1],
    }


def draw(what, chance: random.Random) -> Images:
    image = Image.new("RGB", (10 * SIDE, 10 * SIDE), "white")
    what(ImageDraw.Draw(image), chance)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def write(canvas: ImageDraw.ImageDraw, chance: random.Random) -> None:
    step = chance.choice((12, 20, 30))
    for line in range(0, 10 * SIDE, step):
        canvas.text((chance.randrange(20), line), "".join(chance.choices("abcdefghijklm ", k=60)), fill="black")


def fill(canvas: ImageDraw.ImageDraw, chance: random.Random) -> None:
    for _ in range(6):
        left, right = sorted(chance.sample(range(10 * SIDE), 2))
        top, bottom = sorted(chance.sample(range(10 * SIDE), 2))
        colour = (chance.randrange(256), chance.randrange(256), chance.randrange(256))
        canvas.ellipse((left, top, right, bottom), fill=colour)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
