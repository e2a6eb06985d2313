"""Downloads from a real local server that is helpful, cut off, slow or lying."""

import hashlib
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resnet_train.data.download import checksum, download
from resnet_train.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
SIZE = len(CONTENT)
MD5 = hashlib.md5(CONTENT).hexdigest()
OTHER = random.Random(1).randbytes(SIZE)
HTML = b"<html>Please log in</html>"


class Mirror(ThreadingHTTPServer):
    """Answers every request as `answer(handler, first byte asked for)` says; keeps the Range of each in `ranges`."""

    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.ranges, self.closing = answer, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file.bin"

    def handle_error(self, request, client_address):
        """A client that leaves is no error here."""


class Handler(BaseHTTPRequestHandler):
    timeout = 20

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        self.server.answer(self, int(asked.removeprefix("bytes=").rstrip("-")))

    def log_message(self, *arguments):
        """Nothing."""

    def head(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def partial(self, start):
        self.head(206, Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}", Content_Length=SIZE - start)


def ranged(handler, start):
    handler.partial(start)
    handler.wfile.write(CONTENT[start:])


def rangeless(handler, start):
    handler.head(Content_Length=SIZE)
    handler.wfile.write(CONTENT)


def whole_as_206(handler, start):
    """Knows the word range but always begins at the first byte."""
    handler.partial(0)
    handler.wfile.write(CONTENT)


def cut(handler, start):
    """100,000 bytes, then the end."""
    handler.partial(start)
    handler.wfile.write(CONTENT[start : start + 100_000])


def silent(handler, start):
    """Not even a status line."""
    handler.server.closing.wait(20)


def stalled(handler, start):
    """A third of the file, then nothing, with the connection open."""
    handler.partial(start)
    handler.wfile.write(CONTENT[start : start + 100_000])
    handler.wfile.flush()
    handler.server.closing.wait(20)


def trickle(handler, start):
    """30,000 bytes ten times a second: 300 kB/s, the whole file in one second."""
    handler.partial(start)
    for place in range(start, SIZE, 30_000):
        handler.wfile.write(CONTENT[place : place + 30_000])
        if handler.server.closing.wait(0.1):
            return


def other(handler, start):
    """Another file of the right size."""
    handler.partial(start)
    handler.wfile.write(OTHER[start:])


def html(handler, start):
    handler.head(Content_Type="text/html", Content_Length=len(HTML))
    handler.wfile.write(HTML)


def html_chunked(handler, start):
    """A page that does not tell its length."""
    handler.head(Content_Type="text/html")
    handler.wfile.write(HTML)


def endless(handler, start):
    handler.head()
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


def right_then_endless(handler, start):
    handler.head()
    handler.wfile.write(CONTENT)
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


def bodiless(handler, start):
    """What is said of the file, and nothing of it."""
    handler.partial(start)
    handler.server.closing.wait(20)


def missing(handler, start):
    handler.send_error(404)


def broken(handler, start):
    handler.send_error(500)


def babbling(handler, start):
    """No HTTP at all."""
    handler.wfile.write(b"220 FTP server ready\r\n")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def mirror():
    """Start a mirror that answers as it is told to; all stop with the test."""
    started = []

    def start(answer):
        server = Mirror(answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def refused():
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"


def get(path, *mirrors, **options):
    urls = [getattr(mirror, "url", mirror) for mirror in mirrors]
    return download(urls, path, MD5, SIZE, **({"stall": 5.0} | options))


def first_byte(text):
    return int(text.removeprefix("bytes=").removesuffix("-"))


def only(path):
    """The content of `path`, which is all that its folder holds."""
    assert list(path.parent.iterdir()) == [path]
    return path.read_bytes()


@pytest.mark.parametrize("answer", [ranged, rangeless, whole_as_206, right_then_endless])
def test_one_request_to_the_first_mirror(answer, mirror, tmp_path):
    first, second = mirror(answer), mirror(ranged)
    path = tmp_path / "new" / "folder" / "file.bin"
    assert get(path, first, second) == path
    assert only(path) == CONTENT
    assert (first.ranges, second.ranges) == (["bytes=0-"], [])


def test_checksum(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert checksum(tmp_path / "file") == MD5


def test_a_right_file_is_not_asked_for(mirror, tmp_path):
    path, server = tmp_path / "file.bin", mirror(ranged)
    path.write_bytes(CONTENT)
    assert get(path, server) == path
    assert server.ranges == []


@pytest.mark.parametrize("wrong", [OTHER, CONTENT[:-1], CONTENT + b"x", b""])
def test_a_wrong_file_is_fetched_again(wrong, mirror, tmp_path):
    path, server = tmp_path / "file.bin", mirror(ranged)
    path.write_bytes(wrong)
    assert get(path, server).read_bytes() == CONTENT
    assert server.ranges == ["bytes=0-"]


@pytest.mark.parametrize("answer", [ranged, rangeless, whole_as_206])
def test_the_next_mirror_goes_on_where_the_connection_was_cut(answer, mirror, tmp_path):
    first, second = mirror(cut), mirror(answer)
    get(tmp_path / "file.bin", first, second)
    assert only(tmp_path / "file.bin") == CONTENT
    assert (first.ranges, second.ranges) == (["bytes=0-"], ["bytes=100000-"])


def test_the_next_call_goes_on_where_the_last_was_cut(mirror, tmp_path):
    path, server = tmp_path / "file.bin", mirror(cut)
    with pytest.raises(UserError, match="cut off after 200000 of 300000 bytes"):
        get(path, server)
    assert not path.exists()
    get(path, server)
    assert only(path) == CONTENT
    assert server.ranges == ["bytes=0-", "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize(("answer", "kept"), [(silent, 0), (stalled, 100_000)])
def test_a_silent_mirror_is_left(answer, kept, mirror, tmp_path):
    first, second = mirror(answer), mirror(ranged)
    get(tmp_path / "file.bin", first, second, stall=0.3)
    assert only(tmp_path / "file.bin") == CONTENT
    assert first.ranges[0] == "bytes=0-"
    assert second.ranges[0] == f"bytes={kept}-"


@pytest.mark.parametrize("answer", [silent, bodiless, ranged])
def test_what_is_waited_for_is_said_while_it_is(answer, mirror, tmp_path, capsys):
    first, second = mirror(answer), mirror(ranged)
    get(tmp_path / "file.bin", first, second, stall=60.0 if answer is ranged else 1.0)
    told = "" if answer is ranged else f"{first.url}: sends nothing yet; it is given 1 s\n"
    assert capsys.readouterr().out == told


def test_a_mirror_above_the_least_rate_is_kept(mirror, tmp_path):
    first, second = mirror(trickle), mirror(ranged)
    get(tmp_path / "file.bin", first, second, stall=0.3, slow=1_000)
    assert only(tmp_path / "file.bin") == CONTENT
    assert (first.ranges, second.ranges) == (["bytes=0-"], [])


def test_a_slow_mirror_is_left(mirror, tmp_path):
    first, second = mirror(trickle), mirror(ranged)
    get(tmp_path / "file.bin", first, second, stall=0.3, slow=1_000_000)
    assert only(tmp_path / "file.bin") == CONTENT
    assert first.ranges[0] == "bytes=0-"
    assert 0 < first_byte(second.ranges[0]) < SIZE


def test_when_all_are_slow_a_slow_one_delivers(mirror, tmp_path):
    first, second = mirror(trickle), mirror(silent)
    get(tmp_path / "file.bin", first, second, stall=0.3, slow=1_000_000)
    assert only(tmp_path / "file.bin") == CONTENT
    assert len(first.ranges) == 2
    assert 0 < first_byte(first.ranges[1]) < SIZE


@pytest.mark.parametrize("lie", [other, html, html_chunked, endless])
def test_a_lie_is_not_taken_and_does_not_spoil_the_next_mirror(lie, mirror, tmp_path):
    first, second = mirror(lie), mirror(ranged)
    get(tmp_path / "file.bin", first, second)
    assert only(tmp_path / "file.bin") == CONTENT


@pytest.mark.parametrize("junk", [HTML, OTHER, OTHER + OTHER])
def test_what_an_earlier_call_left_may_be_wrong(junk, mirror, tmp_path):
    """As after a kill between the last byte and the checksum."""
    (tmp_path / "file.bin.part").write_bytes(junk)
    get(tmp_path / "file.bin", mirror(ranged))
    assert only(tmp_path / "file.bin") == CONTENT


@pytest.mark.parametrize("answer", [missing, broken, babbling, None])
def test_an_error_leads_to_the_next_mirror(answer, mirror, tmp_path):
    first, second = mirror(answer) if answer else refused(), mirror(ranged)
    get(tmp_path / "file.bin", first, second)
    assert only(tmp_path / "file.bin") == CONTENT
    assert second.ranges == ["bytes=0-"]


@pytest.mark.parametrize("answer", [missing, broken, babbling, None, other, html, html_chunked, endless, silent])
def test_if_none_delivers_the_error_is_one_line(answer, mirror, tmp_path):
    server = mirror(answer).url if answer else refused()
    path = tmp_path / "file.bin"
    with pytest.raises(UserError) as caught:
        get(path, server, stall=0.3 if answer is silent else 5.0)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ("file.bin", server, "data.root="))
    assert not path.exists()
    assert all(left.stat().st_size <= SIZE for left in tmp_path.iterdir())


@pytest.mark.parametrize("answer", [missing, None, other, endless, silent])
def test_a_mirror_that_had_nothing_is_not_asked_again(answer, mirror, tmp_path, capsys):
    servers = [mirror(answer) if answer else refused() for _ in range(2)]
    with pytest.raises(UserError) as caught:
        get(tmp_path / "file.bin", *servers, stall=0.3 if answer is silent else 5.0)
    assert all((server.url if answer else server) in str(caught.value) for server in servers)
    assert [len(server.ranges) for server in servers if answer] == ([1, 1] if answer else [])
    assert capsys.readouterr().out.count("; trying the next") == (answer in (other, endless))  # else one line is enough


def test_never_more_bytes_than_the_file_has(mirror, tmp_path):
    """Endless content ends at `size`: the connection is closed then and nothing is kept of it."""
    with pytest.raises(UserError, match="other content"):
        get(tmp_path / "file.bin", mirror(endless))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file.bin", "folder/file.bin"])
def test_a_place_that_cannot_be_written_is_a_user_error(below, mirror, tmp_path):
    """The folder's place is taken by a file."""
    (tmp_path / "taken").write_bytes(b"")
    server = mirror(ranged)
    with pytest.raises(UserError, match="taken") as caught:
        get(tmp_path / "taken" / below, server)
    assert "\n" not in str(caught.value)
    assert server.ranges == []


def test_runs_that_begin_together_download_once(mirror, tmp_path, capsys):
    server = mirror(trickle)
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(download, [server.url], tmp_path / "file.bin", MD5, SIZE) for _ in range(3)]
    assert [run.result() for run in started] == 3 * [tmp_path / "file.bin"]
    assert server.ranges == ["bytes=0-"]
    assert capsys.readouterr().out == 2 * "another process downloads; waiting for it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
