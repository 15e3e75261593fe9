"""What a checkpoint keeps, what is said when it cannot, and what else reads it."""

import itertools
import random
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BATCHES,
    QUIET,
    Breaking,
    conv_model,
    interrupted_at,
    linear_model,
    overflowing,
    random_batches,
    sgd,
    tiny_run,
    weights_of,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, Sampler, Subset, TensorDataset

import velasoka

IMAGES, LABELS = (torch.cat(parts) for parts in zip(*random_batches((8, 8)), strict=True))
DATA = TensorDataset(IMAGES, LABELS)
KEEP = {"checkpoint_path": "run.pt"}
RESUME = KEEP | {"resume": True}


def stored():
    return torch.load("run.pt", weights_only=True)


# --- Exact resume ---


class Learning(nn.Module):
    """Cross entropy times a factor that is learned and the number of the call."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits, labels):
        self.calls += 1
        return nn.functional.cross_entropy(logits * self.factor, labels) * self.calls


@pytest.mark.filterwarnings("ignore:interrupted")
def test_the_state_of_a_loss_is_resumed():
    def run(train=BATCHES, **options):
        model, loss_fn = linear_model(), Learning()
        optimizer = sgd(nn.ModuleList([model, loss_fn]))
        tiny_run(model, optimizer, loss_fn, (train, BATCHES), 3, **options)
        return [*weights_of(model).tolist(), str(loss_fn.state_dict())]

    whole = run()
    run(interrupted_at(7), **KEEP)
    assert run(**RESUME) == whole


def draw(rng):
    return torch.rand((), generator=rng).item() if isinstance(rng, torch.Generator) else rng.random()


class Lighter:
    """A transform with a generator of its own."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, image):
        return image + draw(self.rng)


class Transformed(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.transform(IMAGES[index]), LABELS[index]


class Noisy(Transformed):
    """Images that a random generator of the data set's own makes lighter."""

    def __init__(self, rng):
        self.rng = rng

    def transform(self, image):
        return image + draw(self.rng)


class Shuffled(Sampler):
    """The indices of the images in the order that a random generator gives them."""

    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return len(LABELS)

    def __iter__(self):
        return iter(sorted(range(len(LABELS)), key=lambda _: draw(self.rng)))


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy, older": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
}
LOADERS = {
    "transform": lambda rng: DataLoader(Transformed(Lighter(rng)), 8),
    "data set": lambda rng: DataLoader(Subset(ConcatDataset([DATA, Noisy(rng)]), range(8, 24)), 8),
    "batch sampler": lambda rng: DataLoader(DATA, batch_sampler=BatchSampler(Shuffled(rng), 8, False)),
    "sampler of batches": lambda rng: DataLoader(DATA, None, sampler=BatchSampler(Shuffled(rng), 8, False)),
}


def test_a_schedule_that_has_to_wait_for_a_skipped_step_still_waits_after_a_resume(float16):
    def run(overflow_at, train=BATCHES, **options):
        loss_fn = overflowing(nn.CrossEntropyLoss(), at=overflow_at)
        return weights_of(tiny_run(loss_fn=loss_fn, loaders=(train, BATCHES), epochs=3, **options)[1])

    whole = run([2])  # in the last batch of the first epoch
    with pytest.warns(UserWarning, match="interrupted in epoch 2"):
        run([2], interrupted_at(3), **KEEP)
    assert torch.equal(run([], **RESUME), whole)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("place", LOADERS)
def test_a_generator_in_a_loader_is_resumed(place, kind):
    def run(interrupt=False, **options):
        train, test = (LOADERS[place](GENERATORS[kind]()) for _ in range(2))
        history, model = tiny_run(
            loaders=(Breaking(train, KeyboardInterrupt(), 5) if interrupt else train, test), epochs=3, **options
        )
        return [*weights_of(model).tolist(), *(result.loss for result in history.train + history.test)]

    whole = run()
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        run(interrupt=True, **KEEP)
    assert run(**RESUME) == whole


