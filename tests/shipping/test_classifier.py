"""A classifier as its user has it: every form of a picture, files and folders, and what cannot be read."""

import csv
import io
import json

import numpy as np
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
    wanted_precision=0.5,
    flip=0.0,
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
    assert classifier.predict(np.zeros((1, 1), np.uint8)).notes == ()
    large = classifier.predict(np.zeros((300, 400, 3), np.uint8))
    assert large.notes == ("It is 400 x 300 pixels, seen as 8 x 8: nearly all detail is lost.",)


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
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'b.png'}\n"))
    assert main(["predict", str(run), "-", "--json"]) == 0
    assert [each["picture"] for each in json.loads(capsys.readouterr().out)] == [str(pictures / "b.png")]


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
