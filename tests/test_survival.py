"""What can go wrong in training: a test for each row, named after it.

fault                               what the user sees                       what is kept
----------------------------------  ---------------------------------------  ------------------------------------
interrupted, at any moment          a warning, status "interrupted"          history, best weights, checkpoint
killed, at any moment               resume continues                         the checkpoint of the last epoch
a loss that is not finite           epoch, batch, lr, status "diverged"      history, best weights, checkpoint
one overflow in float16             nothing: the scaler sees to it           all
a checkpoint that cannot be written a warning, the next epoch tries again    history, the checkpoint before
memory exhausted                    one line: batch size, and half of it     the checkpoint of the last epoch
resuming another run                one line: what differs                   the checkpoint
a checkpoint of something else      one line naming the file                 that file; no code of it runs
weights that are not finite         one line naming file and tensor          the model's own weights
"""

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET, Bomb, Breaking, overflowing, random_batches, train, weights_of
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import velasoka

# --- Interrupts and kills ---


def greys(number):
    """Pictures of one grey each, ten greys for ten classes: a tiny model gets better at them with each epoch."""
    labels = [index % 10 for index in range(number)]
    images = np.broadcast_to(np.array(labels, np.uint8)[:, None, None, None] * 25, (number, 32, 32, 3)).copy()
    return velasoka._ArrayDataset(images, labels, velasoka.CIFAR10_CLASSES, velasoka.CIFAR10_MEAN, velasoka.CIFAR10_STD)


def small_model_and_loaders(device):
    velasoka.seed_everything(4)
    model = velasoka.SimpleModel(fm_size=2)
    return model, velasoka.get_cifar10_data_loader((greys(40), greys(20)), 20, device=device)


def small_run(device, error=None, at=None, **options):
    """Three epochs of a tiny model, the same whenever it is called; its history, model and test loader."""
    model, loaders = small_model_and_loaders(device)
    first = Breaking(loaders[0], error, at) if error else loaders[0]
    return train(model, (first, loaders[1]), device, 3, **options), model, loaders[1]


def test_an_interrupt_says_in_one_line_what_the_model_holds_and_what_is_kept(model, loaders, device, capsys):
    def interrupt(at, **options):
        breaking = Breaking(loaders[0], KeyboardInterrupt(), at)
        train(model, (breaking, loaders[1]), device, 3, progress=True, **options)
        return capsys.readouterr().out.splitlines()[-1]

    after_one, kept = len(loaders[0]) + 2, "; resume=True (--resume) continues from run.pt"
    held = "Interrupted in epoch 2 of 3 (not CIFAR-10): the model has the weights of epoch 1, the best"
    assert interrupt(after_one) == held
    assert interrupt(after_one, checkpoint_path="run.pt") == held + kept
    first = "Interrupted in epoch 1 of 3 (not CIFAR-10): the model has what it has learnt so far"
    assert interrupt(1, checkpoint_path="run.pt", resume=True) == held + kept
    with pytest.warns(UserWarning, match="will be overwritten"):
        assert interrupt(1, checkpoint_path="run.pt") == first  # the file is another run's
    assert interrupt(1) == first


def test_an_interrupt_returns_the_history_and_the_best_weights(model, loaders, device):
    breaking = Breaking(loaders[0], KeyboardInterrupt(), at=len(loaders[0]) + 2)
    with pytest.warns(UserWarning, match="interrupted in epoch 2 of 3"):
        history = train(model, (breaking, loaders[1]), device, 3)
    assert history.status == "interrupted"
    assert len(history.train) == len(history.test) == 1
    assert velasoka.test_cnn(model, loaders[1], device, **QUIET).loss == pytest.approx(history.test[0].loss, rel=1e-5)


def interrupted(call, moment=None):
    """What `call` returns if it is interrupted before the `moment`-th line of velasoka.py once training has begun.

    Also the name of the function that each of those lines is in.
    """
    lines = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != velasoka.__file__:
            return None
        if event == "line" and (lines or frame.f_code.co_name == "train_cnn"):
            lines.append(frame.f_code.co_name)
            if len(lines) - 1 == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), lines
    finally:
        sys.settrace(before)


