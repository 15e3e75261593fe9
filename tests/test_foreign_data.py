"""Data sets, loaders and losses that users bring: used as they are meant, or refused in one line."""

import itertools
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET, linear_model, random_batches, random_images, save_images, train, weights_of
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, default_collate
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.transforms import v2

import velasoka

# --- What a data set does to its images and labels ---

NORM, FLOAT = velasoka.to_normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)), torch.float32
TENSOR = v1.Compose([v1.ToTensor(), NORM])


class Pictures(datasets.CIFAR10):
    """Eight random pictures, given out as torchvision's `CIFAR10` gives them."""

    def __init__(self, transform=TENSOR, target_transform=None, length=8):
        datasets.VisionDataset.__init__(self, "data", transform=transform, target_transform=target_transform)
        self.train, self.classes, self.length = True, list(velasoka.CIFAR10_CLASSES), length
        self.data, self.targets = random_images(8), [3, 1, 4, 1, 5, 9, 2, 6]

    def __len__(self):
        return self.length


def through(*steps):
    return lambda: Pictures(v1.Compose(steps))


def changed(change):
    """Pictures with a `__getitem__` of their own, which changes what torchvision's gives."""
    get = lambda self, index: change(index, *Pictures.__getitem__(self, index))  # noqa: E731
    return lambda: type("Changed", (Pictures,), {"__getitem__": get})()


def subset(*arguments):
    return lambda: Subset(Pictures(), *arguments)


