"""Packages that users bring, each as its own quick start uses it, with these models and loaders.

`interop-requirements.txt` has them; a test whose package is not installed is skipped.
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import train, weights_of
from torch.utils.data import Dataset, Subset

import velasoka

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")  # its own affairs


@pytest.fixture
def model(device):
    return velasoka.SimpleModel(fm_size=4).to(device)


@pytest.fixture
def one_image(pictures, device):
    """A training loader of a single image, whose `batch_transform` makes the first channel 5."""

    def fill(images, labels):
        images[:, 0] = 5
        return images, labels

    datasets = Subset(pictures[0], [0]), pictures[1]
    return velasoka.get_cifar10_data_loader(datasets, device=device, batch_transform=fill)[0]


def assert_augmented_and_transformed(images):
    images = torch.stack([image.cpu() for image in images])
    assert len(images.unique(dim=0)) > 2  # shifted, not just flipped
    assert images[:, 0].unique().tolist() == [5]


def assert_trained(model, before):
    assert (weights_of(model) != before).any()
    assert weights_of(model).isfinite().all()


def test_lightning_fits_and_sees_images_augmented(model, one_image):
    lightning = pytest.importorskip("lightning")
    seen = []

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            images, labels = batch
            seen.extend(images)
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return velasoka.get_muon_optimizer(self.model)

    before = weights_of(model)
    parts = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    for options in ({}, {"overfit_batches": 1}):  # for which Lightning makes the loader anew
        seen.clear()
        options |= dict.fromkeys(parts, False)
        lightning.Trainer(devices=1, max_epochs=8, **options).fit(Classifier(), one_image)
        assert_augmented_and_transformed(seen)
    assert_trained(model, before)


def test_accelerate_trains(pictures, model, loaders, one_image, device):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    before = weights_of(model)
    parts = model, velasoka.get_muon_optimizer(model), loaders[0], one_image
    model, optimizer, loader, one_image = accelerator.prepare(*parts)
    orders = [[], []]
    for order in orders:
        for images, labels in loader:
            order += labels.tolist()
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert_trained(model, before)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(pictures[0].targets)
    assert_augmented_and_transformed([images[0] for _ in range(8) for images, _ in one_image])


def test_lr_finder_before_a_run(model, loaders, device):
    torch_lr_finder = pytest.importorskip("torch_lr_finder")
    optimizer = velasoka.get_muon_optimizer(model)
    loss_fn = velasoka.get_ce_loss(0)
    peak = optimizer.param_groups[0]["lr"]
    finder = torch_lr_finder.LRFinder(model, optimizer, loss_fn, device)
    finder.range_test(loaders[0], loaders[1], 1e-4, 1e-2, 3, smooth_f=0)
    assert finder.history["lr"][::2] == pytest.approx([1e-4, 1e-2])
    tested = velasoka.test_cnn(model, loaders[1], device, progress=False)
    assert finder.history["loss"][-1] == pytest.approx(tested.loss, 0.02)
    finder.reset()
    history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 1, progress=False)
    assert max(history.learning_rates) == pytest.approx(peak)


def test_torchinfo_counts_the_same_parameters(model):
    torchinfo = pytest.importorskip("torchinfo")
    summary = torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0)
    assert summary.trainable_params == summary.total_params == velasoka.count_parameters(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's and torch's own
def test_an_exported_model_gives_the_same_logits_in_onnxruntime():
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = velasoka.DilatedDepthwiseModel(fm_size=4).eval()
    images = torch.randn(3, 3, 32, 32)
    sizes = ({0: torch.export.Dim("batch")},)
    options = {"input_names": ["images"], "dynamic_shapes": sizes, "verbose": False}
    torch.onnx.export(model, (images[:2],), "net.onnx", dynamo=True, **options)
    (logits,) = onnxruntime.InferenceSession("net.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


def test_grad_cam_and_model_summary_leave_each_other_alone(model, loaders, capsys):
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    images = next(iter(loaders[1]))[0][:4]
    with pytorch_grad_cam.GradCAM(model.eval(), [model.c3]) as cam:
        heat = cam(images, targets=None)
        velasoka.model_summary(model, (3, 32, 32))
        np.testing.assert_allclose(cam(images, targets=None), heat, atol=0.01)
    assert heat.shape == (4, 32, 32) and heat.any()
    assert "Receptive field: 60" in capsys.readouterr().out


def test_a_timm_model_trains_and_has_a_receptive_field(loaders, device, recwarn):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    before = weights_of(model)
    assert train(model, loaders, device, 1).status == "completed"
    assert_trained(model, before)
    recwarn.clear()
    rows = velasoka.receptive_field(timm.create_model("resnet18"), (3, 224, 224))
    assert [row["receptive_field"] for row in rows][-2:] == [435, 627]  # before and after pooling
    assert not recwarn.list


def test_albumentations_data_set_becomes_an_ordinary_data_loader(pictures, model, device):
    albumentations = pytest.importorskip("albumentations")
    to_tensor = pytest.importorskip("albumentations.pytorch").ToTensorV2()
    normalize = albumentations.Normalize(velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD)
    transform = albumentations.Compose([normalize, to_tensor])

    class Albumented(Dataset):
        def __len__(self):
            return len(pictures[1])

        def __getitem__(self, index):
            image = transform(image=pictures[1].data[index])["image"]
            return image, pictures[1].targets[index]

    loaders = velasoka.get_cifar10_data_loader([Albumented()] * 2, 32, device=device)
    own_loader = velasoka.get_cifar10_data_loader(pictures, device=device)[1]
    logits, _ = velasoka.predict(model, loaders[1], device)
    expected, _ = velasoka.predict(model, own_loader, device)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)  # normalised alike
