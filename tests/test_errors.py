"""Errors of the user's own are raised as they are: only an interrupt is an interrupt, only our own loss diverges."""

import dataclasses
import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import QUIET, Breaking, linear_model, random_batches, weights_of
from torch import nn
from torch.utils.data import DataLoader

import velasoka

BATCHES = random_batches()  # three
EXITED = "DataLoader worker (pid(s) 7) exited unexpectedly"
KILLED = "DataLoader worker (pid 7) is killed by signal: "


def start(place=None, error=None, epochs=2, model=None, **options):
    """A run with an `error` in its second epoch, in what `place` names; without, one that nothing happens to."""
    model, loss_fn, loaders = model or linear_model(), nn.CrossEntropyLoss(), {"train": BATCHES, "test": BATCHES}
    if place in loaders:
        loaders[place] = Breaking(BATCHES, error, {"train": 4, "test": 5}[place])  # one test batch is tried beforehand
    elif place:
        calls = iter(Breaking([None] * 9, error, {"loss": 4, "model": 8}[place]))
        {"loss": loss_fn, "model": model}[place].register_forward_pre_hook(lambda *_: next(calls))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    return velasoka.start_cnn(model, optimizer, loss_fn, [*loaders.values()], "cpu", epochs, **QUIET, **options)


# --- Interrupts ---


def stop_a_worker():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError(EXITED)  # noqa: B904  # as torch's handler does while the interrupt is on its way


@pytest.mark.parametrize("place", ["train", "test"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(KILLED + "Interrupt: 2. "), stop_a_worker])
def test_an_interrupt_is_an_interrupt_in_a_worker_too(error, place):
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 2"):
        history = start(place, error)
    assert (history.status, len(history.test)) == ("interrupted", 1)


# --- Every other error ---


def with_cause(error, cause):
    error.__cause__ = cause
    return error


ERRORS = {
    "a worker that exits": lambda: RuntimeError(EXITED),
    "a worker that is killed": lambda: RuntimeError(KILLED + "Killed. "),
    "a worker's own": lambda: RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    "one with a cause": lambda: with_cause(RuntimeError(EXITED), OSError("no such picture")),
    "RuntimeError": lambda: RuntimeError("Interrupt"),
    "KeyError": lambda: KeyError("mine"),
    "FloatingPointError": lambda: FloatingPointError("the train loss is not finite"),
}


@pytest.mark.parametrize("place", ["train", "test", "model", "loss"])
@pytest.mark.parametrize("kind", ERRORS)
def test_any_other_error_is_raised_as_it_is_with_the_history_so_far(kind, place):
    error = ERRORS[kind]()
    cause = error.__cause__
    with pytest.warns(UserWarning, match="history") as warned, pytest.raises(type(error)) as caught:
        start(place, error)
    assert caught.value is error
    assert caught.value.__cause__ is cause
    assert isinstance(error.history, velasoka.History)
    assert len(error.history.train) == len(error.history.test) == error.history.best_epoch == 1
    assert not any("\n" in str(one.message) for one in warned)


class Faulty(torch.utils.data.Dataset):
    """Colour images, but one is grey, or cannot be made at all."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.fault() if index == 6 else torch.zeros(3, 32, 32), 0


def divide_by_zero():
    with np.errstate(all="raise"):
        return torch.tensor(np.ones((3, 32, 32)) / np.zeros(1))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@pytest.mark.parametrize(
    ("fault", "place", "error", "says"),
    [
        (lambda: torch.zeros(1, 32, 32), 0, RuntimeError, "collate_tensor_fn"),
        (divide_by_zero, 1, FloatingPointError, "divide by zero"),
    ],
    ids=["a grey image in training", "a division by zero in the test pass"],
)
def test_an_error_in_a_worker_is_raised_with_what_went_wrong_there(fault, place, error, says):
    loaders, model = [BATCHES, BATCHES], linear_model()
    loaders[place] = DataLoader(Faulty(fault), 4, num_workers=1, multiprocessing_context="fork")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(error, match=says) as caught:
        velasoka.start_cnn(model, optimizer, nn.CrossEntropyLoss(), loaders, "cpu", 1, **QUIET)
    traceback.clear_frames(caught.tb)  # else the worker, last seen in there, takes five seconds to end


def test_a_division_by_zero_in_the_data_is_no_divergence():
    with pytest.warns(UserWarning, match="history"), pytest.raises(FloatingPointError, match="divide by zero"):
        start("train", divide_by_zero)


# --- What is kept ---


@pytest.mark.filterwarnings("ignore:.*history")
@pytest.mark.parametrize("checkpoint", [{}, {"checkpoint_path": "run.pt"}])
def test_after_an_error_the_model_holds_its_best_weights(checkpoint, monkeypatch):
    accuracies, weights, error = iter([30.0, 50.0, 40.0]), [], ZeroDivisionError("mine")

    def test_cnn(model, *_, **__):
        weights.append(weights_of(model))
        if len(weights) > 3:
            raise error
        return dataclasses.replace(velasoka.EpochResult(1.0, 0.0, 0, 1, 1.0), accuracy=next(accuracies))

    monkeypatch.setattr(velasoka, "test_cnn", test_cnn)
    model = linear_model()
    with pytest.raises(ZeroDivisionError):
        start(epochs=5, model=model, **checkpoint)
    assert [result.accuracy for result in error.history.test] == [30, 50, 40]
    assert (error.history.best_accuracy, error.history.best_epoch) == (50, 2)
    assert torch.equal(weights_of(model), weights[1])
    assert not torch.equal(weights[1], weights[3])
