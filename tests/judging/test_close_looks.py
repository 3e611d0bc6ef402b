"""What is known of a single picture: how far from the training images it lies, where it was decided, what is alike."""

import dataclasses

import captum.attr
import numpy as np
import pytest
import torch

from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import UserError
from dynaconv.judging import neighbours as neighbours_module
from dynaconv.judging.closely import look_closely
from dynaconv.judging.familiarity import FARTHEST, RIDGE, Familiarity, measure_familiarity, see
from dynaconv.judging.neighbours import Neighbours, collect_neighbours
from dynaconv.model.network import build_network
from dynaconv.recipe import Recipe, with_settings

RECIPE = with_settings(Recipe(), widths=(8, 12, 16), num_convolutions=(2,), kernel_sizes=(3, 1), pool_after=(1,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    images = load_images("digits", "train", SourceOptions())
    return images.subset(torch.arange(0, 1000)), images.subset(torch.arange(1000, 1400))


@pytest.fixture(scope="module")
def network(digits):
    return build_network(RECIPE.model, 1, 10, 8, seed=0).eval()


@pytest.fixture(scope="module")
def familiarity(network, digits):
    return measure_familiarity(network, *digits, RECIPE)


def batch_of(images):
    return normalize(to_tensor(images.images), RECIPE.augment)


@torch.no_grad()
def test_seeing_changes_nothing(network, digits):
    batch = batch_of(digits[1])
    logits, features = see(network, batch)
    assert torch.equal(logits, network(batch))
    # The middle of three blocks is the second, which weighs its convolutions by these features.
    assert features.shape == (400, network.backbone.block(1).weigh.in_features)


@torch.no_grad()
def test_the_distance_is_mahalanobis(network, digits, familiarity):
    training, validation = (see(network, batch_of(images))[1].double().numpy() for images in digits)
    covariance = np.cov(training.T)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    offset = validation - training.mean(0)
    squared = np.einsum("nd,de,ne->n", offset, np.linalg.inv(covariance), offset)
    expected = np.sqrt(squared / training.shape[1])
    expected /= np.quantile(expected, 1 - 1 / 200)
    assert familiarity.distance(torch.tensor(validation)).numpy() == pytest.approx(expected, rel=1e-3)
    assert (expected > 1).sum() == 2  # of 400


@torch.no_grad()
def test_what_is_unlike_lies_beyond(network, familiarity):
    noise = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    _, features = see(network, normalize(to_tensor(noise), RECIPE.augment))
    assert (familiarity.distance(features) > 1).all()
    features[0, 0], features[1, 0] = torch.nan, torch.inf
    assert familiarity.distance(features[:2]).tolist() == [FARTHEST, FARTHEST]


def test_without_validation_images_no_bound(network, digits):
    training, validation = digits
    assert measure_familiarity(network, training, validation.subset(torch.arange(199)), RECIPE) is None


def test_familiarity_is_stored_and_an_altered_one_refused(network, familiarity):
    stored = familiarity.as_tensors()
    assert torch.equal(Familiarity.from_tensors(stored, network, "f").whitening, familiarity.whitening)
    for change in (
        {"bound": torch.tensor([0.0])},
        {"bound": torch.tensor([torch.nan])},
        {"center": stored["center"][:-1]},
        {"whitening": stored["whitening"].double()},
        {"more": stored["center"]},
    ):
        with pytest.raises(UserError, match="f does not belong to the network beside it"):
            Familiarity.from_tensors({**stored, **change}, network, "f")


def test_the_heat_is_grad_cam_without_a_backward_pass(network, digits):
    for place in range(5):
        batch = batch_of(digits[1])[place : place + 1]
        found = look_closely(network, batch)
        target = int(network(batch).argmax())
        cam = captum.attr.LayerGradCam(network, network.backbone).attribute(batch, target, relu_attributions=True)
        cam = torch.nn.functional.interpolate(cam, size=(8, 8), mode="bilinear", align_corners=False)[0, 0].detach()
        assert found.heat.amax() == pytest.approx(1)
        assert torch.allclose(found.heat, cam / cam.amax(), atol=1e-5)


@torch.no_grad()
def test_the_weights_are_those_that_mixed(network, digits):
    seen = []
    handles = [
        block.weigh.register_forward_hook(lambda _, __, out: seen.append(out)) for block in network.backbone.blocks
    ]
    batch = batch_of(digits[1])[:1]
    network(batch)
    for handle in handles:
        handle.remove()
    found = look_closely(network, batch)
    assert [each["block"] for each in found.mixture] == [1, 2, 3]
    assert [each["kernel_sizes"] for each in found.mixture] == [[3, 1]] * 3
    for each, expected in zip(found.mixture, seen, strict=True):
        assert each["weights"] == pytest.approx(expected[0].tolist())
    assert torch.allclose(network.classifier.linear(found.features), network(batch)[0], atol=1e-5)


def test_what_runs_away_shows_no_heat(network, digits):
    found = look_closely(network, torch.full((1, 1, 8, 8), 1e30))
    assert found.heat.isfinite().all()
    assert all(np.isfinite(each["weights"]).all() for each in found.mixture)


def test_a_training_image_is_its_own_neighbour(network, digits, monkeypatch):
    monkeypatch.setattr(neighbours_module, "MOST", 600)
    found = collect_neighbours(network, digits[0], RECIPE)
    assert len(found.labels) == 500  # every second
    assert torch.equal(found.images, digits[0].images[::2])
    assert torch.equal(found.labels, digits[0].labels[::2])
    features = look_closely(network, batch_of(digits[0])[20:21]).features
    (first, cosine), *others = found.nearest(features, 4)
    assert (first, len(others)) == (10, 3)
    assert cosine == pytest.approx(1, abs=1e-3)
    assert [each for _, each in others] == sorted((each for _, each in others), reverse=True)
    assert found.nearest(torch.full_like(features, torch.nan), 4) == []


def test_neighbours_are_stored_and_altered_ones_refused(network, digits):
    found = collect_neighbours(network, digits[0].subset(torch.arange(30)), RECIPE)
    stored = found.as_tensors()
    again = Neighbours.from_tensors(stored, network, 8, "n")
    assert all(torch.equal(mine, getattr(again, name)) for name, mine in dataclasses.asdict(found).items())
    for change in (
        {"labels": stored["labels"] + 10},
        {"labels": stored["labels"][:-1]},
        {"labels": torch.tensor(3)},
        {"features": stored["features"].float()},
        {"features": stored["features"][:, :-1]},
        {"images": stored["images"][:, :, :-1]},
        {"images": stored["images"].expand(-1, 2, -1, -1)},
        {"more": stored["labels"]},
    ):
        with pytest.raises(UserError, match="n does not belong to the network beside it"):
            Neighbours.from_tensors({**stored, **change}, network, 8, "n")
