"""The loops and the run: what they count, keep, refuse and say."""

import itertools
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BATCHES,
    QUIET,
    Breaking,
    linear_model,
    overflowing,
    random_batches,
    sgd,
    tiny_run,
    train,
    weights_of,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

import velasoka
from velasoka import *  # noqa: F403  # what notebooks do; pytest must not take test_cnn for a test

CE = nn.CrossEntropyLoss()
FLOAT32 = {"precision": torch.float32, "progress": False}
LOOPS = ["train_cnn", "test_cnn", "predict", "start_cnn"]


def call(loop, model, batches, optimizer=None, device="cpu", loss_fn=CE, **options):
    """Call a loop by its name, for one epoch if it trains."""
    optimizer = optimizer or sgd(model)
    arguments = {
        "train_cnn": (batches, loss_fn, optimizer, device),
        "start_cnn": (optimizer, loss_fn, (batches, batches), device, 1),
    }.get(loop, (batches, device))
    if loop != "predict":
        options = QUIET | options
    return getattr(velasoka, loop)(model, *arguments, **options)


# --- Learning ---


@pytest.mark.parametrize("name", ["get_muon_optimizer", "get_sgd_optimizer"])
def test_learns_the_synthetic_pictures(name, device):
    velasoka.seed_everything()
    pair = velasoka.get_synthetic_dataset(3000, 500)
    loaders = velasoka.get_cifar10_data_loader(pair, device=device)
    model = velasoka.SimpleModel(fm_size=12)
    optimizer = getattr(velasoka, name)(model)
    options = QUIET | {"target_accuracy": 95}
    history = velasoka.start_cnn(model, optimizer, CE, loaders, device, 8, **options)
    assert history.status == "target reached"
    assert history.best_accuracy >= 95


def test_the_notebook_cell_of_the_first_version_runs_unchanged(
    pictures, device, monkeypatch, tmp_path, capsys
):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 5)
            self.fc = nn.Linear(6 * 14 * 14, 10)

        def forward(self, x):
            x = F.max_pool2d(self.conv(x), 2)
            return self.fc(torch.relu(x).view(-1, 6 * 14 * 14))

    drive = velasoka.get_drive_path
    monkeypatch.setattr(velasoka, "get_cifar10_dataset", lambda: pictures)
    monkeypatch.setattr(velasoka, "get_drive_path", lambda **names: f"{tmp_path}{drive(**names)}")
    net = Net()

    dataset = velasoka.get_cifar10_dataset()
    data_loader = velasoka.get_cifar10_data_loader(dataset=dataset)
    optimizer = velasoka.get_sgd_optimizer(model=net)
    loss_fn = velasoka.get_ce_loss()
    velasoka.model_summary(model=net, input_size=(3, 32, 32), device=device)
    velasoka.start_cnn(
        model=net,
        optimizer=optimizer,
        loss_fn=loss_fn,
        data_loader=data_loader,
        device=device,
        epochs=8,
    )
    with pytest.warns(UserWarning, match="not mounted"):
        path = velasoka.get_drive_path(folder="Session-7", filename="net.pt")
    velasoka.save_model(model=net, path=path)

    printed = capsys.readouterr().out
    for words in ("\nEPOCH: 1", "\nEPOCH: 8", "Train Accuracy=", "Test Accuracy=", "loss=", "lr="):
        assert words in printed
    saved = tmp_path / "content/gdrive/My Drive/Colab Notebooks/EVA4/Session-7/net.pt"
    assert torch.equal(weights_of(velasoka.load_model(Net(), saved)), weights_of(net))


def test_star_import_brings_the_whole_interface():
    assert test_cnn is velasoka.test_cnn  # noqa: F405
    assert test_cnn.__test__ is False  # noqa: F405
    made_here = {
        name
        for name, value in vars(velasoka).items()
        if callable(value) and value.__module__ == "velasoka" and not name.startswith("_")
    }
    assert made_here <= set(velasoka.__all__)
    assert all(hasattr(velasoka, name) for name in velasoka.__all__)


# --- Counting ---


