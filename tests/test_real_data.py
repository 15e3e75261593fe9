"""Runs on real images: CIFAR10_ROOT names a folder of them as `get_cifar10_dataset` reads it."""

import os

import pytest
from torch.utils.data import Subset

import velasoka

ROOT = os.environ.get("CIFAR10_ROOT")


@pytest.mark.real_data
@pytest.mark.skipif(not ROOT, reason="CIFAR10_ROOT names no folder of real images")
def test_one_pass_over_a_fifth_of_the_images_teaches_the_smallest_model(device):
    """3.0 gave 68.5% (one seed, JPEG). `benchmarks.accuracy` measures all images."""
    velasoka.seed_everything()
    model = velasoka.DilatedDepthwiseModel()
    train, test = velasoka.get_cifar10_dataset(root=ROOT, download=False)
    assert (len(train), len(test)) == (50_000, 10_000)
    pair = Subset(train, range(0, 50_000, 5)), Subset(test, range(0, 10_000, 5))
    loaders = velasoka.get_cifar10_data_loader(pair, device=device)
    optimizer = velasoka.get_muon_optimizer(model)
    loss_fn = velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, epochs=1)
    assert history.test[0].accuracy > 65
