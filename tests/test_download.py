"""The published files, and what can go wrong while they are fetched: a test for each row.

fault                              what the user sees                        what is kept
---------------------------------  ----------------------------------------  --------------------
refused, missing, no such host     the next source, in the end its reason    nothing
no network at all                  "no network?" once, then the sources      nothing
a source that stalls               the next source after 10 s                nothing
a source that crawls               the next source after 15 s                nothing
all sources crawl                  the first of them once more, to its end   the data set
a source that breaks off           the next source, in the end its reason    nothing
wrong bytes: a login page, say     the next source, in the end its reason    nothing
interrupted                        the interrupt                             nothing
two processes at once              both end well                             one data set
a full disk, a wrong folder        its error, no other source is tried       nothing
a damaged folder or archive        one line naming it                        what was there
"""

import contextlib
import errno
import http.server
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
from conftest import random_images

import velasoka

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
SIZE = 140_000  # bytes of the tiny archive


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny `cifar-10-batches-py` of 5 × 4 and 6 images, which passes for the published one."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    names = {f"data_batch_{index}": 4 for index in range(1, 6)} | {"test_batch": 6}
    for index, (name, number) in enumerate(names.items()):
        pixels = random_images(number, seed=index).transpose(0, 3, 1, 2).reshape(-1, 3072)
        batch = {"data": pixels, "labels": [(index + i) % 10 for i in range(number)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": list(velasoka.CIFAR10_CLASSES)}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    cifar10 = velasoka.datasets.CIFAR10
    md5_of = {path.name: velasoka.datasets.utils.calculate_md5(path) for path in folder.iterdir()}
    for name in ("train_list", "test_list"):
        listed = [[file, md5_of[file]] for file, _ in getattr(cifar10, name)]
        monkeypatch.setattr(cifar10, name, listed)
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": md5_of["batches.meta"]})
    return folder


@pytest.fixture
def archive(published, tmp_path, monkeypatch):
    """The same as an archive, in a folder of its own."""
    path = tmp_path / "served" / ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(published, arcname=FOLDER)
    path.write_bytes(path.read_bytes().ljust(SIZE, b"\0"))  # gzip allows zeros at the end
    monkeypatch.setattr(velasoka, "_ARCHIVE_MD5", velasoka.datasets.utils.calculate_md5(path))
    monkeypatch.setattr(velasoka, "_ARCHIVE_SIZE", SIZE)
    shutil.rmtree(published)
    return path


@pytest.fixture
def mirror(archive):
    """A server on loopback, each path with a fault of its own; `asked` lists the paths."""
    whole = archive.read_bytes()
    closing = threading.Event()
    contents = {"wrong": b"?" * SIZE, "longer": whole + b"?" * 100_000}
    contents |= {"half": whole[: SIZE // 2], "stall": whole[: SIZE // 2]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            self.server.asked.append(name)
            self.send_response(404 if name == "missing" else 200)
            self.end_headers()
            content = contents.get(name, whole)
            with contextlib.suppress(OSError):  # the other side may hang up
                for start in range(0, len(content), 2000):
                    self.wfile.write(content[start : start + 2000])
                    closing.wait(0.01 if name == "crawl" else 0)  # at 200 kB/s
                closing.wait(5 if name == "stall" else 0)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.asked = []
        address = f"http://127.0.0.1:{server.server_port}"
        server.urls = lambda *names: [f"{address}/{name}" for name in names]
        yield server
        closing.set()
        server.shutdown()


@pytest.fixture
def impatient(monkeypatch):
    """The limits, 10 s of silence and 200 kB/s over 15 s, made small enough for a test."""
    assert (velasoka._STALL, velasoka._LEAST_SPEED, velasoka._SPEED_WINDOW) == (10, 200_000, 15)
    monkeypatch.setattr(velasoka, "_STALL", 0.3)
    monkeypatch.setattr(velasoka, "_LEAST_SPEED", 1_000_000)
    monkeypatch.setattr(velasoka, "_SPEED_WINDOW", 0.2)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("mirrors", "asked"),
    [
        ("missing whole wrong", "missing whole"),
        ("half wrong longer whole", "half wrong longer whole"),
        ("stall crawl whole", "stall crawl whole"),
        ("crawl missing", "crawl missing crawl"),
    ],
)
def test_the_first_source_that_delivers_is_taken(mirrors, asked, mirror, impatient, tmp_path):
    root = tmp_path / "new" / "data"
    folder = velasoka.download_cifar10(str(root), mirrors=mirror.urls(*mirrors.split()))
    assert mirror.asked == asked.split()
    assert folder == root / FOLDER
    assert names_in(root) == [FOLDER]
    assert len(names_in(folder)) == 7


def test_if_all_fail_each_is_named_with_its_reason_and_the_way_out(mirror, impatient, tmp_path):
    said = {
        "missing": "404",
        "wrong": "not the published file",
        "longer": "not the published file",
        "half": "70,000 bytes of 140,000",
        "stall": "timed out",
    }
    urls = [*mirror.urls(*said), "http://127.0.0.1:1/refused"]
    with pytest.raises(ConnectionError) as error:
        velasoka.download_cifar10(tmp_path / "new", mirrors=urls)
    _, *reasons, way_out = str(error.value).splitlines()
    for url, reason, words in zip(urls, reasons, [*said.values(), "refused"], strict=True):
        assert url in reason
        assert words in reason.replace(url, "")
    assert ARCHIVE in way_out
    assert str(tmp_path / "new") in way_out
    assert names_in(tmp_path / "new") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupt_or_a_full_disk_leaves_nothing_and_is_no_fault_of_a_source(
    error, mirror, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tarfile.TarFile, "extractall", fail)
    with pytest.raises(type(error)) as raised:
        velasoka.download_cifar10(tmp_path / "new", mirrors=mirror.urls("whole", "whole"))
    assert raised.value is error
    assert mirror.asked == ["whole"]
    assert names_in(tmp_path / "new") == []


def test_a_second_process_that_is_faster_does_no_harm(mirror, tmp_path, monkeypatch):
    urls = mirror.urls("whole")
    urlopen = velasoka.urllib.request.urlopen

    def overtaken(*args, **options):
        monkeypatch.setattr(velasoka.urllib.request, "urlopen", urlopen)
        velasoka.download_cifar10(tmp_path / "new", mirrors=urls)
        return urlopen(*args, **options)

    monkeypatch.setattr(velasoka.urllib.request, "urlopen", overtaken)
    assert len(names_in(velasoka.download_cifar10(tmp_path / "new", mirrors=urls))) == 7
    assert names_in(tmp_path / "new") == [FOLDER]
    assert mirror.asked == ["whole", "whole"]


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_fetched(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        velasoka.download_cifar10(tmp_path / "file" / "data", mirrors=mirror.urls("whole"))
    assert not isinstance(error.value, ConnectionError)
    assert mirror.asked == []


@pytest.mark.parametrize("inside", ["", FOLDER])
def test_cifar_10_batches_py_is_read_in_its_folder_or_as_the_root_itself(inside, published):
    train, test = velasoka.get_cifar10_dataset(root=published.parent / inside, download=False)
    assert velasoka.download_cifar10(published.parent, mirrors=[]) == published
    assert np.array_equal(train.data[4:8], random_images(4, seed=1))
    assert train.data.flags["C_CONTIGUOUS"]
    assert train.targets[4:8] == [1, 2, 3, 4]
    assert np.array_equal(test.data, random_images(6, seed=5))
    assert tuple(train.classes) == velasoka.CIFAR10_CLASSES


def test_an_archive_that_is_there_is_verified_unpacked_and_kept(archive):
    train, _ = velasoka.get_cifar10_dataset(root=archive.parent, download=False)
    assert len(train) == 20
    assert names_in(archive.parent) == [FOLDER, ARCHIVE]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_folder_is_named_and_stays_as_it_is(name, published):
    (published / name).write_bytes(b"torn")
    before = names_in(published)
    with pytest.raises(ValueError, match=f"{FOLDER}: incomplete or damaged") as error:
        velasoka.get_cifar10_dataset(root=published.parent)
    assert "\n" not in str(error.value)
    assert names_in(published) == before


def test_a_damaged_archive_is_named_and_stays_as_it_is(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{ARCHIVE}: damaged"):
        velasoka.get_cifar10_dataset(root=tmp_path, download=False)
    assert names_in(tmp_path) == [ARCHIVE]
