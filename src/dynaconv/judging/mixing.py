"""The mixture's own view: what the weights of the K convolutions do, and what is lost without them."""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dynaconv.data.images import ImageSet
from dynaconv.judging.evaluate import Evaluation, evaluate
from dynaconv.judging.paired import Difference, paired_difference
from dynaconv.judging.rate import Rate
from dynaconv.model.network import Block, Network, StaticBlock
from dynaconv.recipe import Recipe

UNUSED = 0.01
"""A convolution with a smaller share of its block's mixture than this is not used."""
COPIES = 0.95
"""Two kernels whose cosine is at least this, or at most minus this, are copies: their sum is one convolution."""


@dataclass(frozen=True)
class BlockView:
    """What the mixture of one block does, over images.

    Attributes:
        block: Its number, from 1.
        kernel_sizes: K sides.
        mean: K means of the weights over images; unbounded, of either sign.
        spread: K standard deviations over images.
        by_class: Per class the K means over its images; None for a class without images.
        between_classes: Share of the weights' variance that lies between classes, 0 to 1 (eta squared); None where the
            weights do not vary.
        shares: K means of |a_k| times the norm of kernel k, over the sum of all of these: what each convolution
            contributes, for inputs without structure. They sum to 1.
        entropy: Mean over images of the entropy of an image's own shares, over log K: 1 where all convolutions
            contribute alike, 0 where one does alone; 1 for K = 1.
        unused: Numbers, from 1, of convolutions with a share below `UNUSED`.
        copies: Pairs of numbers, from 1, with the cosine of the two kernels, where that is `COPIES` or more either way.
        frozen: Rate of correct images with this block's weights frozen to their means, all other blocks as they are.
    """

    block: int
    kernel_sizes: tuple[int, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    by_class: tuple[tuple[float, ...] | None, ...]
    between_classes: float | None
    shares: tuple[float, ...]
    entropy: float
    unused: tuple[int, ...]
    copies: tuple[tuple[int, int, float], ...]
    frozen: Rate


@dataclass(frozen=True)
class MixtureView:
    """What the mixtures of a network do, over images.

    Attributes:
        classes: Class names.
        accuracy: Of the network as it is.
        frozen: With the weights of all blocks frozen to their means: the accuracy of the folded, static network.
        difference: The frozen network's accuracy less that of the whole, with its interval.
        blocks: One view per block.
    """

    classes: tuple[str, ...]
    accuracy: Rate
    frozen: Rate
    difference: Difference
    blocks: tuple[BlockView, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures as JSON values."""
        document = asdict(self)
        document["accuracy"], document["frozen"] = self.accuracy.as_dict(), self.frozen.as_dict()
        for view, block in zip(document["blocks"], self.blocks, strict=True):
            view["frozen"] = block.frozen.as_dict()
        return {**document, "words": tell_mixture(self)}


def view_mixture(network: Network, images: ImageSet, recipe: Recipe) -> MixtureView:
    """Runs the network over the images as it is, and with weights frozen, and describes its mixtures.

    Args:
        network: On the device of `images`; left as it was, in evaluation mode.
        images: At least one image, in the network's classes.
        recipe: Its normalisation and evaluation batch size are used.

    Cost: as many evaluations as there are blocks, and two.
    """
    blocks = _blocks(network)
    with _recording(blocks) as recorded:
        whole = evaluate(network, images, recipe)
    weights = [torch.cat(batches) for batches in recorded]
    means = [each.mean(0) for each in weights]

    def judge_frozen(numbers: Sequence[int]) -> Evaluation:
        with _frozen({number: means[number] for number in numbers}, blocks):
            return evaluate(network, images, recipe)

    static = judge_frozen(range(len(blocks)))
    right = [(each.predictions == each.labels)[None].numpy() for each in (whole, static)]
    return MixtureView(
        classes=images.classes,
        accuracy=_rate(whole),
        frozen=_rate(static),
        difference=paired_difference(right[0], right[1]),
        blocks=tuple(
            _describe(number, block, weights[number], whole.labels, len(images.classes), _rate(judge_frozen([number])))
            for number, block in enumerate(blocks)
        ),
    )


def collapsed(network: Network, images: torch.Tensor) -> dict[int, str]:
    """Finds blocks whose mixture has become a single convolution, from a few normalised images, (N, C, H, W) float.

    Returns:
        By number of the block, from 1: what has happened to it, as the end of a sentence. Leaves the network in
        evaluation mode.
    """
    blocks = _blocks(network)
    network.eval()
    with torch.no_grad(), _recording(blocks) as recorded:
        network(images)
    found: dict[int, str] = {}
    for number, (block, batches) in enumerate(zip(blocks, recorded, strict=True), start=1):
        count = len(block.kernels)
        if count == 1:
            continue
        used = [share for share in _shares(block, torch.cat(batches)).mean(0).tolist() if share >= UNUSED]
        pairs = _copies(block)
        if len(used) == 1:
            found[number] = f"one of its {count} convolutions contributes {used[0]:.1%}"
        elif len(pairs) == count * (count - 1) // 2:
            found[number] = f"its {count} convolutions have become copies of each other"
    return found


class CollapseWatch:
    """Looks after every epoch whether a mixture has become a single convolution, and says so once per block."""

    def __init__(self, images: torch.Tensor, say: Callable[[str], None]) -> None:
        """Takes a few normalised images, (N, C, H, W) float, on the network's device."""
        self._images, self._say = images, say
        self._told: set[int] = set()

    def look(self, network: Network) -> None:
        """Says what has collapsed since the last look; leaves the network in evaluation mode."""
        for block, happened in collapsed(network, self._images).items():
            if block not in self._told:
                self._told.add(block)
                self._say(f"The mixture of block {block} has collapsed: {happened}; --num-convolutions 1 costs less.")


def fold_network(network: Network, images: ImageSet, recipe: Recipe) -> Network:
    """Returns a copy of a network in which every block is one convolution: its weights no longer depend on the image.

    The weights are frozen to their means over `images`, as `view_mixture` freezes them, and the kernels mixed once and
    for all; a block then costs one convolution whatever its K, and neither pools nor weighs.

    Args:
        network: Left as it was, in evaluation mode.
        images: Whose weights are averaged; training images, lest the copy be fitted to those that judge it.
        recipe: Its normalisation and evaluation batch size are used.
    """
    blocks = _blocks(network)
    with _recording(blocks) as recorded:
        evaluate(network, images, recipe)
    folded = copy.deepcopy(network)
    for place, (block, batches) in enumerate(zip(blocks, recorded, strict=True)):
        kernels = torch.stack(_padded(block))
        mean = torch.cat(batches).mean(0).to(kernels)
        folded.backbone.blocks[place] = StaticBlock(torch.einsum("k,kocij->ocij", mean, kernels))
    return folded


def tell_mixture(view: MixtureView) -> list[str]:
    """Says in sentences what the view found."""
    mixing = [block for block in view.blocks if len(block.kernel_sizes) > 1]
    if not mixing:
        return ["Every block has one convolution: there is nothing to mix."]
    gained = view.difference
    verdict = (
        "the weights need not depend on the image, as far as these images can tell"
        if gained.low <= 0 <= gained.high
        else "that is what choosing the weights for each image is worth"
        if gained.value < 0
        else "fixed weights do better"
    )
    lines = [
        f"With all weights frozen to their means {view.frozen.value:.2%} of {view.frozen.images} images are right, "
        f"{view.accuracy.value:.2%} as they are (difference {100 * gained.value:+.2f} points, 95% interval "
        f"{100 * gained.low:+.2f} to {100 * gained.high:+.2f}): {verdict}."
    ]
    most = min(view.blocks, key=lambda block: block.frozen.value)
    lines.append(
        f"Most hangs on block {most.block}: {most.frozen.value:.2%} with its weights alone frozen."
        if most.frozen.value < view.accuracy.value
        else "Frozen alone, no block loses anything."
    )
    known = [block for block in mixing if block.between_classes is not None]
    if known:
        first, last = known[0], known[-1]
        lines.append(
            f"The class explains {first.between_classes:.0%} of the weights' variance in block {first.block} and "
            f"{last.between_classes:.0%} in block {last.block}."
        )
    for block in mixing:
        if block.unused:
            lines.append(f"Block {block.block} does not use its convolution {_listed(block.unused)}.")
        lines += [f"Block {block.block}: convolutions {a} and {b} have become copies." for a, b, _ in block.copies]
    return lines


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _blocks(network: Network) -> list[Block]:
    return [block for block in network.backbone.blocks if isinstance(block, Block)]


@contextmanager
def _recording(blocks: Sequence[Block]) -> Generator[list[list[torch.Tensor]]]:
    """Yields lists that fill with the mixing weights of every batch, (N, K) float32 on the CPU, one list per block."""
    recorded: list[list[torch.Tensor]] = [[] for _ in blocks]

    def hook_of(place: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def record(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            recorded[place].append(output.detach().float().cpu())

        return record

    handles = [block.weigh.register_forward_hook(hook_of(place)) for place, block in enumerate(blocks)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(means: dict[int, torch.Tensor], blocks: Sequence[Block]) -> Generator[None]:
    """Makes blocks, by their place, weigh every image alike: with `means`, each (K,)."""

    def hook_of(mean: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        return lambda layer, inputs, output: mean.to(output).expand_as(output)

    handles = [blocks[place].weigh.register_forward_hook(hook_of(mean)) for place, mean in means.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe(
    number: int, block: Block, weights: torch.Tensor, labels: torch.Tensor, num_classes: int, frozen: Rate
) -> BlockView:
    shares = _shares(block, weights)
    count = weights.shape[1]
    entropies = -(shares * shares.clamp_min(1e-12).log()).sum(1) / math.log(count) if count > 1 else torch.ones(1)
    by_class = [weights[labels == label] for label in range(num_classes)]
    return BlockView(
        block=number + 1,
        kernel_sizes=tuple(kernel.shape[-1] for kernel in block.kernels),
        mean=tuple(weights.mean(0).tolist()),
        spread=tuple(weights.std(0, correction=0).tolist()),
        by_class=tuple(tuple(rows.mean(0).tolist()) if len(rows) else None for rows in by_class),
        between_classes=_between(weights, by_class),
        shares=tuple(shares.mean(0).tolist()),
        entropy=entropies.mean().item(),
        unused=tuple(k for k, share in enumerate(shares.mean(0).tolist(), start=1) if share < UNUSED),
        copies=_copies(block),
        frozen=frozen,
    )


def _shares(block: Block, weights: torch.Tensor) -> torch.Tensor:
    """Returns, (N, K), what each convolution contributes to the mixture of an image; the rows sum to 1."""
    norms = torch.stack([kernel.detach().float().norm().cpu() for kernel in block.kernels])
    parts = weights.abs() * norms
    return parts / parts.sum(1, keepdim=True).clamp_min(1e-12)


def _between(weights: torch.Tensor, by_class: Sequence[torch.Tensor]) -> float | None:
    """Returns eta squared over all K weights together: sum of squares between classes, over that of all images."""
    centre = weights.mean(0)
    total = (weights - centre).square().sum().item()
    if total <= 1e-9 * weights.square().sum().item():
        return None
    return sum(len(rows) * (rows.mean(0) - centre).square().sum().item() for rows in by_class if len(rows)) / total


def _padded(block: Block) -> list[torch.Tensor]:
    side = max(kernel.shape[-1] for kernel in block.kernels)
    return [functional.pad(kernel.detach(), [(side - kernel.shape[-1]) // 2] * 4) for kernel in block.kernels]


def _copies(block: Block) -> tuple[tuple[int, int, float], ...]:
    rows = nn.functional.normalize(torch.stack(_padded(block)).flatten(1).float(), dim=1)
    cosines = (rows @ rows.T).cpu()
    pairs = [(a, b) for a in range(len(rows)) for b in range(a + 1, len(rows))]
    return tuple((a + 1, b + 1, cosines[a, b].item()) for a, b in pairs if abs(cosines[a, b].item()) >= COPIES)


def _rate(evaluation: Evaluation) -> Rate:
    return Rate(int((evaluation.predictions == evaluation.labels).sum()), len(evaluation.labels))
