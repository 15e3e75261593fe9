import copy
import itertools
import random

import numpy as np
import pytest
import torch
from conftest import QUIET, linear_model, overflowing, random_batches, tiny_run, train, weights_of
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

import velasoka
from velasoka import *  # noqa: F403  # what notebooks do; pytest must not take test_cnn for a test

# --- Learning ---


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
def test_learns_the_synthetic_pictures(get_optimizer, device):
    velasoka.seed_everything()
    loaders = velasoka.get_cifar10_data_loader(velasoka.get_synthetic_dataset(5000, 500), device=device)
    model = velasoka.SimpleModel(fm_size=12)
    loss_fn = velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, get_optimizer(model), loss_fn, loaders, device, 6, target_accuracy=95, **QUIET)
    assert history.best_accuracy >= 95
    assert history.status == "target reached"


def test_the_notebook_cell_of_the_first_version_runs_unchanged(pictures, device, monkeypatch, tmp_path, capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 5)
            self.fc = nn.Linear(6 * 14 * 14, 10)

        def forward(self, x):
            return self.fc(torch.relu(nn.functional.max_pool2d(self.conv(x), 2)).view(-1, 6 * 14 * 14))

    monkeypatch.setattr(velasoka, "get_cifar10_dataset", lambda: pictures)
    path = velasoka.get_drive_path
    monkeypatch.setattr(velasoka, "get_drive_path", lambda folder, filename: f"{tmp_path}/{path(folder, filename)}")
    net = Net()

    dataset = velasoka.get_cifar10_dataset()
    data_loader = velasoka.get_cifar10_data_loader(dataset=dataset)
    optimizer = velasoka.get_sgd_optimizer(model=net)
    loss_fn = velasoka.get_ce_loss()
    velasoka.model_summary(model=net, input_size=(3, 32, 32), device=device)
    velasoka.start_cnn(
        model=net, optimizer=optimizer, loss_fn=loss_fn, data_loader=data_loader, device=device, epochs=8
    )
    with pytest.warns(UserWarning, match="not mounted"):
        velasoka.save_model(model=net, path=velasoka.get_drive_path(folder="Session-7", filename="net.pt"))

    printed = capsys.readouterr().out
    for words in ("\nEPOCH: 1", "\nEPOCH: 8", "Train Accuracy=", "Test Accuracy=", "loss=", "lr="):
        assert words in printed
    saved = tmp_path / "content/gdrive/My Drive/Colab Notebooks/EVA4/Session-7/net.pt"
    assert torch.equal(weights_of(velasoka.load_model(Net(), saved)), weights_of(net))


def test_star_import_brings_the_whole_interface():
    assert test_cnn is velasoka.test_cnn  # noqa: F405
    assert test_cnn.__test__ is False  # noqa: F405
    public = {name for name, value in vars(velasoka).items() if callable(value) and value.__module__ == "velasoka"}
    assert {name for name in public if not name.startswith("_")} <= set(velasoka.__all__)
    assert all(hasattr(velasoka, name) for name in velasoka.__all__)


# --- Counting ---


def test_every_image_weighs_the_same_in_a_last_batch_that_is_smaller(device):
    batches, model = random_batches((4, 4, 2)), linear_model().to(device)
    images, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    logits = model(images).detach()
    result = velasoka.test_cnn(model, batches, device, **QUIET)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=0.02)
    assert result.correct == (logits.argmax(1) == labels).sum().item()
    assert result.total == 10
    assert result.accuracy == pytest.approx(10 * result.correct)
    assert result.seconds > 0
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    trained = velasoka.train_cnn(model, batches, nn.CrossEntropyLoss(), frozen, device, **QUIET)
    assert (trained.loss, trained.correct) == (pytest.approx(result.loss, rel=1e-5), result.correct)


def test_takes_an_ordinary_data_loader(pictures, model, device):
    loaders = DataLoader(pictures[0], 64, shuffle=True), DataLoader(pictures[1], 64)
    history = train(model, loaders, device, epochs=1)
    assert (history.train[0].total, history.test[0].total) == (200, 70)


