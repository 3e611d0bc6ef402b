"""A classifier as its user has it: every form of a picture, files and folders, and what cannot be read."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dynaconv.cli import main
from dynaconv.data.sources import SourceOptions, load_images
from dynaconv.errors import UserError
from dynaconv.experiment import run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.rundir import RunDir
from dynaconv.shipping.classifier import Classifier
from dynaconv.shipping.prediction import find_pictures

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=4,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
    wanted_precision=0.9,
    flip=0.0,
    validation_fraction=0.2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    run_experiment(SMALL, folder, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def classifier(run):
    return Classifier.load(run)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "test", SourceOptions())


@pytest.fixture
def pictures(digits, tmp_path):
    """Three digits as files, one in a folder below."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for place, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.fromarray(digits.images[place, 0].numpy()).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_the_probabilities_are_those_that_were_judged(run, classifier, digits):
    logits, _, classes, _ = RunDir.open(run).read_predictions("test")
    temperature = RunDir.open(run).read_json("calibration.json")["temperature"]
    expected = (logits.double() / temperature).softmax(1)
    found = list(classifier.predict_all(list(digits.images), batch_size=50))
    assert found[0].classes == classes
    assert torch.tensor([each.probabilities for each in found]).sub(expected).abs().max() < 1e-5
    assert all(sum(each.probabilities) == pytest.approx(1) for each in found)
    threshold = RunDir.open(run).read_json("calibration.json")["threshold"]
    assert threshold is not None
    assert [each.abstains for each in found] == [each.confidence < threshold for each in found]
    assert {each.abstains for each in found} == {True, False}


