"""Packages that users bring, each as its own quick start uses it, with these models and loaders.

`interop-requirements.txt` has them; a test whose package is not installed is skipped.
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset

import velasoka

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

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
    datasets = Subset(pictures[0], [0]), pictures[1]
    return velasoka.get_cifar10_data_loader(datasets, device=device)[0]


@pytest.fixture
def all_fives(pictures, device):
    """A training loader whose `batch_transform` makes every number of an image 5."""

    def fill(images, labels):
        return torch.full_like(images, 5), labels

    return velasoka.get_cifar10_data_loader(pictures, 32, device=device, batch_transform=fill)[0]


def number_of_views(images):
    """How many different pictures there are among `images`."""
    return len(torch.stack([image.cpu() for image in images]).unique(dim=0))


def weights_of(model):
    return torch.cat([weight.detach().flatten().cpu() for weight in model.parameters()])


def assert_trained(model, before):
    assert (weights_of(model) != before).any()
    assert weights_of(model).isfinite().all()


# --- Lightning --------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture
def classifier_of(lightning):
    """Makes the quick start's module, which also keeps the images of each training batch."""

    class Classifier(lightning.LightningModule):
        def __init__(self, model, get_optimizer=velasoka.get_muon_optimizer):
            super().__init__()
            self.model = model
            self.get_optimizer = get_optimizer
            self.loss_fn = velasoka.get_ce_loss()
            self.images = []

        def training_step(self, batch, batch_idx):
            images, labels = batch
            self.images += images
            return self.loss_fn(self.model(images), labels)

        def validation_step(self, batch, batch_idx):
            images, labels = batch
            self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

        def predict_step(self, batch, batch_idx):
            return self.model(batch[0])

        def configure_optimizers(self):
            return self.get_optimizer(self.model)

    return Classifier


@pytest.fixture
def trainer_of(lightning):
    parts = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    quiet = dict.fromkeys(parts, False)

    def make(max_epochs=2, **options):
        return lightning.Trainer(max_epochs=max_epochs, devices=1, **quiet, **options)

    return make


@both_optimizers
def test_lightning_fits(model, loaders, classifier_of, trainer_of, get_optimizer):
    before = weights_of(model)
    trainer = trainer_of()
    trainer.fit(classifier_of(model, get_optimizer), *loaders)
    assert trainer.global_step == 2 * len(loaders[0])
    assert 0 <= trainer.callback_metrics["accuracy"] <= 1
    assert_trained(model, before)


made_anew = pytest.mark.parametrize(
    "options", [{}, {"overfit_batches": 1}], ids=["same loader", "loader made anew"]
)


@made_anew
def test_lightning_sees_images_augmented_anew(model, one_image, classifier_of, trainer_of, options):
    classifier = classifier_of(model)
    trainer_of(max_epochs=8, **options).fit(classifier, one_image)
    assert number_of_views(classifier.images) > 2  # shifted, not just flipped


@made_anew
def test_lightning_applies_batch_transform(model, all_fives, classifier_of, trainer_of, options):
    classifier = classifier_of(model)
    trainer_of(**options).fit(classifier, all_fives)
    assert torch.stack(classifier.images).unique().tolist() == [5]


def test_lightning_predicts_the_same_logits(model, loaders, device, classifier_of, trainer_of):
    logits = torch.cat(trainer_of().predict(classifier_of(model), loaders[1]))
    expected, _ = velasoka.predict(model, loaders[1], device, precision=torch.float32)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)


# --- Accelerate -------------------------------------------------------------------------------


@pytest.fixture
def accelerator(device):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=device.type == "cpu")


@both_optimizers
def test_accelerate_trains_on_images_shuffled_anew(
    pictures, model, loaders, accelerator, get_optimizer
):
    before = weights_of(model)
    model, optimizer, loader = accelerator.prepare(model, get_optimizer(model), loaders[0])
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


def test_accelerate_augments_anew_and_applies_batch_transform(accelerator, one_image, all_fives):
    one_image, all_fives = accelerator.prepare(one_image, all_fives)
    views = [images[0] for _ in range(8) for images, _ in one_image]
    assert number_of_views(views) > 2
    assert torch.cat([images for images, _ in all_fives]).unique().tolist() == [5]


# --- torch-lr-finder --------------------------------------------------------------------------


@both_optimizers
@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "mixed"])
def test_lr_finder_runs_through_the_rates(model, loaders, device, get_optimizer, is_mixed):
    torch_lr_finder = pytest.importorskip("torch_lr_finder")
    optimizer = get_optimizer(model, lr=1e-4)
    options = {}
    if is_mixed:
        options = {
            "amp_backend": "torch",
            "amp_config": {"device_type": device.type, "dtype": torch.bfloat16},
            "grad_scaler": torch.amp.GradScaler(device.type),
        }
    finder = torch_lr_finder.LRFinder(model, optimizer, velasoka.get_ce_loss(), device, **options)
    finder.range_test(loaders[0], end_lr=1e-2, num_iter=10)  # more batches than an epoch has
    assert finder.history["lr"][::9] == pytest.approx([1e-4, 1e-2])
    assert np.isfinite(finder.history["loss"]).all()
    assert weights_of(model).isfinite().all()


