"""Plants duplicates among CIFAR-10's 60,000 images and counts how many `check` finds, and in what time.

Command: python benchmarks/doctor.py
Needs: DYNACONV_DATA. Takes: two minutes on two cores. Draws docs/figures/near-duplicates.png: the pairs of CIFAR-10's
own that are the least alike of all that were found, to be judged by eye.
"""

import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import write_result

from dynaconv.data.check import check_images
from dynaconv.data.duplicates import exact_duplicates, near_duplicates
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.data_check import check_source
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.reporting.figures import draw_pictures

PLANTED = 200
DRAWN = 20


def main() -> None:
    keep_freed_memory()
    use_threads(0)
    started = time.perf_counter()
    found = check_source("cifar10")
    seconds = time.perf_counter() - started
    train, test = (load_images("cifar10", split, SourceOptions()) for split in ("train", "test"))
    own = {finding.kind: {"value": finding.count} for finding in check_images(train, test)}
    images = torch.cat([train.images, test.images])
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: 2 * PLANTED]
    copies, changed = (
        images[chosen[:PLANTED]],
        torch.stack([change(images[i], n) for n, i in enumerate(chosen[PLANTED:])]),
    )
    together = torch.cat([images, copies, changed])
    groups = exact_duplicates(together)
    exact = sum({int(i), len(images) + n} in map(set, groups) for n, i in enumerate(chosen[:PLANTED]))
    pairs = near_duplicates(together)
    places = {(pair.first, pair.second) for pair in pairs}
    hits = [(int(i), len(images) + PLANTED + n) in places for n, i in enumerate(chosen[PLANTED:])]
    kinds = {kind: {"found": sum(hits[at::3]), "planted": len(hits[at::3])} for at, kind in enumerate(KINDS)}
    draw([pair for pair in pairs if pair.second < len(images)], images)
    print(
        write_result(
            "doctor",
            {
                "seconds": {"value": seconds},
                "to_act_on": {"value": found["to_act_on"]},
                "exact": {"found": exact, "planted": PLANTED},
                "near": {"found": sum(hits), "planted": PLANTED, "by_kind": kinds},
                "own": own,
            },
        )
    )


KINDS = ("shifted by a pixel", "JPEG of quality 75", "brightness 80% or 120%")


def change(image: torch.Tensor, number: int) -> torch.Tensor:
    kind, odd = number % 3, number // 3 % 2
    if kind == 0:
        return image.roll(1 if odd else -1, 1 + number // 6 % 2)
    if kind == 1:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=75)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    return (image.float() * (1.2 if odd else 0.8)).clamp(0, 255).round().to(torch.uint8)


def draw(pairs, images: torch.Tensor) -> None:
    least = pairs[-DRAWN:]
    shown = torch.stack([images[place] for pair in least for place in (pair.first, pair.second)])
    captions = [f"{pair.likeness:.3f}" for pair in least for _ in range(2)]
    title = f"The {DRAWN} least alike of the {len(pairs)} pairs found in CIFAR-10"
    draw_pictures(shown, captions, title, 10).savefig(Path("docs/figures/near-duplicates.png"), dpi=60)


if __name__ == "__main__":
    main()
