"""What tells that two runs were judged on the same images, whatever they made of them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.judging.trained import identify
from dynaconv.recipe import Recipe, with_settings
from dynaconv.training.start import load_training_data

CHOSEN = [1, 3]
RUN = SimpleNamespace(read_json=lambda name: {"validation": CHOSEN})


@pytest.fixture
def pets(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pets" / ("train" if number < 8 else "test") / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "pets"


def read(source, split, **form):
    images = load_images(str(source), "train" if split == "validation" else split, SourceOptions(**form))
    return images.subset(torch.tensor(CHOSEN)) if split == "validation" else images


@pytest.mark.parametrize("form", [{"image_size": 10}, {"channels": 1}, {"image_size": 5, "channels": 1}])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_images_are_known_whatever_form_they_were_given(pets, split, form):
    recipe = with_settings(Recipe(), source=str(pets), **form)
    own, judged = read(pets, split), read(pets, split, **form)
    assert judged.sha256() != own.sha256()
    assert identify(RUN, split, judged, recipe) == own.sha256()
    plain = with_settings(Recipe(), source=str(pets))
    assert identify(RUN, split, own, plain) == own.sha256()


@pytest.mark.parametrize("what", ["large", "gone", "fewer", "other labels", "other classes"])
def test_what_cannot_be_read_again_is_known_by_what_was_judged(pets, monkeypatch, what):
    recipe = with_settings(Recipe(), source=str(pets), image_size=10)
    judged = read(pets, "validation", image_size=10)
    if what == "large":
        monkeypatch.setattr("dynaconv.data.sources._MOST_IN_OWN_FORM", 12 * 8 * 8 * 3 - 1)
    elif what == "gone":
        shutil.rmtree(pets)
    elif what == "fewer":
        for number in (2, 3, 4, 5, 6, 7):
            (pets / "train" / ("cat", "dog")[number % 2] / f"{number:02}.png").unlink()
    elif what == "other labels":
        (pets / "train" / "cat" / "02.png").rename(pets / "train" / "dog" / "00.png")
    else:
        (pets / "train" / "cat").rename(pets / "train" / "wolf")
        (pets / "test" / "cat").rename(pets / "test" / "wolf")
    assert identify(RUN, "validation", judged, recipe) == judged.sha256()


def test_a_list_of_images_to_leave_out_holds_in_any_size(pets, tmp_path):
    images = read(pets, "train")
    (tmp_path / "list.csv").write_text(f"index,data\n2,{images.sha256()[:16]}\n")
    recipe = with_settings(
        Recipe(), source=str(pets), image_size=10, without=str(tmp_path / "list.csv"), validation_fraction=0.0
    )
    data = load_training_data(recipe, torch.device("cpu"), lambda line: None)
    assert data.split.train.tolist() == [0, 1, 3, 4, 5, 6, 7]
