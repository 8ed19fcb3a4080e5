"""Downloads against a server on this machine that misbehaves in every way that servers do."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agr_jax.data.download import DownloadError, download

pytest.importorskip("requests")
CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
NO_WAITS = (0.0, 0.0, 0.0)


class Server:
    """Answers with a list of behaviours, one for each request; then properly."""

    def __init__(self):
        self.requests = []
        self.behaviours = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.headers.get("Range"))
                behaviour = outer.behaviours.pop(0) if outer.behaviours else "whole"
                start = 0
                if self.headers.get("Range") and behaviour != "ignores ranges":
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if isinstance(behaviour, int):
                    self.send_error(behaviour)
                    return
                body = CONTENT[start:]
                if behaviour == "other file":
                    body = b"x" * len(body)
                self.send_response(206 if start else 200)
                length = len(body) + (100 if behaviour == "longer" else 0)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if behaviour == "breaks off":
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(body + (b"y" * 100 if behaviour == "longer" else b""))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/file.bin"


@pytest.fixture
def server():
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def get(server, path, checksum=SHA256, waits=NO_WAITS):
    return download(server.address, path, size=len(CONTENT), checksum=checksum, waits=waits)


def test_a_file_arrives_whole_and_only_once(server, tmp_path):
    path = tmp_path / "new folder" / "file.bin"
    assert get(server, path) == path
    assert path.read_bytes() == CONTENT
    get(server, path)
    assert server.requests == [None]
    assert {p.name for p in path.parent.iterdir()} == {"file.bin", ".file.bin.lock"}


def test_a_broken_connection_is_continued(server, tmp_path, capsys):
    server.behaviours = ["breaks off", "breaks off"]
    get(server, tmp_path / "file.bin")
    first, second = (int(r.removeprefix("bytes=").rstrip("-")) for r in server.requests[1:])
    assert server.requests[0] is None
    # What came before the break is kept, but for its last block.
    assert len(CONTENT) // 2 - 2**16 < first <= len(CONTENT) // 2
    assert first < second < len(CONTENT)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert "trying again in 0 s" in capsys.readouterr().out


def test_a_later_call_continues_what_an_earlier_one_left(server, tmp_path):
    server.behaviours = ["breaks off"]
    with pytest.raises(DownloadError, match=r"ended after|IncompleteRead|ChunkedEncoding"):
        get(server, tmp_path / "file.bin", waits=())
    kept = (tmp_path / "file.bin.partial").stat().st_size
    assert kept > len(CONTENT) // 2 - 2**16
    assert not (tmp_path / "file.bin").exists()
    get(server, tmp_path / "file.bin")
    assert server.requests[-1] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.behaviours = ["breaks off", "ignores ranges"]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.behaviours = [503, 500, 429]
    get(server, tmp_path / "file.bin")
    assert len(server.requests) == 4


def test_a_missing_file_is_not_asked_for_again(server, tmp_path):
    server.behaviours = [404]
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:.*answers 404 Not Found"):
        get(server, tmp_path / "file.bin")
    assert len(server.requests) == 1


def test_another_file_is_refused_and_not_kept(server, tmp_path):
    server.behaviours = ["other file"] * 4
    with pytest.raises(DownloadError, match=f"expected sha256 {SHA256[7:]}, found [0-9a-f]{{64}}"):
        get(server, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()
    assert not (tmp_path / "file.bin.partial").exists()
    assert len(server.requests) == 4
    get(server, tmp_path / "file.bin")  # the right one, the fifth time
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_md5_is_known_too(server, tmp_path):
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    get(server, tmp_path / "file.bin", checksum=f"md5:{md5}")
    with pytest.raises(DownloadError, match="expected md5"):
        get(server, tmp_path / "other.bin", checksum="md5:0", waits=())


def test_more_than_was_promised_is_refused(server, tmp_path):
    server.behaviours = ["longer"]
    with pytest.raises(DownloadError, match=r"expected 5,120,000 bytes, found more"):
        get(server, tmp_path / "file.bin")


def test_nobody_listening_is_one_error(tmp_path):
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9/file.*\(try 2 of 2\)"):
        download("http://127.0.0.1:9/file", tmp_path / "f", size=1, checksum="md5:0", waits=(0.0,))


def test_no_network_is_found_out_at_once(tmp_path):
    address = "http://no-such-host.invalid/file"
    with pytest.raises(DownloadError, match=r"no network, or none that knows no-such-host.invalid"):
        download(address, tmp_path / "f", size=1, checksum="md5:0", waits=(60.0,))


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DownloadError, match="file: cannot be written"):
        get(server, tmp_path / "file" / "file.bin")


def test_two_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=get, args=(server, tmp_path / "file.bin")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [None]
