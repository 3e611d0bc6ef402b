"""A run that was stopped, killed or torn goes on to the result of one that never was."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import dynaconv.experiment
import dynaconv.training.keeping
from dynaconv.cli import main
from dynaconv.errors import UserError
from dynaconv.experiment import resume_experiment, run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.rundir import RunDir

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=4,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=64,
    learning_rate=0.01,
    threads=1,
    max_train_images=400,
)


class _Death(BaseException):
    """Ends a run where it stands, as SIGKILL would: no cleaning up by the code that it goes through."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_experiment(SMALL, folder, lambda line: None)
    return RunDir.open(folder)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A function that runs until `updates` updates were made, with a state stored after each; gives its folder."""

    def stop(updates, recipe=SMALL):
        store = RunDir.write_state
        made = 0

        def store_or_die(self, tensors, facts):
            nonlocal made
            store(self, tensors, facts)
            made += 1
            if made == updates:
                raise _Death

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dynaconv.training.keeping, "MOST_SHARE", float("inf"))
            patch.setattr(dynaconv.experiment, "parse_duration", lambda text: 0.0)
            patch.setattr(RunDir, "write_state", store_or_die)
            with pytest.raises(_Death):
                run_experiment(recipe, tmp_path / "run", lambda line: None)
        return RunDir.open(tmp_path / "run")

    return stop


def assert_same(run, whole):
    for name, tensor in whole.read_weights().items():
        assert torch.equal(tensor, run.read_weights()[name]), name
    timeless = ("seconds", "images_per_second")
    for mine, theirs in zip(run.read_metrics(), whole.read_metrics(), strict=True):
        assert {**mine, **dict.fromkeys(timeless)} == {**theirs, **dict.fromkeys(timeless)}
    result, expected = run.read_json("result.json"), whole.read_json("result.json")
    for name in ("train_loss", "validation_loss", "test_loss", "test_accuracy", "data_sha256"):
        assert result[name] == expected[name], name
    assert (run.path / "figures" / "grid.png").read_bytes() == (whole.path / "figures" / "grid.png").read_bytes()


@pytest.mark.parametrize("updates", [1, 8, 11])  # in the first epoch, at an epoch's end, in the middle of the second
def test_going_on_gives_the_run_that_was_never_stopped(stopped, whole, updates):
    run = stopped(updates)
    lines = []
    result = resume_experiment(run.path, lines.append)
    assert_same(run, whole)
    assert any(line.startswith("Going on in epoch ") for line in lines)
    assert result["train_seconds"] > 0
    assert not (run.path / "state").exists()
    assert len(run.read_json("environment.json")["resumed"]) == 1


def test_two_states_are_kept_and_a_torn_one_is_passed_over(stopped, whole):
    run = stopped(9)
    older, newer = sorted((run.path / "state").iterdir())
    newer.write_bytes(newer.read_bytes()[:-1] + b"!")
    lines = []
    resume_experiment(run.path, lines.append)
    assert f"The stored state {newer} cannot be used (it is torn or was altered); the one before it is." in lines
    assert_same(run, whole)
    assert not older.exists()


def test_a_torn_state_does_not_crowd_out_those_that_follow(tmp_path):
    run = RunDir(tmp_path)
    for epoch in (5, 4, 2, 3):  # the first two are torn ones of before
        run.write_state({"weight": torch.zeros(1)}, {"epoch": epoch, "updates": 0})
    assert [path.name[:6] for path in sorted((tmp_path / "state").iterdir())] == ["000002", "000003"]


def test_without_a_state_the_training_starts_anew(stopped, whole):
    run = stopped(3)
    shutil.rmtree(run.path / "state")
    lines = []
    resume_experiment(run.path, lines.append)
    assert "No state was stored yet: the training starts anew." in lines
    assert_same(run, whole)


def test_a_run_killed_before_its_beginning_was_written(stopped, whole):
    run = stopped(1)
    for name in ("model.safetensors", "model.json", "environment.json"):
        (run.path / name).unlink()
    shutil.rmtree(run.path / "state")
    (run.path / ".model.json.abc.json").write_text("{")  # what a killed process leaves
    resume_experiment(run.path, lambda line: None)
    assert_same(run, whole)
    assert sorted(path.name for path in run.path.iterdir()) == sorted(path.name for path in whole.path.iterdir())


def test_a_run_that_has_ended_is_refused(whole, capsys):
    assert main(["resume", str(whole.path)]) == 2
    assert capsys.readouterr().err == f"dynaconv: The run in {whole.path} has ended; there is nothing to go on with.\n"


def test_other_images_are_refused(stopped):
    run = stopped(2)
    environment = run.read_json("environment.json")
    run.write_json("environment.json", {**environment, "data_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"are not those that the run in .* began with"):
        resume_experiment(run.path, lambda line: None)


@pytest.mark.parametrize(("name", "before"), [("threads", 64), ("transforms", "by hand"), ("judging", "by hand")])
def test_what_is_not_as_at_the_beginning_is_said(name, before, stopped):
    run = stopped(2)
    run.write_json("environment.json", {**run.read_json("environment.json"), name: before})
    lines = []
    resume_experiment(run.path, lines.append)
    assert f"Not as at the run's beginning: {name}. The result may differ in its last digits." in lines


def test_nothing_is_said_of_what_an_older_run_did_not_tell(stopped):
    run = stopped(2)
    environment = run.read_json("environment.json")
    del environment["judging"]
    run.write_json("environment.json", environment)
    lines = []
    resume_experiment(run.path, lines.append)
    assert not [line for line in lines if line.startswith("Not as at")]


def test_a_state_of_another_network_is_refused(stopped):
    run = stopped(2)
    run.write_recipe(with_settings(SMALL, widths=(8, 12)))
    with pytest.raises(UserError, match="does not fit the run's recipe"):
        resume_experiment(run.path, lambda line: None)


def test_two_processes_are_kept_apart(stopped):
    run = stopped(2)
    with (
        run.locked(),
        pytest.raises(UserError, match=f"Another process is at work in {run.path}; wait for it, or stop it."),
    ):
        resume_experiment(run.path, lambda line: None)


def test_no_folder_and_no_run(tmp_path):
    with pytest.raises(UserError):
        resume_experiment(tmp_path / "nowhere", lambda line: None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        resume_experiment(tmp_path / "empty", lambda line: None)


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory):
    """A longer run that was never stopped, so that a signal finds a process at work."""
    folder = tmp_path_factory.mktemp("long")
    run_experiment(with_settings(SMALL, epochs=20), folder / "run", lambda line: None)
    return RunDir.open(folder / "run")


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed(tmp_path, long_whole, name):
    recipe = RunDir.create(tmp_path / "recipe")
    recipe.write_recipe(with_settings(SMALL, epochs=20, checkpoint_every="0.05s"))
    process = subprocess.Popen(
        [sys.executable, "-m", "dynaconv", "train", str(recipe.path), "--run-dir", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "run" / "state").glob("[0-9]*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(name)
    output, errors = process.communicate(timeout=30)
    if name == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, errors
        assert " are kept in run.\nGo on with: dynaconv resume run\n" in output
        assert errors == ""
    run = RunDir.open(tmp_path / "run")
    assert not (run.path / "result.json").exists()
    resume_experiment(run.path, lambda line: None)
    assert_same(run, long_whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    """The first waits for the step to end; the second is raised where it arrives."""
    from dynaconv.training.keeping import Keeper

    keeper = Keeper(RunDir(tmp_path), 3600, lambda: 0.0, lambda line: None)
    with keeper.stopping_gently():
        signal.raise_signal(signal.SIGINT)  # asks
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not (tmp_path / "state").exists()
