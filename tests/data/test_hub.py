"""The Hugging Face hub, played by a server on this machine."""

import hashlib
import json

import pytest
from loopback import Whole

from dynaconv.data import hub
from dynaconv.data.download import DownloadError
from dynaconv.errors import UserError

NAME = "someone/shapes"
TREE = f"/api/datasets/{NAME}/tree/main?recursive=true"


def serve(server, files, name=NAME):
    """Serves a dataset of {path: content}."""
    listing = [{"type": "directory", "path": "data", "size": 0, "oid": "0"}]
    for path, content in files.items():
        oid = hashlib.sha256(content).hexdigest()
        listing.append({"type": "file", "path": path, "size": len(content), "oid": "0", "lfs": {"oid": oid}})
        server.routes[f"/datasets/{name}/resolve/main/{path}"] = Whole(content)
    server.routes[f"/api/datasets/{name}/tree/main?recursive=true"] = Whole(json.dumps(listing).encode())


def test_train_and_test_are_fetched_and_nothing_else(server, own_cache):
    serve(server, {
        "README.md": b"hello", "data/train-00000-of-00002.parquet": b"one", "data/train-00001-of-00002.parquet": b"two",
        "data/test-00000-of-00001.parquet": b"three", "data/validation-00000-of-00001.parquet": b"four",
    })  # fmt: skip
    files = hub.fetch(NAME)
    assert [path.read_bytes() for path in files["train"]] == [b"one", b"two"]
    assert [path.read_bytes() for path in files["test"]] == [b"three"]
    assert all(path.is_relative_to(own_cache) for split in files.values() for path in split)
    assert len(server.seen) == 4


def test_what_was_fetched_is_not_asked_for_again(server, own_cache):
    serve(server, {"train.parquet": b"one", "test.parquet": b"two"})
    first, asked = hub.fetch(NAME), len(server.seen)
    assert hub.fetch(NAME, offline=True) == first
    assert len(server.seen) == asked
    first["test"][0].unlink()
    assert hub.find_cached(NAME) is None
    assert hub.fetch(NAME) == first
    assert [path for path, _ in server.seen[asked:]] == [TREE, f"/datasets/{NAME}/resolve/main/test.parquet"]


def test_files_without_a_split_in_their_names_are_all_train(server):
    serve(server, {"b.parquet": b"2", "a.parquet": b"1"})
    assert [path.name for path in hub.fetch(NAME)["train"]] == ["b.parquet", "a.parquet"]


def test_the_token_is_sent_to_the_hub(server, monkeypatch):
    serve(server, {"train.parquet": b"one"})
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.fetch(NAME)
    assert [headers["authorization"] for _, headers in server.seen] == ["Bearer secret"] * 2


def test_without_a_token_none_is_sent(server):
    serve(server, {"train.parquet": b"one"})
    hub.fetch(NAME)
    assert not any("authorization" in headers for _, headers in server.seen)


def test_a_listing_of_several_pages_is_read_whole(server):
    pages = [[{"type": "file", "path": f"train/{i}.parquet", "size": 1}] for i in range(3)]

    def page(number):
        def route(handler):
            body = json.dumps(pages[number]).encode()
            handler.send_response(200)
            if number < 2:
                handler.send_header("Link", f'<{server.url}/page{number + 1}>; rel="next"')
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

        return route

    server.routes |= {TREE: page(0), "/page1": page(1), "/page2": page(2)}
    assert [file.path for file in hub.list_files(NAME)] == ["train/0.parquet", "train/1.parquet", "train/2.parquet"]


def test_a_next_page_on_another_host_is_not_followed(server):
    def route(handler):
        handler.send_response(200)
        handler.send_header("Link", '<http://elsewhere.invalid/2>; rel="next"')
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"[]")

    server.routes[TREE] = route
    with pytest.raises(DownloadError, match="no readable list"):
        hub.list_files(NAME)


@pytest.mark.parametrize("path", ["../outside/train.parquet", "/etc/train.parquet", "a\\..\\train.parquet"])
def test_a_path_out_of_the_repository_is_refused(server, path):
    serve(server, {path: b"one"})
    with pytest.raises(UserError, match="no readable list"):
        hub.fetch(NAME)


@pytest.mark.parametrize("body", [b"<html>", b'{"error": "x"}', b"[1, 2]", b'[{"type": "file"}]'])
def test_a_listing_that_is_none_is_one_sentence(server, body):
    server.routes[TREE] = Whole(body)
    with pytest.raises(
        DownloadError, match="gave no readable list of the files of hf:someone/shapes; check HF_ENDPOINT"
    ):
        hub.fetch(NAME)


CONFIGURATIONS = {"large/train-0.parquet": b"1", "small/train-0.parquet": b"2", "small/test-0.parquet": b"3"}


def test_a_configuration_is_chosen_by_name(server):
    serve(server, CONFIGURATIONS)
    files = hub.fetch(f"{NAME}/small")
    assert [path.read_bytes() for path in (*files["train"], *files["test"])] == [b"2", b"3"]


@pytest.mark.parametrize(("name", "files", "message"), [
    (NAME, CONFIGURATIONS,
     f"hf:{NAME} has 2 configurations; choose one with hf:{NAME}/large (there are large, small)."),
    (f"{NAME}/tiny", CONFIGURATIONS, f"hf:{NAME}/tiny has no such configuration; there are large, small."),
    (NAME, {"a.csv": b""}, f"hf:{NAME} holds no parquet files; choose a dataset that does, or download it yourself."),
    (NAME, {"test-0.parquet": b"1"}, f"hf:{NAME} has test images, but none to train on."),
])  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(server, name, files, message):
    serve(server, files)
    with pytest.raises(UserError) as caught:
        hub.fetch(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(("code", "message"), [
    (404, "hf:someone/shapes does not exist on {host} (404); check the name."),
    (401, "hf:someone/shapes does not exist or is closed to you (401); check the name, or set HF_TOKEN to a token that "
          "may read it."),
    (500, "{host} answered 500 for hf:someone/shapes; try again later."),
])  # fmt: skip
def test_a_refusal_is_one_sentence(server, code, message):
    server.routes[TREE] = lambda handler: handler.refuse(code)
    with pytest.raises(UserError) as caught:
        hub.fetch(NAME)
    assert str(caught.value) == message.format(host=server.url.removeprefix("http://"))


def test_offline_asks_nobody(server, monkeypatch):
    serve(server, {"train.parquet": b"one"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is not in the cache, and nothing is looked up offline"):
        hub.fetch(NAME)
    assert server.seen == []