class Unsized:
    """Batches that can be gone through again and again, but not counted."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return zip(torch.randn(10, 3, 32, 32), range(10), strict=True)


@pytest.mark.parametrize("loader", [random_batches(), Unsized(random_batches()), DataLoader(Stream(), 4)])
def test_takes_any_iterable_of_batches(loader, device):
    history = train(linear_model(), (loader, loader), device, 2)
    assert [result.total for result in history.train + history.test] == [10] * 4


@pytest.mark.parametrize("as_batches", [False, True])
def test_a_distributed_sampler_is_told_the_epoch(as_batches, pictures, device):
    class Noting(DistributedSampler):
        epochs = ()

        def __iter__(self):
            self.epochs += (self.epoch,)
            return super().__iter__()

    sampler = Noting(pictures[1], num_replicas=2, rank=0)
    order = (
        {"batch_sampler": BatchSampler(sampler, 35, False)} if as_batches else {"sampler": sampler, "batch_size": 35}
    )
    train(linear_model(), (DataLoader(pictures[1], **order), random_batches()), device, 3)
    assert sampler.epochs == (0, 1, 2)


BATCH_NORMS = {
    "1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.BatchNorm1d(10)),
    "2d of one cell": lambda: nn.Sequential(nn.AvgPool2d(32), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10)),
}


@pytest.mark.parametrize("loop", ["train_cnn", "start_cnn"])
@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_a_last_batch_of_one_image_for_a_batch_norm_is_refused_naming_drop_last(norm, loop, device):
    model, batches = BATCH_NORMS[norm](), random_batches((4, 1))
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.01), nn.CrossEntropyLoss()
    arguments = {"train_cnn": (batches, loss_fn, optimizer), "start_cnn": (optimizer, loss_fn, (batches, batches))}
    with pytest.raises(ValueError, match=r"^[^\n]*drop_last[^\n]*$"):
        getattr(velasoka, loop)(model, *arguments[loop], device, **QUIET)
    assert velasoka.test_cnn(model, batches, device, **QUIET).total == 5


def test_another_error_in_a_batch_of_one_image_is_raised_as_it_is(device):
    def loss_fn(logits, labels):
        raise ValueError("of the user's own")

    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(ValueError, match=r"^of the user's own$"):
        velasoka.train_cnn(model, random_batches((1,)), loss_fn, optimizer, device, **QUIET)


# --- Testing ---


def test_test_leaves_the_model_as_it_was(model, loaders, device):
    model.to(device).train()
    model.c2.eval()
    modes, before = [module.training for module in model.modules()], weights_of(model)
    velasoka.test_cnn(model, loaders[1], device, **QUIET)
    velasoka.predict(model, loaders[1], device)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_an_error_too(model, device):
    model.train()
    with pytest.raises(ValueError, match="N×3×H×W"):
        velasoka.predict(model, [(torch.zeros(2, 1, 32, 32), torch.zeros(2).long())], device)
    assert model.training


def test_predict_returns_what_test_counts_in_order(model, loaders, device):
    logits, labels = velasoka.predict(model, loaders[1], device)
    assert logits.shape == (70, 10)
    assert logits.dtype == torch.float32
    assert logits.device.type == labels.device.type == "cpu"
    assert labels.tolist() == [index % 10 for index in range(70)]
    result = velasoka.test_cnn(model, loaders[1], device, **QUIET)
    assert (logits.argmax(1) == labels).sum().item() == result.correct


def test_tta_averages_six_views(device):
    model, batches = linear_model().to(device), random_batches((4,))
    images = batches[0][0].to(device)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    places = [images, images, padded[..., :32, :32], padded[..., 2:, 2:]]
    expected = torch.stack([model(view) for place in places for view in (place, place.flip(-1))]).mean(0)
    logits, _ = velasoka.predict(model, batches, device, tta=True)
    torch.testing.assert_close(logits, expected.detach().cpu(), atol=0.05, rtol=0.05)


# --- Epochs and schedule ---


@pytest.mark.parametrize("epochs", [1, 3])
def test_trains_the_epochs_it_was_asked_for(epochs, model, loaders, device):
    history = train(model, loaders, device, epochs)
    assert len(history.train) == len(history.test) == epochs
    assert history.status == "completed"
    assert history.best_accuracy == max(result.accuracy for result in history.test)
    assert history.test[history.best_epoch - 1].accuracy == history.best_accuracy


def test_the_best_epoch_is_the_one_with_the_best_test_accuracy(scripted):
    history, _ = tiny_run(epochs=3)
    assert (history.best_accuracy, history.best_epoch) == (50.0, 2)


def test_stops_after_the_epoch_that_reaches_the_target(model, loaders, device):
    history = train(model, loaders, device, 3, target_accuracy=1)
    assert len(history.test) == 1
    assert history.status == "target reached"


def test_images_are_shifted_when_they_come_again_and_in_the_first_epoch_only_mirrored(pictures, model, device):
    loaders = velasoka.get_cifar10_data_loader(pictures, 50, device=device, augment=True)
    plain = velasoka.get_cifar10_data_loader(pictures, 50, device=device, augment=False)[0]
    plain = torch.cat([images for images, _ in plain])
    found, flipped = ({image.numpy().tobytes() for image in part.cpu()} for part in (plain, plain.flip(-1)))
    shifted, mirrored = [], []  # how many of the 50 images of each batch of training

    def look(model, inputs):
        if model.training:
            images = [image.numpy().tobytes() for image in inputs[0].contiguous().cpu()]
            shifted.append(sum(image not in found | flipped for image in images))
            mirrored.append(sum(image in flipped for image in images))

    model.register_forward_pre_hook(look)
    train(model, loaders, device, 3)
    assert len(shifted) == 12
    assert max(shifted[:4]) == 0
    assert 0 < min(mirrored[:4]) <= max(mirrored[:4]) < 50
    assert min(shifted[4:]) > 35
    train(model, loaders, device, 1)
    assert max(shifted[12:]) == 0
    optimizer = velasoka.get_muon_optimizer(model)
    velasoka.train_cnn(model, loaders[0], velasoka.get_ce_loss(), optimizer, device, **QUIET)
    assert min(shifted[16:]) > 35  # they come again


class Rates(torch.optim.SGD):
    """SGD that notes the learning rate of every step."""

    def step(self, closure=None):
        self.rates = [*getattr(self, "rates", []), self.param_groups[0]["lr"]]
        return super().step(closure)


def test_the_learning_rate_warms_up_and_ends_near_zero_and_starts_afresh_in_a_second_run(device):
    model, batches = linear_model(), random_batches((2,) * 50)
    optimizer = Rates(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.rates = []
        velasoka.start_cnn(model, optimizer, nn.CrossEntropyLoss(), (batches, batches[:1]), device, 2, **QUIET)
        assert len(optimizer.rates) == 100
        assert optimizer.rates[0] < max(optimizer.rates) == pytest.approx(0.1)
        assert optimizer.rates.index(max(optimizer.rates)) < 5
        falling = optimizer.rates[optimizer.rates.index(max(optimizer.rates)) :]
        assert all(one > another for one, another in itertools.pairwise(falling))
        assert optimizer.rates[-1] < 0.002


def test_the_learning_rate_is_never_negative_however_many_batches_come(device):
    class Short(list):
        def __len__(self):
            return 2

    model, batches = linear_model(), Short(random_batches())
    optimizer = Rates(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="more batches than the 2 that its len"):
        velasoka.start_cnn(model, optimizer, nn.CrossEntropyLoss(), (batches, batches), device, 2, **QUIET)
    assert len(optimizer.rates) == 6
    assert min(optimizer.rates) >= 0


# --- Precision ---


@pytest.mark.parametrize(
    ("kind", "native", "dtype"),
    [
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", None, torch.float32),
    ],
)
def test_precision_is_what_the_hardware_computes_natively(kind, native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert velasoka._precision.__wrapped__(torch.device(kind)) is dtype


def test_the_models_of_this_module_compute_in_channels_last_and_others_need_not(loaders, device):
    for net, expected in (
        (velasoka.SimpleModel(fm_size=4), True),
        (nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()), False),
    ):
        seen = []
        first = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
        hook = lambda _, inputs, seen=seen: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))  # noqa: E731
        first.register_forward_pre_hook(hook)
        velasoka.predict(net, loaders[1], device)
        assert seen == [expected] * len(loaders[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trains_in_every_precision(dtype, pictures, device, monkeypatch):
    monkeypatch.setattr(velasoka, "_precision", lambda device: dtype)
    model = velasoka.DilatedDepthwiseModel(fm_size=4)
    seen = []
    model.c1[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    history = train(model, velasoka.get_cifar10_data_loader(pictures, 32, device=device), device, 3)
    assert set(seen) == {dtype}
    assert history.train[-1].loss < history.train[0].loss
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
def test_a_step_that_overflows_in_float16_changes_nothing_and_does_not_count_in_the_schedule(
    get_optimizer, float16, model, loaders, device
):
    model.to(device)
    optimizer, scaler = get_optimizer(model), torch.amp.GradScaler(device.type)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    loss_fn = overflowing(velasoka.get_ce_loss(), at=[0])
    options = {"scheduler": scheduler, "scheduler_interval": "batch", "scaler": scaler, **QUIET}
    velasoka.train_cnn(model, [next(iter(loaders[0]))], loss_fn, optimizer, device, **options)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(before, after)
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
    velasoka.train_cnn(model, loaders[0], velasoka.get_ce_loss(), optimizer, device, **options)
    assert scheduler.last_epoch == 1 + len(loaders[0]) - 1


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
@pytest.mark.parametrize("own_loader", [True, False])
def test_reads_the_device_a_few_times_a_second_at_most(
    own_loader, get_optimizer, float16, pictures, model, device, monkeypatch
):
    loader, _ = velasoka.get_cifar10_data_loader(pictures, 4, device=device)
    loader = loader if own_loader else list(loader)
    optimizer, reads, view = get_optimizer(model), [], torch.Tensor.numpy
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)

        # NumPy's view of a tensor on the CPU waits for nothing
        def counting(tensor, *args, read=read, **options):
            if tensor.device.type == device.type and (read, device.type) != (view, "cpu"):
                reads.append(read)
            return read(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counting)
    result = velasoka.train_cnn(model, loader, nn.CrossEntropyLoss(), optimizer, device)
    # mirror pairs and Muon's norms, once; sums and scale, at the start, at the end, twice a second
    assert len(reads) <= 2 + 3 * (2 + 2 * result.seconds)


# --- Optimisers and loss ---


def assert_move_alike(ours, theirs, device):
    """Step two pairs of model and optimiser on the same batches, and compare the weights."""
    for images, _ in random_batches():
        for model, optimizer in (ours, theirs):
            optimizer.zero_grad()
            model(images.to(device)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(weights_of(ours[0]), weights_of(theirs[0]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sgd_is_torchs_with_nesterov_momentum_and_weight_decay(momentum, device):
    ours, theirs = linear_model().to(device), linear_model().to(device)
    one = velasoka.get_sgd_optimizer(ours, lr=0.03, momentum=momentum)
    settings = {"momentum": momentum, "nesterov": momentum > 0, "weight_decay": 5e-4}
    two = torch.optim.SGD(theirs.parameters(), lr=0.03, **settings)
    assert_move_alike((ours, one), (theirs, two), device)


def test_muon_moves_what_is_no_filter_as_torchs_sgd_does(device):
    ours, theirs = linear_model().to(device), linear_model().to(device)
    one = velasoka.get_muon_optimizer(ours, lr=0.01)
    two = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    assert_move_alike((ours, one), (theirs, two), device)


@pytest.mark.parametrize(("batch_size", "lr"), [(16, 0.025), (64, 0.05), (256, 0.1), (1024, 0.2)])
def test_the_default_rate_follows_the_square_root_of_the_batch_size(batch_size, lr, model):
    optimizer = velasoka.get_muon_optimizer(model, batch_size=batch_size)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr] * 3)
    optimizer = velasoka.get_muon_optimizer(model, lr=0.3, batch_size=batch_size)  # one set by hand is as it is
    assert [group["lr"] for group in optimizer.param_groups] == [0.3] * 3


def test_label_smoothing_lowers_the_target():
    logits, labels = torch.randn(5, 10), torch.arange(5)
    for smoothing in (0.0, 0.3):
        expected = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert velasoka.get_ce_loss(smoothing)(logits, labels) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (32, 3, 3, 3), (8, 4, 1, 1)])
def test_a_step_is_made_orthogonal_whatever_its_shape_and_however_small(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(velasoka, "_precision", lambda device: dtype)
    filters = 1e-6 * torch.randn(shape, device=device)
    result = velasoka._orthogonalise(filters, steps=5)
    values = torch.linalg.svdvals(result.flatten(1))
    assert result.dtype is torch.float32
    assert values.min() > 0.5
    assert values.max() < 1.5
    left, _, right = torch.linalg.svd(filters.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), 0) > 0.95


def test_muon_turns_filters_and_keeps_their_norm(device):
    layer = nn.Conv2d(8, 16, 3).to(device)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 900, 10).to(device))
    optimizer, before = velasoka.get_muon_optimizer(model, lr=0.01), layer.weight.detach().clone()
    model(torch.randn(2, 8, 32, 32, device=device)).square().sum().backward()
    optimizer.step()
    assert layer.weight.norm().item() == pytest.approx(before.norm().item(), rel=0.02)
    assert 0.002 < (layer.weight - before).norm() / before.norm() < 0.05


def test_muon_has_no_weight_decay(model):
    optimizer = velasoka.get_muon_optimizer(model)
    sgd = [parameter for group in optimizer.param_groups if not group["muon"] for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in sgd]
    for parameter in sgd:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, sgd, strict=True))


def test_muon_moves_each_kind_of_parameter_at_its_own_pace(model):
    optimizer, pace = velasoka.get_muon_optimizer(model, lr=0.1), {}
    for group in optimizer.param_groups:
        pace |= dict.fromkeys(
            group["params"], ("muon" if group["muon"] else "sgd", round(group["lr"] * group["lr_scale"], 9))
        )
    assert set(pace) == set(model.parameters())
    norm, depthwise = model.c1[1], model.c2[3]
    assert pace[model.c1[0].weight] == pace[model.c3[3].weight] == ("muon", 0.1)
    assert pace[norm.bias] == pace[depthwise.weight] == ("sgd", 2.0)
    assert pace[norm.weight] == pace[model.c1[0].bias] == pace[model.c4[1].weight] == ("sgd", 0.2)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Flatten(), nn.Linear(3072, 10)),
        lambda: (nn.Conv2d(3, 10, 32), nn.Flatten()),
        lambda: (nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(3600, 10)),
        lambda: (nn.Conv2d(3, 4, 3).requires_grad_(False), nn.Flatten(), nn.Linear(3600, 10)),
    ],
    ids=["no convolution", "only convolutions", "depthwise", "frozen"],
)
def test_muon_takes_any_model_and_leaves_frozen_parameters_alone(layers, device):
    model = nn.Sequential(*layers())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, (random_batches(), random_batches()), device, 1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new.cpu()) != new.requires_grad


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
def test_optimisers_do_not_mind_how_weights_are_laid_out(get_optimizer, device):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = velasoka.SimpleModel(fm_size=4).to(device, memory_format=memory_format)
        optimizer = get_optimizer(model)
        for _ in range(2):
            optimizer.zero_grad()
            for parameter in model.parameters():
                (parameter * torch.randn(parameter.shape, device=device)).sum().backward()
            optimizer.step()
        results.append(weights_of(model))
    torch.testing.assert_close(*results, atol=0.03, rtol=0)


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
def test_optimisers_go_on_from_their_state_dict(get_optimizer, model, device):
    def step(net, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(4, 3, 32, 32, device=device)).square().sum().backward()
        optimizer.step()

    model.to(device)
    one = get_optimizer(model)
    step(model, one, 1)
    twin = copy.deepcopy(model)
    two = get_optimizer(twin, lr=3.0)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    step(model, one, 2)
    step(twin, two, 2)
    assert torch.equal(weights_of(model), weights_of(twin))


# --- Seeds ---


def test_seed_everything_seeds_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    velasoka.seed_everything(3)
    first = draw()
    velasoka.seed_everything(3)
    assert first == draw()
    velasoka.seed_everything(4)
    assert not set(first) & set(draw())


@pytest.fixture
def any_algorithm():
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_is_switched_on(any_algorithm):
    velasoka.seed_everything(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("before", "warn_only"), [(True, False), (True, True), (False, False)])
def test_seed_everything_leaves_the_deterministic_setting_alone(before, warn_only, any_algorithm):
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    velasoka.seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled() == before
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