class Mirrored(Subset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.flip(-1), label

    def __getitems__(self, indices):
        return [self[index] for index in indices]


APPLIED = {  # the loader gives what the data set gives
    "ToTensor": through(v1.ToTensor()),
    "no transform": lambda: Pictures(None),
    "Normalize": Pictures,
    "Normalize in Sequential": through(v1.ToTensor(), nn.Sequential(NORM)),
    "Normalize deep inside": through(v1.Compose([v1.ToTensor()]), nn.Sequential(nn.Sequential(v2.Compose([NORM])))),
    "one number for three channels": through(v1.ToTensor(), v1.Normalize([0.5], [0.25])),
    "v2": lambda: Pictures(v2.Compose([v2.ToImage(), v2.ToDtype(FLOAT, scale=True), v2.Normalize([0.5], [0.25])])),
    "v2 in Sequential": through(v2.ToImage(), nn.Sequential(v2.ToDtype(FLOAT, scale=True), NORM)),
    "PILToTensor": through(v1.PILToTensor(), v1.ConvertImageDtype(FLOAT), NORM),
    "v2.PILToTensor": through(v2.PILToTensor(), v2.ConvertImageDtype(FLOAT), NORM),
    "the same items in its own way": changed(lambda index, image, label: (image, label)),
    "Subset with a tuple": subset(tuple(range(3, 7))),
    "Subset with a range": subset(range(6, 1, -2)),
    "Subset with an array": subset(np.array([3, 0])),
    "Subset with a tensor": subset(torch.tensor([3, 0])),
    "Subset with NumPy's numbers": subset(list(np.array([3, 0]))),
}
REFUSED = {
    "target_transform": lambda: Pictures(target_transform=lambda label: 9 - label),
    "random flip": through(v1.RandomHorizontalFlip(), TENSOR),
    "random flip of v2": through(TENSOR, v2.RandomHorizontalFlip()),
    "random erasing": through(TENSOR, v1.RandomErasing()),
    "Normalize at random": through(v1.ToTensor(), v1.RandomApply([NORM])),
    "grey": through(v1.Grayscale(3), TENSOR),
    "another size": through(v1.Resize(16), TENSOR),
    "blur in Sequential": through(v1.ToTensor(), nn.Sequential(v1.GaussianBlur(3), NORM)),
    "Lambda": through(TENSOR, v1.Lambda(lambda image: 1 - image)),
    "Lambda of v2": through(TENSOR, v2.Lambda(lambda image: 1 - image)),
    "a function": through(v1.ToTensor(), lambda image: image**2, NORM),
    "a function alone": lambda: Pictures(lambda image: 1 - v1.functional.to_tensor(image)),
    "a second Normalize": through(TENSOR, NORM),
    "a second Normalize in Sequential": through(v1.ToTensor(), nn.Sequential(NORM, NORM)),
    "other labels": changed(lambda index, image, label: (image, 9 - label)),
    "one other label": changed(lambda index, image, label: (image, label + (index == 7))),
    "one other image": changed(lambda index, image, label: (image + 0.5 * (index == 7), label)),
    "three parts": changed(lambda index, image, label: (image, label, index)),
    "dicts": changed(lambda index, image, label: {"image": image, "label": label}),
    "a Subset that changes": lambda: Mirrored(Pictures(), range(4)),
    "a Subset of what changes": lambda: Subset(REFUSED["other labels"](), range(4)),
    "a ConcatDataset with one that changes": lambda: ConcatDataset([Pictures(), REFUSED["other labels"]()]),
}
EITHER = {
    "ConcatDataset": lambda: ConcatDataset([Pictures(), Pictures(v1.ToTensor())]),
    "Subset of a ConcatDataset": lambda: Subset(ConcatDataset([Pictures(), Pictures()]), (12, 3)),
    "ImageFolder": lambda: (
        save_images(Path("train"), random_images(2), [0, 1]) or datasets.ImageFolder("train", TENSOR)
    ),
    "pixels to 255": through(v2.ToImage(), v2.ToDtype(FLOAT)),
    "a function of torchvision": lambda: Pictures(v1.functional.to_tensor),
    "labels as tensors": changed(lambda index, image, label: (image, torch.tensor(label))),
    "shorter than its data": lambda: Pictures(length=4),
}
KINDS = APPLIED | REFUSED | EITHER


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_data_set_does_is_applied_or_refused_in_one_line(kind):
    dataset, other, refused = KINDS[kind](), Pictures(), []
    for pair in ((dataset, other), (other, dataset)):
        try:
            loader = velasoka.get_cifar10_data_loader(pair, 3, device="cpu", augment=False)[1]
        except (TypeError, ValueError) as error:
            refused.append(error)
    if refused:
        assert kind not in APPLIED
        assert len(refused) == 2
        assert all("DataLoader" in str(error) and "\n" not in str(error) for error in refused)
        return
    assert kind not in REFUSED
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    items = [dataset[index] for index in range(len(dataset))]
    items = [(v1.functional.to_tensor(x) if isinstance(x, Image.Image) else torch.Tensor(x), int(y)) for x, y in items]
    torch.testing.assert_close(images, torch.stack([image for image, _ in items]))
    assert labels.tolist() == [label for _, label in items]


def test_tools_and_loops_of_others_find_in_a_loader_what_they_expect(pictures, device):
    loader, _ = velasoka.get_cifar10_data_loader(pictures, 32, device=device)
    model = velasoka.SimpleModel(fm_size=2).to(device)
    torch.optim.swa_utils.update_bn(loader, model)
    assert model.c1[1].running_mean.any()
    assert sum(len(labels) for _, labels in loader) == len(loader.dataset)
    parts = {name: getattr(loader, name) for name in ("sampler", "collate_fn", "num_workers", "pin_memory")}
    images = [images.cpu() for images, _ in DataLoader(loader.dataset, 48, drop_last=True, **parts)]
    assert [len(batch) for batch in images] == [48] * 4
    known = {image.numpy().tobytes() for image, _ in pictures[0]}
    assert sum(image.contiguous().numpy().tobytes() in known for image in torch.cat(images)) < 48  # augmented


# --- Soft labels ---


def start(loaders, epochs=1, **options):
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss_fn = velasoka.get_ce_loss()
    return velasoka.start_cnn(model, optimizer, loss_fn, loaders, "cpu", epochs, **QUIET, **options), weights_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_that_are_sure_train_and_test_as_labels_do(dtype):
    hard = random_batches()
    soft = [(images, F.one_hot(labels, 10).to(dtype)) for images, labels in hard]
    (one, weights), (other, other_weights) = (start((batches, batches), 2) for batches in (hard, soft))
    for result, expected in zip(other.train + other.test, one.train + one.test, strict=True):
        assert (result.correct, result.total) == (expected.correct, expected.total)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)


