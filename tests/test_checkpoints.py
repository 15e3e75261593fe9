"""What a checkpoint keeps, what is said when it cannot, and what else reads it."""

import datetime
import enum
import itertools
import random
import shutil
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET, Breaking, overflowing, random_batches, weights_of
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset, TensorDataset

import velasoka

IMAGES, LABELS = (torch.cat(parts) for parts in zip(*random_batches((12, 12)), strict=True))
TEST_BATCHES = random_batches((10,), seed=1)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(192, 10))


def sgd(**options):
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


def run(loader=None, loss_fn=None, epochs=3, model=None, make_optimizer=None, test=TEST_BATCHES, **options):
    """A short run of a tiny model; its history and its model."""
    model, loaders = model or net(), (loader or random_batches(), test)
    optimizer, loss_fn = (make_optimizer or sgd())(model), loss_fn or velasoka.get_ce_loss()
    return velasoka.start_cnn(model, optimizer, loss_fn, loaders, "cpu", epochs, **QUIET | options), model


def stored():
    return torch.load("run.pt", weights_only=True)


# --- Exact resume ---


class Temperature(nn.Module):
    """Cross entropy with a divisor of the logits that is learned."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits, labels):
        return nn.functional.cross_entropy(logits / self.temperature, labels)


class Centred(nn.Module):
    """Cross entropy of the logits less their running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, logits, labels):
        self.mean.lerp_(logits.detach().mean(0), 0.1)
        return nn.functional.cross_entropy(logits - self.mean, labels)


class Counting(nn.Module):
    """Cross entropy that gets stronger with each call, whose number is its extra state."""

    calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, logits, labels):
        self.calls += 1
        return nn.functional.cross_entropy(logits, labels) * self.calls


@pytest.mark.filterwarnings("ignore:interrupted")
@pytest.mark.parametrize("make_loss", [Temperature, Centred, Counting])
def test_the_state_of_a_loss_is_resumed(make_loss):
    def go(at=100, **options):
        model, loss_fn = net(), make_loss()
        both = lambda model: torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1, momentum=0.9)  # noqa: E731
        run(Breaking(random_batches(), KeyboardInterrupt(), at), loss_fn, 3, model, both, **options)
        return [*weights_of(model).tolist(), str(loss_fn.state_dict())]

    whole = go()
    go(7, checkpoint_path="run.pt")
    assert go(checkpoint_path="run.pt", resume=True) == whole


def draw(generator):
    return torch.rand((), generator=generator).item() if isinstance(generator, torch.Generator) else generator.random()


class Noisy(Dataset):
    """Images that each of the generators makes lighter."""

    def __init__(self, *generators):
        self.__dict__ = {f"generator {i}": generator for i, generator in enumerate(generators)}

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index] + sum(map(draw, vars(self).values())), LABELS[index]


class Order(Sampler):
    """Random batches of `size` indices, or single ones for 0."""

    def __init__(self, rng, size=0):
        self.rng, self.size = rng, size

    def __len__(self):
        return len(LABELS) // (self.size or 1)

    def __iter__(self):
        order = sorted(range(len(LABELS)), key=lambda _: draw(self.rng))
        yield from (order[i : i + self.size] for i in range(0, len(order), self.size)) if self.size else order


DATA = TensorDataset(IMAGES, LABELS)
GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy, older": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
}
PLACES = {
    "data set": lambda rng: DataLoader(Noisy(rng), 8),
    "data set in a Subset": lambda rng: DataLoader(Subset(Noisy(rng), range(24)), 8),
    "data set in a list": lambda rng: DataLoader(torch.utils.data.ConcatDataset([DATA, Noisy(rng)]), 8),
    "sampler": lambda rng: DataLoader(DATA, 8, sampler=Order(rng)),
    "batch sampler": lambda rng: DataLoader(DATA, batch_sampler=Order(rng, 8)),
    "sampler in a batch sampler": lambda rng: DataLoader(DATA, batch_sampler=BatchSampler(Order(rng), 8, False)),
    "sampler as a batch sampler": lambda rng: DataLoader(DATA, None, sampler=BatchSampler(Order(rng), 8, False)),
}


