"""The loops and the run: what they count, keep, refuse and say."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BATCHES, CE, linear_model, overflow, random_batches, sgd, tiny_run, weights_of
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import velasoka

FLOAT32 = {"precision": torch.float32}
OPTIMIZERS = [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer]
every_loop = pytest.mark.parametrize("loop", ["train_cnn", "test_cnn", "predict", "start_cnn"])


def call(loop, model, batches, device="cpu", **options):
    """Call a loop by its name, for one epoch if it trains."""
    arguments = {
        "train_cnn": (batches, CE, sgd(model), device),
        "start_cnn": (sgd(model), CE, (batches, batches), device, 1),
    }.get(loop, (batches, device))
    return getattr(velasoka, loop)(model, *arguments, **options)


@pytest.mark.parametrize("get_optimizer", OPTIMIZERS)
def test_learns_the_synthetic_pictures(get_optimizer, device):
    velasoka.seed_everything()
    pair = velasoka.get_synthetic_dataset(1500, 300)
    loaders = velasoka.get_cifar10_data_loader(pair, 32, device=device)
    model = velasoka.SimpleModel(fm_size=8)
    parts = model, get_optimizer(model), CE, loaders, device
    history = velasoka.start_cnn(*parts, 4, target_accuracy=85)
    assert history.status == "target reached"


class Net(nn.Module):
    """A model as the notebooks of the course define theirs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.fc = nn.Linear(6 * 14 * 14, 10)

    def forward(self, x):
        return self.fc(F.relu(F.max_pool2d(self.conv(x), 2)).view(-1, 6 * 14 * 14))


@pytest.mark.filterwarnings("ignore:Google Drive")
def test_the_notebook_cell_of_the_first_version_runs_unchanged(
    pictures, device, monkeypatch, tmp_path, capsys
):
    drive = velasoka.get_drive_path
    monkeypatch.setattr(velasoka, "get_cifar10_dataset", lambda: pictures)
    monkeypatch.setattr(velasoka, "get_drive_path", lambda **names: f"{tmp_path}{drive(**names)}")
    net = Net()
    # fmt: off
    dataset = velasoka.get_cifar10_dataset()
    data_loader = velasoka.get_cifar10_data_loader(dataset=dataset)
    optimizer = velasoka.get_sgd_optimizer(model=net)
    loss_fn = velasoka.get_ce_loss()
    velasoka.model_summary(model=net, input_size=(3, 32, 32), device=device)
    velasoka.start_cnn(model=net, optimizer=optimizer, loss_fn=loss_fn, data_loader=data_loader, device=device, epochs=8)  # noqa: E501
    velasoka.save_model(model=net, path=velasoka.get_drive_path(folder="Session-7", filename="net.pt"))  # noqa: E501
    # fmt: on
    printed = capsys.readouterr().out
    for words in ("\nEPOCH: 1", "\nEPOCH: 8", "Train Accuracy=", "Test Accuracy=", "loss=", "lr="):
        assert words in printed
    saved = tmp_path / "content/gdrive/My Drive/Colab Notebooks/EVA4/Session-7/net.pt"
    assert torch.equal(weights_of(velasoka.load_model(Net(), saved)), weights_of(net))


def test_every_image_weighs_the_same_in_a_last_batch_that_is_smaller(device):
    model = linear_model().to(device)
    images, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    expected = model(images.to(device)).detach().cpu()
    logits, found = velasoka.predict(model, BATCHES, device, **FLOAT32)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # on the CPU, in order
    assert torch.equal(found, labels)
    result = velasoka.test_cnn(model, BATCHES, device, **FLOAT32)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result.seconds > 0 and result.correct == (logits.argmax(1) == labels).sum().item()
    assert (result.total, result.accuracy) == (10, pytest.approx(10 * result.correct))
    trained = velasoka.train_cnn(model, BATCHES, CE, sgd(model, 0.0), device, **FLOAT32)
    assert (trained.loss, trained.correct) == (pytest.approx(result.loss), result.correct)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(torch.randn(10, 3, 32, 32), range(10), strict=True)


def test_takes_a_loader_without_len():
    loader = DataLoader(Stream(), 4)
    history, _ = tiny_run(loaders=(loader, loader))
    assert [result.total for result in history.train + history.test] == [10] * 4
    assert history.learning_rates[-1] < 0.5 * max(history.learning_rates)  # it was counted


@pytest.mark.parametrize("part", ["dataset", "sampler", "batch_sampler"])
def test_whatever_in_a_loader_has_torchs_set_epoch_is_told_the_epoch(part):
    loader = type("Loader", (list,), {})(BATCHES)
    told = []
    setattr(loader, part, SimpleNamespace(set_epoch=told.append))
    tiny_run(loaders=(loader, BATCHES))
    assert told[:2] == [0, 1]


