"""The search for label errors: folds, ranking, the file, planted errors, and training without what it names."""

import csv
import dataclasses
import json

import pytest
import torch

from dynaconv.cli import main
from dynaconv.data.exclusions import read_exclusions
from dynaconv.data.images import ImageSet
from dynaconv.errors import UserError
from dynaconv.judging.label_errors import (
    COLUMNS,
    assign_folds,
    judge_out_of_fold,
    rank_candidates,
    write_candidates,
)
from dynaconv.recipe import Recipe, with_settings

TINY = ["--epochs", "2", "--threads", "1", "--widths", "16", "32", "--num-convolutions", "2", "--pool-after", "1", "2"]


def make_images(count=120, planted=(7, 40, 81)):
    """Bright images are of class 1, dark ones of class 0; the planted ones bear the other label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 100, (count, 1, 8, 8), generator=generator) + 150 * labels[:, None, None, None]
    labels[list(planted)] = 1 - labels[list(planted)]
    return ImageSet(pixels.to(torch.uint8), labels, ("dark", "bright"), "made-up images")


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_share_out_every_class(folds):
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 50)
    fold_of = assign_folds(labels, folds, seed=1)
    for label in range(3):
        counts = fold_of[labels == label].bincount(minlength=folds)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(fold_of, assign_folds(labels, folds, seed=1))
    assert not torch.equal(fold_of, assign_folds(labels, folds, seed=2))


def test_ranking_is_by_the_margin_to_the_likeliest_other_class():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.0, 0.1, 0.9]])
    candidates = rank_candidates(probabilities, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(candidates.margin, torch.tensor([0.2, -0.7, 0.0, 0.8]))
    assert candidates.order.tolist() == [1, 2, 0, 3]


def test_planted_errors_come_first():
    planted = (7, 40, 81)
    recipe = with_settings(
        Recipe(), widths=(8,), num_convolutions=(2,), pool_after=(1,), epochs=4, batch_size=20, learning_rate=0.01
    )
    images = make_images(planted=planted)
    said = []
    probabilities = judge_out_of_fold(images, recipe, 3, torch.device("cpu"), said.append)
    assert probabilities.sum(1).allclose(torch.ones(len(images)))
    assert sorted(rank_candidates(probabilities, images.labels).order[:3].tolist()) == list(planted)
    assert len(said) == 3


def test_too_few_images_for_the_folds():
    recipe = with_settings(Recipe(), batch_size=2)
    with pytest.raises(UserError, match="2 images, too few for 5 folds"):
        judge_out_of_fold(make_images(4, ()), recipe, 5, torch.device("cpu"), print)


def test_file_holds_the_disputed_labels_alone_and_reads_back(tmp_path):
    images = make_images(4, ())
    candidates = rank_candidates(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]), images.labels)
    path = tmp_path / "candidates.csv"
    assert write_candidates(path, candidates, images, most=10) == 2
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["index"] for row in rows] == ["1", "3"]
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["label"], rows[0]["predicted"], rows[0]["margin"]) == ("bright", "dark", "-0.6000")
    assert read_exclusions(path, images).tolist() == [1, 3]
    assert write_candidates(path, candidates, images, most=1) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column `index`"),
        ("index\n", "no column `index`"),
        ("place\n3\n", "no column `index`"),
        ("index\n4\n", "line 2: '4' is no index into the 4 training images"),
        ("index\n1\n-1\n", "line 3: '-1' is no index"),
        ("index\n²\n", "is no index"),
        ("index\n" + "9" * 5000 + "\n", "is no index"),
        ("index,data\n1,0000\n", "written for other images"),
        ("index\n\x00\n", "is no index|cannot be read"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_exclusions(tmp_path / "list.csv", make_images(4, ()))


def test_a_list_holds_for_the_same_images_in_another_size(tmp_path):
    images = make_images(4, ())
    smaller = dataclasses.replace(images, images=images.images[:, :, ::2, ::2].contiguous())
    (tmp_path / "list.csv").write_text(f"index,data\n2,{smaller.sha256()[:16]}\n")
    assert read_exclusions(tmp_path / "list.csv", images, lambda: smaller).tolist() == [2]
    for in_own_form in (lambda: None, lambda: images):
        with pytest.raises(UserError, match="written for other images"):
            read_exclusions(tmp_path / "list.csv", images, in_own_form)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00index")
    for name in ("none.csv", "list.csv", "."):
        with pytest.raises(UserError, match="cannot be read"):
            read_exclusions(tmp_path / name, make_images(4, ()))


def test_from_the_command_line_to_a_training_without_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["labels", "digits", "--folds", "2", *TINY, "--json"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["images"] == 1438
    assert summary["written"] == min(1000, summary["disputed"])
    assert summary["written"] == len((tmp_path / "label-errors/candidates.csv").read_text().splitlines()) - 1
    assert (tmp_path / "label-errors/candidates.png").stat().st_size > 10_000
    assert main(["labels", "digits", *TINY]) == 2
    assert "exists already" in capsys.readouterr().err
    words = ["train", "--data", "digits", "--without", "label-errors/candidates.csv", "--run-dir", "run", *TINY]
    assert main([*words, "--epochs", "1", "--batch-size", "64"]) == 0
    assert "Left out: " in capsys.readouterr().out
    without = json.loads((tmp_path / "run/split.json").read_text())
    assert without["num_train"] < 1295
    assert len(without["validation"]) == 143


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "`dynaconv labels` needs a source of images: dynaconv labels my-pictures."),
        (["digits", "--folds", "1"], "--folds must be from 2 to 20, received 1."),
        (["digits", "--most", "0"], "--most must be at least 1, received 0."),
        (["digits", "--fold", "3"], "Unknown setting '--fold'. Did you mean '--folds'"),
    ],
)
def test_wrong_arguments(words, sentence, capsys):
    assert main(["labels", *words]) == 2
    assert sentence in capsys.readouterr().err
