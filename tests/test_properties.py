"""What holds for any loader and any checkpoint, tried on many by hypothesis."""

import numpy as np
import pytest
import torch
from conftest import Breaking
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import velasoka

slow_is_fine = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=slow_is_fine)
seeds = st.integers(0, 2**32 - 1)


def pair_of(number, channel_means):
    """A pair of datasets whose image i has the value i in all its pixels, so that it is known after augmentation."""
    images = np.broadcast_to(np.arange(number, dtype=np.uint8)[:, None, None, None], (number, 32, 32, 3))
    labels = [index % 10 for index in range(number)]
    dataset = velasoka._ArrayDataset(images.copy(), labels, velasoka.CIFAR10_CLASSES, channel_means, (0.25, 0.25, 0.25))
    return dataset, dataset


@few
@given(st.integers(1, 60), st.integers(1, 70), seeds, st.booleans())
def test_an_epoch_sees_each_image_once_under_its_own_label(device, number, batch_size, seed, augment):
    pair = pair_of(number, (0.0, 0.0, 0.0))
    loaders = velasoka.get_cifar10_data_loader(pair, batch_size, device=device, augment=augment, seed=seed)
    for loader, shuffled in zip(loaders, (True, False), strict=True):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-number // batch_size)
        assert all(len(images) == len(labels) == batch_size for images, labels in batches[:-1])
        images, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
        assert images.shape == (number, 3, 32, 32)
        values = (images.amax((1, 2, 3)) * 0.25 * 255).round().long()
        assert torch.equal(images.amax((1, 2, 3)), images.amin((1, 2, 3)))
        assert sorted(values.tolist()) == list(range(number))
        assert torch.equal(labels, values % 10)
        assert shuffled or values.tolist() == list(range(number))


@few
@given(st.integers(2, 60), st.integers(1, 70), seeds, st.tuples(*[st.floats(0, 1)] * 3))
def test_the_same_seed_gives_the_same_batches(device, number, batch_size, seed, means):
    one, other = (
        velasoka.get_cifar10_data_loader(pair_of(number, means), batch_size, device=device, seed=seed)[0]
        for _ in range(2)
    )
    for _ in range(2):
        torch.rand(3)
        for (images, labels), (again, labels_again) in zip(one, other, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(labels, labels_again)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@few
@given(st.lists(numbers, min_size=13, max_size=13))
def test_weights_come_back_bit_for_bit(values):
    model, other = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten()), None
    model.register_parameter("scale", nn.Parameter(torch.tensor(values[12:])))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values[:12]).reshape(4, 3, 1, 1))
    velasoka.save_model(model, "net.pt")
    other = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten())
    other.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    velasoka.load_model(other, "net.pt")
    assert [tensor.tolist() for tensor in other.parameters()] == [tensor.tolist() for tensor in model.parameters()]


plain = st.none() | st.booleans() | st.integers() | numbers | st.text() | numbers.map(torch.tensor)
nested = st.recursive(
    plain, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
)


def flat(value):
    """`value` with each tensor as its dtype and number, to compare by =="""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.item()
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    return type(value)(flat(inner) for inner in value) if isinstance(value, (list, tuple)) else value


@few
@given(nested)
def test_what_a_checkpoint_holds_comes_back(content):
    velasoka._write(content, "content.pt")
    assert flat(velasoka._read("content.pt")) == flat(content)


@pytest.mark.filterwarnings("ignore:interrupted")
@settings(few, max_examples=6)
@given(st.integers(0, 3), st.integers(8, 25), st.sampled_from(list(velasoka.MODELS)), seeds)
def test_a_run_broken_off_after_any_epoch_ends_as_the_whole_one(device, done, batch_size, name, seed):
    def run(epochs=3, **options):
        velasoka.seed_everything(seed)
        model = velasoka.MODELS[name](fm_size=2)
        train, test = velasoka.get_cifar10_data_loader(pair_of(24, (0.0,) * 3), batch_size, device=device, seed=seed)
        loaders = Breaking(train, KeyboardInterrupt(), at=epochs * len(train)), test
        optimizer = velasoka.get_muon_optimizer(model)
        velasoka.start_cnn(model, optimizer, velasoka.get_ce_loss(), loaders, device, 3, progress=False, **options)
        return [parameter.tolist() for parameter in model.parameters()]

    whole = run()
    velasoka.Path("run.pt").unlink(missing_ok=True)
    if done < 3:
        run(done, checkpoint_path="run.pt")
    assert run(checkpoint_path="run.pt", resume=True) == whole or device.type != "cpu"
