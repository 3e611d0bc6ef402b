"""Times every form of the K-convolution mixture against a static convolution of the same shape, in turn.

Command: python benchmarks/mixture.py
Takes: about five minutes on two cores. Forward and backward, float32, batch of 75 as in the coursework recipe.
"""

import time
from functools import partial

import torch
from record import over_repeats, write_result

from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.model.mixture import FORMS, choose_form

BATCH = 75
SHAPES = [
    (24, 40, 16),
    (40, 40, 16),
    (64, 64, 16),
    (40, 80, 8),
    (80, 80, 8),
    (128, 128, 8),
    (128, 128, 4),
    (256, 256, 4),
]
"""(channels in, channels out, side of the map)."""
KERNEL_SIZES = ((3, 3), (3, 1), (3, 3, 3, 3), (3, 1, 3, 1))
"""Sides of the K kernels of a block."""
ROUNDS = 7


def step(convolve, inputs, parameters) -> None:
    for tensor in (inputs, *parameters):
        tensor.grad = None
    outputs = convolve(inputs)
    outputs.backward(torch.ones_like(outputs))


def measure(channels: int, outputs: int, side: int, sizes: tuple[int, ...]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)

    def fresh(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = torch.randn(BATCH, channels, side, side, generator=generator)
    inputs = inputs.contiguous(memory_format=torch.channels_last).requires_grad_()
    kernels, weights = [fresh(outputs, channels, size, size) for size in sizes], fresh(BATCH, len(sizes))
    contenders = {"static": (partial(torch.nn.functional.conv2d, weight=kernels[0], padding=1), kernels[:1])}
    for name, mix in FORMS.items():
        contenders[name] = (partial(mix, kernels=kernels, weights=weights), [*kernels, weights])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(ROUNDS + 1):
        for name, (convolve, parameters) in contenders.items():
            started = time.perf_counter()
            step(convolve, inputs, parameters)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    static = over_repeats(seconds["static"])
    ratios = {
        name: over_repeats([a / b for a, b in zip(values, seconds["static"], strict=True)])
        for name, values in seconds.items()
        if name != "static"
    }
    chosen = choose_form(sizes, outputs, inputs)
    told = ", ".join(f"{name} {ratio['median']:.2f}x" for name, ratio in ratios.items())
    shape = f"{channels}->{outputs} @{side}x{side} kernels {sizes}"
    print(f"{shape}: static {static['median'] * 1e3:.1f} ms; {told}; auto: {chosen}")
    return {"static_seconds": static, "times_static": ratios, "chosen": chosen}


def main() -> None:
    keep_freed_memory()
    use_threads(0)
    metrics = {
        f"{channels}->{outputs}@{side} kernels {' '.join(map(str, sizes))}": measure(channels, outputs, side, sizes)
        for channels, outputs, side in SHAPES
        for sizes in KERNEL_SIZES
    }
    print(write_result("mixture", metrics))


if __name__ == "__main__":
    main()
