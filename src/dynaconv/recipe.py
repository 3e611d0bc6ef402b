"""The typed settings of a run: what a Recipe is, and what it refuses. Imports no torch."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dynaconv.errors import UserError, unknown


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _require_range(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    _require(
        math.isfinite(value) and low <= value <= high,
        f"--{name.replace('_', '-')} must be from {low:g} to {high:g}{unit}, received {value:g}.",
    )


def _require_count(name: str, value: int, at_least: int = 1) -> None:
    _require(
        value >= at_least,
        f"--{name.replace('_', '-')} must be at least {at_least}, received {value}.",
    )


def parse_duration(text: str, setting: str = "--budget") -> float:
    """Returns the seconds of a time like 90s, 15m or 1.5h; raises UserError if it is none, or not above zero.

    Example:
        >>> parse_duration("1.5m")
        90.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    _require(seconds > 0, f"{setting} takes a time above zero, as 90s, 15m or 1.5h, received {text!r}.")
    return seconds


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the images come from and how the training images are split."""

    source: str = "auto"
    """cifar10, digits, auto, a folder, a .parquet, .csv or .npz file, or hf:OWNER/NAME. `--data` for short."""
    validation_fraction: float = 0.1
    """Share of the training images held out for validation, the same in every class: 0.01 to 0.5, or 0 to train on all
    of them, for a last run with settings that were chosen before."""
    split_seed: int = 0
    """Seed of that choice. Runs that are to be compared share it."""
    image_size: int | None = None
    """Height and width in pixels, 4 to 512; images of another size are resized. None keeps the source's size."""
    channels: int | None = None
    """1 (grey) or 3 (RGB). None keeps the source's own form."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """What a file that cannot be read does: stop before any work, or be left out and named."""
    max_train_images: int | None = None
    """Use only this many training images, the same share of every class; None uses all. For short trials."""
    without: str | None = None
    """A CSV file with a column `index`, as `dynaconv labels` writes it: training images to leave out. Images that are
    held out for validation stay, so that runs with and without can be compared."""
    offline: bool = False
    """Never look anything up on the network. `HF_HUB_OFFLINE=1` does the same."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _require(bool(self.source.strip()), "--data needs a source, received an empty one.")
        if self.validation_fraction != 0:
            _require_range("validation_fraction", self.validation_fraction, 0.01, 0.5)
        _require_count("split_seed", self.split_seed, 0)
        if self.image_size is not None:
            _require_range("image_size", self.image_size, 4, 512, " pixels")
        _require(self.channels in (None, 1, 3), f"--channels must be 1 or 3, received {self.channels}.")
        if self.max_train_images is not None:
            _require_count("max_train_images", self.max_train_images, 2)


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """The transforms of the training images, drawn anew for every image, and the normalisation of all images.

    Order: RandomAffine, ColorJitter, Cutout, CutMix, Normalize. Zero strength switches a transform off.
    """

    degrees: float = 15.0
    """RandomAffine: rotation is drawn from [-degrees, degrees], 0 to 180 degrees."""
    translate: float = 0.125
    """RandomAffine: shift per axis is drawn from [-translate, translate] times the side, 0 to 0.5."""
    scale_min: float = 0.8
    """RandomAffine: smallest zoom factor, 0.25 to 4."""
    scale_max: float = 1.2
    """RandomAffine: largest zoom factor, scale_min to 4."""
    flip: float = 0.5
    """RandomAffine: chance that left and right are swapped, 0 to 1. Letters and digits need 0."""
    alternate_flip: bool = False
    """RandomAffine: swap by turns instead of by chance: an image swapped in one epoch is not in the next. `flip` is
    then the chance of being swapped in the first epoch."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    """RandomAffine: how a pixel between pixels is read. Bilinear blurs every training image; bicubic hardly does."""
    fill: Literal["black", "border", "reflection"] = "reflection"
    """RandomAffine: what stands outside an image: black, its border pixels drawn out, or its mirror image."""
    brightness: float = 0.1
    """ColorJitter: factor is drawn from [1 - brightness, 1 + brightness], 0 to 1."""
    contrast: float = 0.1
    """ColorJitter: factor is drawn from [1 - contrast, 1 + contrast], 0 to 1."""
    saturation: float = 0.1
    """ColorJitter: factor is drawn from [1 - saturation, 1 + saturation], 0 to 1. Colour images only."""
    hue: float = 0.02
    """ColorJitter: turn of the hue circle is drawn from [-hue, hue], 0 to 0.5 of a full turn. Colour images only."""
    cutout: float = 0.0
    """Cutout: side of a square that is covered at a random place in each image, as a share of the image's shorter side,
    0 to 1. It gets the value that Normalize makes zero."""
    cutmix: float = 0.0
    """CutMix: chance that a rectangle of an image is replaced by that of another image of the batch, 0 to 1; the image
    then belongs to both classes by their shares of its area. For long trainings, which know their images by heart."""
    normalize_mean: float = 0.5
    """Normalize: subtracted from every channel after scaling to [0, 1]."""
    normalize_std: float = 0.5
    """Normalize: what every channel is then divided by, above 0."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _require_range("degrees", self.degrees, 0, 180, " degrees")
        _require_range("translate", self.translate, 0, 0.5)
        _require_range("scale_min", self.scale_min, 0.25, 4)
        _require_range("scale_max", self.scale_max, self.scale_min, 4)
        _require_range("flip", self.flip, 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            _require_range(name, getattr(self, name), 0, 1)
        _require_range("hue", self.hue, 0, 0.5)
        for name in ("cutout", "cutmix"):
            _require_range(name, getattr(self, name), 0, 1)
        _require_range("normalize_mean", self.normalize_mean, -1, 2)
        _require_range("normalize_std", self.normalize_std, 1e-3, 10)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network: a stem, a backbone of N blocks B_1..B_N and a classifier."""

    stem_side: int = 0
    """Side in pixels of a fixed convolution before the first block, which decorrelates neighbouring pixels and is
    computed from training images before the first step; 0 for none, else 1 to 8."""
    stem_stride: int = 1
    """Step in pixels of the stem, 1 to stem_side: 2 halves the first map."""
    widths: tuple[int, ...] = (24, 48, 96, 96, 128, 128)
    """Output channels of each block; their number is N. 1 to 64 blocks, 1 to 4096 channels."""
    num_convolutions: tuple[int, ...] = (4, 2, 2, 2, 2, 2)
    """K, the convolutions mixed in a block: one number for all blocks or one per block, 1 to 64."""
    pool_after: tuple[int, ...] = (1, 2, 4)
    """Blocks (counted from 1) whose output map is halved by a 2x2 max-pooling."""
    kernel_sizes: tuple[int, ...] = (3, 1)
    """Sides of the mixed convolutions in pixels, odd, 1 to 11; taken in turn, so `3 1` mixes 3x3 with 1x1."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """What follows batch norm, and the stem."""
    norm_momentum: float = 0.1
    """Share of the newest batch in batch norm's running mean and variance, above 0 and up to 1. A training of few
    steps needs more than the usual 0.1."""
    mixture_form: Literal["auto", "literal", "concatenated", "grouped", "patches", "winograd", "compiled"] = "auto"
    """How the mixture is computed. All forms give the same result; auto picks the cheaper per block."""

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest image that leaves a map behind all halvings."""
        return self.stem_stride * 2 ** len(self.pool_after)

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _require_range("stem_side", self.stem_side, 0, 8, " pixels")
        _require_range("stem_stride", self.stem_stride, 1, max(1, self.stem_side), " (the stem's side)")
        _require(1 <= len(self.widths) <= 64, f"--widths needs 1 to 64 numbers, received {len(self.widths)}.")
        for width in self.widths:
            _require_range("widths", width, 1, 4096, " channels")
        _require(
            len(self.num_convolutions) in (1, len(self.widths)),
            f"--num-convolutions needs one number or one for each of the {len(self.widths)} blocks, "
            f"received {len(self.num_convolutions)}.",
        )
        for count in self.num_convolutions:
            _require_range("num_convolutions", count, 1, 64)
        for place in self.pool_after:
            _require_range("pool_after", place, 1, len(self.widths), " (the number of blocks)")
        _require(
            len(set(self.pool_after)) == len(self.pool_after),
            f"--pool-after names a block twice: {' '.join(map(str, self.pool_after))}.",
        )
        _require(
            0 < self.norm_momentum <= 1,
            f"--norm-momentum must be above 0 and at most 1, received {self.norm_momentum:g}.",
        )
        _require(len(self.kernel_sizes) > 0, "--kernel-sizes needs at least one number, received none.")
        for side in self.kernel_sizes:
            _require(
                side % 2 == 1 and 1 <= side <= 11, f"--kernel-sizes must be odd and from 1 to 11, received {side}."
            )


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The loss, the optimiser and how its rates fall over the training."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam, or muon: Muon for the convolutions' kernels and Adam for all else."""
    learning_rate: float = 1e-3
    """Adam's rate at the start, above 0 and up to 1. With muon, that of a linear layer is divided by its inputs."""
    kernel_learning_rate: float = 0.24
    """Muon's rate at the start, above 0 and up to 10, for kernels whose every output channel has norm one."""
    kernel_momentum: float = 0.6
    """Muon's momentum, 0 to below 1."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rates fall to zero: half a cosine, stepped after every epoch, or a line, stepped after every update."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes while training, 0 to below 1."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name, most in (("learning_rate", 1), ("kernel_learning_rate", 10)):
            value = getattr(self, name)
            _require(
                0 < value <= most,
                f"--{name.replace('_', '-')} must be above 0 and at most {most}, received {value:g}.",
            )
        for name in ("kernel_momentum", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"--{name.replace('_', '-')} must be at least 0 and below 1, received {value:g}.")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and on what the training runs."""

    epochs: int = 50
    """Passes over the training images, at least 1."""
    batch_size: int = 75
    """Images whose gradients are computed at once, at least 2 (batch norm needs two)."""
    accumulation_steps: int = 1
    """Batches whose gradients are added up before one update, at least 1. One update then sees
    batch_size * accumulation_steps images."""
    budget: str | None = None
    """Time for training and judging, as 90s, 15m or 1.5h: `epochs` is then as many as fit, by a measurement at the
    start. The run's own recipe holds the epochs, and no budget."""
    train_scales: tuple[float, ...] = ()
    """Shares of the images' side, 0.25 to 1, to which training images are scaled, each for an equal part of the epochs:
    `0.5 0.75 1` trains a third of them on images of half the side, which are cheap. Empty keeps the side."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""
    checkpoint_every: str = "60s"
    """Time between two stored states, as 30s, 5m or 1h: what a power cut costs at most. `dynaconv resume` goes on."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """When the loss or a gradient becomes NaN or infinite: stop, or go back to the start of the epoch and on from there
    with half the rates, three times at most."""
    log_every: int = 1
    """Epochs between two log lines, at least 1. The last epoch is always logged."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA if there is one, else MPS, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the convolutions: auto takes bfloat16 where the device computes in it faster, else float32. The
    weights are float32 always."""
    deterministic: bool = False
    """Take only algorithms that give the same bits every time, and fail where there is none. On a CPU all are; on CUDA
    it costs speed."""
    compile: bool = False
    """On CUDA, have torch compile the passes before they are recorded: about 20 seconds at the start for every size of
    images, and steps of two thirds of the time. Pays in long trainings."""
    threads: int = 0
    """CPU threads; 0 takes one per core that this process may use."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _require_count("epochs", self.epochs)
        _require_count("batch_size", self.batch_size, 2)
        _require_count("accumulation_steps", self.accumulation_steps)
        if self.budget is not None:
            parse_duration(self.budget)
        parse_duration(self.checkpoint_every, "--checkpoint-every")
        for scale in self.train_scales:
            _require_range("train_scales", scale, 0.25, 1)
        _require_range("seed", self.seed, 0, 2**63 - 1)
        _require_count("log_every", self.log_every)
        _require_range("threads", self.threads, 0, 1024)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How the validation and test splits are judged."""

    wanted_precision: float = 0.99
    """Share of right answers, 0.01 to 0.9999, wanted among the images that the classifier does not abstain from.
    The confidence that this takes is chosen on the validation images and stored with the model."""
    evaluation_batch_size: int = 50
    """Images judged at once, at least 1. Changes speed and memory, never the result beyond rounding."""
    views: Literal["one", "mirror", "six"] = "one"
    """Views of an image whose logits are averaged for the accuracy "with TTA", which stands beside the plain one: the
    image; with its mirror image; those two also shifted by one pixel along either diagonal."""
    num_grid_images: int = 20
    """Random test images drawn with predicted and actual class, 0 to 100; 0 draws none."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        _require_range("wanted_precision", self.wanted_precision, 0.01, 0.9999)
        _require_count("evaluation_batch_size", self.evaluation_batch_size)
        _require_range("num_grid_images", self.num_grid_images, 0, 100)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run. Immutable; a variant is made with `dataclasses.replace` or `with_settings`."""

    name: str = "custom"
    """Name of the recipe this one started from."""
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


GROUPS: dict[str, type] = {
    "data": DataSettings,
    "augment": AugmentSettings,
    "model": ModelSettings,
    "optim": OptimSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
}
"""The groups of a Recipe, in the order in which they are shown. Setting names are unique across groups."""


def sizes_of_epochs(recipe: Recipe, epochs: int, side: int) -> list[int]:
    """Returns the side in pixels of the training images in each epoch, from `train_scales` and the images' own `side`.

    Example:
        >>> sizes_of_epochs(with_settings(Recipe(), train_scales=(0.5, 1.0)), 5, 32)
        [16, 16, 16, 32, 32]
    """
    scales = recipe.train.train_scales or (1.0,)
    sizes = [max(round(scale * side), min(side, recipe.model.smallest_side)) for scale in scales]
    return [sizes[epoch * len(sizes) // epochs] for epoch in range(epochs)]


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """Returns the recipe with some settings replaced, each named without its group.

    Raises:
        UserError: a name is not a setting (nearest names are offered), or a value is impossible.

    Example:
        >>> with_settings(Recipe(), epochs=3, degrees=0.0).train.epochs
        3
    """
    owner = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name not in owner:
            raise unknown("setting", name, owner)
        changes.setdefault(owner[name], {})[name] = value
    return dataclasses.replace(
        recipe,
        **{group: dataclasses.replace(getattr(recipe, group), **values) for group, values in changes.items()},
    )
