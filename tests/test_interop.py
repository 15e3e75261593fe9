"""The packages that users bring, each as its own quick start uses it, with this module's models and loaders."""

import accelerate
import lightning
import numpy as np
import onnx
import onnxruntime
import pytest
import timm.data
import timm.loss
import timm.scheduler
import torch
import torch.nn.functional as F
import torchinfo
from conftest import QUIET, weights_of
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Subset, default_collate
from torch_lr_finder import LRFinder
from torchvision.datasets import CIFAR10

import velasoka

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")  # its own affairs
both_optimizers = pytest.mark.parametrize(
    "make_optimizer", [velasoka.get_sgd_optimizer, velasoka.get_muon_optimizer], ids=["sgd", "muon"]
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


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def recorded_rates(model, optimizer):
    """A list that gets the learning rate of every training batch."""
    rates = []
    model.register_forward_pre_hook(
        lambda *_: rates.append(optimizer.param_groups[0]["lr"]) if model.training else None
    )
    return rates


# --- torch-lr-finder -------------------------------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "mixed"])
def test_lr_finder_runs_through_the_rates(model, loaders, device, make_optimizer, is_mixed):
    optimizer, options = make_optimizer(model, lr=1e-4), {}
    if is_mixed:
        config = {"device_type": device.type, "dtype": torch.bfloat16}
        options = {"amp_backend": "torch", "amp_config": config, "grad_scaler": torch.amp.GradScaler(device.type)}
    finder = LRFinder(model, optimizer, velasoka.get_ce_loss(), device, **options)
    finder.range_test(loaders[0], end_lr=1e-2, num_iter=10)  # more batches than an epoch has
    assert finder.history["lr"][::9] == pytest.approx([1e-4, 1e-2])
    assert np.isfinite(finder.history["loss"]).all()
    assert weights_of(model).isfinite().all()


@both_optimizers
def test_lr_finder_validates_on_the_test_loader(model, loaders, device, make_optimizer):
    finder = LRFinder(model, make_optimizer(model, lr=1e-4), velasoka.get_ce_loss(0), device)
    finder.range_test(loaders[0], val_loader=loaders[1], end_lr=1e-2, num_iter=3, step_mode="linear", smooth_f=0)
    assert finder.history["loss"][-1] == pytest.approx(velasoka.test_cnn(model, loaders[1], device, **QUIET).loss, 0.02)


@both_optimizers
def test_lr_finder_before_and_after_a_run(model, loaders, device, make_optimizer):
    optimizer, loss_fn = make_optimizer(model), velasoka.get_ce_loss()
    peaks = rates_of(optimizer)
    rates = recorded_rates(model, optimizer)
    for _ in range(2):
        finder = LRFinder(model, optimizer, loss_fn, device)
        finder.range_test(loaders[0], start_lr=1e-4, num_iter=3)
        finder.reset()
        assert rates_of(optimizer) == peaks
        rates.clear()
        velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 1, **QUIET)
        assert max(rates) == pytest.approx(peaks[0])
        assert rates_of(optimizer) == peaks


# --- Lightning -------------------------------------------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    """The quick start's module around `model`; keeps the images of each training batch."""

    def __init__(self, model, make_optimizer):
        super().__init__()
        self.model, self.make_optimizer, self.loss_fn, self.images = model, make_optimizer, velasoka.get_ce_loss(), []

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
        return self.make_optimizer(self.model)


def trainer(**options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="auto", devices=1, **quiet | options)


@both_optimizers
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed", "gradient_clip_val": 1.0}], ids=["float32", "bf16-clipped"]
)
def test_lightning_fits(model, loaders, make_optimizer, options):
    before = weights_of(model)
    fitting = trainer(max_epochs=2, **options)
    fitting.fit(Classifier(model, make_optimizer), *loaders)
    assert fitting.global_step == 2 * len(loaders[0])
    assert 0 <= fitting.callback_metrics["accuracy"] <= 1
    assert (weights_of(model) != before).any() and weights_of(model).isfinite().all()


@both_optimizers
def test_lightning_clips_gradients_where_float16_is_fastest(model, loaders, float16, make_optimizer):
    clipping = trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=1.0)
    clipping.fit(Classifier(model, make_optimizer), loaders[0])
    assert weights_of(model).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"overfit_batches": 1}], ids=["same-loader", "loader-made-anew"])
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
def test_accelerate_trains(model, loaders, device, make_optimizer):
    before = weights_of(model)
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loaders[0])
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert len(loader) == len(loaders[0])
    assert (weights_of(model) != before).any() and loss.isfinite()