def test_a_test_leaves_the_model_as_it_was(model, device):
    model.to(device).c2.eval()
    modes = [module.training for module in model.modules()]
    before = weights_of(model)
    velasoka.test_cnn(model, BATCHES, device)
    with pytest.raises(RuntimeError, match="channels"):
        velasoka.predict(model, [(torch.zeros(2, 1, 32, 32), torch.zeros(2).long())], device)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, weights_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("loop", ["train_cnn", "start_cnn"])
@pytest.mark.parametrize("frozen", ["a part", "all", "by its train"])
def test_a_part_in_eval_mode_stays_so_but_a_whole_model_trains(frozen, loop, device):
    model = velasoka.SimpleModel(fm_size=4).to(device)
    is_whole = frozen == "all"
    if frozen == "by its train":  # that many models have, of their own
        model.train = lambda mode=True: nn.Module.train(model, mode).c1.eval()
    else:
        (model if is_whole else model.c1).eval()
    before = weights_of(model.c1[1])[-1]  # how many batches its norm has seen
    call(loop, model, random_batches((8, 8)), device)
    assert weights_of(model.c1[1])[-1] - before == 2 * is_whole
    assert model.c2[1].num_batches_tracked == 2
    assert model.c1.training == is_whole


def test_tta_averages_an_image_twice_and_two_shifted_views_all_mirrored_too(device):
    model = linear_model().to(device)
    images, labels = BATCHES[0]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    places = [images, images, padded[..., :32, :32], padded[..., 2:, 2:]]
    views = [view for place in places for view in (place, place.flip(-1))]
    expected = torch.stack([model(view.to(device)) for view in views]).mean(0).detach().cpu()
    logits, _ = velasoka.predict(model, [(images, labels)], device, tta=True, **FLOAT32)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


ENDINGS = [  # the target, the epoch in which the callback returns True; status, epochs
    (50, None, "target reached", 2),
    (60, None, "completed", 3),
    (None, 1, "stopped", 1),
    (50, 2, "target reached", 2),
]


@pytest.mark.parametrize(("target", "stop_in", "status", "epochs"), ENDINGS)
def test_a_run_ends_at_its_target_or_when_the_callback_says_so(
    target, stop_in, status, epochs, scripted
):
    seen = []

    def callback(history):
        saved = velasoka._load("run.pt")["history"]  # written before
        seen.append([len(history.train), len(history.test), len(saved["test"])])
        return np.bool_(len(history.test) == stop_in) or "only True stops"

    options = {"checkpoint_path": "run.pt", "target_accuracy": target, "callback": callback}
    history, model = tiny_run(epochs=3, **options)
    assert (history.status, len(history.train), len(history.test)) == (status, epochs, epochs)
    assert (history.best_accuracy, history.best_epoch) == ((50.0, 2) if epochs > 1 else (30.0, 1))
    assert torch.equal(weights_of(model), scripted[-1])  # the last
    velasoka.load_model(model, "run.pt")
    assert torch.equal(weights_of(model), scripted[history.best_epoch - 1])
    assert seen == [[epoch] * 3 for epoch in range(1, epochs + 1)]


@every_loop
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])  # autocast leaves the latter
def test_a_model_computes_in_the_precision_and_layout_that_it_should(own, precision, layout, loop):
    model = nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()).to(own)
    model.memory_format = layout
    seen = []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append((*inputs, output)))
    call(loop, model, BATCHES, precision=precision)
    for images, output in seen:
        assert output.dtype == (precision if own is torch.float32 else own)
        assert images.is_contiguous(memory_format=layout)
    assert model[0].weight.dtype == own


@every_loop
def test_an_error_of_mixed_precision_names_the_way_out_of_it(loop):
    model = linear_model()
    model[2].register_forward_hook(lambda model, inputs, output: print(output.detach().numpy()))
    with pytest.raises(TypeError) as caught:
        call(loop, model, BATCHES, precision=torch.bfloat16)
    if hasattr(caught.value, "add_note"):  # from Python 3.11 on
        assert "precision=torch.float32" in caught.value.__notes__[0]
    call(loop, model, BATCHES, **FLOAT32)


@pytest.mark.parametrize("get_optimizer", OPTIMIZERS)
def test_an_overflow_in_float16_changes_only_the_scale(get_optimizer, model, device):
    optimizer = get_optimizer(model.to(device))
    scaler = torch.amp.GradScaler(device.type)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options = {"precision": torch.float16, "scaler": scaler}
    for loss_fn, is_same in ((overflow(at=[0]), True), (CE, False)):
        velasoka.train_cnn(model, BATCHES[:1], loss_fn, optimizer, device, **options)
        assert all(map(torch.equal, before, model.parameters())) == is_same
    assert scaler.get_scale() == 2**15


