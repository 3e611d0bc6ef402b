"""Export: a run's classifier as one file to run elsewhere, written only with the proof that it is the judged one."""

import contextlib
import copy
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaconv import __version__
from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import load_images, options_of
from dynaconv.device import keep_freed_memory, use_threads
from dynaconv.errors import UserError, WorkError
from dynaconv.files import writing_whole
from dynaconv.judging.familiarity import see
from dynaconv.judging.mixing import fold_network
from dynaconv.judging.trained import load_judged_images, with_source
from dynaconv.model.network import Block
from dynaconv.shipping.certificate import SAME, SAMPLE, Side, certify, hash_weights, tell, to_text
from dynaconv.shipping.classifier import Classifier, load_classifier, to_probabilities
from dynaconv.shipping.portable import (
    FACTS,
    FORMAT,
    PortableClassifier,
    as_layout,
    certificate_of,
    import_onnxruntime,
)

OPSET = 20
CALIBRATION_IMAGES = 512
"""Training images from which the ranges of an 8-bit file are taken."""
FOLDING_IMAGES = 5000
"""Training images over which the mixing weights of a folded file are averaged."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and what it may cost.

    Attributes:
        form: "onnx" or "pt2".
        int8: 8-bit weights and activations; ONNX only.
        fold: One convolution in place of every mixture, its weights frozen to their means over training images.
        into: The file; None takes model.onnx, model-int8.onnx, model-folded.onnx, ... in the run's folder.
        max_drop: Accuracy, 0 to 1, that may be lost at most.
        split: "validation", or "test", which is recorded in the run as a look at the test images.
        overwrite: Replace a file that is there.
        layout: Of the images that the file takes: "nchw", or "nhwc" as pictures lie in memory.
        source: Where the run's images are now; None takes the source that the run names.
    """

    form: str = "onnx"
    int8: bool = False
    fold: bool = False
    into: Path | None = None
    max_drop: float = 0.003
    split: str = "validation"
    overwrite: bool = False
    layout: str = "nchw"
    source: str | None = None


class Portable(nn.Module):
    """What is exported: preprocessing, network, temperature and softmax, from pixels to probabilities."""

    def __init__(self, classifier: Classifier, layout: str = "nchw", fold: bool = False) -> None:
        """Takes the network of a classifier; its mixtures are computed literally, which every runtime can."""
        super().__init__()
        trained = classifier.trained
        self._augment = trained.recipe.augment
        # A copy: the classifier itself goes on as it was judged, to be compared with.
        self.network = (
            fold_network(trained.network, _training_images(classifier, FOLDING_IMAGES), trained.recipe)
            if fold
            else copy.deepcopy(trained.network)
        )
        self._temperature, self._layout = classifier.calibration.temperature, layout
        self._familiarity = classifier.familiarity
        for layer in self.network.modules():
            if isinstance(layer, Block):
                layer.form = "literal"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps (N, C, H, W) or, in the other layout, (N, H, W, C) uint8 to float32.

        Returns:
            (N, classes) that sum to 1; (N,) distances from the training images, where they were measured.
        """
        if self._layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        logits, features = see(self.network, normalize(to_tensor(images), self._augment))
        probabilities = to_probabilities(logits, self._temperature)
        return (probabilities,) if self._familiarity is None else (probabilities, self._familiarity.distance(features))


def export_run(run: Path, options: ExportOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Writes the classifier of a finished run as a file, and the certificate of that file beside it.

    Args:
        run: Folder of the run.
        options: What to export.
        say: Shows a line to the user.

    Returns:
        The certificate.

    Raises:
        UserError: no finished run, a target that is there, settings that do not go together, or a missing package.
        WorkError: the file is not the judged classifier within its bounds; no file is left.
    """
    if options.form == "pt2" and options.int8:
        raise UserError("--int8 goes with --format onnx; torch.export's files keep float32.")
    name = f"model{'-folded' if options.fold else ''}{'-int8' if options.int8 else ''}.{options.form}"
    target = options.into or run / name
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file with --into.")
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} exists; say --overwrite to replace it, or --into for another file.")
    if not target.parent.is_dir():
        raise UserError(f"The folder {target.parent} does not exist; make it first.")
    require_packages(options)
    keep_freed_memory()
    classifier = load_classifier(run)
    if options.source is not None:
        classifier = _with_source(classifier, options.source)
    trained = classifier.trained
    threads = use_threads(trained.recipe.train.threads)
    images = load_judged_images(trained, options.split, options_of(trained.recipe.data))
    if options.split == "test":
        with trained.run.locked():
            count = trained.run.add_look(f"dynaconv export {run} --split test")
        say(f"This is look {count} at the test images by this run; each is recorded.")
    facts = _facts(classifier, options)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / name
            model = Portable(classifier, options.layout, options.fold).eval()
            after = _write(model, draft, facts, classifier, options)
            before = Side.of_torch(classifier)
            document = certify(before, after, images, draft, classifier, options.split, threads)
            document |= {"int8": options.int8, "folded": options.fold}
            if options.fold and not options.int8:
                document["largest_difference_from_folded"] = _distance(_side_of(model, options.layout), after, images)
            _require_same(document, options)
            # The certificate first: a file without one would be opened unproven, a certificate alone proves nothing.
            with writing_whole(certificate_of(target)) as temporary:
                temporary.write_text(to_text(document))
            with writing_whole(target) as temporary:
                draft.replace(temporary)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    for line in tell(document, target):
        say(line)
    return {**document, "file": str(target)}