def test_every_image_weighs_the_same_in_a_last_batch_that_is_smaller(device):
    batches, model = random_batches((4, 4, 2)), linear_model().to(device)
    images, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
    logits = model(images).detach()
    result = velasoka.test_cnn(model, batches, device, **FLOAT32)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result.correct == (logits.argmax(1) == labels).sum().item()
    assert result.total == 10
    assert result.accuracy == pytest.approx(10 * result.correct)
    assert result.seconds > 0
    trained = velasoka.train_cnn(model, batches, CE, sgd(model, 0.0), device, **FLOAT32)
    assert (trained.loss, trained.correct) == (pytest.approx(result.loss), result.correct)


def test_probabilities_that_are_sure_train_and_test_as_labels_do():
    soft = [(images, F.one_hot(labels, 10).double()) for images, labels in BATCHES]
    one, model = tiny_run(**FLOAT32)
    other, soft_model = tiny_run(loaders=(soft, soft), **FLOAT32)
    for result, expected in zip(other.train + other.test, one.train + one.test, strict=True):
        assert (result.correct, result.total) == (expected.correct, expected.total)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(weights_of(soft_model), weights_of(model), rtol=1e-4, atol=1e-6)
    _, labels = velasoka.predict(model, soft, "cpu")
    assert torch.equal(labels, torch.cat([labels for _, labels in BATCHES]))


