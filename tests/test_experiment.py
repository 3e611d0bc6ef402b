"""A whole run on real digits: what it leaves, that it can be repeated, and how it ends when it cannot go on."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import dynaconv.experiment
import dynaconv.training.start
from dynaconv.cli import main
from dynaconv.data.images import ImageSet
from dynaconv.data.sources import options_of
from dynaconv.errors import UserError, WorkError
from dynaconv.experiment import run_experiment
from dynaconv.model.network import build_network
from dynaconv.recipe import Recipe, with_settings
from dynaconv.reporting.events import EventWriter
from dynaconv.rundir import RunDir
from dynaconv.training.start import fit_batches, load_training_data, training_batches

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=6,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its lines and its result."""
    lines = []
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNACONV_CACHE", str(tmp_path_factory.mktemp("cache")))
        result = run_experiment(SMALL, folder, lines.append)
    return RunDir.open(folder), lines, result


def test_it_learns(finished):
    _, _, result = finished
    assert result["test_accuracy"] > 0.6  # ten classes: chance is 0.1
    assert result["validation_accuracy"] > 0.6


def test_lines(finished):
    run, lines, _ = finished
    epochs = [line for line in lines if line.startswith("Epoch")]
    assert [line.split(",")[0] for line in epochs] == [f"Epoch [{n}/6]" for n in range(1, 7)]
    told = float(next(line for line in lines if line.startswith("Training finished in ")).split()[3])
    measured = sum(epoch["seconds"] for epoch in run.read_metrics())
    assert measured <= told <= measured + 5  # what lies between is the writing of the epochs' files


def test_folder(finished):
    run, _, result = finished
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".lock",
        "calibration.json",
        "environment.json",
        "evaluation-test.json",
        "evaluation-validation.json",
        "figures",
        "looks.json",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "pictures-test.json",
        "pictures-validation.json",
        "predictions-test.parquet",
        "predictions-validation.parquet",
        "recipe.json",
        "result.json",
        "split.json",
        "tensorboard",
    ]
    assert run.read_recipe() == SMALL
    assert {**run.read_json("result.json"), "run_dir": str(run.path)} == result
    assert result["test_looks"] == 1
    assert result["peak_memory_bytes"] > 50e6
    assert result["train_seconds"] + result["startup_seconds"] <= result["wall_seconds"]
    assert run.read_json("environment.json")["data_sha256"] == result["data_sha256"]
    assert len(run.read_json("split.json")["validation"]) == 143
    for name in ("curves", "grid"):
        assert run.figure(name).read_bytes().startswith(b"\x89PNG")


def test_stored_weights_are_those_that_were_judged(finished):
    run, _, result = finished
    about = run.read_json("model.json")
    assert about["classes"] == [str(digit) for digit in range(10)]
    model = build_network(run.read_recipe().model, about["channels"], len(about["classes"]), about["image_size"])
    model.load_state_dict(run.read_weights())
    options = options_of(SMALL.data)
    test = dynaconv.experiment.load_images("digits", "test", options).with_classes(tuple(about["classes"]))
    assert dynaconv.experiment.evaluate(model, test, SMALL).accuracy == result["test_accuracy"]


