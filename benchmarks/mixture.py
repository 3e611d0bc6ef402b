"""Times every form of the K-convolution mixture against a static convolution of the same shape, in turn.

Commands: python benchmarks/mixture.py
          python benchmarks/mixture.py cuda    (writes results/mixture-cuda.json and docs/figures/mixture-cuda.png)
Takes: about ten minutes on two cores. Forward and backward at a batch of 128, and a single image forward; in float32,
and in bfloat16 where the processor has it, the weights being float32 as in training. Draws a figure of the result's
name, which is continued by "-avx512" or "-float32" where the processor has no matrix tiles.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from record import on_this_processor, over_repeats, write_result

from dynaconv import native
from dynaconv.device import computing_in, has_fast_bfloat16, keep_freed_memory, use_threads
from dynaconv.model.mixture import FORMS, choose_form

BATCH = 128
SHAPES = [
    (24, 48, 16),
    (48, 96, 8),
    (64, 64, 32),
    (64, 64, 16),
    (128, 128, 16),
    (128, 128, 8),
    (256, 256, 8),
    (256, 256, 4),
    (512, 512, 4),
]
"""(channels in, channels out, side of the map)."""
KERNEL_SIZES = ((3, 3), (3, 1), (3, 3, 3, 3))
"""Sides of the K kernels of a block."""
DRAWN = [(64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4)]
ROUNDS, WARMING = 5, 3
"""How often each contender is timed, and how often it runs before, while the system still hands out memory."""

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
CUDA = DEVICE.type == "cuda"
STEPS = 15 if CUDA else 1
"""Forward and backward passes timed together: an accelerator takes its work in advance."""


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def by_place(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def recorded(work):
    """Returns `work` as a CUDA graph, which costs no launches: what the device does is what is timed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def is_timed(form: str, precision: torch.dtype) -> bool:
    """Winograd's forms are written for the CPU; the compiled one is the literal one where it cannot run."""
    if form == "compiled":
        return not CUDA and precision == torch.bfloat16 and native.library() is not None
    return not (CUDA and form == "winograd")


def step(convolve, inputs, parameters) -> None:
    for tensor in (inputs, *parameters):
        tensor.grad = None
    outputs = convolve(inputs)
    outputs.backward(torch.ones_like(outputs))


def measure(
    channels: int, outputs: int, side: int, sizes: tuple[int, ...], images: int, precision: torch.dtype
) -> dict[str, object]:
    """Times all forms; a single image only forward, without gradients."""
    generator = torch.Generator().manual_seed(0)
    trained = images > 1

    def fresh(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(trained)

    maps = torch.randn(images, channels, side, side, generator=generator).to(DEVICE, precision)
    # Each form gets its inputs as they lie in a network that is made of it.
    layouts = {"winograd": by_place(maps).requires_grad_(trained)}
    usual = maps.contiguous(memory_format=torch.channels_last).requires_grad_(trained)
    kernels, weights = [fresh(outputs, channels, size, size) for size in sizes], fresh(images, len(sizes))
    contenders = {"static": (partial(torch.nn.functional.conv2d, weight=kernels[0], padding=1), kernels[:1])}
    for name, mix in FORMS.items():
        if not is_timed(name, precision):
            continue
        contenders[name] = (partial(mix, kernels=kernels, weights=weights), [*kernels, weights])
    works = {}
    for name, (convolve, parameters) in contenders.items():
        inputs = layouts.get(name, usual)
        work = partial(step, convolve, inputs, parameters) if trained else partial(convolve, inputs)
        works[name] = recorded(work) if CUDA else work
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(WARMING + ROUNDS):
        for name, work in works.items():
            steps = STEPS if trained else 20
            wait()
            started = time.perf_counter()
            for _ in range(steps):
                work()
            wait()
            if round_number >= WARMING:
                seconds[name].append((time.perf_counter() - started) / steps)
    static = over_repeats(seconds["static"])
    ratios = {
        name: over_repeats([a / b for a, b in zip(values, seconds["static"], strict=True)])
        for name, values in seconds.items()
        if name != "static"
    }
    chosen = choose_form(sizes, outputs, usual)
    told = ", ".join(f"{name} {ratio['median']:.2f}x" for name, ratio in ratios.items())
    shape = name_of(channels, outputs, side, sizes, images, precision)
    print(f"{shape}: static {static['median'] * 1e3:.2f} ms; {told}; auto: {chosen}", flush=True)
    return {"static_seconds": static, "times_static": ratios, "chosen": chosen}


def name_of(channels: int, outputs: int, side: int, sizes: tuple[int, ...], images: int, precision: torch.dtype) -> str:
    told = "" if precision == torch.float32 else " bfloat16"
    return f"{channels}->{outputs}@{side} kernels {' '.join(map(str, sizes))} batch {images}{told}"


def draw(metrics: dict[str, dict[str, object]], precisions: list[torch.dtype], path: Path) -> None:
    figure, lines = Figure(figsize=(6.2 * len(precisions), 4.5), layout="constrained"), ([], [])
    for axes, precision in zip(
        figure.subplots(1, len(precisions), squeeze=False, sharey=True)[0], precisions, strict=True
    ):
        for form, marker in zip(FORMS, "osD^vP", strict=True):
            if not is_timed(form, precision):
                continue
            rows = [metrics[name_of(*shape, (3, 3, 3, 3), BATCH, precision)] for shape in DRAWN]
            axes.plot([row["times_static"][form]["median"] for row in rows], marker=marker, label=form)  # pyright: ignore
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log", base=2)
        times = [2**power for power in range(7) if 2**power < axes.get_ylim()[1]]
        axes.set_yticks(times, [f"{each}x" for each in times])
        axes.set_xticks(range(len(DRAWN)), [f"{outputs} channels\n{side}x{side}" for _, outputs, side in DRAWN])
        axes.set_ylabel("time of one static convolution")
        axes.set_title(str(precision).removeprefix("torch."))
        axes.grid(alpha=0.3)
        lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center")  # of the last axes, which have all forms
    figure.suptitle(f"Four 3x3 convolutions mixed: forward and backward, batch of {BATCH}")
    figure.savefig(path, dpi=110)


def main() -> None:
    keep_freed_memory()
    use_threads(0)
    torch.backends.cudnn.benchmark = CUDA
    precisions = [*([] if CUDA else [torch.float32]), *([torch.bfloat16] if has_fast_bfloat16(DEVICE) else [])]
    metrics = {}
    for precision in precisions:
        cases = [(*shape, sizes, BATCH, precision) for shape in SHAPES for sizes in KERNEL_SIZES]
        cases += [(*shape, (3, 3, 3, 3), 1, precision) for shape in DRAWN]
        for case in cases:
            with computing_in(precision, DEVICE), torch.set_grad_enabled(case[-2] > 1):
                metrics[name_of(*case)] = measure(*case)
    name = "mixture-cuda" if CUDA else on_this_processor("mixture")
    print(write_result(name, metrics, device=DEVICE))
    draw(metrics, precisions, Path(f"docs/figures/{name}.png"))


if __name__ == "__main__":
    main()
