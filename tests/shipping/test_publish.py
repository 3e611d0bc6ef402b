"""A classifier published: what is in the folder and what is not, and its way to a hub, which is played on loopback."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest

from dynaconv.cli import main
from dynaconv.errors import UserError
from dynaconv.experiment import run_experiment
from dynaconv.recipe import Recipe, with_settings
from dynaconv.shipping.certificate import hash_weights
from dynaconv.shipping.classifier import Classifier
from dynaconv.shipping.publish import publish_run, push_folder

SMALL = with_settings(
    Recipe(name="small"),
    source="digits",
    epochs=2,
    widths=(8, 16),
    num_convolutions=(2,),
    pool_after=(1,),
    batch_size=32,
    learning_rate=0.01,
    threads=1,
    validation_fraction=0.2,
)
# The hub's library is not yet used to the newest version of its own HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ALWAYS = ["README.md", "calibration.json", "familiarity.safetensors", "figures/curves.png", "figures/grid.png"]
ALWAYS += ["model.json", "model.safetensors", "recipe.json", "result.json"]


def quiet(line):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("private-folder") / "run"
    run_experiment(SMALL, path, quiet)
    # As if the images had come from a folder of this machine.
    recipe = json.loads((path / "recipe.json").read_text())
    recipe["data"]["source"] = "/data/somebody/secret/digits"
    recipe["data"]["without"] = "somebody/secret/doubtful.csv"
    (path / "recipe.json").write_text(json.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    into = tmp_path_factory.mktemp("published") / "model"
    assert main(["publish", str(run), "--into", str(into), "--license", "mit"]) == 0
    return into


def test_the_folder_is_the_classifier(run, published):
    assert sorted(str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()) == ALWAYS
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    mine, theirs = (Classifier.load(path) for path in (run, published))
    assert np.array_equal(mine.answer(images), theirs.answer(images))
    assert mine.threshold == theirs.threshold


def test_no_folder_or_command_of_this_machine_is_in_it(run, published):
    texts = [path.read_text() for path in published.rglob("*") if path.suffix in (".json", ".md")]
    assert texts
    for text in texts:
        assert "private-folder" not in text
        assert "somebody" not in text
        assert "secret" not in text
    data = json.loads((published / "recipe.json").read_text())["data"]
    assert (data["source"], data["without"]) == ("digits", "doubtful.csv")


def test_the_hub_can_read_the_card(run, published):
    card = huggingface_hub.ModelCard.load(published / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "dynaconv"
    (result,) = card.data.eval_results
    accuracy = json.loads((run / "evaluation-test.json").read_text())["top1"]["value"]
    assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("digits", "test", accuracy)
    assert card.text.lstrip().startswith("# small, trained on digits")


def test_exports_go_along_with_their_certificates_only(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "other.onnx").write_bytes(b"onnx")
    for name in ("model.onnx", "model.pt2"):
        certified(tmp_path / "run" / name, hash_weights(run), source="/data/somebody/digits")
    names = publish_run(tmp_path / "run", tmp_path / "into", None, False, quiet)
    assert sorted(set(names) - set(ALWAYS)) == [
        "model.onnx",
        "model.onnx.certificate.json",
        "model.pt2",
        "model.pt2.certificate.json",
    ]
    assert publish_run(tmp_path / "run", tmp_path / "into", None, True, quiet) == names
    assert json.loads((tmp_path / "into" / "model.onnx.certificate.json").read_text())["source"] == "digits"
    assert "license" not in (tmp_path / "into" / "README.md").read_text().split("---")[1]


def certified(path, weights, **more):
    path.write_bytes(b"network")
    facts = {"file_sha256": hashlib.sha256(b"network").hexdigest(), "weights_sha256": weights, **more}
    path.with_name(f"{path.name}.certificate.json").write_text(json.dumps(facts))


def test_an_export_that_is_not_of_this_run_is_not_published(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    words = ["publish", str(tmp_path / "run"), "--into", str(tmp_path / "into")]
    certified(tmp_path / "run" / "model.onnx", hash_weights(run))
    (tmp_path / "run" / "model.onnx").write_bytes(b"another")
    assert main(words) == 2
    assert "model.onnx was altered" in capsys.readouterr().err
    certified(tmp_path / "run" / "model.onnx", "0" * 64)
    assert main(words) == 2
    assert "model.onnx comes from another run" in capsys.readouterr().err
    (tmp_path / "run" / "model.onnx.certificate.json").write_text("[]")
    assert main(words) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_licence_is_an_identifier(run, tmp_path, capsys):
    assert main(["publish", str(run), "--into", str(tmp_path / "into"), "--license", "mit\nx: y"]) == 2
    assert "--license takes an identifier" in capsys.readouterr().err


def test_nothing_of_others_is_replaced(run, tmp_path, capsys):
    into = tmp_path / "model"
    words = ["publish", str(run), "--into", str(into)]
    assert main(words) == 0
    assert main(words) == 2
    assert "say --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "link").symlink_to(into)
    assert main([*words[:-1], str(tmp_path / "link"), "--overwrite"]) == 2
    assert "link is no folder" in capsys.readouterr().err
    (tmp_path / "link").unlink()
    for name in ("notes.txt", ".git/HEAD", "figures/mine.png"):
        (into / name).parent.mkdir(exist_ok=True)
        (into / name).write_text("mine")
        assert main([*words, "--overwrite"]) == 2
        assert f"holds {name.partition('/HEAD')[0]}, which no publication wrote" in capsys.readouterr().err
        assert (into / name).read_text() == "mine"
        (into / name).unlink()
        if name.startswith(".git"):
            (into / ".git").rmdir()
    shutil.rmtree(into)
    into.mkdir()
    (into / "README.md").write_text("a model of somebody else")
    (into / "model.safetensors").touch()
    assert main([*words, "--overwrite"]) == 2
    assert "holds README.md, which no publication wrote" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_publication_stays_until_the_next_is_whole(run, published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path / "model")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynaconv.shipping.publish.render_card", stopped)
    assert main(["publish", str(run), "--into", str(tmp_path / "model"), "--overwrite"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(p.name for p in published.iterdir())


def test_the_run_itself_is_never_replaced(run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (path / "README.md").touch()  # so that it looks like something that was published
    before = sorted(each.name for each in path.iterdir())
    for into in (path, tmp_path):
        with pytest.raises(UserError, match="is or holds the run itself"):
            publish_run(path, into, None, True, quiet)
    assert sorted(each.name for each in path.iterdir()) == before


def test_an_unfinished_run_is_not_published(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        publish_run(tmp_path / "run", tmp_path / "into", None, False, quiet)
    assert not (tmp_path / "into").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        hub = self.server
        hub.asked.append(self.path)
        if self.headers["authorization"] != "Bearer good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.answer(hub.status, {"url": hub.address + "/o/n", "error": "You may not create o/n"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            told = [
                {"path": each["path"], "uploadMode": mode[each["path"].endswith("safetensors")], "shouldIgnore": False}
                for each in files
            ]
            return self.answer(200, {"files": told})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if self.path.endswith("/commit/main"):
            hub.commits.append([json.loads(line) for line in body.splitlines()])
            return self.answer(200, {"commitUrl": hub.address + "/o/n/commit/1", "commitOid": "1", "success": True})
        return self.answer(404, {"error": "Not found"})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.stored[self.path.rpartition("/")[2]] = hashlib.sha256(body).hexdigest()
        self.answer(200, {})

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(404 if self.headers["authorization"] == "Bearer good" else 401, {"error": "Not found"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.asked, server.commits, server.stored, server.status, server.created = [], [], {}, 200, None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "good")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()


def test_a_folder_is_uploaded_when_asked(run, hub, tmp_path, capsys):
    into = tmp_path / "model"
    assert main(["publish", str(run), "--into", str(into), "--push", "o/n"]) == 0
    assert re.search(rf"Uploading [\d.]+ MB to {hub.address}/o/n, private\.", capsys.readouterr().out)
    assert hub.created == {"name": "n", "organization": "o", "visibility": "private"}
    (commit,) = hub.commits
    paths = {line["value"]["path"] for line in commit if line["key"] in ("file", "lfsFile")}
    assert paths == set(ALWAYS)
    large = {line["value"]["path"]: line["value"]["oid"] for line in commit if line["key"] == "lfsFile"}
    assert set(large) == {"model.safetensors", "familiarity.safetensors"}
    assert set(large.values()) == set(hub.stored) == set(hub.stored.values())
    assert large["model.safetensors"] == hashlib.sha256((into / "model.safetensors").read_bytes()).hexdigest()


def test_public_only_when_asked(published, hub):
    push_folder(published, "o/n", True, quiet)
    assert hub.created["visibility"] == "public"


def test_without_push_nothing_is_asked(run, hub, tmp_path):
    assert main(["publish", str(run), "--into", str(tmp_path / "model")]) == 0
    assert hub.asked == []


def test_refusals_of_the_hub(published, hub, run, tmp_path, capsys, monkeypatch):
    words = ["publish", str(run), "--into", str(tmp_path / "model"), "--overwrite", "--push"]
    hub.status = 403
    assert main([*words, "o/n"]) == 1
    assert re.search(r"refused o/n \(403\): .*You may not create o/n\.", capsys.readouterr().err)
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert main([*words, "o/n"]) == 1
    assert "(401)" in capsys.readouterr().err
    assert hub.commits == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main([*words, "o/n"]) == 1
    assert "http://127.0.0.1:9 could not be reached" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    monkeypatch.delenv("HF_TOKEN")
    assert main([*words, "o/n"]) == 2
    assert "Set HF_TOKEN" in capsys.readouterr().err
    assert main([*words, "not a name"]) == 2
    assert "--push takes OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()  # told before anything was written