class Unsized:
    """Batches that can be gone through again and again, but not counted."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(torch.randn(10, 3, 32, 32), range(10), strict=True)


@pytest.mark.parametrize("loader", [BATCHES, Unsized(BATCHES), DataLoader(Stream(), 4)])
def test_takes_any_iterable_of_batches(loader, device):
    history = train(linear_model(), (loader, loader), device)
    assert [result.total for result in history.train + history.test] == [10] * 4
    assert len(history.learning_rates) == 6
    assert history.learning_rates[-1] < 0.5 * max(history.learning_rates)  # it was counted


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_a_distributed_sampler_is_told_the_epoch(kind, pictures, device):
    class Noting(DistributedSampler):
        epochs = ()

        def __iter__(self):
            self.epochs += (self.epoch,)
            return super().__iter__()

    sampler = Noting(pictures[1], num_replicas=2, rank=0)
    order = {"sampler": sampler, "batch_size": 35}
    if kind == "batch_sampler":
        order = {"batch_sampler": BatchSampler(sampler, 35, False)}
        order["batch_sampler"].set_epoch = sampler.set_epoch
    train(linear_model(), (DataLoader(pictures[1], **order), BATCHES), device, 3)
    assert sampler.epochs == (0, 1, 2)


# --- Modes ---


def test_a_test_leaves_the_model_as_it_was(model, loaders, device):
    model.to(device).train()
    model.c2.eval()
    modes = [module.training for module in model.modules()]
    before = weights_of(model)
    velasoka.test_cnn(model, loaders[1], device, **QUIET)
    velasoka.predict(model, loaders[1], device)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_comes_back_after_an_error_too(model, device):
    model.train()
    with pytest.raises(RuntimeError, match="channels"):
        velasoka.predict(model, [(torch.zeros(2, 1, 32, 32), torch.zeros(2).long())], device)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("loop", ["train_cnn", "start_cnn"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_part_in_eval_mode_stays_so_but_a_whole_model_trains(whole, loop, device):
    model = velasoka.SimpleModel(fm_size=4).to(device)
    (model if whole else model.c1).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    call(loop, model, random_batches((8, 8)), device=device)
    moved = {
        name[:2] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])
    }
    assert moved == ({"c1", "c2", "c3"} if whole else {"c2", "c3"})
    assert model.c1.training == whole


# --- Predicting ---


def test_predict_returns_what_test_counts_in_order(model, loaders, device):
    logits, labels = velasoka.predict(model, loaders[1], device)
    assert logits.shape == (70, 10)
    assert logits.dtype == torch.float32
    assert logits.device.type == labels.device.type == "cpu"
    assert labels.tolist() == [index % 10 for index in range(70)]
    result = velasoka.test_cnn(model, loaders[1], device, **QUIET)
    assert (logits.argmax(1) == labels).sum().item() == result.correct


def test_tta_averages_an_image_twice_and_two_shifted_views_all_mirrored_too(device):
    model = linear_model().to(device)
    images = BATCHES[0][0].to(device)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    places = [images, images, padded[..., :32, :32], padded[..., 2:, 2:]]
    views = [view for place in places for view in (place, place.flip(-1))]
    expected = torch.stack([model(view) for view in views]).mean(0).detach().cpu()
    options = {"tta": True, "precision": torch.float32}
    logits, labels = velasoka.predict(model, BATCHES[:1], device, **options)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    result = velasoka.test_cnn(model, BATCHES[:1], device, **options, **QUIET)
    assert result.loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-3)


# --- Epochs ---


def scripted(monkeypatch, accuracies):
    """The tests of a run give these accuracies; returns the list of the weights they see."""
    outcomes, weights = iter(accuracies), []

    def test_cnn(model, *_, **__):
        weights.append(weights_of(model))
        return velasoka.EpochResult(1.0, next(outcomes), 0, 1, 1.0)

    monkeypatch.setattr(velasoka, "test_cnn", test_cnn)
    return weights


def test_ends_with_the_last_weights_and_says_which_epoch_was_best(monkeypatch):
    weights = scripted(monkeypatch, [30.0, 50.0, 40.0])
    history, model = tiny_run(epochs=3)
    assert (history.status, len(history.train), len(history.test)) == ("completed", 3, 3)
    assert (history.best_accuracy, history.best_epoch) == (50.0, 2)
    assert torch.equal(weights_of(model), weights[2])


@pytest.mark.parametrize(
    ("target", "stop_at", "status", "epochs"),
    [
        (50, None, "target reached", 2),
        (60, None, "completed", 3),
        (None, 1, "stopped", 1),
        (50, 2, "target reached", 2),
        (60, 2, "stopped", 2),
    ],
)
def test_a_run_ends_at_its_target_or_when_the_callback_says_so(
    target, stop_at, status, epochs, monkeypatch
):
    scripted(monkeypatch, [30.0, 50.0, 40.0])
    seen = []

    def callback(history):
        saved = torch.load("run.pt", weights_only=True)["history"]["test"]
        seen.append((len(history.train), len(history.test), len(saved)))
        return len(history.test) == stop_at

    options = {"target_accuracy": target, "callback": callback, "checkpoint_path": "run.pt"}
    history, _ = tiny_run(epochs=3, **options)
    assert (history.status, len(history.test)) == (status, epochs)
    assert seen == [(epoch, epoch, epoch) for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize("answer", [None, False, "yes"])
def test_a_callback_that_does_not_return_true_stops_nothing(answer):
    assert tiny_run(callback=lambda history: answer)[0].status == "completed"


# --- Precision ---


class Noting(nn.Module):
    """A model that notes the dtype that its convolution computes in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 32)
        self.seen = set()

    def forward(self, images):
        output = self.conv(images).flatten(1)
        self.seen.add(output.dtype)
        return output


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_the_dtype_of_autocast(dtype, loop, device):
    model = Noting()
    call(loop, model.to(device), BATCHES, device=device, precision=dtype)
    assert model.seen == {dtype}
    assert model.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "native", "dtype"),
    [
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
    ],
)
def test_precision_is_by_default_what_the_hardware_computes_natively(
    kind, native, dtype, monkeypatch
):
    velasoka._fastest_precision.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native)
    model = Noting()
    velasoka.predict(model, BATCHES, kind)
    velasoka._fastest_precision.cache_clear()
    assert model.seen == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trains_in_every_precision(dtype, model, loaders, device):
    history = train(model, loaders, device, 3, precision=dtype)
    assert history.train[-1].loss < history.train[0].loss
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_of_mixed_precision_names_the_way_out_of_it(loop):
    model = linear_model()
    model[2].register_forward_hook(lambda layer, inputs, output: look(output))
    with pytest.raises(TypeError) as caught:
        call(loop, model, BATCHES, precision=torch.bfloat16)
    if hasattr(caught.value, "__notes__"):
        assert "precision=torch.float32" in caught.value.__notes__[0]
    call(loop, model, BATCHES, precision=torch.float32)


