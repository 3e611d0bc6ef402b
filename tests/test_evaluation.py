"""Judging runs on real digits: what is stored, each look counted, two runs compared, several seeds."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dynaconv.cli import main
from dynaconv.data.augment import normalize, to_tensor
from dynaconv.data.pictures import change_form
from dynaconv.errors import UserError
from dynaconv.evaluation import compare_runs, evaluate_run, load_finished
from dynaconv.experiment import run_experiment
from dynaconv.judging.robustness import Block
from dynaconv.recipe import Recipe, with_settings
from dynaconv.rundir import RunDir
from dynaconv.seeds import resume_seeds, run_seeds

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=5,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
    wanted_precision=0.9,
)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("seeds") / "all"
    lines = []
    return folder, run_seeds(SMALL, 2, folder, lines.append), lines


@pytest.fixture
def run(seeds, tmp_path):
    """A copy of one of them, to change."""
    shutil.copytree(seeds[0] / "seed-0", tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def test_the_end_of_a_training_stores_the_judgement(run):
    result, judged = run.read_json("result.json"), run.read_json("evaluation-test.json")
    assert judged["top1"]["value"] == pytest.approx(result["test_accuracy"])
    assert judged["loss"] == pytest.approx(result["test_loss"])
    assert sum(map(sum, judged["confusion"])) == 359
    assert len(run.looks()) == result["test_looks"] == 1
    logits, labels, classes, _ = run.read_predictions("test")
    assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(result["test_accuracy"])
    assert classes == tuple("0123456789")
    table = pq.read_table(run.path / "predictions-test.parquet").to_pydict()
    assert sum(table["right"]) == judged["top1"]["count"]
    calibration = run.read_json("calibration.json")
    assert calibration["images"] == 143
    assert judged["calibration"]["temperature"] == calibration["temperature"]
    assert run.figure("mistakes-test").read_bytes().startswith(b"\x89PNG")


def test_evaluating_again_gives_the_same_and_counts_the_look(run):
    before, lines = run.read_json("evaluation-test.json"), []
    again = evaluate_run(run.path, "test", say=lines.append)
    assert again == before
    assert lines[0] == "This is look 2 at the test images by this run; each is recorded."
    assert lines[1].startswith(f"Test: {before['top1']['value']:.2%} of 359 images right (95% interval ")
    assert len(run.looks()) == 2
    evaluate_run(run.path, "validation", say=quiet)
    assert len(run.looks()) == 2


def test_a_run_is_judged_by_one_process_at_a_time(run, capsys):
    looks = run.looks()
    with run.locked():
        assert main(["evaluate", str(run.path), "--split", "test"]) == 2
    assert "Another process is at work in" in capsys.readouterr().err
    assert run.looks() == looks


def test_images_in_a_folder_are_found_from_anywhere_and_where_they_went_to(tmp_path, monkeypatch, capsys):
    digits = load_digits()
    for place in range(200):
        folder = tmp_path / "pictures" / str(digits.target[place] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[place] * 15).astype("uint8")).save(folder / f"{place}.png")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run"
    run_experiment(with_settings(SMALL, source="pictures", epochs=1), path, quiet)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = evaluate_run(path, say=quiet)
    (tmp_path / "pictures").rename(tmp_path / "moved")
    assert main(["evaluate", str(path)]) == 2
    assert f"There is no {tmp_path / 'pictures'}, where the images of {path} should be; name" in capsys.readouterr().err
    assert main(["evaluate", str(path), "--data", "../moved"]) == 0
    assert RunDir.open(path).read_json("evaluation-validation.json") == before
    (path / "split.json").write_text('{"validation": [1, 100000]}')
    with pytest.raises(UserError, match="names images that there are not"):
        evaluate_run(path, source="../moved", say=quiet)


def test_views_are_stored_beside_the_plain_figures(run):
    plain = run.read_json("evaluation-validation.json")
    found = evaluate_run(run.path, views="six", say=quiet)
    assert run.read_json("evaluation-validation-six.json") == found
    assert found["loss"] != plain["loss"]
    assert run.read_json("evaluation-validation.json") == plain


def test_robustness_is_judged_and_stored(run, monkeypatch):
    monkeypatch.setattr("dynaconv.judging.robustness.SEVERITIES", (1, 2, 3, 4, 5))
    lines = []
    found = evaluate_run(run.path, robustness=True, say=lines.append)["robustness"]["own"]
    assert run.read_json("robustness-validation.json")["own"] == found
    assert found["clean"]["images"] == 143
    assert found["mean"] < found["clean"]["value"]
    assert any(line.startswith("dynaconv corruptions, not CIFAR-10-C: ") for line in lines)


def test_other_classes_than_those_of_cifar10_are_refused(run, tmp_path, capsys):
    assert main(["evaluate", str(run.path), "--cifar10-c", str(tmp_path)]) == 2
    assert "are not those of CIFAR-10" in capsys.readouterr().err


def test_images_of_others_are_judged_in_the_form_that_was_trained(run, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    larger = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=generator)
    trained = load_finished(run.path, torch.device("cpu"))
    seen = normalize(to_tensor(change_form(larger, 8, 1)), trained.recipe.augment)
    labels = trained.network(seen).argmax(1)
    assert len(labels.unique()) > 1
    block = Block("none", 0, larger, labels)
    monkeypatch.setattr("dynaconv.evaluation._read_others", lambda *paths: [("theirs", [block])])
    assert evaluate_run(run.path, say=quiet)["robustness"]["theirs"]["mean"] == 1


def test_a_run_that_has_not_finished(run, capsys):
    (run.path / "result.json").unlink()
    assert main(["evaluate", str(run.path)]) == 2
    sentence = f"The run in {run.path} has not finished; go on with it: dynaconv resume {run.path}.\n"
    assert capsys.readouterr().err == f"dynaconv: {sentence}"
    with pytest.raises(UserError, match="has not finished"):
        compare_runs(run.path, run.path.parent, say=quiet)


def test_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"dynaconv: {tmp_path} is not the folder of a run: it has no recipe.json.\n"


def test_two_runs(seeds, tmp_path):
    folder, _, _ = seeds
    lines = []
    found = compare_runs(folder / "seed-0", folder / "seed-1", into=tmp_path / "compared", say=lines.append)
    assert lines[:3] == found["words"][:3]
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text()) == found
    assert (tmp_path / "compared" / "flips.png").read_bytes().startswith(b"\x89PNG")
    accuracies = [RunDir.open(folder / f"seed-{seed}").read_json("result.json")["test_accuracy"] for seed in (0, 1)]
    assert found["difference"]["value"] == pytest.approx(accuracies[1] - accuracies[0])


def test_a_comparison_is_written_whole_or_not_at_all(seeds, tmp_path, monkeypatch, capsys):
    runs = [str(seeds[0] / f"seed-{seed}") for seed in (0, 1)]
    (tmp_path / "file").write_text("mine")
    assert main(["compare", *runs, "--into", str(tmp_path / "file" / "compared")]) == 2
    assert "cannot be written: " in capsys.readouterr().err

    def full(figure, path):
        raise UserError(f"{path} cannot be written: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr("dynaconv.evaluation.save_figure", full)
        assert main(["compare", *runs, "--into", str(tmp_path / "compared")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr("dynaconv.evaluation.load_images", lambda *_: full(None, "where the images were"))
    assert main(["compare", *runs, "--into", str(tmp_path / "compared")]) == 0
    assert "The images that flipped are not drawn: where the images were" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "compared").iterdir()] == ["comparison.json"]


def test_runs_on_other_images_are_refused(seeds, tmp_path):
    other = with_settings(SMALL, epochs=1, split_seed=5)
    run_experiment(other, tmp_path / "other", quiet)
    with pytest.raises(UserError, match="images"):
        compare_runs(seeds[0] / "seed-0", tmp_path / "other", "validation", say=quiet)
    compare_runs(seeds[0] / "seed-0", tmp_path / "other", "test", say=quiet)  # these are the same


def test_runs_on_the_same_images_in_other_sizes_are_compared(seeds, tmp_path):
    for name in ("once", "again"):
        run_experiment(with_settings(SMALL, epochs=1, image_size=10), tmp_path / name, quiet)
    evaluate_run(tmp_path / "again", say=quiet)
    for split in ("validation", "test"):
        compare_runs(tmp_path / "again", seeds[0] / "seed-0", split, tmp_path / split, quiet)
        assert (tmp_path / split / "flips.png").read_bytes().startswith(b"\x89PNG")
    digests = [RunDir.open(tmp_path / name).read_predictions("validation")[3] for name in ("once", "again")]
    assert digests[0] == digests[1]


def test_a_folder_is_not_compared_with_itself(seeds):
    with pytest.raises(UserError, match="the same folder"):
        compare_runs(seeds[0], seeds[0], say=quiet)
    with pytest.raises(UserError, match="seed-0 is on both sides"):
        compare_runs(seeds[0], seeds[0] / "seed-0", say=quiet)


def test_several_seeds(seeds, tmp_path):
    folder, summary, lines = seeds
    assert json.loads((folder / "summary.json").read_text()) == {k: v for k, v in summary.items() if k != "run_dir"}
    assert summary["seeds"] == [0, 1]
    assert len(summary["test_accuracy"]["values"]) == 2
    assert lines[-1].startswith(f"Test accuracy over 2 seeds: mean {summary['test_accuracy']['mean']:.4f}")
    weights = [RunDir.open(folder / f"seed-{seed}").read_weights() for seed in (0, 1)]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shutil.copytree(folder, tmp_path / "other")
    found = compare_runs(folder, tmp_path / "other", into=tmp_path / "compared", say=lines.append)
    assert lines[-1] == f"Written to {tmp_path / 'compared'}: comparison.json"  # no image flipped
    assert found["difference"]["value"] == 0
    assert found["words"][0].startswith("not distinguishable")


def test_seeds_that_were_stopped_go_on(seeds, tmp_path):
    shutil.copytree(seeds[0], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "seed-1")
    (tmp_path / "half" / "summary.json").unlink()
    before = (tmp_path / "half" / "seed-0" / "result.json").read_bytes()
    again = resume_seeds(tmp_path / "half", quiet)
    assert again["test_accuracy"] == seeds[1]["test_accuracy"]
    assert (tmp_path / "half" / "seed-0" / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["predictions-test.parquet", "calibration.json", "looks.json"])
def test_altered_files_are_named(run, name):
    (run.path / name).write_bytes(b'{"temperature": -1}')
    with pytest.raises(UserError, match=name):
        evaluate_run(run.path, "test", say=quiet) if name != "predictions-test.parquet" else run.read_predictions(
            "test"
        )


def test_a_run_from_before_looks_were_listed_had_one(run):
    (run.path / "looks.json").unlink()
    assert len(run.looks()) == 1


def test_the_mixture_is_described_stored_and_shown_in_the_report(run, capsys):
    assert main(["evaluate", str(run.path), "--mixture", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["mixture"]
    assert run.read_json("mixture-validation.json") == found
    assert found["accuracy"]["value"] == run.read_json("result.json")["validation_accuracy"]
    assert (run.path / "figures" / "mixture-validation.png").exists()
    assert found["words"][0] in printed.err
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert "What the mixture does" in page
    assert "accuracy when frozen" in page