@both_optimizers
def test_lr_finder_before_and_after_a_run(model, loaders, device, get_optimizer):
    torch_lr_finder = pytest.importorskip("torch_lr_finder")
    optimizer = get_optimizer(model)
    loss_fn = velasoka.get_ce_loss(0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for _ in range(2):
        finder = torch_lr_finder.LRFinder(model, optimizer, loss_fn, device)
        finder.range_test(loaders[0], loaders[1], start_lr=1e-4, num_iter=3, smooth_f=0)
        tested = velasoka.test_cnn(model, loaders[1], device, progress=False)
        assert finder.history["loss"][-1] == pytest.approx(tested.loss, 0.02)
        finder.reset()
        history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 1, progress=False)
        assert max(history.learning_rates) == pytest.approx(peaks[0])
        assert [group["lr"] for group in optimizer.param_groups] == peaks


# --- torchinfo, ONNX, Grad-CAM ----------------------------------------------------------------


def test_torchinfo_counts_the_same_parameters():
    torchinfo = pytest.importorskip("torchinfo")
    model = velasoka.DilatedDepthwiseModel()
    summary = torchinfo.summary(model, input_size=(2, 3, 32, 32), verbose=0)
    assert summary.trainable_params == summary.total_params == velasoka.count_parameters(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's and torch's own
def test_an_exported_model_gives_the_same_logits_in_onnxruntime():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    model = velasoka.DilatedDepthwiseModel(fm_size=4).eval()
    images = torch.randn(3, 3, 32, 32)
    sizes = ({0: torch.export.Dim("batch")},)
    options = {"input_names": ["images"], "dynamic_shapes": sizes, "verbose": False}
    torch.onnx.export(model, (images[:2],), "net.onnx", dynamo=True, **options)
    (logits,) = onnxruntime.InferenceSession("net.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


def test_grad_cam_and_model_summary_leave_each_other_alone(model, loaders, capsys):
    pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
    images, _ = next(iter(loaders[1]))
    with pytorch_grad_cam.GradCAM(model.eval(), [model.c3]) as cam:
        heat = cam(images, targets=None)
        velasoka.model_summary(model, (3, 32, 32))
        np.testing.assert_allclose(cam(images, targets=None), heat, atol=0.01)
    assert heat.shape == (len(images), 32, 32)
    assert heat.any()
    assert "Receptive field: 60" in capsys.readouterr().out


# --- timm -------------------------------------------------------------------------------------


@both_optimizers
def test_timm_model_trains(loaders, device, get_optimizer):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    before = weights_of(model)
    loss_fn = velasoka.get_ce_loss()
    history = velasoka.start_cnn(
        model, get_optimizer(model), loss_fn, loaders, device, 1, progress=False
    )
    assert (history.status, history.test[0].total) == ("completed", 70)
    assert_trained(model, before)


def test_timm_model_has_a_receptive_field(recwarn):
    timm = pytest.importorskip("timm")
    rows = velasoka.receptive_field(timm.create_model("resnet18", num_classes=10), (3, 224, 224))
    assert [row["receptive_field"] for row in rows][-2:] == [435, 627]  # before and after pooling
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:receptive field")
@pytest.mark.parametrize(
    ("name", "options"), [("test_convnext", {}), ("test_vit", {"img_size": 32})]
)
def test_timm_model_is_summarised(name, options, capsys):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10, **options)
    velasoka.model_summary(model, input_size=(3, 32, 32))
    assert f"trainable: {velasoka.count_parameters(model):,}" in capsys.readouterr().out


# --- Albumentations ---------------------------------------------------------------------------


def test_albumentations_data_set_becomes_an_ordinary_data_loader(pictures, model, device):
    albumentations = pytest.importorskip("albumentations")
    to_tensor = pytest.importorskip("albumentations.pytorch").ToTensorV2()
    normalize = albumentations.Normalize(velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD)

    class Albumented(Dataset):
        def __init__(self, pictures, *steps):
            self.pictures = pictures
            self.transform = albumentations.Compose([*steps, normalize, to_tensor])

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, index):
            image = self.transform(image=self.pictures.data[index])["image"]
            return image, self.pictures.targets[index]

    dropout = albumentations.CoarseDropout(fill=128, p=0.5)
    train = Albumented(pictures[0], albumentations.HorizontalFlip(), dropout)
    test = Albumented(pictures[1])
    loaders = velasoka.get_cifar10_data_loader((train, test), 32, device=device)
    optimizer = velasoka.get_muon_optimizer(model)
    loss_fn = velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 2, progress=False)
    assert history.train[1].loss < history.train[0].loss
    own_loader = velasoka.get_cifar10_data_loader(pictures, device=device)[1]
    logits, _ = velasoka.predict(model, loaders[1], device)
    expected, _ = velasoka.predict(model, own_loader, device)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)  # normalised alike
