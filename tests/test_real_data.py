"""Runs on real images: set the environment variable CIFAR10_ROOT to a folder as `get_cifar10_dataset` reads it."""

import os
import time

import pytest

import velasoka

ROOT = os.environ.get("CIFAR10_ROOT")
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not ROOT, reason="CIFAR10_ROOT names no folder of real images")]


@pytest.fixture(scope="module")
def cifar10():
    start = time.perf_counter()
    dataset = velasoka.get_cifar10_dataset(root=ROOT, download=False)
    return dataset, time.perf_counter() - start


def test_all_of_cifar_10_is_read_in_time(cifar10):
    (train, test), seconds = cifar10
    assert (len(train), len(test)) == (50_000, 10_000)
    assert [test.targets.count(label) for label in range(10)] == [1000] * 10
    assert seconds < 20


def test_one_epoch_of_the_smallest_model_passes_80_percent(cifar10, device):
    velasoka.seed_everything()
    model = velasoka.DilatedDepthwiseModel()
    loaders = velasoka.get_cifar10_data_loader(cifar10[0], device=device)
    optimizer = velasoka.get_muon_optimizer(model)
    history = velasoka.start_cnn(model, optimizer, velasoka.get_ce_loss(), loaders, device, epochs=1)
    assert history.test[0].accuracy > 80
