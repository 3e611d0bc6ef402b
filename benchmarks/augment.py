"""Times the transforms of one batch, ours against kornia's functions with the same parameters, in turn.

Command: python benchmarks/augment.py
Takes: seconds. 75 colour images of 32x32 pixels, float32; ours in torch, and "one pass" in C where the machine has it.
"""

import time

import kornia
import torch
from record import over_repeats, write_result

from dynaconv.data import one_pass
from dynaconv.data.augment import affine, augment, draw, recolour, turn_hue
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.recipe import AugmentSettings

BATCH, SIDE, ROUNDS = 75, 32, 30


def main() -> None:
    keep_freed_memory()
    use_threads(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    # kornia has no cubic in this place, so both read pixels the same, simpler way.
    settings = AugmentSettings(interpolation="bilinear", fill="black")
    draws = draw(settings, BATCH, generator)
    centre = torch.full((BATCH, 2), (SIDE - 1) / 2)
    shift = torch.stack([draws.shift_x, draws.shift_y], dim=1) * SIDE

    def kornia_affine(batch: torch.Tensor) -> torch.Tensor:
        scale = draws.scale[:, None].expand(-1, 2)
        matrix = kornia.geometry.get_affine_matrix2d(shift, centre, scale, draws.angle.rad2deg())
        return kornia.geometry.warp_affine(batch, matrix[:, :2], (SIDE, SIDE))

    def kornia_hue(batch: torch.Tensor) -> torch.Tensor:
        return kornia.enhance.adjust_hue(batch, 2 * torch.pi * draws.hue)

    def kornia_all(batch: torch.Tensor) -> torch.Tensor:
        batch = kornia_affine(batch)
        batch = kornia.enhance.adjust_brightness_accumulative(batch, draws.brightness)
        batch = kornia.enhance.adjust_contrast_with_mean_subtraction(batch, draws.contrast)
        return kornia_hue(kornia.enhance.adjust_saturation_with_gray_subtraction(batch, draws.saturation))

    pairs = {
        "affine": (lambda batch: affine(batch, draws, "bilinear", "black"), kornia_affine),
        "hue": (lambda batch: turn_hue(batch, draws.hue), kornia_hue),
        "all": (lambda batch: recolour(affine(batch, draws, "bilinear", "black"), settings, draws), kornia_all),
    }
    if one_pass.fits(images, settings):
        pairs["one pass"] = (lambda batch: augment(batch, settings, draws), kornia_all)
    metrics = {}
    for name, functions in pairs.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for round_number in range(ROUNDS + 1):
            for function, values in zip(functions, seconds, strict=True):
                started = time.perf_counter()
                function(images)
                if round_number:
                    values.append(time.perf_counter() - started)
        metrics[name] = {"ours_seconds": over_repeats(seconds[0]), "kornia_seconds": over_repeats(seconds[1])}
        ours, theirs = (metrics[name][side]["median"] * 1e3 for side in ("ours_seconds", "kornia_seconds"))
        print(f"{name}: ours {ours:.2f} ms, kornia {theirs:.2f} ms")
    print(write_result("augment", metrics))


if __name__ == "__main__":
    main()