@pytest.mark.filterwarnings("ignore:interrupted")
def test_interrupted_at_any_moment_nothing_is_lost_and_resume_ends_as_if_nothing_had_happened(device, monkeypatch):
    ticks = itertools.count(step=0.3)  # seconds: the counts are read at the same lines in every run
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    whole, model, _ = small_run(device)
    weights, run = weights_of(model), lambda: small_run(device, checkpoint_path="run.pt")
    _, lines = interrupted(run)
    between_epochs = [moment for moment, name in enumerate(lines) if name == "record"]
    anywhere = random.Random(0).sample(range(len(lines) - 10), 20)  # at the last few lines all is done
    for moment in between_epochs + anywhere:
        Path("run.pt").unlink(missing_ok=True)
        (history, model, test), _ = interrupted(run, moment)
        assert history.status == "interrupted", moment
        assert len(history.train) == len(history.test)
        assert history.test == [] or history.best_accuracy == max(result.accuracy for result in history.test)
        if history.test:
            assert velasoka.test_cnn(model, test, device, **QUIET).accuracy == history.best_accuracy
        resumed, model, _ = small_run(device, checkpoint_path="run.pt", resume=True)
        assert resumed.status == "completed"
        assert [result.correct for result in resumed.test] == [result.correct for result in whole.test]
        assert torch.equal(weights, weights_of(model)) or device.type != "cpu", moment


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


KILLED = {  # where a process dies without a word, in its second epoch
    "in a batch": "t.small_run(device, t.die, 3, checkpoint_path='run.pt')",
    "writing the checkpoint": "t.fail_at(os, 'fsync', 2); t.small_run(device, checkpoint_path='run.pt')",
    "renaming the checkpoint": "t.fail_at(t.Path, 'replace', 2); t.small_run(device, checkpoint_path='run.pt')",
}


def fail_at(owner, name, number):
    """Have the function `name` of `owner` kill the process at its `number`-th call, counted from 0."""
    call, calls = getattr(owner, name), itertools.count()
    setattr(owner, name, lambda *args: die() if next(calls) == number else call(*args))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("where", KILLED)
def test_killed_at_any_moment_resume_ends_as_if_nothing_had_happened(where, device):
    folders = [str(Path(__file__).parent), str(Path(velasoka.__file__).parent)]
    program = f"import os, sys; sys.path[:0] = {folders}; import test_survival as t, velasoka\n"
    program += f"device = velasoka.get_available_device(); {KILLED[where]}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    resumed, model, _ = small_run(device, checkpoint_path="run.pt", resume=True)
    _, whole, _ = small_run(device)
    assert (resumed.status, len(resumed.test)) == ("completed", 3)
    assert torch.equal(weights_of(model), weights_of(whole)) or device.type != "cpu"


def test_an_interrupt_in_the_first_epoch_can_be_resumed_with_the_same_objects(device):
    _, whole, _ = small_run(device)
    model, loaders = small_model_and_loaders(device)
    breaking = Breaking(loaders[0], KeyboardInterrupt(), at=1)
    with pytest.warns(UserWarning, match="interrupted in epoch 1"):
        train(model, (breaking, loaders[1]), device, 3, checkpoint_path="run.pt")
    train(model, loaders, device, 3, checkpoint_path="run.pt", resume=True)
    assert torch.equal(weights_of(model), weights_of(whole)) or device.type != "cpu"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_run_goes_on_with_another_precision_on_another_machine(dtypes, device, monkeypatch):
    before, after = dtypes
    monkeypatch.setattr(velasoka, "_precision", lambda device: before)
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        small_run(device, KeyboardInterrupt(), 5, checkpoint_path="run.pt")
    monkeypatch.setattr(velasoka, "_precision", lambda device: after)
    history, _, _ = small_run(device, checkpoint_path="run.pt", resume=True)
    assert (history.status, len(history.test)) == ("completed", 3)


def test_a_checkpoint_is_not_replaced_before_an_epoch_is_done(model, loaders, device):
    train(model, loaders, device, 1, checkpoint_path="run.pt")
    before = Path("run.pt").read_bytes()
    with pytest.warns(UserWarning, match="interrupted in epoch 1"):
        train(model, (Breaking(loaders[0], KeyboardInterrupt(), 1), loaders[1]), device, 3, checkpoint_path="run.pt")
    assert Path("run.pt").read_bytes() == before


