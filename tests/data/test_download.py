"""Downloads from a server that cuts, stalls, crawls, corrupts and refuses."""

import errno
import hashlib
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock
from loopback import Crawling, Cutting, InTurn, Whole

from dynaconv.data.download import Checksum, DiskError, DownloadError, Patience, download, is_offline
from dynaconv.errors import UserError

CONTENT = bytes(range(256)) * 400
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())
QUICK = Patience(slow_bytes_per_second=5000, slow_seconds=0.3)


def get(server, tmp_path, *paths, **options):
    arguments = {"checksum": SHA256, "size": len(CONTENT), "patience": QUICK} | options
    return download([server.url + path for path in paths], tmp_path / "sub" / "file.bin", **arguments)


def files_in(tmp_path):
    # The empty lock file stays: to delete it would let a third process in beside the one that holds it.
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_file_arrives_whole_and_nothing_else_stays(server, tmp_path, algorithm):
    server.routes["/a"] = Whole(CONTENT)
    checksum = Checksum(algorithm, hashlib.new(algorithm, CONTENT).hexdigest())
    seen = []
    path = get(server, tmp_path, "/a", checksum=checksum, progress=lambda there, whole: seen.append((there, whole)))
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_cut_download_asks_only_for_the_rest(server, tmp_path):
    server.routes["/a"] = Cutting(CONTENT, [30_000, 1_000_000])
    assert get(server, tmp_path, "/a").read_bytes() == CONTENT
    first, second = (headers.get("range") for _, headers in server.seen)
    assert (first, second) == (None, "bytes=30000-")


def test_a_later_process_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    server.routes["/a"] = Whole(CONTENT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin.part").write_bytes(CONTENT[:70_000])
    assert get(server, tmp_path, "/a").read_bytes() == CONTENT
    assert server.seen[0][1]["range"] == "bytes=70000-"


def test_a_second_process_waits_for_the_first_and_takes_its_file(server, tmp_path):
    destination = tmp_path / "sub" / "file.bin"
    destination.parent.mkdir()
    told, waiting = [], threading.Event()

    def notify(notice):
        told.append(notice)
        waiting.set()

    first = FileLock(destination.with_name(".file.bin.lock"))
    with ThreadPoolExecutor(1) as pool:
        with first:
            second = pool.submit(get, server, tmp_path, "/a", notify=notify)
            assert waiting.wait(10)
            destination.write_bytes(CONTENT)
        assert second.result(10).read_bytes() == CONTENT
    assert told == ["Another process is downloading file.bin; waiting for it."]
    assert server.seen == []


def test_a_server_that_ignores_the_range_sends_all_again(server, tmp_path):
    server.routes["/a"] = InTurn([Cutting(CONTENT, [30_000]), Whole(CONTENT, ranges=False)])
    assert get(server, tmp_path, "/a").read_bytes() == CONTENT
    assert len(server.seen) == 2


def test_a_part_that_is_already_whole_is_not_fetched_again(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin.part").write_bytes(CONTENT)
    assert get(server, tmp_path, "/a").read_bytes() == CONTENT
    assert server.seen == []


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"too long"], ids=["whole", "too long"])
def test_416_ends_a_whole_part_and_restarts_a_wrong_one(server, tmp_path, part):
    server.routes["/a"] = Whole(CONTENT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin.part").write_bytes(part)
    assert get(server, tmp_path, "/a", size=None).read_bytes() == CONTENT
    assert len(server.seen) == (1 if part == CONTENT else 2)


def test_without_a_checksum_an_old_part_is_not_trusted(server, tmp_path):
    server.routes["/a"] = Whole(CONTENT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin.part").write_bytes(b"x" * 1000)
    assert get(server, tmp_path, "/a", checksum=None, size=None).read_bytes() == CONTENT
    assert "range" not in server.seen[0][1]


def test_a_corrupt_file_is_fetched_once_more(server, tmp_path):
    notices = []
    server.routes["/a"] = InTurn([Whole(b"x" + CONTENT[1:]), Whole(CONTENT)])
    assert get(server, tmp_path, "/a", notify=notices.append).read_bytes() == CONTENT
    assert "file.bin arrived with the wrong sha256 checksum; once more." in notices


def test_a_source_that_is_corrupt_twice_is_left_and_nothing_of_it_kept(server, tmp_path):
    server.routes["/bad"] = Whole(b"x" + CONTENT[1:])
    with pytest.raises(DownloadError, match="delivered a file with the wrong sha256 checksum, twice"):
        get(server, tmp_path, "/bad")
    assert files_in(tmp_path) == []
    server.routes["/good"] = Whole(CONTENT)
    assert get(server, tmp_path, "/bad", "/good").read_bytes() == CONTENT


@pytest.mark.parametrize("code", [403, 404, 500, 503])
def test_a_refusal_is_not_repeated_and_the_next_source_is_tried(server, tmp_path, code):
    notices = []
    server.routes |= {"/a": lambda handler: handler.refuse(code), "/b": Whole(CONTENT)}
    assert get(server, tmp_path, "/a", "/b", notify=notices.append).read_bytes() == CONTENT
    assert [path for path, _ in server.seen] == ["/a", "/b"]
    assert any(f"answered {code}" in notice for notice in notices)
    assert any(notice == f"Downloading file.bin from {server.url}/b." for notice in notices)


def test_a_source_that_keeps_cutting_is_left_with_its_bytes_kept(server, tmp_path):
    server.routes |= {"/a": Cutting(CONTENT, [10_000]), "/b": Whole(CONTENT)}
    assert get(server, tmp_path, "/a", "/b").read_bytes() == CONTENT
    assert [headers.get("range") for _, headers in server.seen] == [
        None, "bytes=10000-", "bytes=20000-", "bytes=30000-", "bytes=40000-"
    ]  # fmt: skip


def test_a_source_that_stalls_is_left(server, tmp_path):
    server.routes |= {"/a": Crawling(CONTENT, stall_after=2000), "/b": Whole(CONTENT)}
    impatient = Patience(timeout_seconds=0.3, attempts=2)
    assert get(server, tmp_path, "/a", "/b", patience=impatient).read_bytes() == CONTENT
    assert server.seen[-1][0] == "/b"


def test_a_source_that_crawls_is_left(server, tmp_path):
    notices = []
    server.routes |= {"/a": Crawling(CONTENT), "/b": Whole(CONTENT)}
    assert get(server, tmp_path, "/a", "/b", notify=notices.append).read_bytes() == CONTENT
    assert any("is too slow" in notice for notice in notices)


def test_the_last_source_may_crawl_unless_told_otherwise(server, tmp_path):
    slow = CONTENT[:200]
    known = {"checksum": Checksum("sha256", hashlib.sha256(slow).hexdigest()), "size": len(slow)}
    server.routes["/a"] = Crawling(slow)
    assert get(server, tmp_path, "/a", **known).read_bytes() == slow
    strict = Patience(slow_bytes_per_second=5000, slow_seconds=0.3, bear_last=False)
    with pytest.raises(DownloadError, match="is too slow"):
        get(server, tmp_path, "/a", **known, patience=strict)


def test_a_file_of_another_size_is_refused_before_it_is_received(server, tmp_path):
    server.routes["/a"] = Whole(b"<html>log in</html>")
    with pytest.raises(DownloadError, match="offers 19 bytes where 102400 were expected"):
        get(server, tmp_path, "/a")
    assert files_in(tmp_path) == []


def test_without_a_server_it_ends_fast_with_every_reason(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(DownloadError) as caught:
            download([f"http://127.0.0.1:{port}/a"], tmp_path / "f", checksum=SHA256)
    assert str(caught.value) == (
        f"f could not be downloaded: 127.0.0.1:{port} could not be reached (Connection refused). Try again later "
        "(what has come is kept), or put the file in place by hand."
    )


def test_other_schemes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"file:///etc/hostname is not an http or https address\."):
        download(["file:///etc/hostname"], tmp_path / "f", checksum=None)


def test_a_disk_too_small_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 1000))
    with pytest.raises(DiskError) as caught:
        get(server, tmp_path, "/a")
    assert str(caught.value) == (
        f"The disk has no space left for file.bin in {tmp_path / 'sub'}; 0.1 MB more are needed; free some space, or "
        "name another folder with DYNACONV_CACHE."
    )
    assert server.seen == []