@pytest.mark.parametrize(("persistent", "options", "lines"), [(True, KEEP, 1), (True, {}, 0), (False, KEEP, 0)])
def test_workers_that_outlive_an_epoch_are_said_once_to_make_resuming_inexact(persistent, options, lines):
    loader = DataLoader(DATA, 8, num_workers=1, persistent_workers=persistent)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tiny_run(loaders=(loader, BATCHES), **options)
    assert len([one for one in warned if "persistent_workers" in str(one.message)]) == lines


# --- Another run ---


def torchs(images=IMAGES, labels=LABELS):
    return DataLoader(TensorDataset(images, labels), 8)


def own(seed=1, labels=range(10)):
    """Our train loader of ten drawn pictures."""
    train, test = velasoka.get_synthetic_dataset(10, 10, seed=seed)
    train.targets = [*labels]
    return velasoka.get_cifar10_data_loader((train, test), 8, device="cpu")[0]


def run_of(make_optimizer=sgd, loss_fn=None, train=BATCHES, test=BATCHES, model=None, halve=False, **settings):
    model = model or linear_model()
    optimizer = make_optimizer(model, **settings)
    scheduler = StepLR(optimizer, 1, 0.5) if halve else None
    return tiny_run(model, optimizer, loss_fn, (train, test), 1, scheduler=scheduler, **RESUME)[0]


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), **settings)


OTHERS = {  # two runs, and what names their difference
    "weight decay": ({}, {"weight_decay": 5e-4}, "weight_decay"),
    "momentum": ({}, {"momentum": 0.8}, "momentum"),
    "momentum under a scheduler": ({"halve": True}, {"halve": True, "momentum": 0.8}, "momentum"),
    "nesterov": ({}, {"nesterov": True}, "nesterov"),
    "betas": ({"make_optimizer": adam}, {"make_optimizer": adam, "betas": (0.9, 0.99)}, "betas"),
    "smoothing": ({}, {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.2)}, "label_smoothing"),
    "generators": ({"train": torchs()}, {"train": DataLoader(Noisy(random.Random(1)), 8)}, "generators"),
    "images": ({"train": torchs()}, {"train": torchs(IMAGES.flip(0))}, "data"),
    "labels": ({"train": torchs()}, {"train": torchs(labels=LABELS.flip(0))}, "data"),
    "test images": ({"test": torchs()}, {"test": torchs(IMAGES.flip(0))}, "data"),
    "own images": ({"train": own()}, {"train": own(seed=2)}, "data"),
    "own labels": ({"train": own()}, {"train": own(labels=range(9, -1, -1))}, "data"),
    "indices": ({"train": DataLoader(Subset(DATA, [0, 1]))}, {"train": DataLoader(Subset(DATA, [0, 2]))}, "data"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_setting_or_other_data_is_refused_in_one_line_that_names_it(what):
    before, after, named = OTHERS[what]
    run_of(**before)
    content, model = Path("run.pt").read_bytes(), linear_model()
    with pytest.raises(ValueError, match=rf"^run\.pt: was made with [^\n]*{named}[^\n]*$"):
        run_of(model=model, **after)
    assert torch.equal(weights_of(model), weights_of(linear_model()))
    assert Path("run.pt").read_bytes() == content
    assert run_of(**before).status == "completed"  # the same fits


def test_a_run_is_resumed_with_the_objects_that_it_had():
    model = linear_model()
    optimizer = sgd(model)
    options = {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)}  # lowers the rate each epoch
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        tiny_run(model, optimizer, loaders=(interrupted_at(7), BATCHES), epochs=3, **options, **KEEP)
    assert tiny_run(model, optimizer, epochs=3, **options, **RESUME)[0].status == "completed"


@pytest.mark.parametrize("name", ["data", "images", "targets", "labels", "indices", "tensors"])
@pytest.mark.parametrize("value", [{1: 2}, None, 5, [BATCHES], threading.Lock()])
def test_a_data_set_may_hold_anything_under_a_usual_name(name, value):
    loader = DataLoader(DATA, 8)
    loader.dataset.__dict__ |= {"mark": value}
    loader.sampler.__dict__[name] = value
    assert tiny_run(loaders=(loader, BATCHES), epochs=1, **KEEP)[0].status == "completed"


