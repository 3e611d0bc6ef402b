"""Robustness: scores of networks whose answers are known, the choice of images, files that are not what they say."""

import io
import json
import math
import pickle

import numpy as np
import pytest
import torch

from dynaconv.errors import UserError
from dynaconv.judging.corruptions import CORRUPTIONS, SEVERITIES, TITLE, corrupt
from dynaconv.judging.rate import Rate
from dynaconv.judging.robustness import (
    CIFAR10_C,
    Block,
    Cell,
    Robustness,
    judge_blocks,
    judge_robustness,
    read_cifar10_1,
    read_cifar10_c,
)

COUNT = 4
"""Images per severity in the files that these tests write."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_images(count=30, channels=3, side=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(count) % 3


def always(answer):
    """A network that gives every image the same class of three."""
    return lambda images: torch.eye(3)[answer].expand(len(images), 3)


def test_a_network_that_ignores_the_image_keeps_all_of_its_accuracy():
    judged = judge_robustness(always(1), *make_images())
    assert judged.name == TITLE
    assert judged.clean == Rate(10, 30)
    assert [(cell.corruption, cell.severity) for cell in judged.cells] == [
        (name, severity) for name in CORRUPTIONS for severity in SEVERITIES
    ]
    assert {cell.score for cell in judged.cells} == {Rate(10, 30)}
    assert judged.mean == pytest.approx(1 / 3)
    assert judged.relative == pytest.approx(1)
    assert judged.worst == judged.cells[0], "of equal ones the first"
    assert judged.by_corruption == pytest.approx(dict.fromkeys(CORRUPTIONS, 1 / 3))


def test_a_network_that_knows_only_the_clean_images_loses_everything():
    images, labels = make_images()
    answers = {image.numpy().tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}

    def predict(batch):
        return torch.eye(4)[[answers.get(image.numpy().tobytes(), 3) for image in batch]]

    judged = judge_robustness(predict, images, labels, corruptions=["gaussian_noise", "fog"], severities=[2, 5])
    assert judged.clean == Rate(30, 30)
    assert [cell.score.count for cell in judged.cells] == [0] * 4
    assert (judged.mean, judged.relative) == (0, 0)


def test_summaries_by_hand():
    cells = (
        Cell("a", 1, Rate(9, 10)),
        Cell("a", 2, Rate(4, 10)),
        Cell("b", 1, Rate(8, 10)),
        Cell("b", 2, Rate(4, 10)),
    )
    judged = Robustness("by hand", 0, Rate(10, 10), cells)
    assert judged.mean == pytest.approx(0.625)
    assert judged.relative == pytest.approx(0.625)
    assert judged.worst == cells[1]
    assert judged.by_corruption == pytest.approx({"a": 0.65, "b": 0.6})
    assert Robustness("", 0, Rate(5, 10), cells).relative == pytest.approx(1.25)
    assert Robustness("", 0, Rate(0, 10), cells).relative is None
    assert Robustness("", None, None, cells).relative is None


def test_what_json_holds_is_what_was_found():
    images, labels = make_images()
    judged = judge_robustness(always(0), images, labels, corruptions=["fog"], severities=[1, 3], seed=7)
    document = json.loads(json.dumps(judged.as_dict(), allow_nan=False))
    assert document == judged.as_dict()
    assert (document["name"], document["seed"]) == ("dynaconv corruptions, not CIFAR-10-C", 7)
    low, high = Rate(10, 30).interval
    score = {"value": 10 / 30, "interval": [low, high], "count": 10, "images": 30}
    assert document["clean"] == score
    assert document["cells"] == [{"corruption": "fog", "severity": severity, **score} for severity in (1, 3)]
    assert document["worst"] == document["cells"][0]
    assert set(document) == {"name", "seed", "clean", "mean", "relative", "worst", "by_corruption", "cells"}
    bare = json.loads(json.dumps(Robustness("files", None, None, judged.cells).as_dict(), allow_nan=False))
    assert (bare["seed"], bare["clean"], bare["relative"]) == (None, None, None)


def remember(seen):
    """A network that keeps what it is shown."""

    def predict(batch):
        seen.append(batch.clone())
        return torch.zeros(len(batch), 3)

    return predict


def test_a_limit_judges_the_same_share_of_every_class_corrupted_as_among_all():
    images, labels = make_images(90)
    images[:, 0, 0, 0] = torch.arange(90, dtype=torch.uint8)  # An image bears its index.
    seen = []
    judged = judge_robustness(
        remember(seen),
        images,
        labels,
        limit=30,
        seed=3,
        corruptions=["snow", "elastic"],
        severities=[2],
        batch_size=100,
    )
    assert judged.clean == Rate(10, 30)
    indices = seen[0][:, 0, 0, 0].long()
    assert labels[indices].bincount().tolist() == [10, 10, 10]
    for batch, name in zip(seen[1:], ("snow", "elastic"), strict=True):
        assert torch.equal(batch, corrupt(images, name, 2, seed=3)[indices])
    assert torch.equal(seen[0], images[indices])
    again, other = [], []
    judge_robustness(remember(again), images, labels, limit=30, seed=3, corruptions=["fog"], severities=[1])
    judge_robustness(remember(other), images, labels, limit=30, seed=4, corruptions=["fog"], severities=[1])
    assert torch.equal(again[0], seen[0])
    assert not torch.equal(other[0], seen[0])


def test_the_default_limit_is_two_thousand_and_none_judges_all():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8).expand(2500, 1, 8, 8)
    labels = torch.arange(2500) % 10
    kinds = {"corruptions": ["brightness"], "severities": [1]}
    assert judge_robustness(always(0), images, labels, **kinds).clean == Rate(200, 2000)
    assert judge_robustness(always(0), images, labels, limit=None, **kinds).clean == Rate(250, 2500)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_the_batch_size_changes_nothing(batch_size):
    images, labels = make_images(15)

    def predict(batch):
        return batch.double().view(len(batch), 3, -1).mean(2) + batch[:, :, 0, 0]

    def judge(size):
        return judge_robustness(predict, images, labels, severities=[1, 5], batch_size=size)

    assert judge(batch_size) == judge(15)


def test_batches_are_uint8_no_larger_than_asked_and_without_gradients():
    weights = torch.ones(3, requires_grad=True)
    sizes = []

    def predict(batch):
        assert batch.dtype == torch.uint8
        sizes.append(len(batch))
        logits = weights.expand(len(batch), 3) * 2
        assert not logits.requires_grad
        return logits

    judge_robustness(predict, *make_images(), corruptions=["contrast"], severities=[1], batch_size=12)
    assert sizes == [12, 12, 6] * 2


def test_grey_images_skip_saturation():
    images, labels = make_images(channels=1)
    judged = judge_robustness(always(0), images, labels, severities=[1])
    assert [cell.corruption for cell in judged.cells] == [name for name in CORRUPTIONS if name != "saturation"]
    with pytest.raises(UserError, match="corruption of grey images 'saturation'"):
        judge_robustness(always(0), images, labels, corruptions=["fog", "saturation"])


def test_one_image_is_enough_and_absent_classes_do_no_harm():
    images, _ = make_images(1)
    judged = judge_robustness(always(2), images, torch.tensor([2]), severities=[1])
    assert (judged.mean, judged.clean) == (1, Rate(1, 1))


def test_a_network_that_gives_nan_is_never_right():
    images, labels = make_images()
    broken = judge_robustness(lambda batch: always(0)(batch) * math.nan, images, labels, corruptions=["fog"])
    assert broken.clean == Rate(0, 30)
    assert broken.mean == 0


def test_every_cell_is_told_as_soon_as_it_is_known():
    told = []
    judged = judge_robustness(always(0), *make_images(), corruptions=["fog"], notify=told.append)
    assert tuple(told) == judged.cells
    told.clear()
    blocks = [Block("fog", 2, *make_images()), Block("fog", 4, *make_images())]
    assert judge_blocks(always(0), blocks, "files", notify=told.append).cells == tuple(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severities": []}, "severities from 1 to 5"),
        ({"severities": [0, 1]}, "severities from 1 to 5"),
        ({"corruptions": []}, "needs a corruption"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"labels": torch.zeros(29, dtype=torch.int64)}, "a label for each"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}, "got 0"),
        ({"predict": lambda images: torch.zeros(3)}, "classes"),
        ({"predict": lambda images: torch.zeros(1, 3)}, "classes"),
    ],
)
def test_what_cannot_be_judged_is_refused(change, message):
    images, labels = make_images()
    with pytest.raises(ValueError, match=message):
        judge_robustness(**{"predict": always(0), "images": images, "labels": labels, **change})


def test_no_blocks_and_empty_blocks_are_refused():
    with pytest.raises(ValueError, match="at least one block"):
        judge_blocks(always(0), [], "nothing")
    with pytest.raises(ValueError, match="at least one image"):
        judge_blocks(always(0), [Block("fog", 1, *make_images(0))], "nothing")


@pytest.fixture
def cifar10_c(tmp_path):
    """CIFAR-10-C with four images per severity; the first pixel tells corruption, severity and image."""
    for number, name in enumerate(CIFAR10_C):
        rows = np.random.default_rng(number).integers(256, size=(5 * COUNT, 32, 32, 3), dtype=np.uint8)
        rows[:, 0, 0, 0] = number
        rows[:, 0, 0, 1] = np.repeat(SEVERITIES, COUNT)
        rows[:, 0, 0, 2] = np.tile(np.arange(COUNT), 5)
        np.save(tmp_path / f"{name}.npy", rows)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 0, 9, 1], dtype=np.uint8), 5))
    return tmp_path


def test_cifar10_c_gives_every_severity_of_every_corruption_in_order(cifar10_c):
    blocks = list(read_cifar10_c(cifar10_c, COUNT))
    assert [(block.name, block.severity) for block in blocks] == [(n, s) for n in CIFAR10_C for s in SEVERITIES]
    for block in blocks:
        assert (block.images.shape, block.images.dtype) == ((COUNT, 3, 32, 32), torch.uint8)
        assert block.images.is_contiguous()
        assert (block.labels.tolist(), block.labels.dtype) == ([3, 0, 9, 1], torch.int64)
        first = block.images[:, :, 0, 0].tolist()
        assert first == [[CIFAR10_C.index(block.name), block.severity, image] for image in range(COUNT)]
    whole = np.load(cifar10_c / "frost.npy")
    frost = torch.cat([block.images for block in blocks if block.name == "frost"])
    assert np.array_equal(frost.permute(0, 2, 3, 1).numpy(), whole)


def test_cifar10_c_is_judged_under_its_own_name(cifar10_c):
    def predict(batch):
        """Right about the first image always, about the second up to severity 3, about no other."""
        answers = torch.where(batch[:, 2, 0, 0] == 0, 3, torch.where(batch[:, 1, 0, 0] <= 3, 0, 5))
        return torch.eye(10)[answers.long()]

    judged = judge_blocks(predict, read_cifar10_c(cifar10_c, COUNT), "CIFAR-10-C", clean=Rate(4, 4), batch_size=3)
    assert (judged.name, judged.seed) == ("CIFAR-10-C", None)
    assert [cell.score.count for cell in judged.cells] == [2, 2, 2, 1, 1] * 15
    assert judged.mean == pytest.approx(0.4)
    assert judged.relative == pytest.approx(0.4)
    assert judged.worst.severity == 4


@pytest.fixture
def cifar10_1(tmp_path):
    for version in ("v6", "v4"):
        rows = np.random.default_rng(0).integers(256, size=(COUNT, 32, 32, 3), dtype=np.uint8)
        np.save(tmp_path / f"cifar10.1_{version}_data.npy", rows)
        np.save(tmp_path / f"cifar10.1_{version}_labels.npy", np.array([1, 9, 0, 4], dtype=np.int32))
    return tmp_path


@pytest.mark.parametrize("version", ["v6", "v4"])
def test_cifar10_1_is_one_block(cifar10_1, version):
    (block,) = read_cifar10_1(cifar10_1, version, COUNT)
    assert (block.name, block.severity, block.labels.tolist()) == (f"cifar10.1-{version}", 0, [1, 9, 0, 4])
    rows = np.load(cifar10_1 / f"cifar10.1_{version}_data.npy")
    assert np.array_equal(block.images.permute(0, 2, 3, 1).numpy(), rows)


def test_the_real_sizes_are_the_default(cifar10_c, cifar10_1):
    with pytest.raises(UserError, match=r"labels.npy holds shape \(20,\) of uint8; expected: 50000 whole numbers"):
        read_cifar10_c(cifar10_c)
    for version, count in (("v6", 2000), ("v4", 2021)):
        with pytest.raises(UserError, match=rf"holds shape \(4,\) of int32; expected: {count} whole"):
            read_cifar10_1(cifar10_1, version)
    with pytest.raises(UserError, match=r"Unknown version of CIFAR-10\.1 'v5'"):
        read_cifar10_1(cifar10_1, "v5")


class Trap:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def as_bytes(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    np.savez(file, np.zeros(3))
    return file.getvalue()


GOOD = np.zeros((5 * COUNT, 32, 32, 3), dtype=np.uint8)
EXPECTED = r"expected(?: there)?: shape \(20, 32, 32, 3\) of uint8\.$"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "There is no file"),
        (b"", "no whole .npy file"),
        (b"not an array", "no whole .npy file"),
        (as_bytes(GOOD)[:-1], "cut short"),
        (as_bytes(GOOD)[:60], "no whole .npy file"),
        (as_bytes(np.array([Trap()], dtype=object), allow_pickle=True), "Python objects"),
        (pickle.dumps(Trap()), "Python objects"),
        (archive(), "archive of several arrays"),
        (as_bytes(GOOD.astype(np.float32)), r"holds shape \(20, 32, 32, 3\) of float32"),
        (as_bytes(GOOD.astype(np.int8)), r"of int8"),
        (as_bytes(GOOD[:-1]), r"holds shape \(19, 32, 32, 3\) of uint8"),
        (as_bytes(GOOD.transpose(0, 3, 1, 2)), r"holds shape \(20, 3, 32, 32\)"),
        (as_bytes(GOOD[0]), r"holds shape \(32, 32, 3\)"),
    ],
)
def test_pixels_that_are_not_what_they_should_be_are_refused_before_any_block(cifar10_c, content, found):
    path = cifar10_c / f"{CIFAR10_C[-1]}.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){found}.*{EXPECTED}") as error:
        read_cifar10_c(cifar10_c, COUNT)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (None, "There is no file"),
        (np.tile(np.array([3, 0, 9, 1]), 5)[:-1], r"holds shape \(19,\)"),
        (np.zeros((20, 1), dtype=np.int64), r"holds shape \(20, 1\)"),
        (np.zeros(20), "of float64"),
        (np.array([-1] + 19 * [0]), "holds the label -1"),
        (np.array([10] + 19 * [0]), "holds the label 10"),
        (np.array(["cat"] * 20), "of <U3"),
        (np.array([Trap()] * 20, dtype=object), "Python objects"),
        (np.array([3, 0, 9, 1] * 4 + [3, 0, 1, 9]), "gives severity 5 other labels than severity 1"),
    ],
)
def test_labels_that_are_not_what_they_should_be_are_refused(cifar10_c, labels, found):
    path = cifar10_c / "labels.npy"
    path.unlink()
    if labels is not None:
        np.save(path, labels, allow_pickle=True)
    with pytest.raises(UserError, match=found) as error:
        read_cifar10_c(cifar10_c, COUNT)
    assert str(path) in str(error.value)


def test_a_damaged_header_of_any_kind_is_a_users_error(cifar10_1):
    path = cifar10_1 / "cifar10.1_v6_data.npy"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in generator.integers(0, 128, size=3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            list(read_cifar10_1(cifar10_1, "v6", COUNT))
        except UserError:
            refused += 1
    assert refused > 100  # The rest hit the blanks that fill the header up.


def test_a_folder_that_does_not_exist_names_the_file(tmp_path):
    with pytest.raises(
        UserError, match=r"There is no file .*nowhere.*labels\.npy; expected there: 50000 whole numbers"
    ):
        read_cifar10_c(tmp_path / "nowhere")
