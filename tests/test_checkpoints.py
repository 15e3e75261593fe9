"""What a checkpoint keeps, what is said when it cannot, and what else reads it."""

import os
import random
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import BATCHES, KEEP, QUIET, Bomb, interrupted_at, linear_model, tiny_run, weights_of
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import velasoka

RESUME = KEEP | {"resume": True}


class Noisy(velasoka.DilatedDepthwiseModel):
    """Draws from every global random generator in training."""

    def forward(self, images):
        noise = (random.random() + np.random.rand()) * torch.rand(1).item() * self.training
        return super().forward(images * (1 + noise))


LOADERS = {  # and the options of each
    "shuffled": dict,
    "with a generator": lambda: {"generator": torch.Generator().manual_seed(2)},
}
SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=21),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, threshold=9.0),
}


@pytest.mark.parametrize("kind", ["own", *LOADERS, *SCHEDULERS])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind, pictures, device):
    def run(error_at=None, **options):
        velasoka.seed_everything(1)
        model = Noisy(fm_size=2)
        rate = np.logspace(-2, -1, 2)[0]  # a number of NumPy's is kept, too
        optimizer = velasoka.get_muon_optimizer(model, rate)
        loaders = velasoka.get_cifar10_data_loader(pictures, 32, device=device)
        if kind in LOADERS:
            loaders = DataLoader(pictures[0], 32, shuffle=True, **LOADERS[kind]()), loaders[1]
        if kind in SCHEDULERS:
            options["scheduler"] = SCHEDULERS[kind](optimizer)
        loaders = interrupted_at(error_at, *loaders)
        parts = model, optimizer, velasoka.get_ce_loss(), loaders, device
        return velasoka.start_cnn(*parts, 3, **QUIET | options), weights_of(model)

    whole, weights = run()
    assert run(error_at=16, **KEEP)[0].status == "interrupted"
    for _ in range(2):  # the second time, the run is found done
        resumed, weights_again = run(**RESUME)
        assert torch.equal(weights, weights_again) or device.type != "cpu"
        assert resumed.learning_rates == whole.learning_rates
        assert (resumed.best_epoch, resumed.status) == (whole.best_epoch, "completed")


def test_a_run_goes_on_in_another_precision():
    for before, after in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        Path("run.pt").unlink(missing_ok=True)
        tiny_run(loaders=interrupted_at(4), precision=before, **KEEP)
        history, _ = tiny_run(precision=after, **RESUME)
        assert (history.status, len(history.test)) == ("completed", 2)


class Other(nn.Sequential):
    """A model of another class."""


OTHERS = {  # other runs, and what names the difference
    "epochs": lambda: {"epochs": 3},
    "rates": lambda: {"lr": 0.01},
    "loss": lambda: {"loss_fn": nn.functional.cross_entropy},
    "model": lambda: {"model": Other(*linear_model())},
    "batches": lambda: {"loaders": (BATCHES[:2], BATCHES)},
    "parameters": lambda: {"model": nn.Sequential(*linear_model(), nn.Linear(10, 10))},
    "optimizer": lambda: {"make": lambda parameters, lr: torch.optim.Adam(parameters, lr)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_resuming_another_run_is_refused_in_one_line_that_names_the_difference(what):
    def run(model=None, lr=0.05, make=torch.optim.SGD, **options):
        model = model or linear_model()
        return tiny_run(model, make(model.parameters(), lr), **options)

    run(**KEEP)
    content = Path("run.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"^run\.pt: {what} was [^\n]*, [^\n]*$"):
        run(**OTHERS[what](), **RESUME)
    assert Path("run.pt").read_bytes() == content
    assert run(**RESUME)[0].status == "completed"


VERSION_2 = {"fingerprint": {"model": "Sequential"}, "history": {}, "model": {}}
FILES = {  # what is in the file, and what is said of it
    "of version 2": (lambda path: torch.save(VERSION_2, path), "version 2.*delete"),
    "another dict": (lambda path: torch.save({"weights": 1}, path), "not a checkpoint"),
    "weights": (lambda path: velasoka.save_model(linear_model(), path), "not a checkpoint"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cut off"),
    "code": (lambda path: torch.save(Bomb(), path), "never run"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_refused_in_one_line_and_runs_nothing(kind):
    write, says = FILES[kind]
    tiny_run(**KEEP)
    write(Path("run.pt"))
    content = Path("run.pt").read_bytes()
    model = linear_model()
    with pytest.raises(ValueError, match=rf"^run\.pt: [^\n]*{says}[^\n]*$"):
        tiny_run(model, **RESUME)
    assert not Path("exploded").exists()
    assert Path("run.pt").read_bytes() == content
    assert torch.equal(weights_of(model), weights_of(linear_model()))


def test_a_checkpoint_that_cannot_be_written_warns_and_the_next_epoch_tries_again(monkeypatch):
    results = [None, OSError(28, "No space left on device"), None]
    monkeypatch.setattr(os, "fsync", Mock(side_effect=results))
    kept = []

    def callback(history):
        kept.append(len(velasoka._load("run.pt")["history"]["test"]))

    with pytest.warns(UserWarning, match=r"^run\.pt: .*not written.*No space") as warned:
        history, _ = tiny_run(epochs=3, callback=callback, **KEEP)
    assert (len(warned), history.status, kept) == (1, "completed", [1, 1, 3])
    assert [path.name for path in Path().iterdir()] == ["run.pt"]


@pytest.mark.filterwarnings("error")
def test_what_a_path_gives_unexpectedly_is_said_once_and_nothing_else():
    with pytest.warns(UserWarning, match=r"^run\.pt: not there") as warned:
        history, _ = tiny_run(**RESUME)
    assert (len(warned), len(history.test)) == (1, 2)
    tiny_run(**RESUME)
    tiny_run(checkpoint_path="new/folder/run.pt")
    assert Path("new/folder/run.pt").exists()
    before = Path("run.pt").read_bytes()
    with pytest.warns(UserWarning, match=r"^run\.pt: .*resume=True") as warned:
        tiny_run(loaders=interrupted_at(2), **KEEP)  # overwritten after an epoch only
    assert (len(warned), Path("run.pt").read_bytes()) == (1, before)


@pytest.mark.parametrize("has_best", [True, False])  # version 2 had none before the first test
def test_load_model_takes_the_weights_from_a_checkpoint_of_version_2(has_best):
    trained = linear_model()
    nn.init.ones_(trained[2].weight)
    weights = trained.state_dict()
    parts = {"best": weights, "model": {}} if has_best else {"best": None, "model": weights}
    torch.save(VERSION_2 | parts, "run.pt")
    model = velasoka.load_model(linear_model(), "run.pt")
    assert torch.equal(weights_of(model), weights_of(trained))
