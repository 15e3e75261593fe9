"""The packages that users bring, each as its own quick start uses it, with this module's models and loaders."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

import accelerate
import albumentations
import lightning
import numpy as np
import onnx
import onnxruntime
import pytest
import pytorch_grad_cam
import timm
import timm.scheduler
import torch
import torch.nn.functional as F
import torch_lr_finder
import torchinfo
from conftest import QUIET, train, weights_of
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10

import velasoka

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")  # its own affairs
both_optimizers = pytest.mark.parametrize(
    "get_optimizer", [velasoka.get_sgd_optimizer, velasoka.get_muon_optimizer], ids=["sgd", "muon"]
)


@pytest.fixture
def model(device):
    return velasoka.SimpleModel(fm_size=4).to(device)


@pytest.fixture
def one_image(pictures, device):
    """A training loader of a single image."""
    return velasoka.get_cifar10_data_loader((Subset(pictures[0], [0]), pictures[1]), device=device)[0]


def number_of_views(images):
    """How many different pictures there are among `images`."""
    return len(torch.stack([image.cpu() for image in images]).unique(dim=0))


def noted_rates(model, optimizer):
    """A list that gets the learning rate of every training batch."""
    rates, rate = [], lambda: optimizer.param_groups[0]["lr"]
    model.register_forward_pre_hook(lambda *_: rates.append(rate()) if model.training else None)
    return rates


def assert_trained(model, before):
    assert (weights_of(model) != before).any()
    assert weights_of(model).isfinite().all()


# --- torch-lr-finder -------------------------------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "mixed"])
def test_lr_finder_runs_through_the_rates(model, loaders, device, get_optimizer, is_mixed):
    optimizer, options = get_optimizer(model, lr=1e-4), {}
    if is_mixed:
        config = {"device_type": device.type, "dtype": torch.bfloat16}
        options = {"amp_backend": "torch", "amp_config": config, "grad_scaler": torch.amp.GradScaler(device.type)}
    finder = torch_lr_finder.LRFinder(model, optimizer, velasoka.get_ce_loss(), device, **options)
    finder.range_test(loaders[0], end_lr=1e-2, num_iter=10)  # more batches than an epoch has
    assert finder.history["lr"][::9] == pytest.approx([1e-4, 1e-2])
    assert np.isfinite(finder.history["loss"]).all()
    assert weights_of(model).isfinite().all()


@both_optimizers
def test_lr_finder_before_and_after_a_run(model, loaders, device, get_optimizer):
    optimizer, loss_fn = get_optimizer(model), velasoka.get_ce_loss(0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rates = noted_rates(model, optimizer)
    for _ in range(2):
        finder = torch_lr_finder.LRFinder(model, optimizer, loss_fn, device)
        finder.range_test(loaders[0], val_loader=loaders[1], start_lr=1e-4, num_iter=3, smooth_f=0)
        tested = velasoka.test_cnn(model, loaders[1], device, **QUIET)
        assert finder.history["loss"][-1] == pytest.approx(tested.loss, 0.02)
        finder.reset()
        rates.clear()
        velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 1, **QUIET)
        assert max(rates) == pytest.approx(peaks[0])
        assert [group["lr"] for group in optimizer.param_groups] == peaks


# --- Lightning -------------------------------------------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    """The quick start's module around `model`; keeps the images of each training batch."""

    def __init__(self, model, get_optimizer):
        super().__init__()
        self.model, self.get_optimizer, self.loss_fn, self.images = model, get_optimizer, velasoka.get_ce_loss(), []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.images += images
        return self.loss_fn(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])

    def configure_optimizers(self):
        return self.get_optimizer(self.model)


def trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="auto", devices=1, **quiet | options)


@both_optimizers
def test_lightning_fits(model, loaders, get_optimizer):
    before, fitting = weights_of(model), trainer(max_epochs=2)
    fitting.fit(Classifier(model, get_optimizer), *loaders)
    assert fitting.global_step == 2 * len(loaders[0])
    assert 0 <= fitting.callback_metrics["accuracy"] <= 1
    assert_trained(model, before)


