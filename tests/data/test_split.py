"""The split: stratified, disjoint, complete, repeatable."""

import pytest
import torch

from dynaconv.data.split import split_stratified
from dynaconv.errors import UserError

LABELS = torch.tensor([0] * 100 + [1] * 50 + [2] * 7)[torch.randperm(157, generator=torch.Generator().manual_seed(0))]


def test_disjoint_complete_and_stratified():
    split = split_stratified(LABELS, 0.1, seed=0)
    assert sorted(torch.cat([split.train, split.validation]).tolist()) == list(range(157))
    assert LABELS[split.validation].bincount().tolist() == [10, 5, 1]


def test_cifar10s_shape_gives_5000_of_50000():
    split = split_stratified(torch.arange(10).repeat(5000), 0.1, seed=0)
    assert (len(split.train), len(split.validation)) == (45_000, 5_000)


def test_seed_decides():
    first, same, other = (split_stratified(LABELS, 0.1, seed=seed).validation.tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_limit_keeps_the_shares_and_the_validation_images():
    whole, part = split_stratified(LABELS, 0.1, seed=0), split_stratified(LABELS, 0.1, seed=0, limit=30)
    assert torch.equal(whole.validation, part.validation)
    assert set(part.train.tolist()) <= set(whole.train.tolist())
    assert LABELS[part.train].bincount().tolist() == [19, 10, 1]


def test_a_class_of_one_image_is_refused():
    with pytest.raises(UserError) as error:
        split_stratified(torch.tensor([0, 0, 1]), 0.5, seed=0)
    assert str(error.value) == (
        "Class number 2 has one training image; training and validation need one each: add images."
    )