def require_packages(options: ExportOptions) -> None:
    """Raises UserError, naming what to install, if a package that the export needs is not there."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if options.form == "onnx" and missing:
        raise UserError(f"Exporting to ONNX needs {missing[0]}; install it: pip install dynaconv[export].")


def _with_source(classifier: Classifier, source: str) -> Classifier:
    trained = with_source(classifier.trained, source)
    return Classifier(trained, classifier.calibration, classifier.familiarity, classifier.neighbours)


def _facts(classifier: Classifier, options: ExportOptions) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": __version__,
        "classes": list(classifier.classes),
        "image_size": classifier.image_size,
        "channels": classifier.channels,
        "temperature": classifier.calibration.temperature,
        "threshold": classifier.threshold,
        "weights_sha256": hash_weights(classifier.trained.run.path),
        "layout": options.layout,
        "folded": options.fold,
        "input": f"images: ({', '.join(options.layout.upper())}) uint8, 0 to 255",
        "output": "probabilities: (N, classes) float32"
        + ("; distance: (N,) float32, above 1 unlike what trained" if classifier.familiarity else ""),
    }


def _write(model: Portable, draft: Path, facts: dict[str, Any], classifier: Classifier, options: ExportOptions) -> Side:
    """Writes the file; returns what computes with it."""
    example = torch.zeros(2, facts["channels"], facts["image_size"], facts["image_size"], dtype=torch.uint8)
    example = torch.from_numpy(as_layout(example.numpy(), options.layout))
    batch = {"images": {0: torch.export.Dim("batch")}}
    if options.form == "pt2":
        program = torch.export.export(model, (example,), dynamic_shapes=batch)
        torch.export.save(program, draft, extra_files={f"{FACTS}.json": json.dumps(facts)})
        return _side_of(torch.export.load(draft).module(), options.layout)
    whole = draft.with_name("float32.onnx") if options.int8 else draft
    with _quietly("torch.onnx"):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities", "distance"][: 2 if classifier.familiarity else 1],
            dynamic_shapes=batch,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise WorkError("torch could not express the network in ONNX.")
    _save(program.model_proto, whole, facts)
    if options.int8:
        _quantize(whole, draft, _training_images(classifier, CALIBRATION_IMAGES), options.layout)
        import onnx

        _save(onnx.load(draft), draft, facts)
    return Side.of_onnx(PortableClassifier(draft, torch.get_num_threads()))


def _side_of(model: nn.Module, layout: str) -> Side:
    """Returns what torch computes with a module that maps pixels in `layout` to probabilities, and more."""

    def compute(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return model(torch.from_numpy(as_layout(pixels, layout)))[0].double().numpy()

    return Side("torch.export", compute)


def _distance(one: Side, other: Side, images: ImageSet) -> float:
    """Returns by how much a probability of the first images differs at most."""
    pixels = images.images[:SAMPLE].cpu().numpy()
    return float(np.abs(one.over(pixels) - other.over(pixels)).max())


@contextlib.contextmanager
def _quietly(logger: str | None) -> Generator[None]:
    """Hides what exporters tell: torch's own deprecations, packages that are not needed here, advice on its use."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _save(model: Any, path: Path, facts: dict[str, Any]) -> None:
    import onnx

    onnx.helper.set_model_props(model, {FACTS: json.dumps(facts)})
    onnx.save(model, path)