@pytest.mark.filterwarnings("ignore:interrupted")
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_generator_anywhere_in_a_loader_is_resumed(place, kind):
    def go(at=100, **options):
        train, test = (PLACES[place](GENERATORS[kind]()) for _ in range(2))
        history, model = run(Breaking(train, KeyboardInterrupt(), at), test=test, **options)
        return [*weights_of(model).tolist(), *(result.loss for result in history.train + history.test)]

    whole = go()
    go(2 * len(PLACES[place](None)) + 1, checkpoint_path="run.pt")
    assert go(checkpoint_path="run.pt", resume=True) == whole


def test_another_number_of_generators_is_refused_in_one_line():
    kinds = [*GENERATORS.values()]
    loaders = [DataLoader(Noisy(*[make() for make in kinds[:number]]), 8) for number in range(3)]
    for one, other in itertools.permutations(range(3), 2):
        Path("run.pt").unlink(missing_ok=True)
        run(loaders[one], epochs=1, checkpoint_path="run.pt")
        with pytest.raises(ValueError, match=r"^run\.pt: [^\n]*generators[^\n]*$"):
            run(loaders[other], epochs=1, checkpoint_path="run.pt", resume=True)


@pytest.mark.parametrize(("persistent", "path", "lines"), [(True, "run.pt", 1), (True, None, 0), (False, "run.pt", 0)])
def test_workers_that_outlive_an_epoch_cannot_be_resumed_exactly_which_is_said_once(persistent, path, lines):
    loader = DataLoader(DATA, 12, num_workers=1, persistent_workers=persistent)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(loader, epochs=2, checkpoint_path=path)
    found = [str(each.message) for each in warned if "persistent_workers" in str(each.message)]
    assert len(found) == lines
    assert not any("\n" in line for line in found)


# --- Another run ---


def adam(**options):
    return lambda model: torch.optim.Adam(model.parameters(), **options)


def muon(momentum):
    def make(model):
        optimizer = velasoka.get_muon_optimizer(model)
        optimizer.param_groups[0]["momentum"] = momentum
        return optimizer

    return make


def torchs(images=IMAGES, labels=LABELS):
    return {"loader": DataLoader(TensorDataset(images, labels), 8)}


def own(seed=1, turned=False):
    train, test = velasoka.get_synthetic_dataset(24, 10, seed=seed)
    train.targets = train.targets[::-1] if turned else train.targets
    loader, test = velasoka.get_cifar10_data_loader((train, test), 8, device="cpu")
    return {"loader": loader, "test": test}


