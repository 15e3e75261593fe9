import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, random_images
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from torchvision.transforms import v2

import velasoka

# --- Reading ---


def test_reads_image_folders_in_label_order(image_folders):
    train, test = velasoka.get_cifar10_dataset(root=image_folders)
    assert train.data.shape == (30, 32, 32, 3)
    assert train.data.dtype == np.uint8
    assert train.targets == [label for label in range(10) for _ in range(3)]
    assert np.array_equal(test.data, random_images(20, seed=2))
    assert tuple(test.classes) == velasoka.CIFAR10_CLASSES


def test_reads_cifar_10_batches_py(batches_folder):
    train, test = velasoka.get_cifar10_dataset(root=str(batches_folder))
    assert np.array_equal(train.data[4:8], random_images(4, seed=1))
    assert train.targets[4:8] == [1, 2, 3, 4]
    assert np.array_equal(test.data, random_images(6, seed=5))
    assert (len(train), len(test)) == (20, 6)


def test_items_are_normalised_with_the_mean_and_std_given(image_folders):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    _, test = velasoka.get_cifar10_dataset(mean, std, root=image_folders)
    image, label = test[3]
    expected = (torch.tensor(test.data[3] / 255.0) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(image, expected.permute(2, 0, 1).float())
    assert label == 1
    assert isinstance(label, int)


def test_ignores_what_is_no_image(image_folders):
    (image_folders / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (image_folders / "train" / ".ipynb_checkpoints").mkdir()
    for folder in ("train/cat", "__MACOSX/train/cat", "train/__MACOSX/cat", "test/__MACOSX"):  # as a Mac archives them
        (image_folders / folder).mkdir(parents=True, exist_ok=True)
        (image_folders / folder / "._0000.png").write_bytes(b"Mac OS X")
    train, test = velasoka.get_cifar10_dataset(root=image_folders)
    assert (len(train), len(test)) == (30, 20)


def torn_jpeg(path):
    Image.fromarray(random_images(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def grey_of_16_bits(path):
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda root: (root / "train" / "mouse").mkdir(), "mouse"),
        (lambda root: shutil.rmtree(root / "test" / "ship"), "ship"),
        (lambda root: [path.unlink() for path in (root / "train" / "deer").iterdir()], "deer"),
        (lambda root: (root / "train" / "frog" / "0001.png").write_bytes(b"no picture"), "0001.png"),
        (lambda root: (root / "train" / "frog" / "0001.jpg").write_bytes(b""), "0001.jpg"),
        (lambda root: torn_jpeg(root / "test" / "cat" / "0001.jpg"), "0001.jpg"),
        (lambda root: Image.new("RGB", (28, 30)).save(root / "test" / "dog" / "0001.png"), "28×30"),
        (lambda root: grey_of_16_bits(root / "test" / "frog" / "0001.png"), "0001.png"),
        (lambda root: (root / "test").rename(root / "tests"), "test: needs"),
    ],
)
def test_a_wrong_image_folder_is_named_in_one_line(image_folders, harm, named):
    harm(image_folders)
    with pytest.raises(ValueError, match=named) as error:
        velasoka.get_cifar10_dataset(root=image_folders)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"torn",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}),
        pickle.dumps(Bomb()),
    ],
)
def test_a_wrong_batch_is_named_and_its_code_never_runs(batches_folder, content):
    (batches_folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_3"):
        velasoka.get_cifar10_dataset(root=batches_folder)
    assert not Path("exploded").exists()


def test_nothing_there_and_no_download_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        velasoka.get_cifar10_dataset(root=tmp_path / "empty", download=False)


# --- Drawing ---


def test_synthetic_pictures_come_in_ten_classes_of_their_own_the_same_for_the_same_seed(pictures):
    train, test = pictures
    assert (len(train), len(test)) == (200, 70)
    assert train.data.shape == (200, 32, 32, 3)
    assert train.data.dtype == np.uint8
    assert np.bincount(train.targets).tolist() == [20] * 10
    assert len(set(train.classes)) == 10
    assert not set(train.classes) & set(velasoka.CIFAR10_CLASSES)
    again, _ = velasoka.get_synthetic_dataset(200, 70)
    other, _ = velasoka.get_synthetic_dataset(200, 70, seed=7)
    assert np.array_equal(train.data, again.data)
    assert not np.array_equal(train.data, other.data)
    assert not np.array_equal(train.data[:70], test.data)


def test_synthetic_pictures_are_no_task_for_a_linear_classifier():
    train, test = velasoka.get_synthetic_dataset(2000, 500)
    pixels, unseen = (torch.tensor(part.data.reshape(len(part), -1) / 255.0 - 0.5).float() for part in (train, test))
    targets = torch.nn.functional.one_hot(torch.tensor(train.targets)).float()
    weights = torch.linalg.solve(pixels @ pixels.T + 100 * torch.eye(2000), targets)  # ridge regression's dual
    accuracy = ((unseen @ pixels.T @ weights).argmax(1) == torch.tensor(test.targets)).double().mean()
    assert accuracy < 0.5


# --- Loading ---


def batches_of(loader):
    return [(images.cpu().clone(), labels.cpu()) for images, labels in loader]


def epoch(loader):
    images, labels = zip(*batches_of(loader), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches_have_the_shape_type_and_place_that_a_model_takes(pictures, device):
    train, test = velasoka.get_cifar10_data_loader(pictures, batch_size=32)
    assert (len(train), len(test)) == (7, 3)
    assert [len(labels) for _, labels in test] == [32, 32, 6]
    for images, labels in (next(iter(train)), next(iter(test))):
        assert images.shape == (32, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        assert images.device.type == labels.device.type == device.type


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_test_loader_keeps_the_order_and_the_items_of_the_dataset(kind, device):
    dataset = velasoka.get_synthetic_dataset(10, 70, mean=kind((0.1, 0.2, 0.3)), std=kind((0.9, 0.8, 0.7)))
    images, labels = epoch(velasoka.get_cifar10_data_loader(dataset, 32, device=device)[1])
    expected, targets = zip(*dataset[1], strict=True)
    torch.testing.assert_close(images, torch.stack(expected))
    assert labels.tolist() == list(targets)


def test_same_seed_same_batches_whatever_else_draws_random_numbers(pictures, device):
    one, same, other = (velasoka.get_cifar10_data_loader(pictures, device=device, seed=seed)[0] for seed in (1, 1, 2))
    for _ in range(2):
        images, labels = epoch(one)
        torch.rand(3), np.random.rand(3), random.random()
        again, again_labels = epoch(same)
        assert torch.equal(images, again)
        assert torch.equal(labels, again_labels)
        assert not torch.equal(images, epoch(other)[0])


def test_each_epoch_is_shuffled_and_augmented_anew_and_sees_each_image_once(pictures, device):
    plain = velasoka.get_cifar10_data_loader(pictures, device=device, augment=False)[0]
    first, second = epoch(plain), epoch(plain)
    assert not torch.equal(first[1], second[1])
    assert {image.numpy().tobytes() for image in first[0]} == {image.numpy().tobytes() for image in second[0]}
    augmented = velasoka.get_cifar10_data_loader(pictures, device=device)[0]
    one, another = ({image.numpy().tobytes() for image in epoch(augmented)[0]} for _ in range(2))
    assert len(one & another) < 20


def test_augmented_images_are_mirrored_and_moved_with_a_reflected_border_under_their_own_label(device):
    train, test = velasoka.get_synthetic_dataset(400, 10)
    padded = np.pad(train.data, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    views = [padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
    views += [view[:, :, ::-1] for view in views]
    origin = {
        image.tobytes(): (view, label)
        for view, images in enumerate(views)
        for image, label in zip(images, train.targets, strict=True)
    }
    images, labels = epoch(velasoka.get_cifar10_data_loader((train, test), 50, device=device)[0])
    mean, std = (torch.tensor(value) * 255 for value in (velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD))
    pixels = (images.permute(0, 2, 3, 1) * std + mean).round().to(torch.uint8).numpy()
    found = [origin[image.tobytes()] for image in pixels]
    assert [label for _, label in found] == labels.tolist()
    assert {view for view, _ in found} == set(range(50))


@pytest.mark.parametrize(
    "transform",
    [
        velasoka.to_normalize((0.5,) * 3, (0.25,) * 3),
        velasoka.compose_transform(
            velasoka.to_tensor(), velasoka.compose_transform(velasoka.to_normalize([0.5], [0.25]))
        ),
        v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(np.full(3, 0.5), np.full(3, 0.25))]
        ),
        None,
    ],
)
def test_finds_mean_and_std_wherever_the_transform_has_them(transform, pictures, device):
    class Other:
        data, targets = pictures[1].data, np.array(pictures[1].targets)

    Other.transform = transform
    images, _ = epoch(velasoka.get_cifar10_data_loader((Other(), Other()), device=device)[1])
    expected = torch.tensor(Other.data / 255.0).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(images, expected if transform is None else (expected - 0.5) / 0.25)
    assert images.dtype == torch.float32


def test_takes_subsets_and_torchvision_like_datasets(pictures, device):
    class Other:
        data, targets, transform = pictures[0].data, pictures[0].targets, pictures[0].transform

    subset = Subset(Subset(pictures[0], range(0, 200, 2)), [5, 7, 9])
    _, loader = velasoka.get_cifar10_data_loader((Other(), subset), device=device)
    images, labels = epoch(loader)
    assert labels.tolist() == [pictures[0].targets[index] for index in (10, 14, 18)]
    torch.testing.assert_close(images[2], pictures[0][18][0])


def test_loaders_are_ordinary_data_loaders(pictures, device):
    train, test = velasoka.get_cifar10_data_loader(pictures, 32, device=device)
    for loader, number, sampler in ((train, 200, RandomSampler), (test, 70, SequentialSampler)):
        assert isinstance(loader, DataLoader)
        assert (len(loader.dataset), loader.batch_size, loader.drop_last) == (number, 32, False)
        assert isinstance(loader.sampler, sampler)
        assert loader.generator.device.type == "cpu"  # so a seed gives the same batches on every device
    image, label = test.dataset[3]
    expected, target = pictures[1][3]
    torch.testing.assert_close(image.cpu(), expected)
    assert label == target


def test_a_loader_made_anew_of_the_parts_of_one_gives_what_that_gives(pictures, device):
    one, other = (velasoka.get_cifar10_data_loader(pictures, 32, device=device)[0] for _ in range(2))
    anew = DataLoader(other.dataset, 32, sampler=other.sampler, collate_fn=other.collate_fn, generator=other.generator)
    assert torch.equal(epoch(one)[0], epoch(anew)[0])


def test_drawing_batches_leaves_the_global_generators_alone(pictures, device):
    loaders, before = velasoka.get_cifar10_data_loader(pictures, 32, device=device), torch.get_rng_state()
    for loader in loaders:
        epoch(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_loaders_data_set_can_be_gone_through_and_read_by_workers(pictures):
    dataset = velasoka.get_cifar10_data_loader(pictures, 32, device="cpu")[0].dataset
    assert len(list(dataset)) == 200
    by_workers = DataLoader(dataset, 50, num_workers=2, multiprocessing_context="fork")
    one, another = epoch(by_workers), epoch(by_workers)
    assert one[1].tolist() == another[1].tolist() == pictures[0].targets
    assert not torch.equal(one[0], another[0])  # augmented anew
