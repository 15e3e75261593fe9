"""What can go wrong in training: a test for each row, named after it.

fault                             what the user sees                     what is kept
--------------------------------  -------------------------------------  -------------------------
interrupted, in train or test     one line, status "interrupted"         history, best weights
interrupted in the first epoch    the same                               what has been learnt
killed, at any moment             resume continues                       last epoch's checkpoint
a loss that is not finite         epoch, batch, lr, status "diverged"    history, best weights
a few overflows in float16        nothing: the scaler sees to it         all
an error of the user's own        the error, with its history            best weights
a checkpoint not to be written    a warning; the next epoch tries again  the checkpoint before
memory exhausted                  one line: batch size, and half of it   last epoch's checkpoint
resuming another run              one line: what differs                 the checkpoint
a checkpoint of something else    one line naming the file               the file; no code runs
weights that are not finite       one line naming file and tensor        the model's own weights

Rows without a test here are in test_training.py, test_checkpoints.py and test_keeping.py.
"""

import multiprocessing
import os
import signal
import sys

import pytest
import torch
from conftest import BATCHES, KEEP, Breaking, linear_model, overflow, tiny_run, train, weights_of
from torch import nn

import velasoka

EXITED = "DataLoader worker (pid(s) 7) exited unexpectedly"
KILLED = "DataLoader worker (pid 7) is killed by signal: "


def loss_of(model):
    """The loss of `model` on the test batches."""
    return velasoka.test_cnn(model, BATCHES, "cpu").loss


def stop_a_worker():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError(EXITED)  # noqa: B904  # as torch does while the interrupt is on its way


INTERRUPTS = [KeyboardInterrupt(), RuntimeError(KILLED + "Interrupt: 2. "), stop_a_worker]


def run_with(error, place="train", at=4, **options):
    """A run with an `error` in its second epoch, in what `place` names; history and model."""
    loaders = {"train": BATCHES, "test": BATCHES}
    loss_fn = nn.CrossEntropyLoss()
    if place == "loss":
        calls = iter(Breaking([None] * 6, error, at))
        loss_fn.register_forward_pre_hook(lambda *_: next(calls))
    else:
        loaders[place] = Breaking(BATCHES, error, at)
    return tiny_run(loss_fn=loss_fn, loaders=tuple(loaders.values()), **options)


@pytest.mark.parametrize("place", ["train", "test"])
@pytest.mark.parametrize("error", INTERRUPTS)
def test_an_interrupt_returns_the_history_and_the_best_weights(error, place):
    history, model = run_with(error, place)
    assert (history.status, len(history.train), len(history.test)) == ("interrupted", 1, 1)
    assert loss_of(model) == pytest.approx(history.test[0].loss, rel=1e-5)
    assert run_with(error, "test", at=0)[0].status == "interrupted"  # before the first epoch


def test_an_interrupt_says_in_one_line_what_the_model_holds_and_what_is_kept(capsys):
    held = "Interrupted in epoch 2 of 2: the model has the weights of epoch 1, the best"
    learnt = "Interrupted in epoch 1 of 2: the model has what it has learnt so far"
    for batch, options, expected in (
        (4, {}, held),
        (4, KEEP, f"{held}; run.pt can be resumed"),
        (2, {}, learnt),
        (2, {"checkpoint_path": "new.pt"}, learnt),
    ):
        history, model = run_with(KeyboardInterrupt(), at=batch, progress=True, **options)
        assert capsys.readouterr().out.splitlines()[-1] == expected
    assert (history.status, history.test, history.best_epoch) == ("interrupted", [], 0)
    assert not torch.equal(weights_of(model), weights_of(linear_model()))


def test_a_message_that_the_stream_cannot_carry_ends_no_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w", encoding="ascii"))  # noqa: PTH123, SIM115
    history, _ = run_with(KeyboardInterrupt(), checkpoint_path="läuft.pt", progress=True)
    assert history.status == "interrupted"


def small_run(**options):
    """A run of a tiny model on the CPU; its history and model."""
    velasoka.seed_everything(4)
    pair = velasoka.get_synthetic_dataset(40, 20)
    loaders = velasoka.get_cifar10_data_loader(pair, 20, device="cpu")
    model = velasoka.SimpleModel(fm_size=2)
    return train(model, loaders, "cpu", **options), model


def run_until_killed():
    """A `small_run` that is killed while it writes its second checkpoint."""
    fsync = os.fsync
    calls = []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            os.truncate(descriptor, 1000)  # so much of it is on the disk
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fail
    small_run(**KEEP)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_while_it_writes_a_checkpoint_resume_ends_as_if_nothing_had_happened():
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed, model = small_run(**KEEP, resume=True)
    assert (resumed.status, len(resumed.test)) == ("completed", 2)
    assert torch.equal(weights_of(model), weights_of(small_run()[1]))


def test_a_loss_that_is_not_finite_ends_training_and_is_named():
    with pytest.warns(UserWarning, match=r"epoch 2 of 2.* since batch 2, lr=0\.\d+.*lower") as said:
        history, model = tiny_run(loss_fn=overflow(at=[4]), **KEEP)
    assert len(said) == 1
    assert (history.status, len(history.test)) == ("diverged", 1)
    assert loss_of(model) == pytest.approx(history.test[0].loss, rel=1e-5)
    model = linear_model()
    optimizer = velasoka.get_sgd_optimizer(model, 0.01)
    with pytest.warns(UserWarning, match=r"epoch 1 of 2.*first weights.*since batch 1"):
        _, model = tiny_run(model, optimizer, overflow(at=range(10)))
    assert torch.equal(weights_of(model), weights_of(linear_model()))
    assert tiny_run(model, optimizer)[0].status == "completed"  # nothing infinite is left in it


ERRORS = [
    KeyError("mine"),
    FloatingPointError("mine"),  # only a loss that the loops find not finite has diverged
    RuntimeError(EXITED),
    RuntimeError(KILLED + "Killed. "),
    SystemExit(3),
]


@pytest.mark.parametrize("place", ["train", "test", "loss"])
@pytest.mark.parametrize("error", ERRORS)
def test_any_other_error_is_raised_as_it_is_with_the_history_and_the_best_weights(error, place):
    model = linear_model()
    with pytest.raises(type(error)) as caught:
        run_with(error, place, model=model)
    assert caught.value is error
    history = error.history
    assert len(history.train) == len(history.test) == history.best_epoch == 1
    assert loss_of(model) == pytest.approx(history.test[0].loss, rel=1e-5)
