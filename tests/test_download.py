"""What can go wrong while CIFAR-10 is fetched: a test for each row, named after it.

fault                               what the user sees                       what is kept
----------------------------------  ---------------------------------------  ------------------------------------
refused, missing, no such host      the next source, in the end its reason   what other sources have sent
a login page instead of the file    the next source, in the end its reason   what other sources have sent
a certificate nobody vouches for    the next source, in the end its reason   what other sources have sent
a source that stalls                the next source after 10 s               what it had sent
a source that crawls                the next source after 15 s               what it had sent
all sources crawl                   the fastest goes on                      what they had sent
a source that breaks off            the next source                          what it had sent
wrong bytes                         the next source                          what was there before
a part file of something else       a fetch from the start                   nothing of it
a server that cannot go on midway   a fetch from the start                   what was there, until it is overtaken
interrupted or killed               the next call goes on                    what had been sent
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
from pathlib import Path

import pytest

import velasoka

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"


@pytest.fixture
def archive(batches_folder, tmp_path, monkeypatch):
    """The tiny data set as an archive that passes for the published one, and no folder."""
    folder, path = batches_folder / FOLDER, tmp_path / "served" / ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
        tar.add(folder / "test_batch", arcname=f"{folder.name}/../../outside")
        tar.add(folder / "test_batch", arcname="/tmp/absolute_outside")  # noqa: S108
    digest = velasoka.datasets.utils.calculate_md5
    monkeypatch.setattr(velasoka, "_ARCHIVE_MD5", digest(path))
    monkeypatch.setattr(velasoka, "_ARCHIVE_SIZE", path.stat().st_size)
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
            elif start >= len(content) and self.path != "rangeless":
                self.answer(416)
            else:
                start = 0 if self.path == "rangeless" else start
                body = content[start:] if self.path != "wrong" else bytes(len(content) - start)
                with contextlib.suppress(OSError):  # the other side may hang up
                    self.answer(206 if start else 200, body)

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.path in ("half", "stall"):
                self.wfile.write(body[: max(0, len(body) - archive.stat().st_size // 2)])
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
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.address = asked, f"http://127.0.0.1:{server.server_port}/"
    server.urls = lambda *paths: [server.address + path for path in paths]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """The limits, 10 s of silence and 200 kB/s over 15 s, made small enough for a test."""
    limits = {"timeout": 0.3, "speed": 1_000_000, "window": 0.1}
    monkeypatch.setattr(velasoka, "_fetch_archive", functools.partial(velasoka._fetch_archive, **limits))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_takes_the_first_source_that_delivers(mirror, tmp_path):
    folder = velasoka.download_cifar10(tmp_path / "new", mirrors=mirror.urls("missing", "whole", "rangeless"))
    assert len(names_in(folder)) == 6
    assert names_in(folder.parent) == [FOLDER, ARCHIVE]
    assert mirror.asked == [("missing", 0), ("whole", 0)]


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


def test_a_certificate_nobody_vouches_for_is_refused(archive, tmp_path):
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        velasoka.download_cifar10(
            tmp_path / "new", mirrors=[f"https://127.0.0.1:{server.server_port}/served/{ARCHIVE}"]
        )
    server.shutdown()
    server.server_close()


def test_a_source_that_stalls_or_breaks_off_is_left_and_the_next_goes_on(impatient, mirror, archive, tmp_path):
    half, start = archive.stat().st_size - archive.stat().st_size // 2, time.perf_counter()
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("stall", "half", "whole"))
    assert time.perf_counter() - start < 4  # the stalled source would hang up after 5 s
    assert mirror.asked == [("stall", 0), ("half", half), ("whole", half)]


def test_a_source_that_crawls_is_left_while_there_is_another(impatient, mirror, tmp_path):
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("crawl50000", "whole"))
    (_, start), (last, resumed) = mirror.asked
    assert (start, last) == (0, "whole")
    assert resumed > 0


def test_when_all_crawl_the_fastest_is_taken_up_again(impatient, mirror, tmp_path, capsys):
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("crawl50000", "crawl200000", "missing"))
    assert [path for path, _ in mirror.asked] == ["crawl50000", "crawl200000", "missing", "crawl200000"]
    assert [start for _, start in mirror.asked] == sorted(start for _, start in mirror.asked)
    assert "127.0.0.1" in capsys.readouterr().out  # the bar names the source
    assert (tmp_path / FOLDER).is_dir()


def test_the_limits_are_ten_seconds_of_silence_and_200_kb_a_second_over_fifteen():
    assert velasoka._fetch_archive.__kwdefaults__ == {"timeout": 10, "speed": 200_000, "window": 15}


def test_the_next_call_goes_on_where_the_last_one_was_interrupted(mirror, archive, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    half = archive.stat().st_size - archive.stat().st_size // 2
    with pytest.raises(ConnectionError, match="broke off"):
        velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("half"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(velasoka, "check_integrity", interrupted)
        velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("whole"))
    (tmp_path / f".{FOLDER}.part").mkdir()  # what a process killed while unpacking leaves
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("whole"))
    assert mirror.asked[1:] in ([("whole", half)], [("whole", half), ("whole", half)])
    assert names_in(tmp_path / FOLDER) == sorted([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])


def test_wrong_bytes_do_not_spoil_what_was_there_before(mirror, archive, tmp_path):
    half = archive.stat().st_size - archive.stat().st_size // 2
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("half", "wrong", "login", "whole"))
    assert mirror.asked == [("half", 0), ("wrong", half), ("login", half), ("page", half), ("whole", half)]


def test_nothing_good_is_lost_where_all_that_is_left_sends_wrong_bytes(mirror, archive, tmp_path):
    part, good = tmp_path / f"{ARCHIVE}.part", archive.read_bytes()[:-100]
    part.write_bytes(good)
    with pytest.raises(ConnectionError, match="md5"):
        velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("wrong", "missing", "wrong"))
    assert part.read_bytes() == good
    assert [start for _, start in mirror.asked] == [len(good)] * 3 + [0, 0]
    assert names_in(tmp_path) == [f"{ARCHIVE}.part", "served"]


def test_a_file_of_another_size_is_not_begun(mirror, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(velasoka, "_ARCHIVE_SIZE", archive.stat().st_size + 1)
    with pytest.raises(ConnectionError, match=f"offers {archive.stat().st_size:,} bytes, the archive has "):
        velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("whole"))


@pytest.mark.parametrize("content", [b"?" * 100, b"?" * 10**6, None])
def test_a_part_that_is_wrong_or_whole_does_not_stand_in_the_way(content, mirror, archive, tmp_path):
    part = tmp_path / f"{ARCHIVE}.part"
    part.write_bytes(archive.read_bytes() if content is None else content)
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("whole"))
    assert [start for _, start in mirror.asked] == ([] if content is None else [len(content), 0])
    assert names_in(tmp_path / FOLDER)
    assert not part.exists()


def test_a_server_that_cannot_go_on_midway_sends_all_and_nothing_is_lost(mirror, archive, tmp_path):
    part, content = tmp_path / f"{ARCHIVE}.part", archive.read_bytes()
    part.write_bytes(content[:-10])
    velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("rangeless"))
    assert (tmp_path / ARCHIVE).read_bytes() == content
    assert mirror.asked == [("rangeless", len(content) - 10)]


def test_of_two_at_once_one_fetches_and_both_end_well(mirror, tmp_path):
    found = []
    both = [
        threading.Thread(
            target=lambda: found.append(velasoka.download_cifar10(tmp_path, mirrors=mirror.urls("crawl200000")))
        )
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
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
    monkeypatch.setattr(velasoka, "check_integrity", lambda path, md5: names.append(path.name) or check(path, md5))
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
    assert hashed == [f"{ARCHIVE}.part"]


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
