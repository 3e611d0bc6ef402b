"""Exported files: the same probabilities for every kind of picture, bounds that hold, files that were altered."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file, save_file

from dynaconv.cli import main
from dynaconv.data.sources import SourceOptions, load_images, options_of
from dynaconv.errors import UserError, WorkError
from dynaconv.experiment import run_experiment
from dynaconv.judging.evaluate import evaluate
from dynaconv.judging.mixing import fold_network
from dynaconv.judging.trained import load_judged_images
from dynaconv.model.network import Block
from dynaconv.recipe import Recipe, with_settings
from dynaconv.rundir import RunDir
from dynaconv.shipping import export as module
from dynaconv.shipping.classifier import Classifier, load_classifier
from dynaconv.shipping.export import ExportOptions, export_run
from dynaconv.shipping.portable import FACTS, PortableClassifier
from dynaconv.shipping.serve import ServeSettings, build_app
from dynaconv.shipping.verify import digest, read_pixels, verify_file

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=4,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    wanted_precision=0.5,
    threads=1,
    channels=3,
    validation_fraction=0.2,
)


BYTES = {"Content-Type": "application/octet-stream"}


def quiet(line):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run_experiment(SMALL, path, quiet)
    return path


@pytest.fixture(scope="module")
def exported(run):
    lines = []
    certificate = export_run(run, ExportOptions(), lines.append)
    return run / "model.onnx", certificate, lines


def test_the_file_is_the_judged_classifier_and_its_certificate_says_so(run, exported):
    path, certificate, lines = exported
    result = RunDir.open(run).read_json("result.json")
    assert certificate["accuracy_before"]["value"] == pytest.approx(result["validation_accuracy"])
    assert certificate["accuracy_after"] == certificate["accuracy_before"]
    assert certificate["agreement"]["value"] == 1
    assert 0 < certificate["largest_probability_difference"] < 1e-5
    assert certificate["bytes_after"] == path.stat().st_size
    assert certificate["threads"] == 1
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert certificate["weights_sha256"] == PortableClassifier(path).facts["weights_sha256"] == weights
    assert path.stat().st_mode == (run / "result.json").stat().st_mode
    assert json.loads((run / "model.onnx.certificate.json").read_text())["file_sha256"] == certificate["file_sha256"]
    assert "The class agrees on 100.00%" in lines[1]
    assert not [file for file in run.iterdir() if file.name.startswith(".model")]


def _file(image, form, **more):
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def pictures():
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    large = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": _file(colour, "JPEG"),
        "png": _file(colour, "PNG"),
        "webp": _file(colour, "WEBP"),
        "gif": _file(colour.quantize(32), "GIF"),
        "bmp": _file(colour, "BMP"),
        "grey": _file(colour.convert("L"), "PNG"),
        "alpha": _file(colour.convert("RGBA").resize((31, 17)), "PNG"),
        "palette": _file(colour.quantize(16), "PNG"),
        "16-bit": _file(Image.fromarray(generator.integers(0, 2**16, (20, 20), dtype=np.uint16)), "PNG"),
        "rotated": _file(colour, "JPEG", exif=turned),
        "1x1": _file(colour.resize((1, 1)), "PNG"),
        "4000x3000": _file(large, "JPEG"),
    }


def test_every_kind_of_picture_gets_the_same_probabilities_in_every_way(run, exported, tmp_path, capsys):
    kinds = pictures()
    paths = []
    for name, content in kinds.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    by_torch = [each.probabilities for each in Classifier.load(run).predict_all(list(kinds.values()))]
    portable = Classifier.load(exported[0])
    assert isinstance(portable, PortableClassifier)
    by_onnx = [each.probabilities for each in portable.predict_all(paths)]
    assert np.abs(np.array(by_torch) - np.array(by_onnx)).max() < 1e-5
    assert np.std(np.array(by_torch), axis=0).max() > 1e-3  # the pictures differ, and so do their probabilities
    for classifier in (Classifier.load(run), portable):
        with TestClient(build_app(classifier, ServeSettings())) as client:
            answers = [client.post("/v1/predict?top=10", content=each, headers=BYTES).json() for each in kinds.values()]
        tops = [{one["label"]: one["probability"] for one in each["predictions"][0]["top"]} for each in answers]
        by_http = [[top[name] for name in classifier.classes] for top in tops]
        assert np.abs(np.array(by_torch) - np.array(by_http)).max() < 1e-5
    told = []
    for model in (run, exported[0]):
        assert main(["predict", str(model), *map(str, paths), "--top", "10", "--form", "jsonl"]) == 0
        told.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for one, other in zip(*told, strict=True):
        assert one["abstains"] == other["abstains"]
        assert one["label"] == other["label"]
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)


def test_any_number_of_pictures_at_once(exported):
    portable = PortableClassifier(exported[0])
    images = np.random.default_rng(1).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    together = portable.probabilities(images)
    one_by_one = np.concatenate([portable.probabilities(images[place : place + 1]) for place in range(7)])
    assert np.abs(together - one_by_one).max() < 1e-6
    assert together.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize(("stored", "channels"), [((), 1), ((), 3), ((1,), 3), ((3,), 1), ((3,), 3)])
def test_arrays_are_verified_in_the_form_that_was_trained(tmp_path, side, stored, channels):
    source = "digits"
    if stored:
        pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, *stored), dtype=np.uint8)
        source = str(tmp_path / "arrays.npz")
        np.savez(source, images=pixels, labels=np.arange(20) % 2)
    trained = load_images(source, "test", SourceOptions(image_size=side, channels=channels))
    classifier = SimpleNamespace(image_size=side, channels=channels, classes=trained.classes)
    pixels, labels, _ = read_pixels(source, "test", classifier, None, quiet)
    assert pixels.shape == (len(labels), channels, side, side)
    assert digest(pixels, labels, trained.classes) == trained.sha256()


def test_predicting_and_verifying_load_no_torch(exported, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    program = (
        "import sys; from dynaconv.cli import main; import dynaconv.shipping.verify; "
        "code = main(sys.argv[1:]); sys.exit(77 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", program, "predict", str(exported[0]), str(tmp_path / "black.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "black.png" in done.stdout


def test_8_bits_are_smaller_and_bounded(run, tmp_path):
    target = tmp_path / "small.onnx"
    found = export_run(run, ExportOptions(int8=True, into=target, max_drop=0.05), quiet)
    assert found["agreement"]["value"] > 0.9
    assert found["largest_probability_difference"] > 1e-5
    with pytest.raises(WorkError, match="more than --max-drop"):
        export_run(run, ExportOptions(int8=True, into=tmp_path / "none.onnx", max_drop=-1), quiet)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx", "small.onnx.certificate.json"]


def test_a_folded_file_has_no_mixture_and_proves_what_that_costs(run, tmp_path):
    target = tmp_path / "folded.onnx"
    found = export_run(run, ExportOptions(fold=True, into=target, max_drop=0.05), quiet)
    assert found["folded"]
    assert PortableClassifier(target).facts["folded"]
    assert found["largest_difference_from_folded"] < 1e-5
    # By hand: the judge's own figure for weights frozen to their means over the same training images.
    classifier = load_classifier(run)
    options = options_of(SMALL.data)
    held_out = torch.tensor(RunDir.open(run).read_json("split.json")["validation"])
    images = load_images("digits", "train", options)
    training = images.subset(torch.arange(len(images))[~torch.isin(torch.arange(len(images)), held_out)])
    folded = fold_network(classifier.trained.network, training, SMALL)
    judged = evaluate(folded, load_judged_images(classifier.trained, "validation", options), SMALL)
    assert found["accuracy_after"]["count"] == int((judged.predictions == judged.labels).sum())
    lost = found["accuracy_after"]["value"] - found["accuracy_before"]["value"]
    assert found["accuracy_difference"]["value"] == pytest.approx(lost)
    graph = [node.op_type for node in onnx.load(target).graph.node]
    assert graph.count("Conv") == len(SMALL.model.widths)
    assert graph.count("Gemm") + graph.count("MatMul") <= 3  # the classifier, and the distance: no block weighs


def test_what_mixing_is_worth_is_not_folded_away(run, tmp_path, monkeypatch, capsys):
    whole = module.certify
    lost = {"accuracy_difference": {"value": -0.02, "low": -0.03, "high": -0.01}}
    monkeypatch.setattr(module, "certify", lambda *arguments: whole(*arguments) | lost)
    words = ["export", str(run), "--fold", "--into", str(tmp_path / "folded.onnx"), "--max-drop", "1"]
    assert main(words) == 1
    assert "is worth 2.00 points of accuracy here (95% interval 1.00 to 3.00)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_folded_network_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_distance", lambda *_: 0.1)
    with pytest.raises(WorkError, match="is not the folded network"):
        export_run(run, ExportOptions(fold=True, into=tmp_path / "folded.onnx", max_drop=1), quiet)
    assert list(tmp_path.iterdir()) == []


def test_another_network_than_the_judged_one_is_not_written(run, tmp_path, monkeypatch):
    whole = module.Portable.forward
    monkeypatch.setattr(module.Portable, "forward", lambda self, images: whole(self, 255 - images))
    with pytest.raises(WorkError, match="is not the judged classifier"):
        export_run(run, ExportOptions(into=tmp_path / "model.onnx"), quiet)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_not_written(run, tmp_path, monkeypatch):
    whole = module.certify
    unknown = {"largest_probability_difference": float("nan")}
    monkeypatch.setattr(module, "certify", lambda *arguments: whole(*arguments) | unknown)
    with pytest.raises(WorkError, match="is not the judged classifier"):
        export_run(run, ExportOptions(into=tmp_path / "model.onnx"), quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_classifier_goes_on_as_it_was_judged(run):
    classifier = load_classifier(run)
    portable = module.Portable(classifier)
    forms = [
        {block.form for block in network.modules() if isinstance(block, Block)}
        for network in (classifier.trained.network, portable.network)
    ]
    assert forms == [{"auto"}, {"literal"}]


def test_where_the_numbers_run_away_every_way_abstains(run, tmp_path):
    shutil.copytree(run, tmp_path / "wild")
    weights = load_file(run / "model.safetensors")
    weights["classifier.2.weight"] *= 1e38  # the logits of most pictures become infinite, or no numbers
    save_file(weights, tmp_path / "wild" / "model.safetensors")
    export_run(tmp_path / "wild", ExportOptions(into=tmp_path / "wild.onnx"), quiet)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for path in (tmp_path / "wild", tmp_path / "wild.onnx"):
        prediction = Classifier.load(path).predict(picture)
        assert prediction.probabilities == pytest.approx([0.1] * 10, abs=1e-6)
        assert prediction.abstains
        assert prediction.notes[-1].startswith("It is so unlike the pictures that trained")


def test_torch_export(run, tmp_path):
    found = export_run(run, ExportOptions(form="pt2", into=tmp_path / "model.pt2", layout="nhwc"), quiet)
    assert found["agreement"]["value"] == 1
    extra = {f"{FACTS}.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra[f"{FACTS}.json"])["classes"] == list("0123456789")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    told = [each.probabilities for each in Classifier.load(run).predict_all(list(pixels))]
    probabilities, distance = program(torch.from_numpy(pixels))
    assert (distance > 1).all()  # noise
    assert probabilities.detach().numpy() == pytest.approx(np.array(told), abs=1e-5)
    assert (tmp_path / "model.pt2").stat().st_size == found["bytes_after"]


def test_what_cannot_be_exported(run, exported, tmp_path):
    for options, said in (
        (ExportOptions(), "say --overwrite"),
        (ExportOptions(form="pt2", int8=True), "goes with --format onnx"),
        (ExportOptions(into=tmp_path / "no" / "m.onnx"), "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            export_run(run, options, quiet)


def test_a_look_at_the_test_images_is_counted_and_they_are_found_again(run, tmp_path):
    before = len(RunDir.open(run).looks())
    path = tmp_path / "model.onnx"
    found = export_run(run, ExportOptions(split="test", into=path, layout="nhwc"), quiet)
    assert found["images"] == 359
    assert len(RunDir.open(run).looks()) == before + 1
    assert PortableClassifier(path).session.get_inputs()[0].shape[1:] == [8, 8, 3]
    again = verify_file(path, say=quiet)
    assert (again["split"], again["same_images"]) == ("test", True)
    assert again["accuracy"] == found["accuracy_after"]
    with pytest.raises(UserError, match="does not say which validated"):
        verify_file(path, "digits", "validation", quiet)


def test_verification_takes_the_images_of_the_certificate(exported):
    path, certificate, _ = exported
    lines = []
    found = verify_file(path, say=lines.append)
    assert (found["source"], found["split"], found["same_images"]) == ("digits", "validation", True)
    assert found["accuracy"] == certificate["accuracy_after"]
    assert found["sample"]["largest_probability_difference"] < 1e-5
    assert "Of the 100 in the certificate 100.0% get the same class" in lines[3]
    tested = verify_file(path, "digits", "test", quiet)
    assert (tested["accuracy"]["images"], tested["same_images"], tested["sample"]) == (359, False, None)


@pytest.mark.parametrize(
    "change",
    [
        {"sample": {"places": [0, 10**6], "probabilities": [[0.1] * 10] * 2}},
        {"sample": {"places": [0, 1], "probabilities": [[0.1] * 9] * 2}},
        {"sample": {"places": [0.5], "probabilities": [[0.1] * 10]}},
        {"places": ["0"]},
        {"places": [-1]},
        {"accuracy_after": {}},
        {"accuracy_after": {"value": "high", "interval": [0, 1], "count": 1, "images": 1}},
        {"source": "digits", "int8": False, "images": None},
    ],
)
def test_a_certificate_that_was_altered_is_refused(exported, tmp_path, change):
    path, certificate, _ = exported
    shutil.copy(path, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.certificate.json").write_text(json.dumps(certificate | change))
    with pytest.raises(UserError, match="is no whole certificate; it was altered"):
        verify_file(tmp_path / "model.onnx", say=quiet)


def test_eight_bits_may_round_the_other_way_but_not_say_another_class(exported, tmp_path):
    path, certificate, _ = exported
    shutil.copy(path, tmp_path / "model.onnx")
    sample = np.array(certificate["sample"]["probabilities"])
    for told, holds in ((sample * 0.9 + 0.01, True), (sample[:, ::-1], False)):
        own = certificate | {"int8": True, "sample": certificate["sample"] | {"probabilities": told.tolist()}}
        (tmp_path / "model.onnx.certificate.json").write_text(json.dumps(own))
        if holds:
            verify_file(tmp_path / "model.onnx", say=quiet)
            continue
        with pytest.raises(WorkError, match="gives other probabilities"):
            verify_file(tmp_path / "model.onnx", say=quiet)


def test_a_run_whose_source_has_moved(run, tmp_path):
    with pytest.raises(UserError, match=r"There is no gone\.npz, where the images"):
        export_run(run, ExportOptions(into=tmp_path / "model.onnx", source="gone.npz"), quiet)


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        export_run(run, ExportOptions(into=tmp_path / "model.onnx"), quiet)


@pytest.fixture
def folder(tmp_path):
    """The digits' test-like pictures: a folder per class, made from the classes' names."""
    generator = np.random.default_rng(3)
    for name in "0123456789":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for place in range(2):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{place}.png")
    return tmp_path / "pictures"


def test_verification_sees_a_lower_accuracy_and_altered_files(exported, folder, tmp_path, capsys):
    path, certificate, _ = exported
    with pytest.raises(WorkError, match="less than its certificate's"):
        verify_file(path, str(folder), "test", quiet)  # noise: a tenth is right by chance
    copied = tmp_path / "copy.onnx"
    copied.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="has no certificate"):
        verify_file(copied, str(folder), say=quiet)
    (tmp_path / "copy.onnx.certificate.json").write_text(json.dumps(certificate | {"file_sha256": "0"}))
    assert main(["verify", str(copied), "--data", str(folder)]) == 2
    assert "altered since" in capsys.readouterr().err
    (tmp_path / "copy.onnx.certificate.json").write_text("[]")
    with pytest.raises(UserError, match="is no certificate"):
        verify_file(copied, str(folder), say=quiet)


def test_verification_of_a_folder_compares_probabilities_with_the_certificate(exported, folder, tmp_path):
    path, certificate, _ = exported
    shutil.copy(path, tmp_path / "copy.onnx")
    beside = tmp_path / "copy.onnx.certificate.json"
    portable = PortableClassifier(path)
    pixels, labels, _ = read_pixels(str(folder), "test", portable, None, quiet)
    assert len(labels) == 10  # one of the two pictures of each class
    sample = portable.probabilities(pixels[:3])
    own = certificate | {
        "split": "test",
        "places": None,
        "images": 10,
        "images_sha256": digest(pixels, labels, portable.classes),
        "accuracy_after": {"value": 0.1, "interval": [0.0, 0.3], "count": 1, "images": 10},
        "sample": {"places": [0, 1, 2], "probabilities": sample.tolist()},
    }
    beside.write_text(json.dumps(own))
    assert verify_file(tmp_path / "copy.onnx", str(folder), say=quiet)["same_images"]
    own["sample"]["probabilities"] = (sample + 0.01).tolist()
    beside.write_text(json.dumps(own))
    with pytest.raises(WorkError, match="other probabilities here"):
        verify_file(tmp_path / "copy.onnx", str(folder), say=quiet)


# What so small a network loses in 8 bits hangs on the processor that trained it, and is not asked here.
EIGHT_BITS = ["export", "run", "--int8", "--max-drop", "0.1"]


@pytest.mark.parametrize("words", [["predict", "model.onnx", "picture.png"], EIGHT_BITS])
def test_onnxruntime_leaves_no_trace_of_its_telemetry(run, exported, tmp_path, words):
    shutil.copy(exported[0], tmp_path / "model.onnx")
    shutil.copy(f"{exported[0]}.certificate.json", tmp_path / "model.onnx.certificate.json")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.onnx*"))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-m", "dynaconv", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment | home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # It stores an identifier of the machine before it sends anything.
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name or path.name == "deviceid"]


@pytest.mark.parametrize("drop", ["nan", "-1", "5"])
def test_what_may_be_lost_is_a_share(run, tmp_path, capsys, drop):
    assert main(["export", str(run), "--into", str(tmp_path / "none.onnx"), "--max-drop", drop]) == 2
    assert f"--max-drop must be from 0 to 1, received {drop}" in capsys.readouterr().err
    assert main(["export", str(run), "--into", str(tmp_path), "--overwrite"]) == 2
    assert "is a folder; name a file with --into" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["verify"], ["predict"]])
def test_a_file_of_torch_export_is_named_as_one(tmp_path, capsys, verb):
    (tmp_path / "model.pt2").write_bytes(b"PK")
    (tmp_path / "model.pt2.certificate.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    pictures = [str(tmp_path / "picture.png")] if verb == ["predict"] else []
    assert main([*verb, str(tmp_path / "model.pt2"), *pictures]) == 2
    assert "is a file of torch.export" in capsys.readouterr().err


def test_files_that_are_no_exported_classifier(exported, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match="no model that onnxruntime can open"):
        PortableClassifier(tmp_path / "text.onnx")
    with pytest.raises(UserError, match="cannot be read"):
        PortableClassifier(tmp_path / "none.onnx")
    model = onnx.load(exported[0])
    facts = json.loads(PortableClassifier(exported[0]).session.get_modelmeta().custom_metadata_map[FACTS])
    for change, said in (
        ({"format": 99}, "newer version"),
        ({"classes": ["a", "b"]}, "names 2 classes and gives 10"),
        ({"channels": 7}, "is impossible"),
        ({"threshold": "high"}, "cannot be read; it was altered"),
        ({"layout": "nhwc"}, "does not take the images that it says"),
    ):
        onnx.helper.set_model_props(model, {FACTS: json.dumps(facts | change)})
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(UserError, match=said):
            PortableClassifier(tmp_path / "changed.onnx")
    onnx.helper.set_model_props(model, {"other": "x"})
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="it names no classes"):
        PortableClassifier(tmp_path / "foreign.onnx")


def test_the_file_tells_pictures_unlike_what_trained_as_the_run_does(run, exported):
    noise = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    mine, its = (Classifier.load(path).answer(noise)[:, -1] for path in (run, exported[0]))
    assert (mine > 1).all()
    assert its == pytest.approx(mine, rel=1e-4)