def look(output):
    """A hook's usual `.numpy()`, which has no bfloat16."""
    output.detach().cpu().numpy()


@pytest.mark.parametrize("name", ["get_muon_optimizer", "get_sgd_optimizer"])
def test_an_overflow_in_float16_is_the_scalers_business(name, model, device):
    model.to(device)
    optimizer = getattr(velasoka, name)(model)
    scaler = torch.amp.GradScaler(device.type)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options = QUIET | {"precision": torch.float16, "scaler": scaler}
    batches = random_batches((8,))
    velasoka.train_cnn(model, batches, overflowing(CE, at=[0]), optimizer, device, **options)
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == 2**15
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
    velasoka.train_cnn(model, batches, CE, optimizer, device, **options)
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(("overflows", "status"), [(3, "completed"), (30, "diverged")])
@pytest.mark.filterwarnings("ignore:diverged")
def test_float16_may_overflow_a_few_times_in_a_row(overflows, status, device):
    batches = random_batches((2,) * 40)
    loss_fn = overflowing(CE, at=range(2, 2 + overflows))
    options = {"loaders": (batches, batches), "precision": torch.float16, "epochs": 1}
    history, _ = tiny_run(loss_fn=loss_fn, **options)
    assert history.status == status


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_the_host_reads_the_device_a_few_times_a_second_at_most(
    precision, pictures, model, device, monkeypatch
):
    one_hot = torch.eye(10, device=device)  # labels on the CPU are looked at: no one waits

    def soften(images, labels):
        return images, one_hot[labels]

    options = {"device": device, "batch_transform": soften}
    loader, _ = velasoka.get_cifar10_data_loader(pictures, 4, **options)
    optimizer = velasoka.get_muon_optimizer(model)
    reads = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)

        def counting(tensor, *args, read=read, **options):
            if tensor.device.type == device.type:
                reads.append(read)
            return read(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counting)
    options = QUIET | {"precision": precision}
    result = velasoka.train_cnn(model, loader, CE, optimizer, device, **options)
    # at the start and at the end, and twice a second between
    assert len(reads) <= 8 + 2 * (1 + 2 * result.seconds) < 50


# --- Device, dtype, layout ---


@pytest.mark.parametrize("loop", LOOPS)
def test_images_get_the_dtype_of_the_model(loop):
    model = linear_model().double()
    call(loop, model, BATCHES, **{"precision": torch.float32})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("is_ours", [True, False])
