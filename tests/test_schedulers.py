"""The rate of every step: a scheduler of the user's own is stepped as torch steps it; without, the rates come back."""

import contextlib
import copy
import math

import pytest
import torch
from conftest import QUIET, Breaking, linear_model, overflowing, random_batches, weights_of
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import velasoka

CE = nn.CrossEntropyLoss()
BATCHES = random_batches()  # three; in four epochs twelve


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


KINDS = {
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3], gamma=0.5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.25, total_iters=3),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=4),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=3),
    "one's own": Halving,
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.9),
}
KINDS |= {
    "OneCycleLR": one_cycle(12),  # exactly as long as the run
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "SequentialLR": sequence(KINDS["LinearLR"], KINDS["ExponentialLR"], 1),
    "SequentialLR with OneCycleLR": sequence(KINDS["LinearLR"], one_cycle(10), 2),
    "ChainedScheduler": chain(KINDS["LinearLR"], KINDS["StepLR"]),
    "ChainedScheduler with CyclicLR": chain(KINDS["ExponentialLR"], lambda o: KINDS["CyclicLR"](o)),
    "a chain of a sequence with OneCycleLR": chain(sequence(KINDS["LinearLR"], one_cycle(10), 2)),
}


def usual_interval(name):
    return "batch" if "Cycl" in name else "epoch"


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def noted(optimizer):
    """A list to which each step of `optimizer` adds its learning rate."""
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(float(optimizer.param_groups[0]["lr"])))
    return rates


def run(make=None, epochs=4, *, model=None, optimizer=None, loaders=(BATCHES, BATCHES), **options):
    """A run of three batches an epoch: its history, the rate of every step and the one that is left, the weights."""
    model = model or linear_model()
    optimizer = optimizer or sgd(model)
    rates, scheduler = noted(optimizer), make and make(optimizer)
    options = {"scheduler": scheduler, **QUIET, **options}
    history = velasoka.start_cnn(model, optimizer, CE, loaders, "cpu", epochs, **options)
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
def test_each_scheduler_is_stepped_when_torchs_documentation_steps_it(name):
    history, rates, _ = run(KINDS[name])
    assert rates == by_hand(KINDS[name], usual_interval(name), [result.loss for result in history.test])


@pytest.mark.parametrize(
    ("make", "epochs", "last"),
    [(lambda o: lrs.StepLR(o, 1, gamma=0.5), 2, 0.0125), (lambda o: lrs.CosineAnnealingLR(o, T_max=3), 3, 0)],
)
def test_a_schedule_in_epochs_ends_where_it_was_meant_to(make, epochs, last):
    assert run(make, epochs)[1][-1] == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize("interval", ["epoch", "batch"])
@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "SequentialLR", "ChainedScheduler with CyclicLR"])
def test_the_interval_can_be_said(name, interval):
    assert run(KINDS[name], scheduler_interval=interval)[1] == by_hand(KINDS[name], interval)


def test_reduce_on_plateau_goes_by_the_test_loss():
    wrong = [(images, (labels + 1) % 10) for images, labels in BATCHES]  # the better it trains, the worse it tests
    model = linear_model()
    options = {"model": model, "optimizer": sgd(model, 1e-4), "loaders": (BATCHES, wrong)}
    history, rates, _ = run(lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0), **options)
    assert history.train[-1].loss < history.train[0].loss
    assert history.test[-1].loss > history.test[0].loss
    assert rates[::3] == [1e-4, 1e-4, 5e-5, 2.5e-5, 1.25e-5]


@pytest.mark.parametrize("interval", [None, "epoch", "batch"])
@pytest.mark.parametrize("name", ["ExponentialLR", "OneCycleLR", "SequentialLR with OneCycleLR"])
def test_a_pass_of_train_cnn_steps_a_schedule_in_epochs_once_at_its_end(name, interval):
    model = linear_model()
    optimizer = sgd(model)
    rates, scheduler = noted(optimizer), KINDS[name](optimizer)
    options = {"scheduler": scheduler, "scheduler_interval": interval} if interval else {"scheduler": scheduler}
    for _ in range(2):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **QUIET, **options)
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates == by_hand(KINDS[name], interval or usual_interval(name), epochs=2)


# --- What is refused ---


