"""The rate of every step: a scheduler of the user's own is stepped as torch steps it; without, the rates come back."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import BATCHES, QUIET, Breaking, interrupted_at, linear_model, overflowing, sgd, tiny_run, weights_of
from torch import nn
from torch.optim import lr_scheduler as lrs

import velasoka

CE = nn.CrossEntropyLoss()


class Halving(lrs.LRScheduler):
    """One that a user wrote."""

    def get_lr(self):
        return [group["lr"] / (2 if self.last_epoch else 1) for group in self.optimizer.param_groups]


def one_cycle(steps):
    return lambda optimizer: lrs.OneCycleLR(optimizer, 0.1, total_steps=steps)


def sequence(first, then, milestone):
    return lambda optimizer: lrs.SequentialLR(optimizer, [first(optimizer), then(optimizer)], [milestone])


def chain(*parts):
    return lambda optimizer: lrs.ChainedScheduler([part(optimizer) for part in parts])


def linear_lr(optimizer):
    return lrs.LinearLR(optimizer, 0.25, total_iters=3)


def cyclic(optimizer):
    return lrs.CyclicLR(optimizer, 0.01, 0.05, step_size_up=2)


def plateau(optimizer, threshold=0.9):
    return lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=threshold)


KINDS = {  # stepped after every batch if the name speaks of a cycle, else after every epoch
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "one's own": Halving,
    "ReduceLROnPlateau": plateau,
    "SequentialLR": sequence(linear_lr, Halving, 1),
    "OneCycleLR": one_cycle(12),  # exactly as long as the run
    "CyclicLR": cyclic,
    "ChainedScheduler with CyclicLR": chain(Halving, cyclic),
    "a chain of a sequence with OneCycleLR": chain(sequence(linear_lr, one_cycle(10), 2)),
}


def usual_interval(name):
    return "batch" if "Cycl" in name else "epoch"


def noted(optimizer):
    """A list to which each step of `optimizer` adds its learning rate."""
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(float(optimizer.param_groups[0]["lr"])))
    return rates


def run(make=None, optimizer=None, model=None, epochs=4, **options):
    """A run of three batches an epoch: its history, the rate of every step and the one that is left, the weights."""
    model = model or linear_model()
    optimizer = optimizer or sgd(model)
    rates, scheduler = noted(optimizer), make and make(optimizer)
    history, _ = tiny_run(model, optimizer, epochs=epochs, scheduler=scheduler, **options)
    return history, [*rates, float(optimizer.param_groups[0]["lr"])], weights_of(model)


def by_hand(make, interval, losses=(), epochs=4):
    """The rates of such a run by the loop of torch's documentation."""
    optimizer = sgd(nn.Linear(1, 1))
    scheduler, rates, losses = make(optimizer), noted(optimizer), iter(losses)
    for _ in range(epochs):
        for _ in BATCHES:
            optimizer.step()
            if interval == "batch":
                scheduler.step()
        if interval == "epoch":
            scheduler.step(*[next(losses)] if isinstance(scheduler, lrs.ReduceLROnPlateau) else ())
    return [*rates, optimizer.param_groups[0]["lr"]]


# --- When a scheduler is stepped ---


@pytest.mark.parametrize("name", KINDS)
def test_each_scheduler_is_stepped_as_torchs_documentation_steps_it(name):
    history, rates, _ = run(KINDS[name])
    assert rates == by_hand(KINDS[name], usual_interval(name), [result.loss for result in history.test])


@pytest.mark.parametrize("interval", ["epoch", "batch"])
@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR"])
def test_the_interval_can_be_said(name, interval):
    assert run(KINDS[name], scheduler_interval=interval)[1] == by_hand(KINDS[name], interval)


def test_reduce_on_plateau_goes_by_the_test_loss():
    wrong = [(images, (labels + 1) % 10) for images, labels in BATCHES]  # the better it trains, the worse it tests
    model = linear_model()
    _, rates, _ = run(lambda o: plateau(o, 1e-4), sgd(model, 1e-4), model, loaders=(BATCHES, wrong))
    assert rates[::3] == [1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5]


@pytest.mark.parametrize("interval", [None, "epoch", "batch"])
@pytest.mark.parametrize("name", ["one's own", "OneCycleLR"])
def test_train_cnn_steps_a_schedule_in_epochs_once_at_its_end(name, interval):
    model = linear_model()
    optimizer = sgd(model)
    rates, options = noted(optimizer), {"scheduler": KINDS[name](optimizer), "scheduler_interval": interval}
    for _ in range(2):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **QUIET, **options)
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates == by_hand(KINDS[name], interval or usual_interval(name), epochs=2)