def test_a_checkpoint_that_does_not_fit_leaves_the_optimiser_and_the_scheduler_as_they_were():
    def parts():
        model = linear_model()
        optimizer = sgd(model)
        return model, optimizer, StepLR(optimizer, 1, 0.1)

    model, optimizer, scheduler = parts()
    tiny_run(model, optimizer, scheduler=scheduler, **KEEP)
    content = stored()
    del content["random"]["torch"]
    torch.save(content, "run.pt")
    model, optimizer, scheduler = parts()
    with pytest.raises(ValueError, match="does not fit"):
        tiny_run(model, optimizer, scheduler=scheduler, **RESUME)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert scheduler.last_epoch == 0
    assert torch.equal(weights_of(model), weights_of(linear_model()))


def test_a_scheduler_without_a_state_is_said_to_give_no_checkpoint():
    class Bare:
        def step(self):
            pass

    with pytest.warns(UserWarning, match=r"^run\.pt: checkpoint not written \([^\n]*state_dict[^\n]*$"):
        assert tiny_run(scheduler=Bare(), **KEEP)[0].status == "completed"


def test_a_file_already_there_is_said_to_be_replaced():
    Path("run.pt").write_text("notes")
    with pytest.warns(UserWarning, match=r"^run\.pt[^\n]*resume=True[^\n]*$") as warned:
        tiny_run(**KEEP)
    assert len(warned) == 1
    assert len(stored()["history"]["test"]) == 2


@pytest.mark.filterwarnings("error")
def test_where_nothing_gets_lost_nothing_is_said():
    for _ in range(2):  # with resume, the first run starts and the second finds it done
        tiny_run(**RESUME)
    tiny_run(checkpoint_path="new/folder/run.pt")


# --- What cannot be kept ---


class Extra(nn.Sequential):
    """A linear model with `extra` state."""

    def __init__(self, extra):
        super().__init__(*linear_model())
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("thing", [Path("here"), lambda: 1, threading.Lock()], ids=["Path", "lambda", "lock"])
def test_a_state_that_cannot_be_read_back_is_said_before_the_first_epoch(thing):
    model, said = linear_model(), []
    optimizer = sgd(model)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    scheduler.thing = thing
    model.register_forward_pre_hook(lambda module, _: said.append(len(warned)) if module.training else None)
    with pytest.warns(UserWarning, match=r"^run\.pt: checkpoint not written \([^\n]+\)[^\n]*$") as warned:
        history, _ = tiny_run(model, optimizer, scheduler=scheduler, **KEEP)
    assert said[0] == len(warned) == 1
    assert (history.status, len(history.test)) == ("completed", 2)
    assert not [*Path().iterdir()]


@pytest.mark.filterwarnings("ignore:.*replaced after the first epoch")
def test_a_state_that_cannot_be_read_back_replaces_no_checkpoint():
    tiny_run(**KEEP)
    before = Path("run.pt").read_bytes()
    with pytest.warns(UserWarning, match="not written"):
        tiny_run(Extra(Path("here")), **KEEP)
    assert Path("run.pt").read_bytes() == before


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_folder_that_vanishes_is_not_made_anew(comes_back):
    loss_fn, calls = nn.CrossEntropyLoss(), itertools.count()

    def vanishing(logits, labels):
        call = next(calls)
        if call == 3:  # the second epoch begins
            shutil.rmtree("drive/My Drive")
        if call == 6 and comes_back:
            Path("drive/My Drive").mkdir()
        return loss_fn(logits, labels)

    with pytest.warns(UserWarning, match="not written") as warned:
        history, _ = tiny_run(loss_fn=vanishing, epochs=3, checkpoint_path="drive/My Drive/run.pt")
    assert len(warned) == 1
    assert (history.status, len(history.test)) == ("completed", 3)
    assert [path.name for path in Path("drive").rglob("*.pt")] == ["run.pt"] * comes_back


# --- Weights for others ---


