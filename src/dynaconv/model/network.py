"""The network: blocks B_1..B_N that mix K convolutions, the backbone made of them, and the classifier on top."""

import math
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

from dynaconv.errors import UserError
from dynaconv.model.layout import (
    average_beside,
    continue_channels,
    lay_by_place,
    lies_by_place,
    pool_maps,
)
from dynaconv.model.mixture import FORMS, MIXES_KERNELS, choose_form, mix_compiled, mix_literally, mix_winograd
from dynaconv.model.normalize import ACTIVATIONS, normalize_and_activate
from dynaconv.model.stem import WhiteningStem, whiten_and_activate
from dynaconv.recipe import ModelSettings


class Block(nn.Module):
    """Mixes K convolutions with weights computed from the input itself, and adds a residual connection.

        a = mean over height and width of X, times W, plus b        (N, K), unbounded
        O = a_1 Conv_1(X) + ... + a_K Conv_K(X) + shortcut(X)        (N, O, H, W)

    The shortcut is X itself, continued by channels of zeros or cut off where O differs from C: a projection would be
    one more 1x1 convolution that is not mixed. At the start W is zero and b is 1/sqrt(K): every image gets the same
    mixture, with the variance of one convolution. A random W, as torch would draw it, stops seven blocks from learning
    at all (docs/log.md).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_convolutions: int = 4,
        kernel_sizes: tuple[int, ...] = (3,),
        form: str = "auto",
    ) -> None:
        """Makes the block with fresh weights from torch's global generator.

        Args:
            in_channels: C, at least 1.
            out_channels: O, at least 1.
            num_convolutions: K, at least 1.
            kernel_sizes: Odd sides; convolution k has side number k modulo their count.
            form: "auto" or a key of `mixture.FORMS`.
        """
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weigh = nn.Linear(in_channels, num_convolutions)
        sides = [kernel_sizes[k % len(kernel_sizes)] for k in range(num_convolutions)]
        self.kernels = nn.ParameterList(torch.empty(out_channels, in_channels, side, side) for side in sides)
        self.form = form
        nn.init.zeros_(self.weigh.weight)
        nn.init.constant_(self.weigh.bias, 1 / math.sqrt(num_convolutions))
        for kernel in self.kernels:
            nn.init.kaiming_normal_(kernel, nonlinearity="relu")

    def mixing_weights(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns a, (N, K): the weight of each convolution in each image of `inputs`, (N, C, H, W)."""
        return self.weigh(self.pool(inputs).flatten(1))

    def form_for(self, inputs: torch.Tensor) -> str:
        """Returns the form that computes the mixture of (N, C, H, W) `inputs`: a key of `mixture.FORMS`."""
        if self.form != "auto":
            return self.form
        return choose_form([kernel.shape[-1] for kernel in self.kernels], len(self.kernels[0]), inputs)

    def forward(self, inputs: torch.Tensor, pooled: bool = False, averages: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, O, H, W); `pooled`, for the compiled form only, to (N, O, H / 2, W / 2).

        Averages, (N, C, 1, 1), are those of the inputs if they are known, with the gradient that belongs to them.
        """
        if averages is None:
            inputs, taken = average_beside(inputs, self.pool)
            weights = self.weigh(taken.flatten(1))
        else:
            weights = apply_precisely(self.weigh, averages)
        kernels = list(self.kernels)
        outputs = kernels[0].shape[0]
        form = self.form_for(inputs)
        if form == "winograd" and not torch.compiler.is_compiling():
            inputs = lay_by_place(inputs)  # before the shortcut, whose order all that follows inherits
        elif lies_by_place(inputs):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if averages is not None and form != "compiled":
            weights = weights.to(inputs.dtype)  # of another one they would make larger maps of bfloat16 ones
        if form in MIXES_KERNELS:
            # The shortcut is one more convolution, always with weight one: inside the mixed kernel it costs nothing.
            identity = torch.eye(outputs, inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
            kernels.append(identity[:, :, None, None])
            return FORMS[form](inputs, kernels, torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1))
        if form == "compiled":
            return mix_compiled(inputs, kernels, weights, inputs, pooled)
        shortcut = continue_channels(inputs, outputs)
        if form == "literal":
            return mix_literally(inputs, kernels, weights, shortcut)
        if form == "winograd":
            return mix_winograd(inputs, kernels, weights, shortcut)
        return FORMS[form](inputs, kernels, weights) + shortcut


class StaticBlock(nn.Module):
    """What a block becomes when its mixing weights are fixed: one convolution, with the shortcut inside its kernel."""

    def __init__(self, kernel: torch.Tensor) -> None:
        """Takes the mixed kernel, (O, C, R, R) with R odd, to which the shortcut is added here."""
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)  # not of the forward pass: what tells strange pictures looks through it
        outputs, channels, side, _ = kernel.shape
        kernel = kernel.clone()
        kernel[:, :, side // 2, side // 2] += torch.eye(outputs, channels, dtype=kernel.dtype, device=kernel.device)
        self.kernel = nn.Parameter(kernel)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, O, H, W)."""
        return functional.conv2d(inputs, self.kernel, padding=self.kernel.shape[-1] // 2)


class Averaged(NamedTuple):
    """Maps, (N, C, H, W), and their averages, (N, C, 1, 1) float32."""

    maps: torch.Tensor
    averages: torch.Tensor


class Backbone(nn.Module):
    """A stem, if any, and N blocks, each followed by max-pooling where the map halves, batch norm and activation.

    The pooling comes before batch norm and activation: both then work on a quarter of the values.
    """

    def __init__(self, channels: int, settings: ModelSettings) -> None:
        """Makes the backbone for images with `channels` channels (1 or 3)."""
        super().__init__()
        self.stem = WhiteningStem(channels, settings.stem_side, settings.stem_stride) if settings.stem_side else None
        self.activation = settings.activation
        self.activate = ACTIVATIONS[settings.activation]
        channels = channels if self.stem is None else self.stem.out_channels
        widths = settings.widths
        counts = settings.num_convolutions * (len(widths) if len(settings.num_convolutions) == 1 else 1)
        self.blocks = nn.ModuleList(
            Block(before, width, count, settings.kernel_sizes, settings.mixture_form)
            for before, width, count in zip((channels, *widths[:-1]), widths, counts, strict=True)
        )
        self.pools = nn.ModuleList(
            nn.MaxPool2d(2) if place in settings.pool_after else nn.Identity() for place in range(1, len(widths) + 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, momentum=settings.norm_momentum) for width in widths)

    def forward(self, inputs: torch.Tensor, beside: list[Averaged] | None = None) -> torch.Tensor:
        """Maps (N, C, H, W) to (N, last width, H / 2**P, W / 2**P) after P poolings; sizes are rounded down.

        To `beside` the result is appended with its averages, if they were taken on the way.
        """
        maps, averages = self._run_blocks(*self._run_stem(inputs), 0, len(self.blocks))
        if beside is not None and averages is not None:
            beside.append(Averaged(maps, averages))
        return maps

    def block(self, place: int) -> Block:
        """Returns block number `place`, from 0."""
        return cast("Block", self.blocks[place])

    def run_stem(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images to the maps that the first block sees: the images themselves without a stem."""
        return self._run_stem(images)[0]

    def _run_stem(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.stem is None:
            return images, None
        return whiten_and_activate(self.stem, images, self.activation, self.activate)

    def run_blocks(self, maps: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Runs blocks number `start` to `stop` - 1, from 0, and what follows each."""
        return self._run_blocks(maps, None, start, stop)[0]

    def _run_blocks(
        self, maps: torch.Tensor, averages: torch.Tensor | None, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layers = list(zip(self.blocks, self.pools, self.norms, strict=True))
        for block, pool, norm in layers[start:stop]:
            if not isinstance(block, Block):
                maps = pool_maps(pool, block(maps))
            elif isinstance(pool, nn.MaxPool2d) and block.form_for(maps) == "compiled":
                # Pooled as it is written, with a tenth of the memory moved.
                maps = block(maps, pooled=True, averages=averages)
            else:
                maps = pool_maps(pool, block(maps, averages=averages))
            norm = cast("nn.BatchNorm2d", norm)
            maps, averages = normalize_and_activate(norm, maps, self.activation, self.activate)
        return maps, averages


def apply_precisely(layer: nn.Linear, averages: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, 1, 1) float32 averages on the CPU to (N, outputs), in the layer's own precision under autocast too.

    A layer of so few outputs takes torch twice as long in bfloat16.
    """
    with torch.autocast("cpu", enabled=False):
        return layer(averages.flatten(1).to(layer.weight.dtype))


class Classifier(nn.Sequential):
    """Global average pooling, flatten, linear layer: (N, C, H, W) to (N, num_classes) logits."""

    def __init__(self, channels: int, num_classes: int) -> None:
        """Makes the classifier for a backbone with `channels` output channels."""
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, input: torch.Tensor, averages: torch.Tensor | None = None) -> torch.Tensor:
        """Maps (N, C, H, W) maps, or their (N, C, 1, 1) float32 averages if they are known, to logits."""
        return super().forward(input) if averages is None else apply_precisely(self.linear, averages)

    @property
    def linear(self) -> nn.Linear:
        """The last layer."""
        return cast("nn.Linear", self[2])


class Network(nn.Module):
    """Backbone and classifier: normalised images to logits."""

    def __init__(self, settings: ModelSettings, channels: int, num_classes: int) -> None:
        """Makes the network with fresh weights from torch's global generator."""
        super().__init__()
        self.backbone = Backbone(channels, settings)
        self.classifier = Classifier(settings.widths[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps normalised images, (N, C, H, W) float, to logits, (N, num_classes) float."""
        beside: list[Averaged] = []
        maps = self.backbone(images, beside)
        # Torch takes as long for averages over maps of bfloat16, and the way back, as for a whole block. What a hook
        # has put in the maps' place has averages of its own.
        known = [each.averages for each in beside if each.maps is maps]
        return self.classifier(maps, *known)


def build_network(
    settings: ModelSettings, channels: int, num_classes: int, image_size: int, seed: int | None = None
) -> Network:
    """Makes a network that fits images of `channels` x `image_size` x `image_size`.

    Args:
        settings: Widths, K, pooling places, kernel sides, form of the mixture.
        channels: 1 or 3.
        num_classes: At least 2.
        image_size: Pixels a side.
        seed: Seed of the initial weights, drawn without touching the global generator; None draws from it.

    Raises:
        UserError: the poolings would leave a map of no pixels.
    """
    if image_size < settings.smallest_side:
        raise UserError(
            f"--pool-after halves the map {len(settings.pool_after)} times, too often for images of {image_size} "
            f"pixels a side; remove a place or set --image-size {settings.smallest_side} or more."
        )
    if seed is None:
        return Network(settings, channels, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(settings, channels, num_classes)


@torch.no_grad()
def count_flops(network: Network, channels: int, image_size: int) -> int:
    """Counts the floating-point operations of one image's forward pass, a multiply-add being two.

    Counted is the definition, K convolutions of every block, whatever form computes them: the figure belongs to the
    network and not to a machine. Batch norm, pooling and activations are left out, as is usual.

    Args:
        network: Left as it was, but in evaluation mode.
        channels: 1 or 3.
        image_size: Pixels a side.

    Example:
        >>> settings = ModelSettings(widths=(8,), num_convolutions=(2,), kernel_sizes=(3,), pool_after=())
        >>> count_flops(Network(settings, 3, 10), 3, 16) - 2 * 2 * (8 * 3 * 9) * 16 * 16  # pooled to K=2, 8 to 10
        172
    """
    counted: list[int] = []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
        places = outputs[0, 0].numel() if outputs.ndim == 4 else 1
        held = [*layer.parameters(recurse=False), *layer.buffers()] if not isinstance(layer, Block) else layer.kernels
        counted.append(sum(2 * places * kernel.numel() for kernel in held if kernel.ndim > 1))

    network.eval()
    layers = [layer for layer in network.modules() if isinstance(layer, Block | WhiteningStem | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        device = next(network.parameters()).device
        with torch.autocast(device.type, enabled=False):  # compiled layers are not called one by one
            network(torch.zeros(1, channels, image_size, image_size, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return sum(counted)