def test_tensorboard_reads_the_events(finished):
    run, _, _ = finished
    (file,) = run.tensorboard.iterdir()
    points = [
        (event.step, value.tag, value.tensor.float_val or value.simple_value)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    losses = [value[0] for step, tag, value in points if tag == "loss/validation"]
    assert losses == pytest.approx([epoch["validation_loss"] for epoch in run.read_metrics()])


def test_events_on_a_full_disk_end_in_one_sentence(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.write(b"")

    writer = EventWriter(tmp_path / "events")
    writer.close()
    writer._writer = Full()
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.\d+\.\d+ cannot be written: No space left on device"):
        writer.write({"epoch": 1, "training_loss": 1.0})
    writer.close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        EventWriter(tmp_path / "file")


def test_the_stored_recipe_repeats_the_run(finished, tmp_path):
    run, _, result = finished
    again = run_experiment(run.read_recipe(), tmp_path / "again", lambda line: None)
    for key in ("train_loss", "validation_loss", "test_loss", "test_accuracy", "data_sha256"):
        assert again[key] == result[key], key
    other = run_experiment(with_settings(SMALL, seed=1, epochs=1), tmp_path / "other", lambda line: None)
    assert other["train_loss"] != result["train_loss"]


def test_test_images_are_opened_once_and_after_the_training(tmp_path, monkeypatch):
    seen = []
    load, fit = dynaconv.experiment.load_images, dynaconv.experiment.fit

    def spy_load(source, split, options):
        seen.append(split)
        return load(source, split, options)

    def spy_fit(*arguments, **more):
        history = fit(*arguments, **more)
        seen.append("trained")
        return history

    monkeypatch.setattr(dynaconv.experiment, "load_images", spy_load)
    monkeypatch.setattr(dynaconv.training.start, "load_images", spy_load)
    monkeypatch.setattr(dynaconv.experiment, "fit", spy_fit)
    run_experiment(with_settings(SMALL, epochs=1), tmp_path / "run", lambda line: None)
    assert seen == ["train", "trained", "test"]


def test_a_run_that_exists_is_refused_before_any_work(finished, tmp_path):
    run, _, _ = finished
    before = (run.path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        run_experiment(with_settings(SMALL, source="/nowhere"), run.path, lambda line: None)
    assert (run.path / "model.safetensors").read_bytes() == before


def test_fewer_images_than_a_batch_go_in_four(tmp_path):
    lines = []
    settings = with_settings(SMALL, batch_size=2000, accumulation_steps=3, epochs=1)
    run_experiment(settings, tmp_path / "run", lines.append)
    assert "1295 training images are fewer than --batch-size 2000: batches of 324 instead." in lines
    train = RunDir.open(tmp_path / "run").read_recipe().train  # what a resumed run goes on with
    assert (train.batch_size, train.accumulation_steps) == (324, 1)


@pytest.mark.parametrize(("images", "batches"), [(2, [2]), (3, [3]), (5, [2, 3]), (999, [250, 250, 250, 249])])
def test_few_images_go_in_batches_that_batch_norm_can_work_on(images, batches):
    recipe = fit_batches(with_settings(SMALL, batch_size=1000), images, lambda line: None)
    pixels = torch.zeros(images, 1, 8, 8, dtype=torch.uint8)
    some = ImageSet(pixels, torch.zeros(images, dtype=torch.int64), ("zero",), "zeros")
    assert [len(labels) for _, labels in training_batches(recipe, some)] == batches


def test_as_many_images_as_a_batch_are_one():
    assert fit_batches(SMALL, SMALL.train.batch_size, pytest.fail) is SMALL


@pytest.mark.parametrize("size", [None, 12])
def test_images_of_another_size_are_resized_aloud(size):
    lines = []
    data = load_training_data(with_settings(SMALL, image_size=size), torch.device("cpu"), lines.append)
    assert data.train.images.shape[2:] == ((8, 8) if size is None else (size, size))
    told = "Images of another size are resized to 12 pixels (--image-size)."
    assert (told in lines) == (size is not None)


def test_nothing_left_to_train_on(tmp_path):
    everything = tmp_path / "all.csv"
    everything.write_text("index\n" + "".join(f"{place}\n" for place in range(1438)))
    with pytest.raises(UserError, match="0 images are left to train on, two are the least"):
        run_experiment(with_settings(SMALL, without=str(everything)), tmp_path / "run", lambda line: None)


@pytest.mark.parametrize(("bad_epoch", "kept"), [(1, "The untrained weights"), (3, "The weights of epoch 2")])
def test_nan_keeps_the_last_good_weights(tmp_path, monkeypatch, bad_epoch, kept):
    model_of = {}
    build = dynaconv.experiment.build_model

    def spy_build(*arguments, **more):
        model_of["run"] = build(*arguments, **more)
        return model_of["run"]

    calls = 0
    cross_entropy = torch.nn.functional.cross_entropy

    def sick_loss(self, logits, labels):
        nonlocal calls
        if model_of["run"].training:
            calls += 1
        steps_an_epoch = math.ceil(1295 / 32)
        sick = model_of["run"].training and calls == (bad_epoch - 1) * steps_an_epoch + 5
        return cross_entropy(logits, labels) * (math.nan if sick else 1)

    monkeypatch.setattr(dynaconv.experiment, "build_model", spy_build)
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", sick_loss)
    with pytest.raises(WorkError) as error:
        run_experiment(SMALL, tmp_path / "run", lambda line: None)
    assert str(error.value) == (
        f"The loss became nan at step 5 of epoch {bad_epoch}. {kept} are kept in {tmp_path / 'run'}. "
        "Try a smaller --learning-rate than 0.01."
    )
    run = RunDir.open(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in run.read_weights().values())
    assert not (run.path / "result.json").exists()
    if bad_epoch > 1:
        assert len(run.read_metrics()) == bad_epoch - 1


def test_nan_is_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        torch.nn.CrossEntropyLoss, "forward", lambda self, logits, labels: logits.sum() * torch.tensor(math.nan)
    )
    assert main(["train", "--data", "digits", "--run-dir", "run", "--epochs", "1"]) == 1
    assert capsys.readouterr().err.startswith("dynaconv: The loss became nan at step 1 of epoch 1. The untrained")


def test_json_is_one_document_and_all_else_goes_to_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", "digits", "--epochs", "1", "--widths", "8", "--num-convolutions", "2", "--pool-after"]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert Path(result["run_dir"]).parent == Path("runs")
    assert "Epoch [1/1], Training Loss: " in shown.err
    assert f"Test accuracy {result['test_accuracy']:.4f} on 359 images, read once" in shown.err


def test_real_cifar10_ends_in_a_judged_classifier(real_cifar10, tmp_path, monkeypatch):
    recipe = with_settings(SMALL, source="cifar10", max_train_images=2000, epochs=2)
    result = run_experiment(recipe, tmp_path / "run", lambda line: None)
    assert (result["validation_images"], result["test_images"]) == (5000, 10_000)
    assert result["test_accuracy"] > 0.2  # ten classes: chance is 0.1
    assert len(RunDir.open(tmp_path / "run").read_json("split.json")["validation"]) == 5000


def test_without_validation_every_image_trains(tmp_path):
    lines = []
    recipe = with_settings(SMALL, epochs=1, validation_fraction=0.0, views="mirror")
    result = run_experiment(recipe, tmp_path / "run", lines.append)
    assert result["validation_accuracy"] is None
    assert result["validation_images"] == 0
    assert 0 <= result["test_accuracy_tta"] <= 1
    assert "validation_accuracy_tta" not in result
    assert any(line.endswith("Validation Loss: none, Validation Accuracy: none") for line in lines)
    run = RunDir.open(tmp_path / "run")
    assert run.read_json("split.json")["validation"] == []
    assert run.figure("curves").is_file()


def test_a_budget_becomes_epochs_in_the_stored_recipe(tmp_path):
    lines = []
    result = run_experiment(with_settings(SMALL, budget="2s", num_grid_images=0), tmp_path / "run", lines.append)
    stored = RunDir.open(tmp_path / "run").read_recipe()
    assert stored.train.budget is None
    assert any(line.startswith(f"{stored.train.epochs} epochs fit into 2s") for line in lines)
    assert result["train_seconds"] < 10  # far from tight: the machine may be busy