def test_models_of_this_module_compute_in_channels_last_and_others_need_not(is_ours, device):
    ours = velasoka.SimpleModel(fm_size=4)
    model = ours if is_ours else nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())
    seen = []

    def note(layer, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    next(part for part in model.modules() if isinstance(part, nn.Conv2d)).register_forward_pre_hook(
        note
    )
    velasoka.predict(model, random_batches((4, 4)), device)
    assert seen == [is_ours] * 2


# --- What is refused, before it can do harm ---


class Wrong(nn.Module):
    """Gives an output of a wrong shape."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shape = shape

    def forward(self, images):
        return self.weight * torch.zeros(self.shape)


BATCH = random_batches((2,))[0]
FLAT = [(BATCH[0], BATCH[1] * 0)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 10, 1, 1), r"\(2, 10, 1, 1\).*\(2, classes\).*flatten"),
        ((2,), r"\(2,\).*\(2, classes\)"),
        ((3, 10), r"\(3, 10\).*\(2, classes\)"),
    ],
)
def test_an_output_that_is_not_a_logit_for_each_class_is_refused(shape, says, loop):
    with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
        call(loop, Wrong(*shape), FLAT)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("label", "says"), [(10, "a label is 10.* 10 logits"), (-1, "label -1")])
def test_a_label_that_is_no_class_is_refused_in_whatever_batch(label, says, loop):
    batches = [*FLAT, (BATCH[0], torch.tensor([0, label]))]
    with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
        call(loop, linear_model(), batches)


@pytest.mark.parametrize("loop", LOOPS)
def test_soft_labels_of_more_classes_than_the_model_has_are_refused(loop):
    with pytest.raises(ValueError, match="10 logits"):
        call(loop, linear_model(), [(BATCH[0], torch.full((2, 11), 1 / 11))])


@pytest.mark.parametrize("loop", ["train_cnn", "test_cnn", "predict"])
@pytest.mark.parametrize("loader", [[], iter([])])
def test_a_loader_without_batches_is_refused(loader, loop):
    with pytest.raises(ValueError, match="no batches"):
        call(loop, linear_model(), loader)


MODEL = linear_model()
STRANGER = sgd(linear_model())
REFUSED = [  # options of a run, and what the one line says
    ({"epochs": 0}, "epochs=0"),
    ({"epochs": -1}, "epochs=-1"),
    ({"target_accuracy": 0}, "target_accuracy=0"),
    ({"target_accuracy": 0.8}, r"target_accuracy=0\.8"),
    ({"target_accuracy": 101}, "target_accuracy=101"),
    ({"resume": True}, "resume=True"),
    ({"optimizer": STRANGER}, "optimizer: .*this model"),
    ({"scheduler": lr_scheduler.StepLR(STRANGER, 1)}, "scheduler: .*another optimizer"),
    ({"scheduler": lr_scheduler.ReduceLROnPlateau(STRANGER)}, "scheduler: .*another optimizer"),
    ({"scheduler_interval": "epochs"}, "scheduler_interval='epochs'"),
    ({"loaders": ([], BATCHES)}, "no batches"),
    ({"loaders": (BATCHES, [])}, "no batches"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_would_go_wrong_in_silence_is_refused_in_one_line(options, says):
    before = weights_of(MODEL)
    with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
        tiny_run(MODEL, **options)
    assert torch.equal(weights_of(MODEL), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [pair for pair in REFUSED if {"scheduler_interval", "scheduler"} & {*pair[0]}],
)
def test_train_cnn_refuses_a_wrong_scheduler_too(options, says):
    with pytest.raises(ValueError, match=says):
        velasoka.train_cnn(MODEL, BATCHES, CE, sgd(MODEL), "cpu", **QUIET | options)


def test_a_test_batch_that_does_not_fit_is_known_before_the_first_epoch():
    batches = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]
    loss_fn = Breaking(None, None, None)  # is never called
    with pytest.raises(RuntimeError):
        tiny_run(loss_fn=loss_fn, loaders=(BATCHES, batches))


# --- Errors that name their cause ---


def run_out_of_cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs.")


@pytest.mark.parametrize(
    "exhaust", [run_out_of_cuda_memory, lambda: torch.empty(2**58), lambda: bytearray(2**62)]
)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("size", "way_out"), [(9, "batch_size=4"), (1, "smaller model")])
def test_exhausted_memory_names_the_batch_size_and_a_way_out(size, way_out, exhaust, loop):
    model = linear_model()
    model.register_forward_hook(lambda *_: exhaust())
    with pytest.raises(MemoryError, match=f"^[^\n]*batches of {size} image[^\n]*{way_out}[^\n]*$"):
        call(loop, model, random_batches((size,)))


@pytest.mark.parametrize("loop", ["train_cnn", "test_cnn"])
def test_a_loss_that_is_not_finite_is_named_with_its_batch(loop):
    model = linear_model()
    calls = itertools.count()
    model.register_forward_hook(
        lambda model, inputs, output: output * (torch.nan if next(calls) == 1 else 1)
    )
    batches = random_batches((2,) * 4)
    rate = ", lr=0.05" if loop == "train_cnn" else ""
    with pytest.raises(FloatingPointError, match=re.escape(f"since batch 2{rate}")):
        call(loop, model, batches, optimizer=sgd(model, 0.05))


# --- Seeds ---


def test_seed_everything_seeds_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    draws = []
    for seed in (3, 3, 4):
        velasoka.seed_everything(seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


@pytest.mark.parametrize(("before", "asked", "after"), [(0, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_seed_everything_asks_for_deterministic_algorithms_and_never_against(before, asked, after):
    torch.use_deterministic_algorithms(bool(before))
    try:
        velasoka.seed_everything(1, deterministic=bool(asked))
        assert torch.are_deterministic_algorithms_enabled() == bool(after)
    finally:
        torch.use_deterministic_algorithms(False)