def test_a_disk_that_fills_on_the_way_is_one_sentence_and_no_other_source(server, tmp_path, monkeypatch):
    server.routes |= {"/a": Whole(CONTENT), "/b": Whole(CONTENT)}

    def full(there, whole):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match="The disk has no space left"):
        get(server, tmp_path, "/a", "/b", progress=full)
    assert [path for path, _ in server.seen] == ["/a"]
    assert not (tmp_path / "sub" / "file.bin").exists()


def test_the_token_follows_a_redirection_only_to_the_same_host(server, tmp_path):
    token = {"Authorization": "Bearer secret"}
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.routes |= {
        "/same": lambda handler: handler.refuse(302, Location=f"{server.url}/a"),
        "/other": lambda handler: handler.refuse(302, Location=f"{elsewhere}/b"),
        "/a": Whole(CONTENT),
        "/b": Whole(CONTENT),
    }
    get(server, tmp_path, "/same", headers=token)
    get(server, tmp_path, "/other", headers=token)
    told = {path: headers.get("authorization") for path, headers in server.seen}
    assert told == {"/same": "Bearer secret", "/a": "Bearer secret", "/other": "Bearer secret", "/b": None}


@pytest.mark.parametrize(("name", "value", "offline"), [
    ("HF_HUB_OFFLINE", "1", True), ("HF_HUB_OFFLINE", "true", True), ("HF_DATASETS_OFFLINE", "1", True),
    ("HF_HUB_OFFLINE", "0", False), ("HF_HUB_OFFLINE", "", False),
])  # fmt: skip
def test_offline(monkeypatch, name, value, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv(name, value)
    assert is_offline(False) is offline
    assert is_offline(True) is True