def test_accuracy_on_soft_labels_counts_the_most_likely_class():
    model, (images, _) = linear_model(), random_batches((6,))[0]
    logits = model(images).detach()
    probabilities = torch.cat([logits[:4], -logits[4:]]).softmax(1)  # four right, two wrong
    result = velasoka.test_cnn(model, [(images, probabilities)], "cpu", **QUIET)
    assert (result.correct, result.total) == (4, 6)
    assert result.loss == pytest.approx(F.cross_entropy(logits, probabilities).item(), rel=0.02)
    _, labels = velasoka.predict(model, [(images, probabilities)], "cpu")
    assert labels.dtype is torch.int64
    assert torch.equal(labels, probabilities.argmax(1))


@pytest.mark.parametrize("mix", [v2.CutMix(num_classes=10), v2.MixUp(num_classes=10)], ids=["CutMix", "MixUp"])
def test_a_collate_fn_that_mixes_images_trains(mix, pictures, model):
    collate = lambda items: mix(*default_collate(items))  # noqa: E731
    loader = DataLoader(pictures[0], 50, shuffle=True, collate_fn=collate)
    history = train(model, (loader, DataLoader(pictures[1], 70)), "cpu", 2)
    assert history.train[1].loss < history.train[0].loss
    assert [result.total for result in history.train + history.test] == [200, 200, 70, 70]


@pytest.mark.parametrize("classes", [9, 11])
def test_soft_labels_of_another_number_of_classes_than_the_model_has_are_refused(classes):
    batch = random_batches((4,))[0][0], torch.full((4, classes), 1 / classes)
    with pytest.raises(ValueError, match=rf"{classes} classes") as error:
        velasoka.test_cnn(linear_model(), [batch], "cpu", **QUIET)
    assert "\n" not in str(error.value)


# --- Loaders without an end, or with a wrong length ---

BATCH = random_batches((2,))[0]


def endless():
    """As good as endless: whoever asks for so many batches, or for so long, would not have stopped."""
    began = time.monotonic()
    yield from itertools.takewhile(lambda _: time.monotonic() < began + 10, itertools.repeat(BATCH, 2_000_000))
    pytest.fail("it was not seen that there is no end")


