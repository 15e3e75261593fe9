"""Data sets of image folders and drawn pictures; test_download.py has the published files."""

import struct

import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image

import velasoka

# --- Image folders ---


def test_reads_image_folders_in_label_order(image_folders):
    train, test = velasoka.get_cifar10_dataset(root=str(image_folders))
    assert train.data.shape == (30, 32, 32, 3)
    assert train.data.dtype == np.uint8
    assert train.targets == [label for label in range(10) for _ in range(3)]
    assert np.array_equal(test.data, random_images(20, seed=2))
    assert tuple(test.classes) == velasoka.CIFAR10_CLASSES
    assert test.class_to_idx["truck"] == 9


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_items_and_batches_are_normalised_with_the_mean_and_std_given(kind, image_folders, device):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    dataset = velasoka.get_cifar10_dataset(kind(mean), kind(std), root=image_folders)
    test = dataset[1]
    image, label = test[3]
    expected = (torch.tensor(test.data[3] / 255.0) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(image.float(), expected.permute(2, 0, 1).float())
    assert label == 1
    assert isinstance(label, int)
    (images, _), *_ = velasoka.get_cifar10_data_loader(dataset, device=device)[1]
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[3].cpu(), expected.permute(2, 0, 1).float())


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5, 0.0, 0.5))])
def test_a_mean_or_std_that_does_not_fit_is_refused_before_any_work(mean, std, tmp_path):
    with pytest.raises(ValueError, match="three numbers"):
        velasoka.get_cifar10_dataset(mean, std, root=tmp_path / "new")
    with pytest.raises(ValueError, match="three numbers"):
        velasoka.get_synthetic_dataset(10, 10, mean=mean, std=std)
    assert not (tmp_path / "new").exists()


def test_folders_and_files_that_a_system_leaves_are_no_classes(image_folders):
    for folder in ("train/@eaDir/0000.png", "train/.ipynb_checkpoints", "test/__MACOSX/cat"):
        (image_folders / folder).mkdir(parents=True)
    (image_folders / "train/cat/Thumbs.db").write_bytes(b"")
    (image_folders / "train/cat/._0000.png").write_bytes(b"Mac OS X")
    (image_folders / "train/.ipynb_checkpoints/0000-checkpoint.png").write_bytes(b"no picture")
    train, test = velasoka.get_cifar10_dataset(root=image_folders)
    assert (len(train), len(test)) == (30, 20)


def read_as_first(image_folders, picture, name="0000.png", **options):
    """The first training image, an airplane, if its file holds `picture`."""
    (image_folders / "train/airplane/0000.png").unlink()
    picture.save(image_folders / "train/airplane" / name, **options)
    return velasoka.get_cifar10_dataset(root=image_folders)[0].data[0]


def test_a_grey_picture_gets_three_channels_and_transparent_pixels_are_white(image_folders):
    picture = Image.new("LA", (32, 32), (0, 0))
    picture.paste((20, 255), (8, 8, 24, 24))
    read = read_as_first(image_folders, picture)
    assert read[0, 0].tolist() == [255] * 3
    assert read[16, 16].tolist() == [20] * 3


def exif_block(orientation, *resolution):
    """EXIF data of an orientation and a resolution, a fraction."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 0x011A, 10, 1, 38)  # a rational, which lies behind the entries
    ends = struct.pack("<Iii", 0, *resolution)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + ends


@pytest.mark.parametrize(("resolution", "is_turned"), [((72, 1), True), ((-1, 0), False)])
def test_exif_orientation_is_applied_unless_the_exif_data_are_damaged(
    resolution, is_turned, image_folders
):
    picture = Image.new("L", (32, 32), 0)
    picture.paste(255, (0, 0, 32, 16))  # white above
    exif = exif_block(3, *resolution)  # 3: the camera was upside down
    read = read_as_first(image_folders, picture, "0000.jpg", exif=exif)
    assert (read[0].mean() < 128) == is_turned


def write_torn_jpeg(path):
    Image.fromarray(random_images(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def write_grey_of_16_bits(path):
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("harm", "at", "named"),
    [
        (lambda path: path.write_bytes(b"no picture"), "train/frog/0001.png", r"0001\.png"),
        (write_torn_jpeg, "test/cat/0001.jpg", r"0001\.jpg"),
        (write_grey_of_16_bits, "test/frog/0001.png", r"0001\.png: .*8 bits"),
        (Image.new("1", (20000, 9000)).save, "train/cat/0001.png", r"0001\.png"),  # a "bomb"
        (Image.new("RGB", (28, 30)).save, "test/dog/0001.png", r"0001\.png: 28×30"),
        (lambda path: path.parent.rename(path.parent.with_name("mouse")), "train/cat/x", "mouse"),
        (lambda path: path.rename(path.with_name("tests")), "test", "test: missing"),
    ],
)
def test_what_is_wrong_in_image_folders_is_named_in_one_line(image_folders, harm, at, named):
    harm(image_folders / at)
    with pytest.raises(ValueError, match=named) as error:
        velasoka.get_cifar10_dataset(root=image_folders)
    assert "\n" not in str(error.value)


# --- Roots that are nearly right ---


@pytest.mark.parametrize(
    ("moved", "root", "said"),
    [
        ({"train/airplane/0000.png": "flat/train/1.png"}, "flat", r"directly in train/.*<class>/"),
        ({"train": "data/train", "test": "data/test"}, ".", "but .*data/train/cat"),
        ({}, "train", "but .*train/cat"),
    ],
)
def test_a_root_that_is_nearly_right_is_told_what_is_expected(
    moved, root, said, image_folders, monkeypatch
):
    for old, new in moved.items():
        (image_folders / new).parent.mkdir(parents=True, exist_ok=True)
        (image_folders / old).rename(image_folders / new)
    monkeypatch.delattr(velasoka.urllib.request, "urlopen")
    before = sorted(image_folders.rglob("*"))
    with pytest.raises(ValueError, match=said):
        velasoka.get_cifar10_dataset(root=image_folders / root)
    assert sorted(image_folders.rglob("*")) == before


def test_nothing_there_and_no_download_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py") as error:
        velasoka.get_cifar10_dataset(root=tmp_path / "empty", download=False)
    assert "[Errno" not in str(error.value)


# --- Drawn pictures and transforms ---


def test_synthetic_pictures_have_classes_of_their_own_and_are_the_same_for_a_seed(pictures):
    train, test = pictures
    assert (train.data.shape, train.data.dtype) == ((200, 32, 32, 3), np.uint8)
    assert len(test) == 70
    assert np.bincount(train.targets).tolist() == [20] * 10
    assert len(set(train.classes) - set(velasoka.CIFAR10_CLASSES)) == 10
    again, _ = velasoka.get_synthetic_dataset(200, 70)
    other, _ = velasoka.get_synthetic_dataset(200, 70, seed=7)
    assert np.array_equal(train.data, again.data)
    assert not np.array_equal(train.data, other.data)
    assert not np.array_equal(train.data[:70], test.data)


def test_transforms_are_torchvisions_and_applied_from_left_to_right():
    picture = random_images(1)[0]
    normalize = velasoka.to_normalize((0.5,) * 3, (0.25,) * 3)
    image = velasoka.compose_transform(velasoka.to_tensor(), normalize)(picture)
    np.testing.assert_allclose(image.permute(1, 2, 0), (picture / 255 - 0.5) * 4, atol=1e-5)
    assert np.array_equal(velasoka.to_pil()(velasoka.to_tensor()(picture)), picture)