@both_optimizers
def test_lightning_clips_gradients_where_float16_is_fastest(model, loaders, float16, get_optimizer):
    before, clipping = weights_of(model), trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=1.0)
    clipping.fit(Classifier(model, get_optimizer), loaders[0])
    assert_trained(model, before)


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 1}], ids=["same loader", "loader made anew"])
def test_lightning_sees_images_augmented_anew_in_each_epoch(model, one_image, options):
    classifier = Classifier(model, velasoka.get_sgd_optimizer)
    trainer(max_epochs=8, **options).fit(classifier, one_image)
    assert number_of_views(classifier.images) > 2  # shifted, not just flipped


def test_lightning_predicts_the_same_logits(model, loaders, device):
    logits = torch.cat(trainer().predict(Classifier(model, None), loaders[1]))  # makes the loader anew
    expected, _ = velasoka.predict(model, loaders[1], device)
    torch.testing.assert_close(logits.cpu(), expected, rtol=0.02, atol=0.02)  # mixed precision only in the latter


# --- Accelerate ------------------------------------------------------------------------------------------------------


@both_optimizers
def test_accelerate_trains_on_images_shuffled_and_augmented_anew(
    pictures, model, loaders, one_image, device, get_optimizer
):
    before, accelerator = weights_of(model), accelerate.Accelerator(cpu=device.type == "cpu")
    parts = model, get_optimizer(model), loaders[0], one_image
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
    assert number_of_views([image for _ in range(8) for images, _ in one_image for image in images]) > 2


# --- Grad-CAM, torchinfo, ONNX ---------------------------------------------------------------------------------------


def test_grad_cam_and_model_summary_leave_each_other_alone(model, loaders, capsys):
    images, _ = next(iter(loaders[1]))
    with pytorch_grad_cam.GradCAM(model.eval(), [model.c3]) as cam:
        heat = cam(images, targets=None)
        seen = list(cam.activations_and_grads.activations)
        velasoka.model_summary(model, (3, 32, 32))
        assert all(now is then for now, then in zip(cam.activations_and_grads.activations, seen, strict=True))
        np.testing.assert_allclose(cam(images, targets=None), heat, atol=0.01)
    assert heat.shape == (len(images), 32, 32)
    assert heat.any()
    assert "Receptive field: 60" in capsys.readouterr().out


def test_torchinfo_counts_the_same_parameters():
    model = velasoka.DilatedDepthwiseModel()
    summary = torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0)
    assert summary.trainable_params == summary.total_params == velasoka.count_parameters(model)


def test_an_exported_model_gives_the_same_logits_in_onnxruntime():
    model, images = velasoka.DilatedDepthwiseModel(fm_size=4).eval(), torch.randn(3, 3, 32, 32)
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    torch.onnx.export(model, (images[:2],), "net.onnx", input_names=["images"], dynamo=True, verbose=False, **batch)
    (logits,) = onnxruntime.InferenceSession("net.onnx").run(None, {"images": images.numpy()})
    onnx.checker.check_model("net.onnx")
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-5)


# --- timm ------------------------------------------------------------------------------------------------------------


@both_optimizers
def test_timm_model_trains(loaders, device, get_optimizer):
    model = timm.create_model("test_resnet", num_classes=10)
    before = weights_of(model)
    history = velasoka.start_cnn(model, get_optimizer(model), velasoka.get_ce_loss(), loaders, device, 1, **QUIET)
    assert (history.status, history.test[0].total) == ("completed", 70)
    assert_trained(model, before)