def test_load_model_takes_the_best_weights_from_a_checkpoint(scripted):
    tiny_run(epochs=3, **KEEP)
    model = linear_model()
    assert velasoka.load_model(model, "run.pt", "cpu") is model
    assert torch.equal(weights_of(model), scripted[1])
    assert not torch.equal(scripted[1], scripted[2])


def test_load_model_takes_the_weights_from_a_checkpoint_without_an_epoch():
    model = linear_model()
    nn.init.ones_(model[-1].weight)
    with pytest.warns(UserWarning, match="interrupted"):
        tiny_run(model, loaders=(interrupted_at(1), BATCHES), **KEEP)
    assert (velasoka.load_model(linear_model(), "run.pt")[-1].weight == 1).all()


@pytest.mark.parametrize("change", [{"best": 3}, {"best": None, "model": None}])
def test_a_checkpoint_without_weights_is_refused_in_one_line(change):
    tiny_run(**KEEP)
    torch.save(stored() | change, "run.pt")
    with pytest.raises(ValueError, match=r"^run\.pt: [^\n]*$"):
        velasoka.load_model(linear_model(), "run.pt")


@pytest.mark.parametrize("extra", [{"a": [1.5, "b"]}, torch.arange(4), np.float64(2.5)], ids=repr)
def test_extra_state_goes_through_save_and_load_and_resume(extra):
    model, resumed = Extra(extra), Extra(torch.zeros(2))  # whatever it was before
    velasoka.save_model(model, "net.pt")
    tiny_run(model, **KEEP)
    tiny_run(resumed, **RESUME)
    for found in (resumed, *(velasoka.load_model(Extra(torch.zeros(2)), path) for path in ("net.pt", "run.pt"))):
        assert str(found.extra) == str(extra)


def compiled_block(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a compiled block": compiled_block,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_weights_pass_between_a_plain_model_and_a_wrapped_one(wrap):
    one, other = conv_model(), WRAPS[wrap](conv_model())
    for saved, loaded in ((other, one), (conv_model(), other)):
        velasoka.save_model(saved, "net.pt")
        assert velasoka.load_model(loaded, "net.pt") is loaded
        assert torch.equal(weights_of(loaded), weights_of(saved))


@pytest.mark.parametrize("wrap", [lambda model: model, WRAPS["both"]], ids=["plain", "both"])
def test_names_of_the_models_own_that_look_like_a_wrappers_are_kept(wrap):
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    one.module, other.module = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    velasoka.save_model(wrap(one), "net.pt")
    assert torch.equal(weights_of(velasoka.load_model(other, "net.pt")), weights_of(one))


# --- Gradient scaling ---


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer, adam])
def test_train_cnn_takes_torchs_own_scaler(get_optimizer, monkeypatch):
    monkeypatch.setattr(velasoka, "_precision", lambda device: torch.float32)
    scalers = None, torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = []
    for scaler in scalers:
        torch.manual_seed(0)
        model, loss_fn = conv_model(nn.Flatten(), nn.Linear(4 * 13 * 13, 10)), nn.CrossEntropyLoss()
        optimizer, before = get_optimizer(model), weights_of(model)
        if scaler is scalers[-1]:
            velasoka.train_cnn(model, BATCHES[:1], overflowing(loss_fn, [0]), optimizer, "cpu", scaler=scaler, **QUIET)
            assert torch.equal(weights_of(model), before)
            assert scaler.get_scale() == 512
        velasoka.train_cnn(model, BATCHES, loss_fn, optimizer, "cpu", scaler=scaler, **QUIET)
        weights.append(weights_of(model))
    torch.testing.assert_close(weights[1:], weights[:1] * 2, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer])
def test_an_optimiser_of_ours_takes_the_scale_of_a_float16_pass_and_no_longer(get_optimizer, float16):
    model, marks = linear_model(), []
    optimizer = get_optimizer(model)
    optimizer.register_step_pre_hook(lambda *_: marks.append(getattr(optimizer, "_step_supports_amp_scaling", False)))
    velasoka.train_cnn(model, BATCHES[:1], nn.CrossEntropyLoss(), optimizer, "cpu", **QUIET)
    assert marks == [True]
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # others read the mark as "fused"