@pytest.mark.filterwarnings("ignore:interrupted")
@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad])
def test_an_interrupt_while_torch_changes_its_modes_leaves_them_as_they_were(mode, model, loaders):
    def loss_fn(logits, labels):
        mode().__enter__()
        raise KeyboardInterrupt

    optimizer = velasoka.get_muon_optimizer(model)
    assert velasoka.start_cnn(model, optimizer, loss_fn, loaders, "cpu", 1, **QUIET).status == "interrupted"
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


# --- Resuming ---


@pytest.mark.parametrize("kind", ["own", "DataLoader", "DataLoader with a generator", "DataLoader with a sampler"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind, pictures, device):
    class Noisy(velasoka.DilatedDepthwiseModel):
        """Draws from every global random generator in training."""

        def forward(self, images):
            noise = (random.random() + np.random.rand()) * torch.rand(1).item() * self.training
            return super().forward(images * (1 + noise))

    def run(error_at=None, **options):
        velasoka.seed_everything(1)
        model, generator = Noisy(fm_size=4), torch.Generator().manual_seed(2)
        if kind == "own":
            loader, test_loader = velasoka.get_cifar10_data_loader(pictures, 32, device=device)
        else:
            order = {
                "DataLoader": {"shuffle": True},
                "DataLoader with a generator": {"shuffle": True, "generator": generator},
                "DataLoader with a sampler": {"sampler": RandomSampler(pictures[0], generator=generator)},
            }[kind]
            loader, test_loader = DataLoader(pictures[0], 32, **order), DataLoader(pictures[1], 32)
        loader = Breaking(loader, KeyboardInterrupt(), error_at) if error_at else loader
        history = train(model, (loader, test_loader), device, 3, **options)
        return history, weights_of(model)

    whole, weights = run()
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        run(error_at=16, checkpoint_path="run.pt")
    resumed, weights_again = run(checkpoint_path="run.pt", resume=True)
    assert torch.equal(weights, weights_again) or device.type != "cpu"
    assert [result.correct for result in resumed.train + resumed.test] == [r.correct for r in whole.train + whole.test]
    assert (resumed.best_epoch, resumed.status) == (whole.best_epoch, "completed")
    finished, weights_again = run(checkpoint_path="run.pt", resume=True)
    assert torch.equal(weights, weights_again) or device.type != "cpu"
    assert finished == resumed


def test_resuming_another_run_is_refused_and_a_first_run_starts(model, loaders, device):
    resume = {"checkpoint_path": "run.pt", "resume": True}
    train(model, loaders, device, 1, **resume)
    with pytest.raises(ValueError, match=r"run\.pt: was made with epochs=1, this run has epochs=2"):
        train(model, loaders, device, 2, **resume)
    with pytest.raises(ValueError, match=r"run\.pt: was made with batches="):
        train(model, (random_batches(), loaders[1]), device, 1, **resume)
    with pytest.raises(ValueError, match=r"run\.pt: was made with parameters="):
        train(velasoka.DilatedDepthwiseModel(fm_size=2), loaders, device, 1, **resume)
    with pytest.raises(ValueError, match=r"run\.pt: was made with model=DilatedDepthwiseModel"):
        train(velasoka.SimpleModel(fm_size=4), loaders, device, 1, **resume)
    muon, sgd = velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer
    for optimizer, loss_fn, differs in (
        (muon(model, lr=0.01), velasoka.get_ce_loss(), "learning rates"),
        (sgd(model), velasoka.get_ce_loss(), "optimizer"),
        (torch.optim.Adam(model.parameters()), velasoka.get_ce_loss(), "optimizer"),
        (muon(model), nn.NLLLoss(), "loss"),
    ):
        with pytest.raises(ValueError, match=rf"run\.pt: was made with {differs}="):
            velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 1, **QUIET | resume)


