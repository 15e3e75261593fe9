"""Data sets, loaders and losses that users bring: used as they are meant, or refused in one line."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BATCHES, QUIET, linear_model, random_batches, random_images, sgd, tiny_run, train, weights_of
from torch import nn
from torch.utils.data import DataLoader, Subset, default_collate
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


class Changed(Pictures):
    """Pictures whose items `change` makes of what torchvision's `CIFAR10` gives."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, index):
        return self.change(index, *super().__getitem__(index))


class Mirrored(Subset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.flip(-1), label

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def through(*steps):
    return Pictures(v1.Compose(steps))


APPLIED = {  # the loader gives what the data set gives
    "Normalize in Sequential": through(v1.ToTensor(), nn.Sequential(nn.Sequential(NORM))),
    "PILToTensor": through(v1.PILToTensor(), v1.ConvertImageDtype(FLOAT), NORM),
    "v2 in Sequential": through(v2.ToImage(), nn.Sequential(v2.ToDtype(FLOAT, scale=True), NORM), v2.ToPureTensor()),
    "the same items in its own way": Changed(lambda index, image, label: (image, label)),
    "labels as tensors": Changed(lambda index, image, label: (image, torch.tensor(label))),
    "Subset with an array": Subset(Pictures(), np.array([3, 0])),
    "Subset with NumPy's numbers": Subset(Pictures(), list(np.array([3, 0]))),
}
REFUSED = {
    "target_transform": Pictures(target_transform=lambda label: 9 - label),
    "a random flip": through(v1.RandomHorizontalFlip(), TENSOR),
    "Normalize at random": through(v1.ToTensor(), v1.RandomApply([NORM])),
    "a blur in Sequential": through(v1.ToTensor(), nn.Sequential(v1.GaussianBlur(3), NORM)),
    "a function": Pictures(lambda image: 1 - v1.functional.to_tensor(image)),
    "a second Normalize": through(TENSOR, NORM),
    "pixels to 255": through(v2.ToImage(), v2.ToDtype(FLOAT)),
    "one other label": Changed(lambda index, image, label: (image, label + (index == 7))),
    "one other image": Changed(lambda index, image, label: (image + 0.5 * (index == 7), label)),
    "three parts": Changed(lambda index, image, label: (image, label, index)),
    "shorter than its data": Pictures(length=4),
    "a Subset that changes": Mirrored(Pictures(), range(4)),
    "a Subset of what changes": Subset(Changed(lambda index, image, label: (image, 9 - label)), range(4)),
}


@pytest.mark.parametrize("kind", APPLIED)
def test_what_a_data_set_does_is_done_by_the_loader(kind, device):
    dataset = APPLIED[kind]
    for loader in velasoka.get_cifar10_data_loader((dataset, dataset), 3, device=device, augment=False):
        images, labels = (torch.cat(parts).cpu() for parts in zip(*loader, strict=True))
        expected, targets = zip(*[dataset[i] for i in range(len(dataset))], strict=True)
        assert sorted(labels.tolist()) == sorted(map(int, targets))
    torch.testing.assert_close(images, torch.stack(expected))  # of the test loader, which keeps the order
    assert labels.tolist() == [*map(int, targets)]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_loader_cannot_do_is_refused_in_one_line(kind):
    with pytest.raises((TypeError, ValueError), match=r"^dataset: [^\n]*DataLoader[^\n]*$"):
        velasoka.get_cifar10_data_loader((Pictures(), REFUSED[kind]), 3, device="cpu")


def test_an_error_of_a_data_set_is_raised_as_it_is():
    def broken(*_):
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        velasoka.get_cifar10_data_loader((Pictures(), Changed(broken)), 3, device="cpu")


# --- Soft labels ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_probabilities_that_are_sure_train_and_test_as_labels_do(dtype):
    soft = [(images, F.one_hot(labels, 10).to(dtype)) for images, labels in BATCHES]
    (one, model), (other, soft_model) = tiny_run(), tiny_run(loaders=(soft, soft))
    for result, expected in zip(other.train + other.test, one.train + one.test, strict=True):
        assert (result.correct, result.total) == (expected.correct, expected.total)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(weights_of(soft_model), weights_of(model), rtol=1e-4, atol=1e-6)


def test_accuracy_on_soft_labels_counts_the_most_likely_class():
    model, (images, _) = linear_model(), random_batches((6,))[0]
    logits = model(images).detach()
    probabilities = torch.cat([logits[:4], -logits[4:]]).softmax(1)  # four right, two wrong
    result = velasoka.test_cnn(model, [(images, probabilities)], "cpu", **QUIET)
    assert (result.correct, result.total) == (4, 6)
    assert result.loss == pytest.approx(F.cross_entropy(logits, probabilities).item(), rel=0.02)
    _, labels = velasoka.predict(model, [(images, probabilities)], "cpu")
    assert torch.equal(labels, probabilities.argmax(1))


def test_a_collate_fn_that_mixes_images_trains(pictures, model, device):
    mix = v2.CutMix(num_classes=10)
    loader = DataLoader(pictures[0], 50, shuffle=True, collate_fn=lambda items: mix(*default_collate(items)))
    history = train(model, (loader, DataLoader(pictures[1], 70)), device)
    assert history.train[1].loss < history.train[0].loss
    assert [result.total for result in history.train + history.test] == [200, 200, 70, 70]


@pytest.mark.parametrize("classes", [9, 11])
def test_soft_labels_of_another_number_of_classes_than_the_model_has_are_refused(classes):
    batch = random_batches((4,))[0][0], torch.full((4, classes), 1 / classes)
    with pytest.raises(ValueError, match=rf"^[^\n]*{classes} classes[^\n]*$"):
        velasoka.test_cnn(linear_model(), [batch], "cpu", **QUIET)


# --- Loaders without an end, or with a wrong length ---

BATCH = random_batches((2,))[0]


class Batches:
    """Batches that `make` makes anew in every epoch."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


class Sized(Batches):
    """Such batches, said to be `length` of them."""

    def __init__(self, length, make):
        super().__init__(make)
        self.length = length

    def __len__(self):
        return self.length


def endless():
    """As good as endless: more batches than are looked at."""
    yield from itertools.repeat(BATCH, 100_000)
    pytest.fail("its end was looked for")


@pytest.mark.parametrize("place", [0, 1], ids=["train", "test"])
@pytest.mark.parametrize("make", [endless, lambda: Batches(endless)], ids=["generator", "iterable"])
def test_a_loader_without_an_end_is_refused(make, place):
    loaders = [[BATCH], [BATCH]]
    loaders[place] = make()
    with pytest.raises(ValueError, match=r"^[^\n]*\bend[^\n]*$"):
        tiny_run(loaders=loaders)


@pytest.mark.parametrize("place", [0, 1], ids=["train", "test"])
@pytest.mark.parametrize(("said", "come"), [(4, 8), (6, 4)])
def test_a_loader_of_another_length_than_it_says_is_warned_of(said, come, place):
    loaders = [[BATCH], [BATCH]]
    loaders[place] = Sized(said, lambda: [BATCH] * come)
    which = "more" if come > said else "fewer"
    with pytest.warns(UserWarning, match=rf"{which} batches than the {said} that its len\(\) reports"):
        history, _ = tiny_run(loaders=loaders, epochs=1)
    assert (history.train, history.test)[place][0].total == 2 * come


def test_a_loader_of_more_than_twice_the_length_it_says_is_refused():
    with pytest.raises(ValueError, match=r"\b4\b"):
        tiny_run(loaders=(Sized(4, lambda: [BATCH] * 9), [BATCH]))


@pytest.mark.filterwarnings("error")
def test_a_loader_of_the_length_it_says_or_of_none_is_no_reason_to_warn():
    for make in (lambda: Sized(4, lambda: [BATCH] * 4), lambda: Batches(lambda: [BATCH] * 4), lambda: iter([BATCH])):
        tiny_run(loaders=(make(), make()))


# --- A loss that is a sum ---


def epoch(reduction, lr, sizes, kind="module"):
    """An epoch of a linear model: its mean loss and the weights after it."""
    model = linear_model()
    kinds = {"module": nn.CrossEntropyLoss, "partial": partial(partial, F.cross_entropy)}
    loss_fn = kinds[kind](reduction=reduction)
    optimizer = sgd(model, lr, momentum=0)
    return velasoka.train_cnn(model, random_batches(sizes), loss_fn, optimizer, "cpu", **QUIET).loss, weights_of(model)


@pytest.mark.parametrize("kind", ["module", "partial"])
def test_a_loss_that_is_a_sum_is_reported_as_the_mean_per_image(kind):
    assert epoch("sum", 0.0, (4, 4, 2), kind)[0] == pytest.approx(epoch("mean", 0.0, (4, 4, 2))[0], rel=1e-4)


def test_a_loss_that_is_a_sum_trains_as_one():
    sum_weights, mean_weights = epoch("sum", 1e-3, (4, 4))[1], epoch("mean", 4e-3, (4, 4))[1]
    torch.testing.assert_close(sum_weights, mean_weights, rtol=1e-4, atol=1e-6)


# --- Paths ---


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


def test_a_tilde_is_the_home_folder_in_every_path(home):
    assert len(velasoka.get_cifar10_dataset(root="~/images", download=False)[0]) == 30
    with pytest.raises(ConnectionError) as error:
        velasoka.download_cifar10(Path("~/data"), mirrors=())
    assert str(home / "data") in str(error.value)
    for resume in (False, True):
        tiny_run(checkpoint_path="~/run.pt", resume=resume)
    velasoka.save_model(linear_model(), "~/net.pt")
    velasoka.load_model(linear_model(), Path("~/net.pt"))
    assert {path.name for path in home.iterdir()} >= {"run.pt", "net.pt"}


def test_a_tilde_is_the_home_folder_on_the_command_line(home, monkeypatch):
    monkeypatch.setattr(velasoka, "MODELS", {"dilated-depthwise": lambda: velasoka.DilatedDepthwiseModel(fm_size=2)})
    arguments = "--epochs 1 --device cpu --data ~/images --checkpoint ~/run.pt --save ~/net.pt"
    for more in ("", " --resume"):
        assert velasoka._main((arguments + more).split()) == 0
    assert {path.name for path in home.iterdir()} == {"images", "run.pt", "net.pt"}