def used(optimizer):
    """A OneCycleLR of 13 steps that has 11 left."""
    scheduler = one_cycle(13)(optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    return scheduler


@pytest.mark.parametrize(
    ("make", "interval", "left", "needed"),
    [
        (one_cycle(11), None, 11, 12),
        (one_cycle(3), "epoch", 3, 4),
        (used, None, 11, 12),
        (chain(one_cycle(11)), None, 11, 12),
        (sequence(linear_lr, one_cycle(9), 2), None, 11, 12),
    ],
)
def test_a_one_cycle_too_short_for_the_run_is_refused_before_training(make, interval, left, needed):
    model = linear_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match=rf"^scheduler: [^\n]*\b{left} steps left[^\n]*\b{needed}$"):
        run(make, model=model, scheduler_interval=interval)
    assert torch.equal(before, weights_of(model))


@pytest.mark.parametrize("name", [*KINDS, None])
def test_a_resumed_run_has_the_rates_and_the_weights_of_the_whole_one(name):
    make = KINDS.get(name)
    _, rates, weights = run(make)
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        run(make, loaders=(interrupted_at(7), BATCHES), checkpoint_path="run.pt")
    _, resumed, weights_again = run(make, checkpoint_path="run.pt", resume=True)
    assert resumed == rates[6:]
    assert torch.equal(weights, weights_again)
    assert run(make, checkpoint_path="run.pt", resume=True)[1] == rates[-1:]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("get_step_lr_scheduler", {}, lambda o: lrs.StepLR(o, 10, 0.1)),
        ("get_step_lr_scheduler", {"step_size": 8, "gamma": 0.5}, lambda o: lrs.StepLR(o, 8, 0.5)),
        ("get_multi_step_lr_scheduler", {}, lambda o: lrs.MultiStepLR(o, [10, 20], 0.1)),
        ("get_multi_step_lr_scheduler", {"milestone": [5], "gamma": 0.5}, lambda o: lrs.MultiStepLR(o, [5], 0.5)),
    ],
)
def test_the_courses_helpers_give_torchs_own_schedulers(name, options, expected):
    optimizer, twin = sgd(nn.Linear(1, 1)), sgd(nn.Linear(1, 1))
    one, other = getattr(velasoka, name)(optimizer=optimizer, **options), expected(twin)
    assert type(one) is type(other)
    assert one.state_dict() == other.state_dict()
    assert one.optimizer is optimizer


# --- The optimiser's own rates ---


def rates_of(optimizer):
    return [(type(group["lr"]), float(group["lr"]), group.get("initial_lr")) for group in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:interrupted", "ignore:diverged", "ignore:.*history")
@pytest.mark.parametrize("ending", ["completed", "interrupted", "diverged", "error"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_however_a_run_ends_the_optimiser_has_its_own_rates_back(ending, kind):
    model = linear_model()
    groups = [{"params": each, "lr": kind(lr)} for each, lr in zip(model.parameters(), (0.05, 0.02), strict=True)]
    groups[1]["initial_lr"] = 0.3  # as a scheduler before leaves it
    optimizer = torch.optim.SGD(groups)
    before, errors = rates_of(optimizer), {"interrupted": KeyboardInterrupt(), "error": KeyError("mine")}
    loader = Breaking(BATCHES, errors[ending], 4) if ending in errors else BATCHES
    loss_fn = overflowing(CE, [4] if ending == "diverged" else [])
    with pytest.raises(KeyError) if ending == "error" else nullcontext():
        assert tiny_run(model, optimizer, loss_fn, (loader, BATCHES))[0].status == ending
    assert rates_of(optimizer) == before


@pytest.mark.parametrize("name", ["one's own", "OneCycleLR"])
def test_a_schedule_after_a_run_without_one_begins_at_the_optimisers_own_rate(name):
    model = linear_model()
    optimizer = sgd(model)
    run(None, optimizer, model)
    assert run(KINDS[name], optimizer, model)[1] == by_hand(KINDS[name], usual_interval(name))


@pytest.mark.parametrize("first", [None, "StepLR"])
def test_a_rate_set_by_hand_is_the_next_runs_peak(first):
    model = linear_model()
    optimizer = sgd(model)
    run(KINDS.get(first), optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.004
    rates = run(None, optimizer, model)[1]
    assert max(rates) == pytest.approx(0.004)
    assert rates[-1] == 0.004


@pytest.mark.parametrize("runs_before", [0, 1])
@pytest.mark.parametrize("get_optimizer", [velasoka.get_muon_optimizer, lambda m: torch.optim.Adam(m.parameters())])
def test_after_a_diverged_run_a_lower_rate_trains(get_optimizer, runs_before):
    model = velasoka.SimpleModel(fm_size=2)
    optimizer = get_optimizer(model)
    for _ in range(runs_before):
        tiny_run(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match="diverged in epoch 2"):
        tiny_run(model, optimizer, overflowing(CE, [4]))
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    weights, (history, _) = weights_of(model), tiny_run(model, optimizer)
    assert history.status == "completed"
    assert math.isfinite(history.test[-1].loss)
    assert not torch.equal(weights, weights_of(model))
