"""Optimisers, the loss, and the rate of every step."""

import copy
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    BATCHES,
    QUIET,
    Breaking,
    conv_model,
    linear_model,
    overflowing,
    random_batches,
    sgd,
    tiny_run,
    train,
    weights_of,
)
from torch import nn
from torch.optim import lr_scheduler as lrs

import velasoka

CE = nn.CrossEntropyLoss()
OPTIMIZERS = [velasoka.get_muon_optimizer, velasoka.get_sgd_optimizer]

# --- Muon ---


@pytest.fixture
def classifier(device):
    return conv_model(nn.Flatten(), nn.Linear(4 * 13 * 13, 10)).to(device)


def take_steps(model, optimizer, number=1, seed=0):
    """Steps on random images."""
    torch.manual_seed(seed)
    for _ in range(number):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 32, 32, device=next(model.parameters()).device)
        model(images).square().mean().backward()
        optimizer.step()


def test_muon_turns_filters_by_the_rate_and_keeps_their_norm(classifier):
    weight = classifier[3].weight
    weight.data.mul_(7)
    weight.grad = torch.randn_like(weight)  # always in one direction
    optimizer = velasoka.get_muon_optimizer(classifier, lr=0.02)
    norm = weight.norm().item()
    for _ in range(40):
        old = weight.detach().clone()
        optimizer.step()
        assert weight.norm().item() == pytest.approx(norm, rel=0.05)
        assert 0.005 < (weight - old).norm() / norm < 0.06


def test_muon_moves_filters_along_the_orthogonal_part_of_the_gradient(device):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.Linear(1, 1)).to(device)
    weight = model[0].weight
    weight.grad = 1e-6 * torch.randn_like(weight)  # however small
    left, _, right = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    old = weight.detach().clone()
    velasoka.get_muon_optimizer(model, lr=1e-3).step()
    move = (old - weight).detach().flatten()
    assert nn.functional.cosine_similarity(move, (left @ right).flatten(), 0) > 0.9


def test_muon_moves_filters_that_begin_at_zero(classifier):
    nn.init.zeros_(classifier[3].weight)
    take_steps(classifier, velasoka.get_muon_optimizer(classifier, lr=0.01), 2)
    assert weights_of(classifier).isfinite().all()
    assert classifier[3].weight.any()


def test_muon_moves_each_kind_of_parameter_at_its_own_pace(model):
    pace = {}
    for group in velasoka.get_muon_optimizer(model, lr=0.1).param_groups:
        rate = round(group["lr"] * group["lr_scale"], 9)
        pace |= dict.fromkeys(group["params"], ("muon" if group["muon"] else "sgd", rate))
    assert set(pace) == set(model.parameters())
    norm, depthwise = model.c1[1], model.c2[3]
    assert pace[model.c1[0].weight] == pace[model.c3[3].weight] == ("muon", 0.1)
    assert pace[norm.bias] == pace[depthwise.weight] == ("sgd", 2.0)
    assert pace[norm.weight] == pace[model.c1[0].bias] == pace[model.c4[1].weight] == ("sgd", 0.2)


MODELS = {
    "no convolution": lambda: [nn.Flatten(), nn.Linear(3072, 10)],
    "only a convolution": lambda: [nn.Conv2d(3, 10, 32), nn.Flatten()],
    "depthwise": lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 10, 30), nn.Flatten()],
    "frozen": lambda: [nn.Conv2d(3, 3, 1).requires_grad_(False), nn.Flatten(), nn.Linear(3072, 10)],
}


@pytest.mark.parametrize("kind", MODELS)
def test_muon_takes_any_model_and_leaves_frozen_parameters_alone(kind, device):
    model = nn.Sequential(*MODELS[kind]())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, (BATCHES, BATCHES), device, 1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new.cpu()) != new.requires_grad


