"""Errors of the user's own are raised as they are: only an interrupt is an interrupt, only our own loss diverges."""

import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import BATCHES, Breaking, linear_model, tiny_run, weights_of
from torch import nn
from torch.utils.data import DataLoader, Dataset

EXITED = "DataLoader worker (pid(s) 7) exited unexpectedly"
KILLED = "DataLoader worker (pid 7) is killed by signal: "


def run_with(error, place):
    """A run with an `error` in its second epoch, in what `place` names."""
    loaders, loss_fn = {"train": BATCHES, "test": BATCHES}, nn.CrossEntropyLoss()
    if place == "loss":
        calls = iter(Breaking([None] * 6, error, at=4))
        loss_fn.register_forward_pre_hook(lambda *_: next(calls))
    else:
        at = {"train": 4, "test": 5}[place]  # one test batch is tried beforehand
        loaders[place] = Breaking(BATCHES, error, at)
    return tiny_run(loss_fn=loss_fn, loaders=[*loaders.values()])[0]


# --- Interrupts ---


def stop_a_worker():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError(EXITED)  # noqa: B904  # as torch's handler does while the interrupt is on its way


@pytest.mark.parametrize("place", ["train", "test"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(KILLED + "Interrupt: 2. "), stop_a_worker])
def test_an_interrupt_is_one_in_a_worker_too(error, place):
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 2"):
        history = run_with(error, place)
    assert (history.status, len(history.test)) == ("interrupted", 1)


# --- Every other error ---


@pytest.mark.parametrize("place", ["train", "test", "loss"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, FloatingPointError])
@pytest.mark.parametrize("text", [EXITED, KILLED + "Killed. ", "Interrupt\nand a second line"])
def test_any_other_error_is_raised_as_it_is_with_the_history_so_far(text, kind, place):
    error, cause = kind(text), OSError("no such picture")
    error.__cause__ = cause
    with pytest.warns(UserWarning, match="history") as warned, pytest.raises(kind) as caught:
        run_with(error, place)
    assert caught.value is error
    assert caught.value.__cause__ is cause
    assert len(error.history.train) == len(error.history.test) == error.history.best_epoch == 1
    assert not any("\n" in str(one.message) for one in warned)


class Faulty(Dataset):
    """Divides by zero in the third of its four images."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with np.errstate(all="raise"):
            return torch.ones(3, 32, 32) * float(np.float64(1) / (index - 2)), 0


class Closed(Exception):  # noqa: N818
    """An error that takes no history."""

    history = property()


def test_an_error_that_takes_no_attributes_is_raised_as_it_is():
    with pytest.warns(UserWarning, match="epoch 1"), pytest.raises(Closed):
        run_with(Closed(), "train")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_a_division_by_zero_in_a_worker_is_no_divergence():
    loader = DataLoader(Faulty(), 2, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(FloatingPointError, match="divide by zero") as caught:
        tiny_run(loaders=(BATCHES, loader))
    traceback.clear_frames(caught.tb)  # else the worker, last seen in there, takes five seconds to end


@pytest.mark.filterwarnings("ignore:.*history")
def test_after_an_error_the_model_has_its_best_weights(scripted):
    model = linear_model()
    with pytest.raises(ZeroDivisionError) as caught:
        tiny_run(model, epochs=5)
    history = caught.value.history
    assert [result.accuracy for result in history.test] == [30, 50, 40]
    assert (history.best_accuracy, history.best_epoch) == (50, 2)
    assert torch.equal(weights_of(model), scripted[1])
    assert not torch.equal(scripted[1], scripted[3])