OTHERS = {  # two runs, and what names their difference
    "weight decay": (dict, lambda: {"make_optimizer": sgd(weight_decay=5e-4)}, "weight[_ ]decay"),
    "momentum": (dict, lambda: {"make_optimizer": sgd(momentum=0.8)}, "momentum"),
    "nesterov": (dict, lambda: {"make_optimizer": sgd(nesterov=True)}, "nesterov"),
    "betas": (lambda: {"make_optimizer": adam()}, lambda: {"make_optimizer": adam(betas=(0.9, 0.99))}, "betas"),
    "Muon": (lambda: {"make_optimizer": muon(0.9)}, lambda: {"make_optimizer": muon(0.7)}, "momentum"),
    "smoothing": (dict, lambda: {"loss_fn": velasoka.get_ce_loss(0.2)}, "label[_ ]smoothing"),
    "images": (torchs, lambda: torchs(IMAGES.flip(0)), "data|images"),
    "labels": (torchs, lambda: torchs(labels=LABELS.flip(0)), "data|labels"),
    "test images": (
        lambda: {"test": torchs()["loader"]},
        lambda: {"test": torchs(IMAGES.flip(0))["loader"]},
        "data|images",
    ),
    "own images": (own, lambda: own(seed=2), "data|images"),
    "own labels": (own, lambda: own(turned=True), "data|labels"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_setting_or_other_data_is_refused_in_one_line_that_names_it(what):
    before, after, named = OTHERS[what]
    resume = {"epochs": 1, "checkpoint_path": "run.pt", "resume": True}
    run(**before(), **resume)
    content, model = Path("run.pt").read_bytes(), net()
    with pytest.raises(ValueError, match=rf"^run\.pt: was made with [^\n]*({named})[^\n]*$"):
        run(model=model, **after(), **resume)
    assert torch.equal(weights_of(model), weights_of(net()))
    assert Path("run.pt").read_bytes() == content
    assert run(**before(), **resume)[0].status == "completed"  # the same fits


def occupied(kind):
    """A file of some `kind` at run.pt, and its bytes."""
    if kind == "checkpoint":
        run(epochs=1, checkpoint_path="run.pt")
    elif kind == "weights":
        velasoka.save_model(net(), "run.pt")
    else:
        Path("run.pt").write_text(kind)
    return Path("run.pt").read_bytes()


@pytest.mark.parametrize("kind", ["checkpoint", "weights", "notes"])
def test_a_file_already_there_is_announced_and_kept_until_an_epoch_is_done(kind):
    before, loss_fn, found = occupied(kind), velasoka.get_ce_loss(), []

    def looking(logits, labels):
        found.append(Path("run.pt").read_bytes() == before)
        return loss_fn(logits, labels)

    with pytest.warns(UserWarning, match=r"^[^\n]*run\.pt[^\n]*resume=True[^\n]*$") as warned:
        run(loss_fn=looking, epochs=2, checkpoint_path="run.pt")
    assert len(warned) == 1
    assert found == [True] * 3 + [False] * 3
    assert len(stored()["history"]["test"]) == 2


@pytest.mark.filterwarnings("error")
def test_where_nothing_gets_lost_nothing_is_said():
    for _ in range(2):  # with resume, the first run starts and the second finds it done
        run(epochs=1, checkpoint_path="run.pt", resume=True)
    run(epochs=1, checkpoint_path="new/folder/run.pt")


# --- What cannot be kept ---


class Colour(enum.Enum):
    RED = 1


class Carrying(LambdaLR):
    """A scheduler with a `thing` in its state."""

    def __init__(self, optimizer, thing):
        self.thing = thing
        super().__init__(optimizer, lambda step: 1.0)


class Extra(nn.Sequential):
    """A model with `extra` state."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def with_extra(thing):
    model = Extra(*net())
    model.extra = thing
    return model


UNREADABLE = {
    "Enum": Colour.RED,
    "deque": deque([1.0], maxlen=3),
    "Path": Path("here"),
    "function": net,
    "lambda": lambda: 1,
    "date": datetime.date(2020, 1, 1),
    "deep inside": {"one": [(Colour.RED,)]},
}


@pytest.mark.parametrize(
    ("place", "thing"),
    [*(("scheduler", name) for name in UNREADABLE), ("optimizer", "Path"), ("model", "Path"), ("loss", "Path")],
)
def test_a_state_that_cannot_be_read_back_is_said_before_the_first_epoch(place, thing):
    thing, said = UNREADABLE[thing], []
    model, loss_fn = with_extra(thing) if place == "model" else net(), Counting()
    loss_fn.get_extra_state = lambda: thing if place == "loss" else {}
    optimizer = sgd()(model)
    optimizer.param_groups[0]["note"] = thing if place == "optimizer" else None
    scheduler = Carrying(optimizer, thing if place == "scheduler" else None)
    model.register_forward_pre_hook(lambda module, _: said.append(len(warned)) if module.training else None)
    with pytest.warns(UserWarning, match=r"^run\.pt: checkpoint not written \([^\n]+\)[^\n]*$") as warned:
        history, _ = run(None, loss_fn, 2, model, lambda _: optimizer, scheduler=scheduler, checkpoint_path="run.pt")
    assert said[0] == 1
    assert (history.status, len(history.test)) == ("completed", 2)
    assert not [*Path().iterdir()]


def test_a_state_that_cannot_be_read_back_replaces_no_checkpoint():
    run(epochs=1, checkpoint_path="run.pt")
    before, model = Path("run.pt").read_bytes(), with_extra(Path("here"))
    with pytest.warns(UserWarning, match="not written"):
        run(epochs=1, model=model, checkpoint_path="run.pt")
    assert Path("run.pt").read_bytes() == before


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_folder_that_vanishes_is_not_made_anew(comes_back):
    loss_fn, calls = velasoka.get_ce_loss(), itertools.count()

    def vanishing(logits, labels):
        call = next(calls)
        if call == 3:  # the second epoch begins
            shutil.rmtree("drive/My Drive")
        if call == 6 and comes_back:
            Path("drive/My Drive").mkdir()
        return loss_fn(logits, labels)

    with pytest.warns(UserWarning, match="not written") as warned:
        history, _ = run(loss_fn=vanishing, checkpoint_path="drive/My Drive/run.pt")
    assert len(warned) == (1 if comes_back else 2)
    assert (history.status, len(history.test)) == ("completed", 3)
    assert [path.name for path in Path("drive").rglob("*.pt")] == ["run.pt"] * comes_back


# --- Weights for others ---


def test_load_model_takes_the_best_weights_from_a_checkpoint(monkeypatch):
    accuracies, weights = iter([30.0, 50.0, 40.0]), []

    def scripted(model, *_, **__):
        weights.append(weights_of(model))
        return velasoka.EpochResult(1.0, next(accuracies), 0, 1, 1.0)

    monkeypatch.setattr(velasoka, "test_cnn", scripted)
    run(checkpoint_path="run.pt")
    model = net()
    assert velasoka.load_model(model, "run.pt", "cpu") is model
    assert torch.equal(weights_of(model), weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_load_model_takes_the_last_weights_from_a_checkpoint_without_an_epoch():
    model = net()
    nn.init.ones_(model[2].weight)
    with pytest.warns(UserWarning, match="interrupted"):
        run(Breaking(random_batches(), KeyboardInterrupt(), 1), model=model, checkpoint_path="run.pt")
    assert (velasoka.load_model(net(), "run.pt")[2].weight == 1).all()


@pytest.mark.parametrize(
    "content",
    [
        lambda: stored() | {"best": 3},
        lambda: stored() | {"best": {"2.weight": torch.zeros(10, 192)}},
        lambda: stored() | {"best": {"2.weight": torch.full((10, 192), torch.nan), "2.bias": torch.zeros(10)}},
        lambda: {name: value for name, value in stored().items() if name not in ("best", "model")},
        lambda: stored() | {"best": velasoka.SimpleModel(fm_size=2).state_dict()},
    ],
)
def test_a_checkpoint_without_weights_of_this_model_is_refused_in_one_line(content):
    run(epochs=1, checkpoint_path="run.pt")
    torch.save(content(), "run.pt")
    model = net()
    with pytest.raises(ValueError, match=r"^run\.pt: [^\n]*$"):
        velasoka.load_model(model, "run.pt")
    assert torch.equal(weights_of(model), weights_of(net()))


@pytest.mark.parametrize("extra", [{"a": 1}, [1.5, "b"], "text", 3, torch.arange(4), np.float64(2.5)], ids=repr)
def test_extra_state_goes_through_save_and_load_and_resume(extra):
    model = with_extra(extra)
    velasoka.save_model(model, "net.pt")
    run(epochs=1, model=model, checkpoint_path="run.pt")
    resumed = with_extra(torch.zeros(2))  # whatever it was before
    run(epochs=1, model=resumed, checkpoint_path="run.pt", resume=True)
    for found in (resumed, *(velasoka.load_model(with_extra(torch.zeros(2)), path) for path in ("net.pt", "run.pt"))):
        assert str(found.extra) == str(extra)


def compiled_block(model):
    model.c1 = torch.compile(model.c1, backend="eager")
    return model


WRAPS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a compiled block": compiled_block,
}


@pytest.mark.parametrize("saved", WRAPS)
@pytest.mark.parametrize("loaded", WRAPS)
def test_weights_pass_between_a_plain_model_and_a_wrapped_one(saved, loaded):
    model, other = (WRAPS[wrap](velasoka.SimpleModel(fm_size=2)) for wrap in (saved, loaded))
    velasoka.save_model(model, "net.pt")
    assert velasoka.load_model(other, "net.pt") is other
    assert torch.equal(weights_of(other), weights_of(model))


@pytest.mark.parametrize("wrap", ["compiled", "DataParallel"])
def test_the_best_weights_of_a_wrapped_models_run_load_into_the_plain_one(wrap):
    model = WRAPS[wrap](net()).cpu()
    run(epochs=1, model=model, checkpoint_path="run.pt")
    assert torch.equal(weights_of(velasoka.load_model(net(), "run.pt")), weights_of(model))


class Named(nn.Module):
    """A model whose own names look like those of a wrapper."""

    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.randn(2, 2))


@pytest.mark.parametrize("wrap", ["plain", "compiled", "DataParallel", "both"])
def test_names_of_the_models_own_that_look_like_a_wrappers_are_kept(wrap):
    model = Named()
    velasoka.save_model(WRAPS[wrap](model), "net.pt")
    assert torch.equal(weights_of(velasoka.load_model(Named(), "net.pt")), weights_of(model))


# --- Gradient scaling ---


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(velasoka, "_precision", lambda device: torch.float32)


OPTIMIZERS = [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer, adam(), adam(fused=True)]
OWN = pytest.mark.parametrize("get_optimizer", OPTIMIZERS[:2])


@pytest.mark.parametrize("get_optimizer", OPTIMIZERS)
def test_train_cnn_takes_torchs_own_scaler(get_optimizer, float32):
    weights = []
    for settings in (None, {"init_scale": 1024.0}, {"enabled": False}):
        options = {} if settings is None else {"scaler": torch.amp.GradScaler("cpu", **settings)}
        torch.manual_seed(0)
        model = velasoka.SimpleModel(fm_size=2)
        optimizer = get_optimizer(model)
        velasoka.train_cnn(model, random_batches(), velasoka.get_ce_loss(), optimizer, "cpu", **QUIET | options)
        weights.append(weights_of(model))
    torch.testing.assert_close(weights[1:], weights[:1] * 2, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("get_optimizer", OPTIMIZERS)
def test_a_scaler_of_ones_own_leaves_out_a_step_that_overflows(get_optimizer, float32):
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, loss_fn = get_optimizer(model), overflowing(velasoka.get_ce_loss(), at=[0])
    (batch, *_), before = random_batches(), weights_of(model)
    velasoka.train_cnn(model, [batch], loss_fn, optimizer, "cpu", scaler=scaler, **QUIET)
    assert torch.equal(weights_of(model), before)
    assert scaler.get_scale() == 512
    velasoka.train_cnn(model, [batch], loss_fn, optimizer, "cpu", scaler=scaler, **QUIET)
    assert weights_of(model).isfinite().all()
    assert not torch.equal(weights_of(model), before)


@OWN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_a_float16_pass_of_ours_has_an_optimiser_take_the_scale(get_optimizer, dtype, monkeypatch):
    monkeypatch.setattr(velasoka, "_precision", lambda device: dtype)
    model, marks = velasoka.SimpleModel(fm_size=2), []
    optimizer = get_optimizer(model)
    optimizer.register_step_pre_hook(lambda *_: marks.append(getattr(optimizer, "_step_supports_amp_scaling", False)))
    velasoka.train_cnn(model, random_batches((4,)), velasoka.get_ce_loss(), optimizer, "cpu", **QUIET)
    assert marks == [dtype is torch.float16]
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # others read the mark as "fused"
