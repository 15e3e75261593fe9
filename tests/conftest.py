"""What several test files need: the device, small data sets, small models, short runs."""

import itertools
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import velasoka

QUIET = {"progress": False}
KEEP = {"checkpoint_path": "run.pt"}
CE = nn.CrossEntropyLoss()
torch.set_num_threads(1)  # the tensors are tiny; more threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # so it is in what the tests start


@pytest.fixture(scope="session")
def device():
    return velasoka.get_available_device()


@pytest.fixture(autouse=True)
def in_an_empty_folder_and_seeded(tmp_path, monkeypatch):
    """No test finds files by chance or leaves any; each draws the same numbers, alone or not."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pictures():
    """A small synthetic pair of data sets."""
    return velasoka.get_synthetic_dataset(200, 70)


@pytest.fixture
def loaders(pictures, device):
    return velasoka.get_cifar10_data_loader(pictures, 32, device=device)


@pytest.fixture
def model():
    return velasoka.DilatedDepthwiseModel(fm_size=4)


def random_images(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)


def save_images(folder, images, labels):
    """Write image folders as `get_cifar10_dataset` reads them, as PNG so that no pixel changes."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / velasoka.CIFAR10_CLASSES[label] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def image_folders(tmp_path):
    """Image folders of 3 training and 2 test images a class."""
    for split, number in (("train", 3), ("test", 2)):
        labels = np.repeat(range(10), number)
        save_images(tmp_path / split, random_images(len(labels), seed=number), labels)
    return tmp_path


class Bomb:
    """To unpickle it without care creates a file named `exploded`."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


class Breaking:
    """A loader that raises `error`, or calls it, before batch `at`, counted over all epochs."""

    def __init__(self, loader, error, at):
        self.loader = loader
        self.error = error
        self.at = at
        self.count = 0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.count == self.at:
                raise self.error() if callable(self.error) else self.error
            self.count += 1
            yield batch


def overflow(at):
    """Cross entropy, infinite at the calls whose numbers, counted from 0, are in `at`."""
    calls = itertools.count()
    return lambda logits, labels: CE(logits, labels) * (math.inf if next(calls) in at else 1)


def random_batches(sizes=(4, 4, 2), seed=0):
    """Batches of `sizes` random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator)
    labels = torch.randint(10, (sum(sizes),), generator=generator)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


BATCHES = random_batches()  # three


def linear_model():
    """One that learns the random batches, though not within ten epochs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))


def sgd(model, lr=0.05, momentum=0.9, **options):
    return torch.optim.SGD(model.parameters(), lr, momentum, **options)


def weights_of(model):
    """All that `model` holds, in one tensor on the CPU."""
    return torch.cat([value.flatten().double().cpu() for value in model.state_dict().values()])


def train(model, loaders, device, epochs=2, **options):
    """A run with the recipe's optimiser and loss; its history."""
    parts = model, velasoka.get_muon_optimizer(model), velasoka.get_ce_loss(), loaders, device
    return velasoka.start_cnn(*parts, epochs, **QUIET | options)


def tiny_run(model=None, optimizer=None, loss_fn=CE, loaders=(BATCHES, BATCHES), **options):
    """A run of a linear model on the CPU, of two epochs; its history and its model."""
    model = model or linear_model()
    optimizer = optimizer or sgd(model)
    options = QUIET | {"epochs": 2} | options
    return velasoka.start_cnn(model, optimizer, loss_fn, loaders, "cpu", **options), model


def interrupted_at(batch, loader=BATCHES, test_loader=BATCHES):
    """A pair of loaders, the first with an interrupt before `batch`, counted over all epochs."""
    return Breaking(loader, KeyboardInterrupt(), batch), test_loader


@pytest.fixture
def scripted(monkeypatch):
    """The tests of a run give 30%, 50% and 40%; this lists the weights that they see."""
    accuracies, weights = iter([30.0, 50.0, 40.0]), []

    def test_cnn(model, *_, **__):
        weights.append(weights_of(model))
        return velasoka.EpochResult(1.0, next(accuracies), 0, 1, 1.0)

    monkeypatch.setattr(velasoka, "test_cnn", test_cnn)
    return weights


def conv_model(*more):
    """Two convolutions with a pool between them, receptive field 8, and what is to follow."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), *more)