def test_muon_takes_a_closure(classifier):
    optimizer = velasoka.get_muon_optimizer(classifier)
    before = weights_of(classifier)

    def closure():
        loss = classifier(torch.ones(2, 3, 32, 32, device=classifier[0].weight.device)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert not torch.equal(weights_of(classifier), before)


def test_after_an_overflow_weights_and_momentum_are_the_same_bit_for_bit(model, device):
    optimizer = velasoka.get_muon_optimizer(model.to(device))
    take_steps(model, optimizer)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    optimizer.grad_scale = torch.tensor(64.0, device=device)  # as a `GradScaler` sets them
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_muon_unscales_the_gradients_of_a_scaler(classifier, device):
    twin = copy.deepcopy(classifier)
    for model, scale in ((classifier, 1.0), (twin, 64.0)):
        optimizer = velasoka.get_muon_optimizer(model)
        for parameter in model.parameters():
            parameter.grad = scale * torch.ones_like(parameter)
        optimizer.grad_scale = torch.tensor(scale, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        optimizer.step()
    torch.testing.assert_close(weights_of(classifier), weights_of(twin))


@pytest.mark.parametrize(("size", "lr"), [(16, 0.025), (64, 0.05), (256, 0.1), (1024, 0.2)])
def test_the_default_rate_follows_the_square_root_of_the_batch_size(size, lr, model):
    for given, expected in ((None, lr), (0.3, 0.3)):
        optimizer = velasoka.get_muon_optimizer(model, given, batch_size=size)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 3)


# --- Every optimiser, and the loss ---


def muon_alike(model):
    return sgd(model, 0.02, nesterov=True)


def sgd_alike(model):
    return sgd(model, 0.01, nesterov=True, weight_decay=5e-4)


@pytest.mark.parametrize("pair", [*zip(OPTIMIZERS, (muon_alike, sgd_alike), strict=True)])
def test_what_is_no_filter_moves_as_torchs_sgd_moves_it(pair, device):
    weights = []
    for make, options in zip(pair, ({"lr": 0.01}, {}), strict=True):
        model = linear_model().to(device)
        take_steps(model, make(model, **options), 3)
        weights.append(weights_of(model))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("get_optimizer", OPTIMIZERS)
def test_optimisers_go_on_from_their_state_dict(get_optimizer, classifier):
    one = get_optimizer(classifier)
    take_steps(classifier, one)
    twin = copy.deepcopy(classifier)
    other = get_optimizer(twin, lr=3.0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    take_steps(classifier, one, 2)
    take_steps(twin, other, 2)
    assert torch.equal(weights_of(classifier), weights_of(twin))


def test_label_smoothing_lowers_the_target():
    logits, labels = torch.randn(5, 10), torch.arange(5)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    assert velasoka.get_ce_loss(0.3)(logits, labels) == expected


# --- When a scheduler is stepped ---


KINDS = {  # and how often they are stepped unless something else is said
    "StepLR": (lambda o: lrs.StepLR(o, 2, gamma=0.5), "epoch"),
    "OneCycleLR": (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=12), "batch"),  # as the run
    "CyclicLR": (lambda o: lrs.CyclicLR(o, 0.01, 0.05, step_size_up=2), "batch"),
}


def noted(optimizer):
    """A list to which each step of `optimizer` adds its learning rate."""
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    return rates


def run(make=None, optimizer=None, model=None, **options):
    """Four epochs of three batches: the history, each step's rate and the one that is left."""
    model = model or linear_model()
    optimizer = optimizer or sgd(model)
    rates = noted(optimizer)
    scheduler = None if make is None else make(optimizer)
    history, _ = tiny_run(model, optimizer, epochs=4, scheduler=scheduler, **options)
    return history, [*rates, optimizer.param_groups[0]["lr"]]


def by_hand(make, interval, epochs=4):
    """The rates of such a run by the loop of torch's documentation."""
    optimizer = sgd(nn.Linear(1, 1))
    scheduler = make(optimizer)
    rates = noted(optimizer)
    for step in range(1, 3 * epochs + 1):
        optimizer.step()
        if interval == "batch" or step % 3 == 0:
            scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("interval", [None, "epoch", "batch"])
@pytest.mark.parametrize("name", KINDS)
def test_a_scheduler_is_stepped_as_torchs_documentation_steps_it(name, interval):
    make, usual = KINDS[name]
    history, rates = run(make, scheduler_interval=interval)
    assert rates == by_hand(make, interval or usual)
    assert history.learning_rates == rates[:-1]
    model = linear_model()
    optimizer = sgd(model)
    rates = noted(optimizer)
    options = QUIET | {"scheduler": make(optimizer), "scheduler_interval": interval}
    for _ in range(2):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **options)
    assert [*rates, optimizer.param_groups[0]["lr"]] == by_hand(make, interval or usual, 2)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_reduce_on_plateau_goes_by_the_test_loss_or_with_max_by_the_accuracy(mode, monkeypatch):
    results = [(1.0, 50.0), (0.9, 40.0), (0.95, 60.0), (0.5, 55.0)]  # loss, accuracy
    outcomes = iter([velasoka.EpochResult(*result, 1, 2, 1.0) for result in results])
    monkeypatch.setattr(velasoka, "test_cnn", lambda *_, **__: next(outcomes))
    _, rates = run(lambda o: lrs.ReduceLROnPlateau(o, mode, factor=0.5, patience=0))
    expected = {"min": [0.05, 0.05, 0.05, 0.025, 0.025], "max": [0.05, 0.05, 0.025, 0.025, 0.0125]}
    assert rates[::3] == expected[mode]


