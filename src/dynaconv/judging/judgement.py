"""The whole judgement of a classifier on a split, as its run stores it: figures, calibration, what to abstain from."""

from dataclasses import dataclass
from typing import Any

import torch

from dynaconv.errors import UserError
from dynaconv.judging.calibration import confidences, coverage, fit_temperature, reliability, threshold_for
from dynaconv.judging.evaluate import Evaluation
from dynaconv.judging.metrics import measure
from dynaconv.judging.rate import Rate


@dataclass(frozen=True)
class Calibration:
    """What was fitted on the validation images, and holds for every picture that is classified.

    Attributes:
        temperature: By which logits are divided, above 0; 1 where there were no validation images.
        precision: Share of right answers that was wanted among the images decided, above 0 and below 1.
        threshold: Confidence after calibration, 0 to 1, below which the classifier should abstain; None where no
            threshold reaches the precision for certain.
        images: Validation images that both were fitted on.
    """

    temperature: float
    precision: float
    threshold: float | None
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, document: Any, where: str) -> "Calibration":
        """Reads what `as_dict` returned; raises UserError, naming the file `where`, if it cannot be that."""
        try:
            temperature, precision, threshold, images = (
                document[name] for name in ("temperature", "precision", "threshold", "images")
            )
            sound = 0 < temperature < 1e3 and 0 < precision < 1 and (threshold is None or 0 <= threshold <= 1)
            if sound and isinstance(images, int):
                return cls(float(temperature), float(precision), threshold, images)
        except (KeyError, TypeError, ValueError):
            pass
        raise UserError(f"{where} holds no calibration; it was altered.")


def calibrate(validation: Evaluation | None, precision: float) -> Calibration:
    """Fits the temperature, and the threshold for a wanted precision, on validation images; None fits nothing."""
    if validation is None:
        return Calibration(1.0, precision, None, 0)
    temperature = fit_temperature(validation)
    found = threshold_for(precision, *confidences(validation, temperature))
    return Calibration(temperature, precision, found and found.threshold, len(validation.labels))


def judge(evaluation: Evaluation, classes: tuple[str, ...], calibration: Calibration) -> dict[str, Any]:
    """Returns all figures of an evaluation as JSON values.

    Args:
        evaluation: Of at least one image.
        classes: Class names in the order of the logits.
        calibration: Fitted on the validation images.

    Returns:
        The figures of `Metrics`, and under "calibration" the reliability before and after, under "coverage" the
        accuracy of the surest images, under "decided" what the threshold decides, None without one.
    """
    before, after = (confidences(evaluation, temperature) for temperature in (1.0, calibration.temperature))
    decided = None
    if calibration.threshold is not None:
        sure, right = after
        kept = sure >= calibration.threshold
        rate = Rate(int(right[kept].sum()), int(kept.sum())) if kept.any() else None
        decided = {"covered": float(kept.mean()), "accuracy": rate and rate.as_dict()}
    return {
        **measure(evaluation, classes).as_dict(),
        "calibration": {
            **calibration.as_dict(),
            "before": reliability(*before).as_dict(),
            "after": reliability(*after).as_dict(),
            "loss_after": Evaluation(evaluation.logits.double() / calibration.temperature, evaluation.labels).loss,
        },
        "coverage": [point.as_dict() for point in coverage(*after)],
        "decided": decided,
    }


def tell(document: dict[str, Any], split: str) -> list[str]:
    """Says in a few lines what a judgement found."""
    top1, calibration = document["top1"], document["calibration"]
    low, high = top1["interval"]
    lines = [
        f"{split.capitalize()}: {top1['value']:.2%} of {top1['images']} images right "
        f"(95% interval {low:.2%} to {high:.2%})"
    ]
    if document["top5"]:
        lines.append(f"  among the five likeliest classes: {document['top5']['value']:.2%}")
    f1 = document["macro"]["f1"]
    lines.append(f"  loss {document['loss']:.4f}, Brier score {document['brier']:.4f}, macro F1 {f1:.4f}")
    before, after = calibration["before"]["error"], calibration["after"]["error"]
    lines.append(f"  calibration error {before:.4f}, {after:.4f} with temperature {calibration['temperature']:.3f}")
    if (decided := document["decided"]) and decided["accuracy"]:
        lines.append(
            f"  of the surest {decided['covered']:.1%}, {decided['accuracy']['value']:.2%} are right (wanted: "
            f"{calibration['precision']:.0%}; the classifier abstains below {calibration['threshold']:.3f})"
        )
    weakest = min((each for each in document["classes"] if each["images"]), key=lambda each: each["recall"])
    lines.append(f"  weakest class: {weakest['name']}, {weakest['recall']:.2%} of {weakest['images']} images")
    if document["confused"]:
        actual, predicted, count = document["confused"][0]
        lines.append(f"  most confused: {actual} taken for {predicted}, {count} {'image' if count == 1 else 'images'}")
    return lines


def worst_mistakes(evaluation: Evaluation, count: int) -> torch.Tensor:
    """Returns the places of the mistakes that the classifier was surest of, the surest first, at most `count`."""
    wrong = (evaluation.predictions != evaluation.labels).nonzero()[:, 0]
    sure = evaluation.logits.double().softmax(1).amax(1)[wrong]
    return wrong[sure.argsort(descending=True, stable=True)][:count]
