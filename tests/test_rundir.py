"""A run's folder and files written whole or not at all."""

import json
import stat

import pytest
import torch

from dynaconv.errors import UserError
from dynaconv.files import writing_whole
from dynaconv.recipe import Recipe
from dynaconv.rundir import RunDir


def test_round_trips(tmp_path):
    run = RunDir.create(tmp_path / "new" / "run")
    run.write_recipe(Recipe(name="mine"))
    run.write_json("result.json", {"a": 1})
    run.append_metrics({"epoch": 1})
    run.append_metrics({"epoch": 2})
    weights = {"w": torch.randn(2, 3), "n": torch.tensor(4)}
    run.write_weights(weights)
    again = RunDir.open(run.path)
    assert again.read_recipe() == Recipe(name="mine")
    assert again.read_json("result.json") == {"a": 1}
    assert again.read_metrics() == [{"epoch": 1}, {"epoch": 2}]
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.read_weights().items())


@pytest.mark.parametrize("kind", ["file", "filled folder", "link"])
def test_what_exists_is_never_overwritten(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / "precious").write_text("mine")
    with pytest.raises(UserError) as error:
        RunDir.create(path)
    assert str(error.value) == f"The folder {path} exists already; name another with --run-dir or remove it."


def test_an_empty_folder_is_taken(tmp_path):
    assert RunDir.create(tmp_path).figure("grid").parent.is_dir()


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no recipe\.json"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[" * 200_000])
def test_damaged_json_is_named(tmp_path, content):
    run = RunDir.create(tmp_path / "run")
    if content is not None:
        (run.path / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result.json cannot be read"):
        run.read_json("result.json")


def test_damaged_weights_are_named(tmp_path):
    run = RunDir.create(tmp_path / "run")
    run.write_weights({"w": torch.randn(20)})
    weights = run.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        run.read_weights()


def test_writing_whole_leaves_the_old_file_when_the_writing_fails(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), writing_whole(path) as temporary:
        temporary.write_text("half ü", encoding="ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def fill_the_disk(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError) as error, writing_whole(tmp_path / "file.json") as temporary:
        fill_the_disk(temporary)
    assert str(error.value) == f"{tmp_path / 'file.json'} cannot be written: No space left on device."
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(UserError, match="cannot be written: No such file or directory"),
        writing_whole(tmp_path / "a/b"),
    ):
        pass


def test_files_are_as_readable_as_others(tmp_path):
    (tmp_path / "plain").touch()
    with writing_whole(tmp_path / "file.json") as temporary:
        temporary.write_text(json.dumps({}))
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_weights_that_do_not_fit_are_one_sentence_and_the_old_ones_stay(tmp_path):
    resource = pytest.importorskip("resource")
    run = RunDir.create(tmp_path / "run")
    run.write_weights({"a": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a real write that fails half way, as on a full disk
    try:
        with pytest.raises(UserError, match=r"model\.safetensors cannot be written: File too large\."):
            run.write_weights({"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(run.read_weights()["a"], torch.ones(10))
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []
