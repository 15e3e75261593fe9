"""What can go wrong while CIFAR-10 is fetched: a test for each row, or a case of one, named after it.

fault                               what the user sees                       what is kept
----------------------------------  ---------------------------------------  ------------------------------------
refused, missing, no such host      the next source, in the end its reason   what other sources have sent
a login page instead of the file    the next source, in the end its reason   what other sources have sent
a certificate that is not trusted   the next source, in the end its reason   what other sources have sent
a source that stalls                the next source after 10 s               what it had sent
a source that crawls                the next source after 15 s               what it had sent
all sources crawl                   the fastest continues                    what they had sent
a source that breaks off            the next source                          what it had sent
wrong bytes                         the next source                          what was there before
a file of another size              the next source, in the end its size     what other sources have sent
a part file of something else       a fetch from the start                   nothing of it
a server that cannot go on midway   a fetch from the start                   what was there, until it is overtaken
interrupted or killed               the next call continues                  what had been sent
two processes at once               one fetches, the other waits             one whole copy
a full disk, a read-only folder     one line naming it                       no half file of a final name
a copy on a read-only disk          it is used, hashed once                  that copy
a damaged copy                      one line naming the file                 that copy
members that point outside          nothing of them                          the rest
"""

import contextlib
import errno
import functools
import http.server
import shutil
import ssl
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Breaking
from filelock import FileLock, Timeout

import velasoka

ARCHIVE, PART, FOLDER = "cifar-10-python.tar.gz", "cifar-10-python.tar.gz.part", "cifar-10-batches-py"
SIZE, HALF, GOOD = 140_000, 70_000, 139_900  # bytes of the tiny archive: all, half, and what a part file may hold
MIDWAY = pytest.approx(HALF, abs=HALF - 1)  # any place but the start and the end


@contextlib.contextmanager
def serving(handler, context=None):
    """A server on loopback, with TLS if there is a `context`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True) if context else server.socket
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def archive(batches_folder, tmp_path, monkeypatch):
    """The tiny data set as an archive that passes for the published one, and no folder."""
    folder, path = batches_folder / FOLDER, tmp_path / "served" / ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
        tar.add(folder / "test_batch", arcname=f"{folder.name}/../../outside")
        tar.add(folder / "test_batch", arcname="/tmp/absolute_outside")  # noqa: S108
    path.write_bytes(path.read_bytes().ljust(SIZE, b"\0"))  # gzip allows zeros at the end
    digest = velasoka.datasets.utils.calculate_md5
    monkeypatch.setattr(velasoka, "_ARCHIVE_MD5", digest(path))
    monkeypatch.setattr(velasoka, "_ARCHIVE_SIZE", SIZE)
    for word, names in (("train_list", [f"data_batch_{i}" for i in range(1, 6)]), ("test_list", ["test_batch"])):
        monkeypatch.setattr(velasoka.datasets.CIFAR10, word, [[name, digest(folder / name)] for name in names])
    shutil.rmtree(folder)
    return path


@pytest.fixture
def mirror(archive):
    """A server on loopback that serves the archive, each path with a fault of its own; `asked` is the log of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, self.path = archive.read_bytes(), self.path[1:]
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            asked.append((self.path, start))
            if self.path == "login":
                self.answer(302, Location="/page")
            elif self.path == "page":
                self.answer(200, b"<html>Sign in</html>", **{"Content-Type": "text/html; charset=utf-8"})
            elif self.path == "missing":
                self.answer(404)
            elif start >= SIZE and self.path != "rangeless":
                self.answer(416)
            else:
                start = 0 if self.path == "rangeless" else start
                body = {"wrong": b"?" * SIZE, "longer": content + b"?"}.get(self.path, content)[start:]
                with contextlib.suppress(OSError):  # the other side may hang up
                    self.answer(206 if start else 200, body)

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.path in ("half", "stall"):
                self.wfile.write(body[: max(0, len(body) - HALF)])
                closing.wait(5 if self.path == "stall" else 0)
            elif self.path.startswith("crawl"):
                for chunk in (body[i : i + 1000] for i in range(0, len(body), 1000)):
                    self.wfile.write(chunk)
                    closing.wait(1000 / float(self.path[5:]))
            else:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    asked, closing = [], threading.Event()
    with serving(Handler) as server:
        server.asked = asked
        server.urls = lambda *paths: [f"http://127.0.0.1:{server.server_port}/{path}" for path in paths]
        yield server
        closing.set()


@pytest.fixture
def impatient(monkeypatch):
    """The limits, 10 s of silence and 200 kB/s over 15 s, made small enough for a test."""
    limits = {"timeout": 0.5, "speed": 250_000, "window": 0.3}
    monkeypatch.setattr(velasoka, "_fetch_archive", functools.partial(velasoka._fetch_archive, **limits))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def case(name, mirrors, *starts, then="", before=0, fails=None, kept=0):
    """A row of the table below.

    `starts`: from which byte on each of the `mirrors` is asked, and `then` each of those. `before`: the part file, as
    its content or as a number of bytes of the archive. `fails`: what is said; the part file then has `kept` bytes.
    """
    asked = f"{mirrors} {then}".replace("login", "login page").split()[: len(starts)]  # /login sends on to /page
    asked = [*zip(asked, starts, strict=True)]
    return pytest.param(mirrors.split(), asked, before, fails, kept or before, id=name)


@pytest.mark.parametrize(
    ("mirrors", "asked", "before", "fails", "kept"),
    [
        case("the first source that delivers", "missing whole rangeless", 0, 0),
        case("a source that stalls or breaks off", "stall half whole", 0, HALF, HALF),
        case("all sources break off", "half missing", 0, HALF, fails="broke off", kept=HALF),
        case("a source that crawls", "crawl20000 whole", 0, MIDWAY),
        case("all sources crawl", "crawl20000 crawl200000 missing", 0, MIDWAY, MIDWAY, MIDWAY, then="crawl200000"),
        case("wrong bytes after good ones", "half wrong login whole", 0, HALF, HALF, HALF, HALF),
        case(
            "only wrong bytes", "wrong missing wrong", *[GOOD] * 3, 0, 0, then="wrong wrong", before=GOOD, fails="md5"
        ),
        case("a file of another size", "longer", 0, fails="offers 140,001 bytes, the archive has 140,000"),
        case("a part file of something else", "whole", 100, 0, then="whole", before=b"?" * 100),
        case("a part file that is too long", "whole", 10**6, 0, then="whole", before=b"?" * 10**6),
        case("a part file that is whole", "whole", before=SIZE),
        case("a server that cannot go on midway", "rangeless", GOOD, before=GOOD),
    ],
)
def test_mirrors_are_asked_in_turn_and_what_they_have_sent_is_kept(
    mirrors, asked, before, fails, kept, mirror, archive, tmp_path, capsys, request
):
    root, whole, start = tmp_path / "new", archive.read_bytes(), time.perf_counter()
    root.mkdir()
    if before:
        (root / PART).write_bytes(whole[:before] if isinstance(before, int) else before)
    if mirrors[0] in ("stall", "crawl20000"):
        request.getfixturevalue("impatient")
    with pytest.raises(ConnectionError, match=fails) if fails else contextlib.nullcontext():
        assert len(names_in(velasoka.download_cifar10(root, mirrors=mirror.urls(*mirrors)))) == 6
    assert mirror.asked == asked
    starts = [start for _, start in mirror.asked]
    assert mirrors[0] != "crawl20000" or starts == sorted(starts)
    assert "127.0.0.1" in capsys.readouterr().out or fails or not asked  # the bar names the source
    left = ({PART: whole[:kept]} if kept else {}) if fails else {ARCHIVE: whole, FOLDER: None}
    assert {path.name: None if path.is_dir() else path.read_bytes() for path in root.iterdir()} == left  # no .lock
    assert time.perf_counter() - start < 4  # a source that stalls would hang up after 5 s


def test_the_limits_are_ten_seconds_of_silence_and_200_kb_a_second_over_fifteen():
    assert velasoka._fetch_archive.__kwdefaults__ == {"timeout": 10, "speed": 200_000, "window": 15}


def test_refused_missing_a_login_page_and_wrong_bytes_are_named_with_the_way_out(mirror, tmp_path):
    urls = [*mirror.urls("missing", "login", "wrong"), "http://127.0.0.1:1/refused", "no-url"]
    with pytest.raises(ConnectionError) as error:
        velasoka.download_cifar10(tmp_path / "new", mirrors=urls)
    first, *reasons, way_out = str(error.value).splitlines()
    assert ARCHIVE in first
    for url, reason, says in zip(urls, reasons, ("404", "web page", "md5", "refused", "unknown url"), strict=True):
        assert url in reason.split()[0]
        assert says in reason.partition(url)[2]
    assert "/page" in reasons[1]
    assert f"{ARCHIVE} by hand and put it into {tmp_path / 'new'}" in way_out
    assert names_in(tmp_path / "new") == []


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWBjDHHOQ6rbF2w8O
piUcnBfVjTPgg0hcXPeZyzdroJihRANCAAS/GGbVdybcKXapcgu1F1dxkKPQn0zq
xrj8qamhl66ajeJLsk+ghdE5bgIKAHv9oHrIz1uO4m8Uz5IukqNumobR
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUE4g8gcUIdzV88geGL8DXYrn5A0EwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyMjIzNDQyNVoYDzIxMjYxMDI5
MjM0NDI1WjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAS/GGbVdybcKXapcgu1F1dxkKPQn0zqxrj8qamhl66ajeJLsk+ghdE5
bgIKAHv9oHrIz1uO4m8Uz5IukqNumobRo2QwYjAdBgNVHQ4EFgQU7wiAgn3A2hoP
sbcCjz51JSy3W7UwHwYDVR0jBBgwFoAU7wiAgn3A2hoPsbcCjz51JSy3W7UwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IEAn9iltbibP1ty2eE4Bdydv/3Wd7G4ky17s5qmH5azTAiEAxDQaAHueZEK6qAG6
XrJnBFEyFPy6y4KZLTAsqc34ZjE=
-----END CERTIFICATE-----
"""  # self-signed, for 127.0.0.1, and its key: of no use elsewhere


def test_a_certificate_that_is_not_trusted_is_refused(archive, tmp_path):
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with serving(http.server.SimpleHTTPRequestHandler, context) as server:
        url = f"https://127.0.0.1:{server.server_port}/served/{ARCHIVE}"
        with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            velasoka.download_cifar10(tmp_path / "new", mirrors=[url])


def test_interrupted_or_killed_it_leaves_no_lock_and_the_next_call_goes_on(mirror, tmp_path, monkeypatch):
    root, urlopen = tmp_path / "new", velasoka.urllib.request.urlopen

    def interrupted(*args, **options):
        with pytest.raises(Timeout):  # no other process may fetch into the folder now
            FileLock(root / ".lock", timeout=0).acquire()
        reply = urlopen(*args, **options)
        chunks = iter(Breaking([reply.read1(1000), b""], KeyboardInterrupt(), at=1))
        reply.read1 = lambda size: next(chunks)
        return reply

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(velasoka.urllib.request, "urlopen", interrupted)
        velasoka.download_cifar10(root, mirrors=mirror.urls("whole"))
    assert names_in(root) == [PART]
    received = (root / PART).stat().st_size
    (root / f".{FOLDER}.part").mkdir()  # what a process killed while unpacking leaves
    folder = velasoka.download_cifar10(root, mirrors=mirror.urls("whole"))
    assert mirror.asked == [("whole", 0), ("whole", received)]
    assert received > 0
    assert names_in(folder) == sorted([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
    assert names_in(root) == [FOLDER, ARCHIVE]


def test_of_two_at_once_one_fetches_and_both_end_well(mirror, tmp_path):
    with ThreadPoolExecutor() as pool:
        urls = mirror.urls("crawl200000")
        found = list(pool.map(lambda _: velasoka.download_cifar10(tmp_path, mirrors=urls), range(2)))
    assert found == [tmp_path / FOLDER] * 2
    assert mirror.asked == [("crawl200000", 0)]


@pytest.mark.parametrize("broken", ["open", "mkdir", "write_bytes"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_or_a_read_only_folder_is_one_line(broken, number, mirror, tmp_path, monkeypatch):
    root, call = tmp_path / "new", getattr(Path, broken)

    def fail(path, *arguments, **options):
        if path.name == ".lock" or path.parent.name == "served":
            return call(path, *arguments, **options)
        raise OSError(number, {errno.ENOSPC: "No space left", errno.EROFS: "Read-only"}[number], str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left|Read-only") as error:
        patch.setattr(Path, broken, fail)
        velasoka.download_cifar10(root, mirrors=mirror.urls("whole", "rangeless"))
    assert type(error.value) is OSError
    assert str(error.value).startswith(f"{root}: cannot be written")
    assert "\n" not in str(error.value)
    assert not (root / FOLDER).exists()
    assert len(mirror.asked) <= 1
    velasoka.download_cifar10(root, mirrors=mirror.urls("whole"))
    assert names_in(root) == [FOLDER, ARCHIVE]


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files whose md5 is computed, in order."""
    names, check = [], velasoka.check_integrity
    hashing = lambda path, md5: (path.exists() and names.append(path.name)) or check(path, md5)  # noqa: E731
    monkeypatch.setattr(velasoka, "check_integrity", hashing)
    return names


def test_a_copy_on_a_read_only_disk_is_used_and_hashed_once(archive, hashed, tmp_path, monkeypatch):
    monkeypatch.setattr(velasoka.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(velasoka.os, "access", lambda *_: False)
    folder = velasoka.download_cifar10(archive.parent, mirrors=[])
    assert hashed == [ARCHIVE]
    assert names_in(archive.parent) == [ARCHIVE]
    assert len(velasoka.get_cifar10_dataset(root=archive.parent, download=False)[0]) == 20
    hashed.clear()
    for write in ("mkdir", "open", "write_bytes"):
        monkeypatch.setattr(Path, write, None)
    assert velasoka.download_cifar10(folder.parent, mirrors=[]) == folder
    assert sorted(hashed) == names_in(folder)


def test_what_was_fetched_is_hashed_once(mirror, hashed, tmp_path):
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("whole"))
    assert hashed == [PART]


def test_an_archive_in_the_folder_is_used_without_a_network(archive):
    train, _ = velasoka.get_cifar10_dataset(root=archive.parent, download=False)
    assert len(train) == 20


def test_without_download_a_damaged_archive_is_named_and_nothing_is_fetched(monkeypatch, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"damaged")
    monkeypatch.delattr(velasoka.urllib.request, "urlopen")
    with pytest.raises(ConnectionError, match=r"cifar-10-python\.tar\.gz is missing or damaged"):
        velasoka.get_cifar10_dataset(root=tmp_path, download=False)


def test_a_damaged_folder_is_named_and_not_taken_for_the_published_one(batches_folder):
    with pytest.raises(ValueError, match="data_batch_1 is missing or damaged"):
        velasoka.download_cifar10(batches_folder, mirrors=[])


def test_members_that_point_outside_the_folder_are_refused(archive, tmp_path):
    velasoka.download_cifar10(archive.parent, mirrors=[])
    assert not list(tmp_path.glob("**/*outside"))
    assert not Path("/tmp/absolute_outside").exists()  # noqa: S108


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_is_no_obstacle(error, archive, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(velasoka.FileLock, "acquire", refuse)
    assert len(names_in(velasoka.download_cifar10(archive.parent, mirrors=[]))) == 6