@pytest.mark.filterwarnings("ignore:Diverged")
@pytest.mark.parametrize(("overflows", "status"), [(3, "completed"), (30, "diverged")])
def test_float16_may_overflow_a_few_times_in_a_row(overflows, status):
    batches = random_batches((2,) * 40)
    loss_fn = overflow(at=range(2, 2 + overflows))
    options = {"loaders": (batches, batches), "precision": torch.float16, "epochs": 1}
    assert tiny_run(loss_fn=loss_fn, **options)[0].status == status


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_the_host_reads_the_device_a_few_times_a_second_at_most(
    precision, pictures, model, device, monkeypatch
):
    one_hot = torch.eye(10, device=device)  # other labels on the CPU are looked at, without a wait
    options = {"batch_transform": lambda images, labels: (images, one_hot[labels])}
    loader, _ = velasoka.get_cifar10_data_loader(pictures, 8, device=device, **options)
    optimizer = velasoka.get_muon_optimizer(model)
    reads = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)

        def counting(tensor, *args, read=read, **options):
            if tensor.device.type == device.type:
                reads.append(read)
            return read(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counting)
    options = {"precision": precision}
    result = velasoka.train_cnn(model, loader, CE, optimizer, device, **options)
    # of 25 steps, at the start and at the end, and twice a second between
    assert len(reads) <= 8 + 2 * (1 + 2 * result.seconds)


def of_shape(*shape):
    """A model that gives an output of a wrong shape."""
    model = linear_model()
    model.register_forward_hook(lambda model, inputs, output: torch.zeros(shape))
    return model


IMAGES = torch.zeros(2, 3, 32, 32)
TWO = (IMAGES, torch.tensor([0, 1]))
NO_FIT = [  # a model, batches, and what the one line says
    (of_shape(2, 10, 1, 1), [TWO], r"\(2, 10, 1, 1\), not .*\(2, classes\).*flatten"),
    (of_shape(3, 10), [TWO], r"\(3, 10\), not .*\(2, classes\)"),
    (linear_model(), [TWO, (IMAGES, torch.tensor([3, 10]))], r"labels.* 10\b.* 10 logits"),
    (linear_model(), [TWO, (IMAGES, torch.tensor([3, -1]))], r"labels.*-1\b.* 10 logits"),
    (linear_model(), [], "no batches"),
]


@every_loop
@pytest.mark.parametrize(("model", "batches", "says"), NO_FIT)
def test_outputs_labels_and_loaders_that_do_not_fit_are_refused_in_one_line(
    model, batches, says, loop
):
    with pytest.raises(ValueError, match=rf"\A.*{says}.*\Z"):
        call(loop, model, batches)


STRANGER = sgd(linear_model())
REFUSED = [  # options of a run, and what the one line says
    ({"epochs": 0}, "epochs=0"),
    ({"target_accuracy": 0}, "target_accuracy=0"),
    ({"target_accuracy": 0.8}, r"target_accuracy=0\.8"),
    ({"resume": True}, "resume=True"),
    ({"optimizer": STRANGER}, "optimizer: .*this model"),
    ({"scheduler": lr_scheduler.StepLR(STRANGER, 1)}, "scheduler: .*another optimizer"),
    ({"scheduler_interval": "epochs"}, "scheduler_interval='epochs'"),
    ({"loaders": ([], BATCHES)}, "no batches"),
    ({"checkpoint_path": f"{__file__}/run.pt"}, "test_training"),  # a folder that cannot be made
    ({"checkpoint_path": "."}, "a folder"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_would_go_wrong_in_silence_is_refused_in_one_line(options, says):
    model = linear_model()
    with pytest.raises((ValueError, OSError), match=rf"\A.*{says}.*\Z"):
        tiny_run(model, **options)
    for name in ("scheduler", "scheduler_interval"):
        if name in options:
            with pytest.raises(ValueError, match=says):
                velasoka.train_cnn(model, BATCHES, CE, sgd(model), "cpu", **options)
    assert torch.equal(weights_of(model), weights_of(linear_model()))


def run_out_of_cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs.")


EXHAUST = [run_out_of_cuda_memory, lambda: torch.empty(2**58), lambda: bytearray(2**62)]


@every_loop
@pytest.mark.parametrize("exhaust", EXHAUST)
def test_memory_exhausted_names_the_batch_size_and_half_of_it(exhaust, loop):
    model = linear_model()
    model.register_forward_hook(lambda *_: exhaust())
    for size, way_out in ((9, "batch_size=4"), (1, "smaller model")):
        with pytest.raises(MemoryError, match=rf"\A.*batches of {size} image.*{way_out}.*\Z"):
            call(loop, model, random_batches((size,)))


def test_seed_everything_seeds_every_generator_and_asks_for_determinism_if_told(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    draws = []
    for seed, deterministic in ((3, False), (3, True), (4, False)):
        velasoka.seed_everything(seed, deterministic)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])
    assert asked == [True]