@pytest.mark.filterwarnings("ignore:the receptive field leaves out")
@pytest.mark.parametrize(("name", "options"), [("test_convnext", {}), ("test_vit", {"img_size": 32})])
def test_timm_model_is_summarised(name, options, capsys):
    model = timm.create_model(name, num_classes=10, **options)
    velasoka.model_summary(model, input_size=(3, 32, 32))
    assert f"trainable: {velasoka.count_parameters(model):,}" in capsys.readouterr().out


def test_timm_scheduler_is_refused_before_training(model, loaders, device):
    optimizer, before = velasoka.get_sgd_optimizer(model), weights_of(model)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=2)  # its `step` takes the number of the epoch
    with pytest.raises(ValueError, match="CosineLRScheduler"):
        velasoka.start_cnn(model, optimizer, velasoka.get_ce_loss(), loaders, device, 2, scheduler=scheduler, **QUIET)
    assert weights_of(model).equal(before)


# --- albumentations --------------------------------------------------------------------------------------------------


class Albumented(CIFAR10):
    """torchvision's `CIFAR10`, of `pictures`, through an albumentations transform, as many a notebook has it."""

    def __init__(self, pictures, *steps):
        normalize = albumentations.Normalize(velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD)
        self.data, self.targets, self.classes = pictures.data, pictures.targets, pictures.classes
        self.transform = albumentations.Compose([*steps, normalize, albumentations.pytorch.ToTensorV2()])

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


def test_albumentations_dataset_trains(pictures, model, device):
    steps = albumentations.HorizontalFlip(p=0.5), albumentations.CoarseDropout(fill=128, p=0.5)
    loaders = DataLoader(Albumented(pictures[0], *steps), 32, shuffle=True), DataLoader(Albumented(pictures[1]), 32)
    history = train(model, loaders, device)
    assert history.train[1].loss < history.train[0].loss
    logits, _ = velasoka.predict(model, loaders[1], device)
    expected, _ = velasoka.predict(model, velasoka.get_cifar10_data_loader(pictures, device=device)[1], device)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)  # normalised alike


def test_albumentations_transform_is_refused_naming_the_way_out(pictures):
    datasets = [Albumented(part, albumentations.InvertImg(p=1)) for part in pictures]
    with pytest.raises(ValueError, match="DataLoader takes any dataset"):
        velasoka.get_cifar10_data_loader(datasets, device="cpu")


# --- The course's next notebook --------------------------------------------------------------------------------------


def conv(inside, outside, side, stride=1):
    layer = nn.Conv2d(inside, outside, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.layers = nn.Sequential(conv(inside, outside, 3, stride), nn.ReLU(), conv(outside, outside, 3))
        self.shortcut = conv(inside, outside, 1, stride) if inside != outside else nn.Sequential()

    def forward(self, x):
        out = self.layers(x)
        out += self.shortcut(x)
        return F.relu(out)


def resnet18(width):
    layers, inside = [conv(3, width, 3), nn.ReLU()], width
    for outside in (width, 2 * width, 4 * width, 8 * width):
        layers += [BasicBlock(inside, outside, outside // inside), BasicBlock(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(inside, 10))


def test_next_notebook(pictures, device, capsys):
    data_loader = velasoka.get_cifar10_data_loader(dataset=pictures, batch_size=20)  # ten batches an epoch
    model = resnet18(width=4).to(device)
    velasoka.model_summary(model=model, input_size=(3, 32, 32), device=device)
    optimizer = velasoka.get_sgd_optimizer(model=model, lr=0.01, momentum=0.9)
    loss_fn = velasoka.get_ce_loss()
    scheduler = velasoka.get_step_lr_scheduler(optimizer=optimizer, step_size=1)
    rates = noted_rates(model, optimizer)
    history = velasoka.start_cnn(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        data_loader=data_loader,
        device=device,
        epochs=2,
        scheduler=scheduler,
    )
    assert history.status == "completed"
    assert history.train[1].loss < history.train[0].loss
    assert rates == pytest.approx([0.01] * 10 + [0.001] * 10)
    assert "Receptive field: 133" in capsys.readouterr().out