def used(optimizer):
    """A OneCycleLR of 13 steps that has 11 left."""
    scheduler = one_cycle(13)(optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    return scheduler


BOTH = r"(?=.*\b{}\b)(?=.*\b{}\b)"
EPOCH, BATCH, STEP = ({"scheduler_interval": interval} for interval in ("epoch", "batch", "step"))


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (KINDS["StepLR"], STEP, "scheduler_interval='step'"),
        (KINDS["ReduceLROnPlateau"], BATCH, "scheduler_interval|ReduceLROnPlateau"),
        (one_cycle(11), {}, BOTH.format(11, 12)),
        (lambda o: lrs.OneCycleLR(o, 0.1, steps_per_epoch=3, epochs=3), {}, BOTH.format(9, 12)),
        (one_cycle(3), EPOCH, BOTH.format(3, 4)),
        (used, {}, BOTH.format(11, 12)),
        (chain(one_cycle(11)), {}, BOTH.format(11, 12)),
        (sequence(KINDS["LinearLR"], one_cycle(9), 2), {}, "OneCycleLR"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_training(make, options, says):
    model = linear_model()
    before = weights_of(model)
    with pytest.raises(ValueError, match=says) as error:
        run(make, model=model, **options)
    assert "\n" not in str(error.value)
    assert torch.equal(before, weights_of(model))


@pytest.mark.parametrize(
    ("name", "options", "says"), [("ReduceLROnPlateau", {}, "test loss"), ("StepLR", STEP, "scheduler_interval='step'")]
)
def test_train_cnn_refuses_what_it_cannot_step(name, options, says):
    model = linear_model()
    before, optimizer = weights_of(model), sgd(model)
    options = {"scheduler": KINDS[name](optimizer), **options, **QUIET}
    with pytest.raises(ValueError, match=says):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **options)
    assert torch.equal(before, weights_of(model))


# --- Resuming ---


@pytest.mark.parametrize("name", [*KINDS, None])
def test_a_resumed_run_has_the_rates_and_the_weights_of_the_whole_one(name):
    make = KINDS.get(name)
    _, rates, weights = run(make)
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        run(make, loaders=(Breaking(BATCHES, KeyboardInterrupt(), 7), BATCHES), checkpoint_path="run.pt")
    _, resumed, weights_again = run(make, checkpoint_path="run.pt", resume=True)
    assert resumed == rates[6:]
    assert torch.equal(weights, weights_again)
    assert run(make, checkpoint_path="run.pt", resume=True)[1] == rates[-1:]


# --- The course's helpers ---

STEP_LR, MULTI_STEP_LR = "get_step_lr_scheduler", "get_multi_step_lr_scheduler"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (STEP_LR, {}, lambda o: lrs.StepLR(o, 10, 0.1)),
        (STEP_LR, {"step_size": 8, "gamma": 0.5}, lambda o: lrs.StepLR(o, 8, 0.5)),
        (MULTI_STEP_LR, {}, lambda o: lrs.MultiStepLR(o, [10, 20], 0.1)),
        (MULTI_STEP_LR, {"milestone": [10, 20, 30], "gamma": 0.5}, lambda o: lrs.MultiStepLR(o, [10, 20, 30], 0.5)),
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
def test_however_a_run_with_the_default_schedule_ends_the_optimiser_has_its_own_rates_back(ending, kind):
    model = linear_model()
    groups = [{"params": each, "lr": kind(lr)} for each, lr in zip(model.parameters(), (0.05, 0.02), strict=True)]
    groups[1]["initial_lr"] = 0.3  # as a scheduler before leaves it
    optimizer = torch.optim.SGD(groups)
    before, errors = rates_of(optimizer), {"interrupted": KeyboardInterrupt(), "error": KeyError("mine")}
    loader = Breaking(BATCHES, errors[ending], 4) if ending in errors else BATCHES
    loss_fn = overflowing(CE, [4] if ending == "diverged" else [])
    with pytest.raises(KeyError) if ending == "error" else contextlib.nullcontext():
        assert velasoka.start_cnn(model, optimizer, loss_fn, (loader, BATCHES), "cpu", 2, **QUIET).status == ending
    assert rates_of(optimizer) == before


@pytest.mark.parametrize("name", [*list(KINDS)[:10], "OneCycleLR"])
def test_a_schedule_after_a_run_with_the_default_one_begins_at_the_optimisers_own_rate(name):
    model = linear_model()
    optimizer = sgd(model)
    run(model=model, optimizer=optimizer)
    assert run(KINDS[name], model=model, optimizer=optimizer)[1] == by_hand(KINDS[name], usual_interval(name))


def test_a_pass_of_train_cnn_after_a_run_trains_at_the_optimisers_own_rate():
    model = linear_model()
    optimizer = sgd(model)
    run(model=model, optimizer=optimizer)
    rates = noted(optimizer)
    velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **QUIET)
    assert rates == [0.05] * 3


@pytest.mark.parametrize("first", [None, "StepLR", "LambdaLR"])
def test_a_rate_set_by_hand_is_the_next_runs_peak(first):
    model = linear_model()
    optimizer = sgd(model)
    run(KINDS.get(first), model=model, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.004
    rates = run(model=model, optimizer=optimizer)[1]
    assert max(rates) == pytest.approx(0.004)
    assert rates[-1] == 0.004


OPTIMIZERS = {"torch's SGD": sgd, "SGD": velasoka.get_sgd_optimizer, "Muon": velasoka.get_muon_optimizer}
OPTIMIZERS["Adam"] = lambda model: torch.optim.Adam(model.parameters())


@pytest.mark.parametrize("runs_before", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_diverged_run_a_lower_rate_trains(name, runs_before):
    model = velasoka.SimpleModel(fm_size=2)
    optimizer = OPTIMIZERS[name](model)
    start = lambda loss_fn: velasoka.start_cnn(model, optimizer, loss_fn, (BATCHES, BATCHES), "cpu", 2, **QUIET)  # noqa: E731
    for _ in range(runs_before):
        start(CE)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match="diverged in epoch 2"):
        start(overflowing(CE, [4]))
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    weights, history = weights_of(model), start(CE)
    assert history.status == "completed"
    assert math.isfinite(history.test[-1].loss)
    assert not torch.equal(weights, weights_of(model))
