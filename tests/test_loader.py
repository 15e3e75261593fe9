"""Loaders of subsets, of other data sets and with a transform of batches; see also test_data.py."""

import numpy as np
import pytest
import torch
from conftest import train
from torch.utils.data import ConcatDataset, Subset, random_split
from torchvision.transforms import v2

import velasoka


def loaders_of(train, test=None, batch_size=32, **options):
    return velasoka.get_cifar10_data_loader((train, test or train), batch_size, **options)


def epoch(loader):
    """All images and labels of an epoch, on the CPU."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images).cpu(), torch.cat(labels).cpu()


def as_bytes(images):
    return [image.numpy().tobytes() for image in images.cpu().contiguous()]


def test_start_cnn_shifts_no_image_in_its_first_epoch(pictures, device):
    loaders = loaders_of(*pictures, batch_size=200, device=device)
    plain = set(as_bytes(epoch(loaders_of(*pictures, device=device, augment=False)[0])[0]))
    model = velasoka.SimpleModel(fm_size=2)
    unshifted = []  # of the 200 images of each epoch

    def look(model, inputs):
        if model.training:
            views = zip(as_bytes(inputs[0]), as_bytes(inputs[0].flip(-1)), strict=True)
            unshifted.append(sum(bool({*pair} & plain) for pair in views))

    model.register_forward_pre_hook(look)
    train(model, loaders, device, 2)
    train(model, loaders, device, 1)
    optimizer = velasoka.get_muon_optimizer(model)
    velasoka.train_cnn(model, loaders[0], velasoka.get_ce_loss(), optimizer, device)
    assert unshifted[0] == unshifted[2] == 200
    assert max(unshifted[1], unshifted[3]) < 50


def test_nested_subsets_and_random_splits_are_what_they_pick(pictures, device):
    subset = Subset(Subset(pictures[0], range(0, 200, 2)), np.array([5, 7, 9]))
    part, rest = random_split(pictures[0], [40, 160])
    nested, _ = random_split(rest, [16, 144])
    for chosen in (subset, part, nested):
        loader = loaders_of(chosen, device=device)[1]
        images, labels = epoch(loader)
        expected, targets = zip(*chosen, strict=True)
        torch.testing.assert_close(images, torch.stack(expected))
        assert labels.tolist() == loader.dataset.targets == list(targets)
        assert loader.dataset.classes == pictures[0].classes
        normalised = pictures[0].transform(loader.dataset.data[0])  # of the pixels
        torch.testing.assert_close(normalised, expected[0])


class Mirrored(Subset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.flip(-1), label

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def negative():
    """A data set of ours with a transform of the user's."""
    dataset, _ = velasoka.get_synthetic_dataset(8, 4)
    dataset.transform = lambda image: 1 - velasoka.to_tensor()(image)
    return dataset


def changed_in_place():
    dataset, _ = velasoka.get_synthetic_dataset(8, 4)
    dataset.transform.transforms.append(torch.neg)
    return dataset


OTHERS = {
    "another transform": negative,
    "a transform more": changed_in_place,
    "subset of another transform": lambda: Subset(negative(), [3, 1]),
    "subset of one's own": lambda: Mirrored(velasoka.get_synthetic_dataset(8, 4)[0], range(8)),
    "concatenated": lambda: ConcatDataset(velasoka.get_synthetic_dataset(8, 4)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_data_set_goes_through_its_own_transforms_and_no_others(kind, device):
    dataset = OTHERS[kind]()
    train, test = loaders_of(dataset, batch_size=3, device=device)
    expected, targets = zip(*[dataset[index] for index in range(len(dataset))], strict=True)
    images, labels = epoch(test)
    torch.testing.assert_close(images, torch.stack(expected))
    assert labels.tolist() == list(targets)
    assert sorted(as_bytes(epoch(train)[0])) == sorted(as_bytes(images))
    assert next(iter(test))[0].device.type == device.type


@pytest.mark.parametrize("is_foreign", [False, True])
def test_a_batch_transform_comes_last_and_in_training_only(is_foreign, pictures, device):
    def cut_out(images, labels):
        images = images.clone()
        images[:, :, 8:24, 8:24] = 0
        return images, labels

    dataset = Mirrored(pictures[0], range(70)) if is_foreign else pictures[0]
    loaders = loaders_of(dataset, device=device, batch_transform=cut_out)
    for loader, is_cut in zip(loaders, (True, False), strict=True):
        images, _ = epoch(loader)
        assert (not images[:, :, 8:24, 8:24].any()) == is_cut
        assert images[:, :, :8].any()


def test_cut_mix_trains_with_soft_labels(pictures, model, device):
    loaders = loaders_of(*pictures, device=device, batch_transform=v2.CutMix(num_classes=10))
    _, labels = epoch(loaders[0])
    assert labels.shape == (200, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(200))
    history = train(model, loaders, device, 1)
    assert [result.total for result in (*history.train, *history.test)] == [200, 70]