def test_train_cnn_has_no_test_for_reduce_on_plateau_which_it_says_before_training():
    model = linear_model()
    optimizer = sgd(model)
    scheduler = lrs.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau .*start_cnn"):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", scheduler=scheduler, **QUIET)
    assert torch.equal(weights_of(model), weights_of(linear_model()))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("get_step_lr_scheduler", {"step_size": 8, "gamma": 0.5}, lambda o: lrs.StepLR(o, 8, 0.5)),
        ("get_multi_step_lr_scheduler", {}, lambda o: lrs.MultiStepLR(o, [10, 20], 0.1)),
    ],
)
def test_the_courses_helpers_give_torchs_own_schedulers(name, options, expected):
    optimizer, twin = sgd(nn.Linear(1, 1)), sgd(nn.Linear(1, 1))
    one, other = getattr(velasoka, name)(optimizer=optimizer, **options), expected(twin)
    assert type(one) is type(other)
    assert one.state_dict() == other.state_dict()


# --- The schedule of a run without one ---


def test_the_rate_warms_up_and_ends_near_zero_and_starts_afresh_in_a_second_run():
    model = linear_model()
    optimizer = sgd(model, 0.1)
    batches = random_batches((2,) * 50)
    for _ in range(2):
        rates = tiny_run(model, optimizer, loaders=(batches, BATCHES))[0].learning_rates
        peak = rates.index(max(rates))
        assert len(rates) == 100
        assert rates[0] < rates[peak] == pytest.approx(0.1)
        assert peak < 5
        assert all(one > another for one, another in itertools.pairwise(rates[peak:]))
        assert 0 < rates[-1] < 0.003


@pytest.mark.filterwarnings("ignore:Diverged")
@pytest.mark.parametrize("ending", ["completed", "interrupted", "diverged", "failed"])
def test_however_a_run_ends_the_optimiser_has_its_own_rates_back(ending):
    model = linear_model()
    weight, bias = model.parameters()
    groups = [{"params": weight}, {"params": bias, "lr": 0.02, "initial_lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.05)  # the last was left by a scheduler before
    errors = {"interrupted": KeyboardInterrupt(), "failed": KeyError("mine")}
    loader = Breaking(BATCHES, errors[ending], 4) if ending in errors else BATCHES
    loss_fn = overflowing(CE, [4] if ending == "diverged" else [])
    with pytest.raises(KeyError) if ending == "failed" else nullcontext():
        history, _ = tiny_run(model, optimizer, loss_fn, (loader, BATCHES))
        assert history.status == ending
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.02]


@pytest.mark.parametrize("name", KINDS)
def test_runs_with_and_without_a_scheduler_may_follow_each_other(name):
    model = linear_model()
    optimizer = sgd(model)
    run(None, optimizer, model)
    make, interval = KINDS[name]
    assert run(make, optimizer, model)[1] == by_hand(make, interval)
    optimizer.param_groups[0]["lr"] = 0.004  # set by hand: the next run's peak
    _, rates = run(None, optimizer, model)
    assert max(rates) == pytest.approx(0.004)
    assert rates[-1] == 0.004
