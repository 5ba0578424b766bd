"""Downloads from a server that misbehaves: whole and right, or absent; gone on with, not begun anew; else one clear line."""

import hashlib
import http.server
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from conftest import ROOT

from etude.corpus.fetch import download, hub
from etude.corpus.fetch.download import WikipediaConfig, download_wikipedia, fetch
from etude.errors import DataError, StorageError, UsageError

SCRIPT = ROOT / "tool" / "download_data.py"
DUMP = random.Random(0).randbytes(3_000_000)
NAME = "zhwiki-20250101-pages-articles-multistream.xml.bz2"
SUMS = f"{'0' * 40}  zhwiki-20250101-pages-articles.xml.bz2\n{hashlib.sha1(DUMP).hexdigest()}  {NAME}\n".encode()
TEXT = b'{"text": "a"}\n' * 50_000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Files by path. ``drop_after``: bytes a connection may send before it breaks; ``etags`` as the Hub gives them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.ranges = True
        self.drop_after = self.slow = 0
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked.append((self.command, self.path, wanted))
        data = server.files.get(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        if self.path in server.etags:
            self.send_header("ETag", f'"{server.etags[self.path]}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        rest = data[start:]
        if server.drop_after and len(rest) > server.drop_after:
            self.wfile.write(rest[: server.drop_after])
            self.close_connection = True
            return
        for at in range(0, len(rest), 2**16):
            self.wfile.write(rest[at : at + 2**16])
            time.sleep(server.slow)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT_SECONDS", 0)
    monkeypatch.setattr(hub, "WAIT_SECONDS", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    server.files["/zhwiki/latest/zhwiki-latest-sha1sums.txt"] = SUMS
    server.files["/zhwiki/20250101/zhwiki-20250101-sha1sums.txt"] = SUMS
    server.files[f"/zhwiki/20250101/{NAME}"] = DUMP
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def script(*arguments: object, **environment: str) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert done.stdout == ""
    return done.returncode, done.stderr


def one_line(answer: tuple[int, str], code: int, *pieces: str) -> None:
    assert answer[0] == code, answer
    errors = [line for line in answer[1].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and answer[1].endswith(errors[0] + "\n") and "Traceback" not in answer[1]
    for piece in pieces:
        assert piece in errors[0], errors[0]


# ---- dumps --------------------------------------------------------------------------------------------------------------


def test_the_latest_dump_is_found_checked_and_kept(server, tmp_path):
    arguments = ["wikipedia", "--dumps_mirror", server.url, "--output", tmp_path]
    code, err = script(*arguments)
    target = tmp_path / NAME.replace("20250101", "latest")
    assert code == 0 and target.read_bytes() == DUMP and "SHA-1 is right" in err and "of 20250101" in err
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    asked = len(server.asked)
    code, err = script(*arguments)
    assert code == 0 and "there" in err and len(server.asked) == asked
    target.write_bytes(b"old")
    assert script(*arguments, "--force", "true")[0] == 0 and target.read_bytes() == DUMP


def test_a_broken_connection_is_gone_on_with(server, tmp_path):
    server.drop_after = 700_000
    fetch(f"{server.url}/zhwiki/20250101/{NAME}", tmp_path / "a", hashlib.sha1(DUMP).hexdigest())
    assert (tmp_path / "a").read_bytes() == DUMP
    assert [wanted for _, _, wanted in server.asked] == [
        "", "bytes=700000-", "bytes=1400000-", "bytes=2100000-", "bytes=2800000-"
    ]  # fmt: skip


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.part").write_bytes(DUMP[:1000])
    fetch(f"{server.url}/zhwiki/20250101/{NAME}", tmp_path / "a", hashlib.sha1(DUMP).hexdigest())
    assert (tmp_path / "a").read_bytes() == DUMP
    server.drop_after = 700_000  # and one that never gets to the end is not asked for ever
    with pytest.raises(StorageError, match=r"the connection ended early.*put it at"):
        fetch(f"{server.url}/zhwiki/20250101/{NAME}", tmp_path / "b")
    assert not (tmp_path / "b").exists() and len(server.asked) < 20


@pytest.mark.parametrize("kept", [DUMP, DUMP + b"more", DUMP[:-1], DUMP[:1]], ids=["whole", "longer", "nearly", "a byte"])
def test_what_a_former_attempt_left_is_used(server, tmp_path, kept):
    (tmp_path / "a.part").write_bytes(kept)
    fetch(f"{server.url}/zhwiki/20250101/{NAME}", tmp_path / "a", hashlib.sha1(DUMP).hexdigest())
    assert (tmp_path / "a").read_bytes() == DUMP and not (tmp_path / "a.part").exists()
    if kept in (DUMP[:-1], DUMP[:1]):
        assert [wanted for _, _, wanted in server.asked] == [f"bytes={len(kept)}-"]


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.files[f"/zhwiki/20250101/{NAME}"] = DUMP[:-1] + b"x"
    answer = script("wikipedia", "--date", "20250101", "--dumps_mirror", server.url, "--output", tmp_path)
    one_line(answer, 65, NAME, "expected " + hashlib.sha1(DUMP).hexdigest(), "try again")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_noticed_and_mended_by_a_second_try(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(bytes(1000))
    config = WikipediaConfig(date="20250101", dumps_mirror=server.url, output=str(tmp_path))
    with pytest.raises(DataError, match="what arrived has SHA-1"):
        download_wikipedia(config)
    download_wikipedia(config)
    assert (tmp_path / NAME).read_bytes() == DUMP


@pytest.mark.parametrize(
    "arguments, code, piece",
    [
        (["--date", "20240101"], 65, "HTTP 404"),
        (["--language", "xx"], 65, "HTTP 404"),
        (["--language", "../x"], 2, "language (../x)"),
        (["--date", "yesterday"], 2, "date (yesterday)"),
    ],
)
def test_what_is_not_there_is_one_line(server, tmp_path, arguments, code, piece):
    one_line(script("wikipedia", "--dumps_mirror", server.url, "--output", tmp_path, *arguments), code, piece)


def test_a_dump_that_is_not_listed_is_not_finished(server, tmp_path):
    server.files["/zhwiki/latest/zhwiki-latest-sha1sums.txt"] = SUMS.splitlines(True)[0]
    with pytest.raises(DataError, match="not finished"):
        download_wikipedia(WikipediaConfig(dumps_mirror=server.url, output=str(tmp_path)))


def test_without_a_network_it_says_where_to_put_the_file(tmp_path):
    closed = "http://127.0.0.1:9"  # discard: nothing listens there
    answer = script("wikipedia", "--dumps_mirror", closed, "--output", tmp_path / "w", ETUDE_HOME=str(tmp_path))
    one_line(answer, 74, closed, "cannot be reached", "put it at", "zhwiki-latest-pages-articles-multistream.xml.bz2")
    answer = script("minimind", "--output", tmp_path / "m", HF_ENDPOINT=closed, HF_HUB_DOWNLOAD_TIMEOUT="1")
    one_line(answer, 74, "pretrain_hq.jsonl: cannot be reached", "--mirror", "put it at")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_is_told_beforehand(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="make room"):
        fetch(f"{server.url}/zhwiki/20250101/{NAME}", tmp_path / "a")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_it_goes_on_from_its_part(server, tmp_path):
    server.slow = 0.05
    arguments = ["wikipedia", "--date", "20250101", "--dumps_mirror", server.url, "--output", tmp_path]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / f"{NAME}.part", time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 200_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    server.slow, size = 0, part.stat().st_size
    assert script(*arguments)[0] == 0 and (tmp_path / NAME).read_bytes() == DUMP
    assert server.asked[-1] == ("GET", f"/zhwiki/20250101/{NAME}", f"bytes={size}-")


# ---- the Hub ------------------------------------------------------------------------------------------------------------


def serve(server: Server, repo: str, revision: str, name: str, data: bytes, etag: str = "") -> str:
    path = f"/datasets/{repo}/resolve/{revision}/{name}"
    server.files[path], server.etags[path] = data, etag or hashlib.sha256(data).hexdigest()
    return path


def test_a_file_of_the_hub_by_way_of_a_mirror(server, tmp_path):
    serve(server, "me/data", "main", "raw/a.jsonl", TEXT)
    small = b"{}\n"
    serve(server, "me/data", "main", "b.jsonl", small, hashlib.sha1(b"blob 3\0" + small).hexdigest())
    arguments = ["file", "--repo", "me/data", "--file", "raw/a.jsonl", "b.jsonl", "--output", tmp_path / "out"]
    code, err = script(*arguments, "--mirror", server.url)
    assert code == 0 and "SHA-256 is right" in err and "SHA-1 is right" in err, err
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == TEXT and (tmp_path / "out" / "b.jsonl").read_bytes() == small
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "b.jsonl"]
    answer = script("file", "--repo", "me/data", "--file", "c.jsonl", "--output", tmp_path / "out", HF_ENDPOINT=server.url)
    one_line(answer, 65, f"{server.url}/datasets/me/data/resolve/main/c.jsonl", "there is no such file")


def test_minimind_goes_where_the_stages_look(server, tmp_path):
    for name in ("pretrain_hq.jsonl", "sft_mini_512.jsonl"):
        serve(server, "jingyaogong/minimind_dataset", hub.MINIMIND[name].revision, name, TEXT)
    code, err = script("minimind", HF_ENDPOINT=server.url, ETUDE_HOME=str(tmp_path))
    assert code == 0 and "licence" in err, err
    from etude.training.config import PretrainConfig

    (tmp_path / "training_data" / "sft" / "sft_mini_512.jsonl").read_bytes()
    default = PretrainConfig().data[0].rpartition("training_data")[2]
    assert (tmp_path / f"training_data{default}").read_bytes() == TEXT


def test_a_file_of_the_hub_with_a_wrong_checksum_leaves_nothing(server, tmp_path):
    serve(server, "me/data", "main", "a.jsonl", TEXT, etag="0" * 64)
    answer = script("file", "--repo", "me/data", "--file", "a.jsonl", "--output", tmp_path, "--mirror", server.url)
    one_line(answer, 65, "SHA-256", f"expected {'0' * 64}")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_connection_to_the_hub_is_gone_on_with(server, tmp_path):
    data = TEXT * 36  # 25 MB: the library writes 10 MiB at a time
    path = serve(server, "me/data", "main", "a.jsonl", data)
    server.drop_after = 12_000_000
    code, err = script("file", "--repo", "me/data", "--file", "a.jsonl", "--output", tmp_path, "--mirror", server.url)
    assert code == 0 and (tmp_path / "a.jsonl").read_bytes() == data, err
    ranges = [wanted for method, asked, wanted in server.asked if method == "GET" and asked == path]
    assert ranges[0] == "" and ranges[1].startswith("bytes=10485760-") and len(ranges) == 3


@pytest.mark.parametrize("file", ["../a", "/etc/passwd", "a/../../b", "a\\b", "folder/"])
def test_a_file_stays_within_its_folder(file):
    with pytest.raises(UsageError, match="must be the path of a file"):
        hub.FileConfig(repo="me/data", file=(file,))


def test_modelscope(tmp_path, monkeypatch):
    asked = []

    def dataset_file_download(repo, name, local_dir, revision, endpoint):
        asked.append((repo, name, revision, endpoint))
        if name == "missing.jsonl":
            raise ValueError("404 Not Found")
        if name == "far.jsonl":
            raise ConnectionError("no route")
        with open(os.path.join(local_dir, name), "wb") as file:
            file.write(TEXT)
        return file.name

    module = types.ModuleType("modelscope.hub.file_download")
    module.dataset_file_download = dataset_file_download
    monkeypatch.setitem(sys.modules, "modelscope.hub.file_download", module)
    hub.download_minimind(hub.MiniMindConfig(("pretrain_hq.jsonl",), str(tmp_path), "modelscope"))
    assert (tmp_path / "pretrain" / "pretrain_hq.jsonl").read_bytes() == TEXT
    assert asked == [("gongjy/minimind_dataset", "pretrain_hq.jsonl", None, None)]
    for name, error in (("missing.jsonl", DataError), ("far.jsonl", StorageError)):
        with pytest.raises(error, match=name):
            hub.download_file(hub.FileConfig("me/data", (name,), str(tmp_path), "modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.file_download", None)
    with pytest.raises(UsageError, match="pip install modelscope"):
        hub.download_file(hub.FileConfig("me/data", ("a.jsonl",), str(tmp_path), "modelscope"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["pretrain", "pretrain_hq.jsonl"]