class Again:
    """Batches that `make` makes anew in every epoch."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


class Says(Again):
    """Such batches, said to be `length` of them."""

    def __init__(self, length, make):
        super().__init__(make)
        self.length = length

    def __len__(self):
        return self.length


class Stream(Again, IterableDataset):
    """A data set without an end."""


ENDLESS = {
    "a generator": endless,
    "an iterator": lambda: map(tuple, endless()),
    "an iterable": lambda: Again(endless),
    "a DataLoader": lambda: DataLoader(Stream(endless), batch_size=None),
}


@pytest.mark.parametrize("place", [0, 1], ids=["train", "test"])
@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
def test_a_loader_without_an_end_is_refused(make, place):
    loaders = [[BATCH], [BATCH]]
    loaders[place] = make()
    with pytest.raises(ValueError, match=r"\bend") as error:
        start(loaders)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [0, 1], ids=["train", "test"])
@pytest.mark.parametrize(("said", "come"), [(4, 6), (4, 8), (6, 4)])
def test_a_loader_of_another_length_than_it_says_is_warned_of(said, come, place):
    loaders = [[BATCH], [BATCH]]
    loaders[place] = Says(said, lambda: [BATCH] * come)
    with pytest.warns(UserWarning, match=rf"(?=.*\b{said}\b)(?=.*\b{come}\b)"):
        history, _ = start(loaders)
    assert (history.train, history.test)[place][0].total == 2 * come


@pytest.mark.parametrize("make", [lambda: [BATCH] * 9, endless], ids=["9", "endless"])
def test_a_loader_of_more_than_twice_the_length_it_says_is_refused(make):
    with pytest.raises(ValueError, match=r"\b4\b"):
        start((Says(4, make), [BATCH]))


def test_a_loader_of_the_length_it_says_or_of_none_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in (lambda: Says(4, lambda: [BATCH] * 4), lambda: Again(lambda: [BATCH] * 4), lambda: iter([BATCH])):
            start((make(), make()), 2)


# --- A loss that is a sum ---


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss, lambda **how: nn.CrossEntropyLoss(label_smoothing=0.1, **how), nn.MultiMarginLoss]
)
def test_a_loss_that_is_a_sum_is_reported_as_the_mean_per_image_and_trains_as_a_sum(loss):
    for rates, sizes in (((0.0, 0.0), (4, 4, 2)), ((4e-3, 1e-3), (4, 4, 4))):  # batches of four: a rate four times that
        found = []
        for lr, reduction in zip(rates, ("mean", "sum"), strict=True):
            model, loss_fn = linear_model(), loss(reduction=reduction)
            optimizer = torch.optim.SGD(model.parameters(), lr)
            result = velasoka.train_cnn(model, random_batches(sizes), loss_fn, optimizer, "cpu", **QUIET)
            found.append((torch.tensor(result.loss), weights_of(model)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --- Files and paths ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_png_of_16_bits_is_refused_by_name(split, image_folders):
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(image_folders / split / "frog" / "0099.png")
    with pytest.raises(ValueError, match=r"frog.0099\.png") as error:
        velasoka.get_cifar10_dataset(root=image_folders)
    assert "\n" not in str(error.value)


def test_what_a_mac_leaves_in_an_archive_is_passed_over(image_folders):
    for folder in ("train/cat", "test/dog", "__MACOSX/train/cat", "train/__MACOSX/cat", "test/__MACOSX"):
        (image_folders / folder).mkdir(parents=True, exist_ok=True)
        (image_folders / folder / "._0000.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    train, test = velasoka.get_cifar10_dataset(root=image_folders)
    assert (len(train), len(test)) == (30, 20)


@pytest.fixture
def home(image_folders, tmp_path_factory, monkeypatch):
    """A home folder with images in `~/images`; afterwards there must be no folder that is called `~`."""
    home = tmp_path_factory.mktemp("home")
    image_folders.rename(home / "images")
    image_folders.mkdir()
    monkeypatch.chdir(image_folders)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    yield home
    assert list(image_folders.iterdir()) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder_in_every_path(kind, home):
    assert len(velasoka.get_cifar10_dataset(root=kind("~/images"), download=False)[0]) == 30
    with pytest.raises(ConnectionError) as error:
        velasoka.download_cifar10(kind("~/data"), mirrors=())
    assert str(home / "data") in str(error.value)
    for resume in (False, True):
        start(([BATCH], [BATCH]), checkpoint_path=kind("~/run.pt"), resume=resume)
    velasoka.save_model(linear_model(), kind("~/net.pt"))
    (home / "net.pt").rename(home / "moved.pt")
    velasoka.load_model(linear_model(), kind("~/moved.pt"))
    assert (home / "run.pt").exists()


def test_a_tilde_is_the_home_folder_on_the_command_line(home, monkeypatch):
    monkeypatch.setattr(velasoka, "MODELS", {"dilated-depthwise": lambda: velasoka.DilatedDepthwiseModel(fm_size=2)})
    arguments = "--epochs 1 --device cpu --data ~/images --checkpoint ~/run.pt --save ~/net.pt"
    for more in ("", " --resume"):
        assert velasoka._main((arguments + more).split()) == 0
    assert {path.name for path in home.iterdir()} == {"images", "run.pt", "net.pt"}