def test_numbers_of_numpy_can_be_resumed_from(model, loaders, device):
    for resume in (False, True):
        optimizer = velasoka.get_sgd_optimizer(model, lr=np.float64(0.05))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / 100))
        options = {"scheduler": scheduler, "checkpoint_path": "run.pt", "resume": resume}
        loss_fn, epochs = velasoka.get_ce_loss(), np.int64(2)
        history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, epochs, **QUIET | options)
        assert (history.status, len(history.test)) == ("completed", 2)


def test_a_target_is_judged_by_what_was_reached_not_by_an_earlier_target(model, loaders, device):
    options = {"checkpoint_path": "run.pt", "resume": True}
    assert train(model, loaders, device, 2, target_accuracy=1, **options).status == "target reached"
    assert train(model, loaders, device, 2, target_accuracy=100, **options).status == "completed"
    finished = train(model, loaders, device, 2, target_accuracy=1, **options)
    assert (finished.status, len(finished.test)) == ("target reached", 2)


def spoiled(change):
    """The checkpoint's content after `change`."""
    content = torch.load("run.pt", weights_only=True)
    change(content)
    torch.save(content, "run.pt")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.write_bytes(b""), "not a file that this module saved"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "not a file that this module saved"),
        (lambda path: path.write_text("no checkpoint"), "not a file that this module saved"),
        (lambda path: torch.save(Bomb(), path), "not a file that this module saved"),
        (lambda path: torch.save([1], path), "not a checkpoint"),
        (lambda path: velasoka.save_model(velasoka.SimpleModel(fm_size=4), path), "not a checkpoint"),
        (lambda path: spoiled(lambda content: content.pop("history")), "does not fit"),
        (lambda path: spoiled(lambda content: content["model"].popitem()), "does not fit"),
        (lambda path: spoiled(lambda content: content.update(model=[1])), "does not fit"),
        (lambda path: spoiled(lambda content: content.update(optimizer=None)), "does not fit"),
        (lambda path: spoiled(lambda content: content.update(best={"a": "b"})), "does not fit"),
        (lambda path: spoiled(lambda content: content["random"].pop("loader 0")), "does not fit"),
        (lambda path: spoiled(lambda content: content["best"]["c4.1.bias"].fill_(math.nan)), r"c4\.1\.bias has NaN"),
        (lambda path: spoiled(lambda content: content["model"]["c4.1.bias"].fill_(math.nan)), r"c4\.1\.bias has NaN"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line_and_runs_nothing(harm, says, model, loaders, device):
    train(model, loaders, device, 1, checkpoint_path="run.pt")
    harm(Path("run.pt"))
    model = velasoka.DilatedDepthwiseModel(fm_size=4).to(device)
    before, content = weights_of(model), Path("run.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"run\.pt: .*{says}") as error:
        train(model, loaders, device, 1, checkpoint_path="run.pt", resume=True)
    assert "\n" not in str(error.value)
    assert not Path("exploded").exists()
    assert Path("run.pt").read_bytes() == content
    assert torch.equal(before, weights_of(model))


@pytest.mark.parametrize("identity", ["made_with", "fingerprint"])  # of 2.0, of 2.1
def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line_that_says_so(identity, model, loaders, device):
    torch.save({identity: {"model": "DilatedDepthwiseModel"}, "history": {}, "best": {}}, "run.pt")
    with pytest.raises(ValueError, match=r"^run\.pt: a checkpoint of an earlier version, which .* cannot continue$"):
        train(model, loaders, device, 1, checkpoint_path="run.pt", resume=True)


# --- Numbers, disk and memory that run out ---


@pytest.mark.parametrize("progress", [True, False])
def test_a_loss_that_is_not_finite_stops_training_and_is_named(progress, model, loaders, device):
    loss_fn = overflowing(velasoka.get_ce_loss(), at=[len(loaders[0]) + 2])
    optimizer = velasoka.get_muon_optimizer(model)
    with pytest.warns(UserWarning, match=r"epoch 2 of 3: .* since batch 3, lr=0\.\d+"):
        history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, 3, progress=progress)
    assert history.status == "diverged"
    assert len(history.test) == 1
    assert velasoka.test_cnn(model, loaders[1], device, **QUIET).loss == pytest.approx(history.test[0].loss, rel=1e-5)


@pytest.mark.parametrize("progress", [True, False])
def test_divergence_is_noticed_within_half_a_second(progress, model, loaders, device, monkeypatch):
    seconds, losses = itertools.count(), []
    monkeypatch.setattr(velasoka.time, "perf_counter", lambda: next(seconds))  # each look at the clock takes one

    def loss_fn(logits, labels):
        losses.append(logits.sum() * (math.nan if len(losses) == 2 else 1))
        return losses[-1]

    with pytest.raises(FloatingPointError, match="since batch 3"):
        optimizer = velasoka.get_muon_optimizer(model)
        velasoka.train_cnn(model, loaders[0], loss_fn, optimizer, device, progress=progress)
    assert len(losses) == 3


def test_a_loss_that_is_never_finite_leaves_the_weights_it_began_with(model, loaders, device):
    before = weights_of(model)
    loss_fn = overflowing(velasoka.get_ce_loss(), at=range(10))
    with pytest.warns(UserWarning, match="diverged in epoch 1 of 3: .* since batch 1"):
        velasoka.start_cnn(model, velasoka.get_muon_optimizer(model), loss_fn, loaders, device, 3, **QUIET)
    assert torch.equal(before, weights_of(model))


def test_one_overflow_in_float16_is_no_divergence(float16, model, loaders, device):
    loss_fn = overflowing(velasoka.get_ce_loss(), at=[3])
    history = velasoka.start_cnn(model, velasoka.get_muon_optimizer(model), loss_fn, loaders, device, 1, **QUIET)
    assert history.status == "completed"
    assert math.isfinite(history.train[0].loss)


def test_a_checkpoint_that_cannot_be_written_warns_and_the_next_epoch_tries_again(model, loaders, device, monkeypatch):
    fsync, errors = os.fsync, iter([None, None, OSError(28, "No space left on device"), None, KeyboardInterrupt()])

    def fail(descriptor):
        if error := next(errors):
            raise error
        fsync(descriptor)

    done = lambda: len(torch.load("run.pt", weights_only=True)["history"]["test"])  # noqa: E731
    monkeypatch.setattr(velasoka.os, "fsync", fail)
    written, ended = "not written.*No space", "interrupted in epoch 4"
    with pytest.warns(UserWarning, match=ended), pytest.warns(UserWarning, match=written) as warned:
        history = train(model, loaders, device, 4, checkpoint_path="run.pt")
    assert "interrupted" in str(warned[-1].message)
    assert (history.status, len(history.test), done()) == ("interrupted", 4, 3)
    assert [path.name for path in Path().iterdir()] == ["run.pt"]


def test_a_checkpoint_in_a_place_that_is_gone_warns_and_training_goes_on(model, loaders, device, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="not written"):
        history = train(model, loaders, device, 1, checkpoint_path=tmp_path / "file" / "run.pt")
    assert history.status == "completed"


def run_out_of_cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")


@pytest.mark.parametrize("exhaust", [run_out_of_cuda_memory, lambda: torch.empty(2**58), lambda: bytearray(2**62)])
@pytest.mark.parametrize("call", ["train_cnn", "test_cnn", "predict", "start_cnn"])
def test_memory_exhausted_names_the_batch_size_and_half_of_it(exhaust, call, model, loaders, device, monkeypatch):
    arguments = {
        "train_cnn": (loaders[0], velasoka.get_ce_loss(), velasoka.get_muon_optimizer(model), device),
        "start_cnn": (velasoka.get_muon_optimizer(model), velasoka.get_ce_loss(), loaders, device, 1),
    }
    monkeypatch.setattr(model, "forward", lambda images: exhaust())
    with pytest.raises(MemoryError, match=r"batches of 32 images: try half, batch_size=16") as error:
        getattr(velasoka, call)(model, *arguments.get(call, (loaders[1], device)))
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(model, loaders, device):
    with torch.no_grad():
        model.c4[1].bias[3] = math.nan
    velasoka.save_model(model, "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt: holds damaged weights \(c4\.1\.bias has NaN\)"):
        velasoka.load_model(velasoka.DilatedDepthwiseModel(fm_size=4), "net.pt")
    with pytest.raises(ValueError, match="logits are not finite"):
        velasoka.predict(model, loaders[1], device)