def test_every_form_of_a_picture_gives_the_same(classifier, digits, tmp_path):
    pixels = digits.images[3, 0].numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    expected = classifier.predict(tmp_path / "digit.png").probabilities
    colour = np.repeat(pixels[:, :, None], 3, 2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    forms = {
        "text": str(tmp_path / "digit.png"),
        "bytes": (tmp_path / "digit.png").read_bytes(),
        "BMP": buffer.getvalue(),
        "PIL": Image.fromarray(pixels),
        "colour": Image.fromarray(colour),
        "palette": Image.fromarray(pixels).convert("P"),
        "alpha": Image.fromarray(colour).convert("RGBA"),
        "16 bits": Image.fromarray(pixels.astype(np.uint16) * 257),
        "array": pixels,
        "array with a channel": pixels[:, :, None],
        "colour array": colour,
        "tensor": digits.images[3],
        "colour tensor": torch.from_numpy(colour).permute(2, 0, 1),
    }
    for name, form in forms.items():
        assert classifier.predict(form).probabilities == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(
    "picture",
    [
        b"",
        b"no picture",
        np.zeros((8, 8)),
        np.zeros((8, 8, 5), np.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        "gone.png",
    ],
    ids=["empty", "text", "float array", "five channels", "flat tensor", "no file"],
)
def test_what_is_no_picture_is_refused(classifier, picture):
    with pytest.raises(UserError):
        classifier.predict(picture)


def test_any_size_is_read_and_a_much_larger_one_gets_a_note(classifier):
    small, large = (classifier.predict(np.zeros(shape, np.uint8)) for shape in ((1, 1), (300, 400, 3)))
    told = "It is 400 x 300 pixels, seen as 8 x 8: nearly all detail is lost."
    assert told in large.notes
    assert set(large.notes) - {told} == set(small.notes)  # black is unlike any digit


def test_the_likeliest_classes(classifier, digits):
    prediction = classifier.predict(digits.images[0])
    top = prediction.top(3)
    assert [probability for _, probability in top] == sorted(prediction.probabilities, reverse=True)[:3]
    assert (prediction.label, prediction.confidence) == top[0]
    assert len(prediction.top(100)) == 10
    assert json.loads(json.dumps(prediction.as_dict(2))) == prediction.as_dict(2)


def test_pictures_are_found(pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    names = [path.name for path in find_pictures(["pictures"], [])]
    assert names == ["a.png", "b.png", "c.png"]
    assert [path.name for path in find_pictures(["pictures/*.png"], [])] == ["a.png", "b.png"]
    assert [path.name for path in find_pictures([str(pictures / "?.png")], [])] == ["a.png", "b.png"]
    assert [path.name for path in find_pictures(["-", "pictures/b.png"], ["pictures/a.png\n", "\n"])] == [
        "a.png",
        "b.png",
    ]
    (pictures / "empty").mkdir()
    for word, sentence in (("gone.png", "There is no picture gone.png."), ("x*.png", "No picture matches 'x*.png'."),
                           ("pictures/empty", "The folder pictures/empty holds no pictures.")):  # fmt: skip
        with pytest.raises(UserError) as error:
            find_pictures([word], [])
        assert str(error.value) == sentence


def test_the_verb(run, classifier, pictures, capsys, monkeypatch):
    expected = classifier.predict(pictures / "a.png")
    assert main(["predict", str(run), str(pictures / "a.png"), "--top", "2"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{pictures / 'a.png'}: {expected.label} {expected.confidence:.1%}, ")
    assert ("abstain" in line) == expected.abstains
    assert main(["predict", str(run), str(pictures), "--form", "jsonl"]) == 0
    assert [json.loads(text)["picture"] for text in capsys.readouterr().out.splitlines()] == [
        str(pictures / name) for name in ("a.png", "b.png", "more/c.png")
    ]
    assert main(["predict", str(run), str(pictures), "--form", "csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(rows[0]["confidence"]) == pytest.approx(expected.confidence, abs=1e-6)
    assert rows[0]["label_2"] == expected.top(2)[1][0]
    for end in ("\n", "\r\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'b.png'}{end}"))
        assert main(["predict", str(run), "-", "--json"]) == 0
        assert [each["picture"] for each in json.loads(capsys.readouterr().out)] == [str(pictures / "b.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["predict", str(run), "-"]) == 2
    assert "Standard input names no picture" in capsys.readouterr().err


def test_a_bad_picture_among_others_is_told_and_left(run, pictures, capsys):
    (pictures / "b.png").write_bytes(b"torn")
    assert main(["predict", str(run), str(pictures)]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) >= 2
    assert f"{pictures / 'b.png'} cannot be read as a picture" in shown.err
    assert shown.err.endswith("dynaconv: 1 of 3 pictures could not be read.\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "`dynaconv predict` needs the folder of a run: dynaconv predict runs/first cat.jpg."),
        (["RUN"], "`dynaconv predict` needs pictures: dynaconv predict runs/first cat.jpg."),
        (["RUN", "gone.png"], "There is no picture gone.png."),
        (["RUN", "gone.png", "--top", "0"], "--top must be at least 1, received 0."),
        (["gone", "a.png"], "gone is not the folder of a run: it has no recipe.json."),
    ],
)
def test_what_a_user_gets_wrong(run, words, sentence, capsys):
    assert main(["predict", *(str(run) if word == "RUN" else word for word in words)]) == 2
    assert capsys.readouterr().err == f"dynaconv: {sentence}\n"


def test_predictions_as_a_parquet_file(run, pictures, tmp_path, capsys):
    into = tmp_path / "found.parquet"
    assert main(["predict", str(run), str(pictures), "--form", "parquet", "--top", "2", "--into", str(into)]) == 0
    assert capsys.readouterr().out == f"3 predictions: {into}\n"
    rows = pq.read_table(into).to_pylist()
    assert main(["predict", str(run), str(pictures), "--top", "2", "--json"]) == 0
    assert rows == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_predictions_into_a_file_are_those_of_standard_output(form, run, pictures, tmp_path, capsys):
    words = ["predict", str(run), str(pictures), "--form", form]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert main([*words, "--into", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found").read_text() == told


def test_a_file_that_is_there_is_not_replaced(run, pictures, capsys):
    kept = (pictures / "b.png").read_bytes()
    assert main(["predict", str(run), str(pictures / "b.png"), "--into", str(pictures / "b.png")]) == 2
    assert "b.png exists; name another file" in capsys.readouterr().err
    assert (pictures / "b.png").read_bytes() == kept


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
@pytest.mark.parametrize("form", ["csv", "parquet", "table", "jsonl"])
def test_a_name_that_is_no_text_is_told_all_the_same(form, run, pictures, tmp_path, capsys):
    (pictures / "b.png").rename(os.fsdecode(os.fsencode(pictures) + b"/bad\xff.png"))
    words = ["predict", str(run), str(pictures), "--form", form]
    assert main([*words, "--into", str(tmp_path / "found")]) == 0
    assert form == "parquet" or main(words) == 0  # standard output is as strict as a file, unless the locale is C
    if form == "parquet":
        told = " ".join(row["picture"] for row in pq.read_table(tmp_path / "found").to_pylist())
    else:
        told = (tmp_path / "found").read_text(encoding="utf-8")
    assert r"bad\udcff.png" in told


def test_where_it_cannot_be_written_is_told_before_anything_is_classified(run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dynaconv.shipping.predictions.load_classifier", None)
    assert main(["predict", str(run), str(pictures), "--into", str(tmp_path / "none" / "found.csv")]) == 2
    assert "none does not exist; make it first" in capsys.readouterr().err


def test_no_more_classes_are_told_than_there_are(run, pictures, capsys):
    assert main(["predict", str(run), str(pictures), "--form", "csv", "--top", "100"]) == 0
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert {len(row) for row in rows} == {len(header)} == {4 + 2 * 9}


def test_a_long_name_can_be_explained(run, pictures, tmp_path):
    (pictures / "b.png").rename(pictures / f"{'ä' * 110}.png")
    assert main(["predict", str(run), str(pictures), "--explain", str(tmp_path / "explained")]) == 0
    assert len(list((tmp_path / "explained").iterdir())) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="it has other limits")
@pytest.mark.parametrize("where", ["picture", "into", "run"])
def test_names_that_the_system_refuses_are_told(where, run, pictures, tmp_path, capsys):
    long = str(tmp_path / ("x" * 300))
    words = ["predict", long if where == "run" else str(run), long if where == "picture" else str(pictures)]
    assert main([*words, *(["--into", long] if where == "into" else [])]) == 2
    assert re.fullmatch(
        r"dynaconv: .*x{300}\S* cannot be (used|read).*: File name too long.*\n", capsys.readouterr().err
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_told(run, pictures):
    words = [sys.executable, "-m", "dynaconv", "predict", str(run), str(pictures)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "dynaconv: The output cannot be used: No space left on device.\n"


def test_parquet_needs_a_file(run, pictures, capsys):
    assert main(["predict", str(run), str(pictures), "--form", "parquet"]) == 2
    assert "--into predictions.parquet" in capsys.readouterr().err


def test_explained_pictures(run, pictures, tmp_path, capsys):
    folder = tmp_path / "why"
    assert main(["predict", str(run), str(pictures), "--explain", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["0001-a.png", "0002-b.png", "0003-c.png"]
    both = np.asarray(Image.open(folder / "0001-a.png").convert("RGB"))
    seen = np.asarray(Image.open(pictures / "a.png").resize((48, 48), Image.Resampling.NEAREST))
    assert both.shape == (48, 104, 3)
    assert np.array_equal(both[:, :48, 0], seen)
    assert len(np.unique(both[:, 56:].reshape(-1, 3), axis=0)) > 10
    capsys.readouterr()
    assert main(["predict", str(run), str(pictures), "--explain", str(folder)]) == 2
    assert "holds something" in capsys.readouterr().err
    assert main(["predict", "model.onnx", str(pictures), "--explain", str(tmp_path / "other")]) == 2


def test_a_picture_unlike_what_trained_is_told(classifier, digits):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    notes = [classifier.predict(picture).notes for picture in (noise, digits.images[0, 0].numpy())]
    assert notes[0][-1].startswith("It is unlike the pictures that trained: ")
    assert notes[1] == ()
    assert (classifier.answer(digits.images.numpy())[:, -1] > 1).mean() < 0.03


def test_an_older_run_knows_less(run, tmp_path, digits):
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "familiarity.safetensors").unlink()
    (tmp_path / "old" / "pictures-test.json").unlink()
    old, new = Classifier.load(tmp_path / "old"), Classifier.load(run)
    images = digits.images[:5].numpy()
    assert np.isnan(old.answer(images)[:, -1]).all()
    assert np.array_equal(old.probabilities(images), new.probabilities(images))
    assert old.gallery() == []
    assert old.detail(images[0])["nearest"] == []


def test_kept_training_images_are_shown(run, tmp_path, digits, capsys):
    shutil.copytree(run, tmp_path / "kept")
    assert main(["evaluate", str(tmp_path / "kept"), "--neighbours"]) == 0
    assert "Kept 1151 training images" in capsys.readouterr().out
    kept = Classifier.load(tmp_path / "kept")
    shown = kept.detail(digits.images[0].numpy())["nearest"]
    assert len(shown) == 5
    assert {each["label"] for each in shown} <= set(kept.classes)
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]["png"]))).size == (8, 8)
    assert len(kept.gallery()) == 20
    assert kept.gallery()[0]["label"] in kept.classes
    (tmp_path / "kept" / "pictures-test.json").write_text('{"random": [{"label": "cat"}]}')
    with pytest.raises(UserError, match="holds no pictures"):
        kept.gallery()