def test_accelerate_sees_images_shuffled_and_augmented_anew_in_each_epoch(pictures, loaders, one_image, device):
    accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
    loader, one_image = accelerator.prepare(loaders[0], one_image)
    orders = [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(pictures[0].targets) and orders[0] != orders[1]
    assert number_of_views([image for _ in range(8) for images, _ in one_image for image in images]) > 2


# --- Averaged weights ------------------------------------------------------------------------------------------------


def test_averaged_model_gets_its_batch_norms_from_the_loader(model, loaders, device):
    optimizer, averaged, trained = velasoka.get_muon_optimizer(model), AveragedModel(model), []
    for _ in range(2):
        velasoka.train_cnn(model, loaders[0], velasoka.get_ce_loss(), optimizer, device, **QUIET)
        averaged.update_parameters(model)
        trained.append(model.c4[1].weight.detach().clone())
    update_bn(loaders[0], averaged, device)
    torch.testing.assert_close(averaged.module.c4[1].weight, torch.stack(trained).mean(0))
    assert averaged.module.c1[1].num_batches_tracked == len(loaders[0])
    assert velasoka.test_cnn(averaged, loaders[1], device, **QUIET).total == 70


def test_averaged_weights_load_into_the_plain_model(model, device):
    averaged = AveragedModel(model)
    velasoka.save_model(averaged, "averaged.pt")
    plain = velasoka.load_model(velasoka.SimpleModel(fm_size=4), "averaged.pt", device)
    assert weights_of(plain).equal(weights_of(model))


# --- Grad-CAM and torchinfo ------------------------------------------------------------------------------------------


def test_grad_cam_draws_a_heat_map(model, loaders):
    images, labels = next(iter(loaders[1]))
    targets = [ClassifierOutputTarget(label) for label in labels.tolist()]
    with GradCAM(model.eval(), [model.c3]) as cam:
        heat, mirrored = cam(images, targets), cam(images.flip(-1), targets)
    assert heat.shape == (len(images), 32, 32) and heat.min() >= 0 and 0.5 < heat.max() <= 1
    np.testing.assert_allclose(mirrored[..., ::-1], heat, atol=0.02)  # the model treats a mirror image alike


def test_grad_cam_and_model_summary_leave_each_other_alone(model, loaders, capsys):
    images, _ = next(iter(loaders[1]))
    with GradCAM(model.eval(), [model.c3]) as cam:
        cam(images, targets=None)
        seen = list(cam.activations_and_grads.activations)
        velasoka.model_summary(model, (3, 32, 32))
        assert velasoka.receptive_field(model)[-1]["receptive_field"] == 60
        assert all(now is then for now, then in zip(cam.activations_and_grads.activations, seen, strict=True))
        assert cam(images, targets=None).any()
    assert "Receptive field: 60" in capsys.readouterr().out


@pytest.mark.parametrize("name", velasoka.MODELS)
def test_torchinfo_counts_the_same_parameters(name):
    model = velasoka.MODELS[name]()
    summary = torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0)
    assert summary.trainable_params == summary.total_params == velasoka.count_parameters(model)


# --- timm ------------------------------------------------------------------------------------------------------------


@both_optimizers
def test_timm_model_trains(loaders, device, make_optimizer):
    model = timm.create_model("test_resnet", num_classes=10)
    before = weights_of(model)
    history = velasoka.start_cnn(
        model, make_optimizer(model), velasoka.get_ce_loss(), loaders, device, epochs=1, **QUIET
    )
    assert history.status == "completed" and history.test[0].total == 70
    assert (weights_of(model) != before).any() and weights_of(model).isfinite().all()


@pytest.mark.filterwarnings("ignore:the receptive field leaves out")
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_timm_model_is_summarised(name, capsys):
    model = timm.create_model(name, num_classes=10, **{"img_size": 32} if name == "test_vit" else {})
    velasoka.model_summary(model, input_size=(3, 32, 32))
    assert f"trainable: {velasoka.count_parameters(model):,}" in capsys.readouterr().out


def test_timm_mixup_trains(pictures, loaders, model, device):
    mixup = timm.data.Mixup(cutmix_alpha=1.0, num_classes=10)
    soft = DataLoader(pictures[0], 20, shuffle=True, collate_fn=lambda batch: mixup(*default_collate(batch)))
    optimizer, loss_fn = velasoka.get_muon_optimizer(model), timm.loss.SoftTargetCrossEntropy()
    result = velasoka.train_cnn(model, soft, loss_fn, optimizer, device, **QUIET)
    assert result.total == 200 and 0 < result.accuracy < 100


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
        import albumentations
        from albumentations.pytorch import ToTensorV2

        normalize = albumentations.Normalize(velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD)
        self.data, self.targets, self.classes = pictures.data, pictures.targets, pictures.classes
        self.transform = albumentations.Compose([*steps, normalize, ToTensorV2()])

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