def _quantize(whole: Path, target: Path, found: ImageSet, layout: str) -> None:
    """Turns a float32 file into one with 8-bit weights and activations, with ranges from training images."""
    import_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = as_layout(found.images.numpy(), layout)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.array_split(images, max(1, len(images) // 64)))

        def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    prepared = whole.with_name("prepared.onnx")
    with _quietly(None):
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # 7 bits: without it, sums of weights overflow on processors that add pairs of products in 16 bits, and the
            # file would compute something else there.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"],
        )


def _training_images(classifier: Classifier, count: int) -> ImageSet:
    """Returns about `count` images that trained, evenly over all of them."""
    trained = classifier.trained
    images = load_images(trained.recipe.data.source, "train", options_of(trained.recipe.data))
    # What is taken from the images that the file is proved on would flatter it.
    held_out = torch.tensor(trained.run.read_json("split.json").get("validation", []), dtype=torch.int64)
    chosen = torch.arange(len(images))
    chosen = chosen[~torch.isin(chosen, held_out)]
    return images.subset(chosen[:: max(1, len(chosen) // count)]).with_classes(trained.classes)


def _require_same(document: dict[str, Any], options: ExportOptions) -> None:
    drop = document["accuracy_before"]["value"] - document["accuracy_after"]["value"]
    largest = document["largest_probability_difference"]
    if options.fold:
        _require_worthless(document)
    # Asked this way round, what is not a number passes neither.
    elif not options.int8 and not (largest <= SAME and document["agreement"]["value"] == 1):
        raise WorkError(
            f"The exported file is not the judged classifier: probabilities differ by up to {largest:.1e} (at most "
            f"{SAME:.0e} is allowed), and {document['agreement']['value']:.3%} of the classes agree. No file was left."
        )
    if not drop <= options.max_drop:
        raise WorkError(
            f"The exported file loses {100 * drop:.2f} points of accuracy, more than --max-drop {options.max_drop:g} "
            "allows; no file was left."
        )


def _require_worthless(document: dict[str, Any]) -> None:
    """Raises WorkError unless weights that depend on the image buy nothing that the images can tell."""
    lost = document["accuracy_difference"]
    if not lost["high"] >= 0:
        raise WorkError(
            f"Choosing the weights for each image is worth {-100 * lost['value']:.2f} points of accuracy here (95% "
            f"interval {-100 * lost['high']:.2f} to {-100 * lost['low']:.2f}), which --fold would lose; no file was "
            "left."
        )
    largest = document.get("largest_difference_from_folded", 0.0)
    if not largest <= SAME:
        raise WorkError(
            f"The exported file is not the folded network: probabilities differ by up to {largest:.1e} (at most "
            f"{SAME:.0e} is allowed). No file was left."
        )