@pytest.fixture
def albumentations(monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for a newer version
    import albumentations

    return albumentations


def test_albumentations_dataset_trains(pictures, model, device, albumentations):
    steps = albumentations.HorizontalFlip(p=0.5), albumentations.CoarseDropout(fill=128, p=0.5)
    loaders = DataLoader(Albumented(pictures[0], *steps), 32, shuffle=True), DataLoader(Albumented(pictures[1]), 32)
    optimizer, loss_fn = velasoka.get_muon_optimizer(model), velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, epochs=2, **QUIET)
    assert history.train[1].loss < history.train[0].loss
    logits, _ = velasoka.predict(model, loaders[1], device)
    expected, _ = velasoka.predict(model, velasoka.get_cifar10_data_loader(pictures, device=device)[1], device)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)  # normalised alike


def test_albumentations_transform_is_applied_or_refused(pictures, device, albumentations):
    datasets = [Albumented(part, albumentations.InvertImg(p=1)) for part in pictures]
    try:
        _, loader = velasoka.get_cifar10_data_loader(datasets, device=device)
    except (TypeError, ValueError) as error:
        assert "DataLoader" in str(error)
    else:
        torch.testing.assert_close(next(iter(loader))[0][0].cpu(), datasets[1][0][0])


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", velasoka.MODELS)
def test_exported_model_gives_the_same_logits_in_onnxruntime(name):
    model, images = velasoka.MODELS[name](fm_size=4).eval(), torch.randn(3, 3, 32, 32)
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    torch.onnx.export(model, (images[:2],), "net.onnx", input_names=["images"], dynamo=True, verbose=False, **batch)
    (logits,) = onnxruntime.InferenceSession("net.onnx").run(None, {"images": images.numpy()})
    onnx.checker.check_model("net.onnx")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


# --- The course's next notebook --------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != self.expansion * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, self.expansion * planes, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(self.expansion * planes),
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, block, num_blocks, num_classes=10, width=64):
        super().__init__()
        self.in_planes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._make_layer(block, width, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(block, 2 * width, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, num_blocks[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, num_blocks[3], stride=2)
        self.linear = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(self, block, planes, num_blocks, stride):
        layers = []
        strides = [stride] + [1] * (num_blocks - 1)
        for stride in strides:
            layers.append(block(self.in_planes, planes, stride))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = self.layer4(out)
        out = F.avg_pool2d(out, 4)
        out = out.view(out.size(0), -1)
        return self.linear(out)


def ResNet18(width=64):  # noqa: N802 — the notebook's name
    return ResNet(BasicBlock, [2, 2, 2, 2], width=width)


@pytest.mark.parametrize(
    ("helper", "options", "rates"),
    [
        ("get_step_lr_scheduler", {"step_size": 8}, [0.01, 0.01, 0.01]),  # of the first epoch, the second, and after
        ("get_step_lr_scheduler", {"step_size": 1}, [0.01, 1e-3, 1e-4]),
        ("get_multi_step_lr_scheduler", {"milestone": [1]}, [0.01, 1e-3, 1e-3]),
    ],
    ids=["step 8", "step 1", "milestone 1"],
)
def test_next_notebook(pictures, device, capsys, helper, options, rates):
    data_loader = velasoka.get_cifar10_data_loader(dataset=pictures, batch_size=20)  # ten batches an epoch
    model = ResNet18(width=4).to(device)
    velasoka.model_summary(model=model, input_size=(3, 32, 32), device=device)
    optimizer = velasoka.get_sgd_optimizer(model=model, lr=0.01, momentum=0.9)
    loss_fn = velasoka.get_ce_loss()
    scheduler = getattr(velasoka, helper)(optimizer=optimizer, **options)
    seen = recorded_rates(model, optimizer)
    history = velasoka.start_cnn(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        data_loader=data_loader,
        device=device,
        epochs=2,
        scheduler=scheduler,
    )
    assert history.status == "completed" and history.train[1].loss < history.train[0].loss
    assert seen + rates_of(optimizer) == pytest.approx([rates[0]] * 10 + [rates[1]] * 10 + [rates[2]])
    assert "Receptive field: 133" in capsys.readouterr().out
