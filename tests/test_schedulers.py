"""Optimisers, the loss, and the rate of every step."""

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
from conftest import BATCHES, CE, Breaking, linear_model, overflow, sgd, tiny_run, weights_of
from torch import nn
from torch.optim import lr_scheduler as lrs

import velasoka


def test_muon_turns_filters_by_the_rate_along_the_orthogonal_part_of_the_gradient(device):
    filters = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.Linear(1, 1)).to(device)
    weight = filters[0].weight
    weight.data.mul_(7)
    weight.grad = 1e-6 * torch.randn_like(weight)  # however small, and always in one direction
    left, _, right = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    optimizer = velasoka.get_muon_optimizer(filters, lr=0.02)
    norm = weight.norm().item()
    for step in range(40):
        old = weight.detach().clone()
        optimizer.step()
        move = (old - weight).detach().flatten()
        if step == 0:
            assert nn.functional.cosine_similarity(move, (left @ right).flatten(), 0) > 0.9
        assert 0.005 < move.norm() / norm < 0.06
        assert weight.norm().item() == pytest.approx(norm, rel=0.05)


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
    "grouped": lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 10, 30), nn.Flatten()],
    "frozen": lambda: [nn.Conv2d(3, 3, 1).requires_grad_(False), nn.Flatten(), nn.Linear(3072, 10)],
    "zero": lambda: [nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3072, 10)],
}


@pytest.mark.parametrize("kind", MODELS)
def test_muon_takes_any_model_and_leaves_frozen_parameters_alone(kind):
    model = nn.Sequential(*MODELS[kind]())
    if kind == "zero":
        nn.init.zeros_(model[0].weight)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tiny_run(model, velasoka.get_muon_optimizer(model), epochs=1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) != new.requires_grad
        assert new.isfinite().all()


@pytest.mark.parametrize(("size", "lr"), [(16, 0.025), (64, 0.05), (256, 0.1), (1024, 0.2)])
def test_the_default_rate_follows_the_square_root_of_the_batch_size(size, lr, model):
    for given, expected in ((None, lr), (0.3, 0.3)):
        optimizer = velasoka.get_muon_optimizer(model, given, batch_size=size)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 3)


def test_what_is_no_filter_moves_as_torchs_sgd_moves_it():
    weights = []
    for make in (velasoka.get_muon_optimizer, functools.partial(sgd, lr=0.1, nesterov=True)):
        model = linear_model()
        optimizer = make(model)

        def closure(model=model):
            model.zero_grad()
            loss = CE(model(BATCHES[0][0]), BATCHES[0][1])
            loss.backward()
            return loss

        for _ in range(3):
            assert optimizer.step(closure).requires_grad
        weights.append(weights_of(model))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)
    options = velasoka.get_sgd_optimizer(model).defaults
    assert options.items() >= {"lr": 0.05, "nesterov": True, "weight_decay": 5e-4}.items()


def test_the_courses_helpers_give_torchs_own():
    optimizer = sgd(nn.Linear(1, 1))
    by_step = velasoka.get_step_lr_scheduler(optimizer=optimizer, step_size=8, gamma=0.5)
    by_epoch = velasoka.get_multi_step_lr_scheduler(optimizer=optimizer)
    assert (type(by_step), by_step.step_size, by_step.gamma) == (lrs.StepLR, 8, 0.5)
    assert (type(by_epoch), sorted(by_epoch.milestones)) == (lrs.MultiStepLR, [10, 20])
    assert velasoka.get_ce_loss(0.3).label_smoothing == 0.3


KINDS = {  # and how often they are stepped unless something else is said
    "StepLR": (lambda o: lrs.StepLR(o, 2, gamma=0.5), "epoch"),
    "OneCycleLR": (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=12), "batch"),  # as the run
    "CyclicLR": (lambda o: lrs.CyclicLR(o, 0.01, 0.05, step_size_up=2), "batch"),
}


def run(make, model, optimizer, **options):
    """Four epochs of three batches: the history, each step's rate and the one that is left."""
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    options |= {"epochs": 4, "scheduler": make and make(optimizer)}
    history, _ = tiny_run(model, optimizer, **options)
    return history, [*rates, optimizer.param_groups[0]["lr"]]


def by_hand(make, interval):
    """The rates of such a run by the loop of torch's documentation."""
    optimizer = sgd(nn.Linear(1, 1))
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 13):
        optimizer.step()
        if interval == "batch" or step % 3 == 0:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("interval", [None, "epoch", "batch"])
@pytest.mark.parametrize("name", KINDS)
def test_a_scheduler_is_stepped_as_torchs_documentation_steps_it(name, interval):
    make, usual = KINDS[name]
    expected = by_hand(make, interval or usual)
    model = linear_model()
    optimizer = sgd(model)
    run(None, model, optimizer)  # leaves nothing behind
    history, rates = run(make, model, optimizer, scheduler_interval=interval)
    assert rates == expected
    assert history.learning_rates == rates[:-1]
    optimizer.param_groups[0]["lr"] = 0.004  # set by hand: the next run's peak
    _, rates = run(None, model, optimizer)
    assert max(rates) == pytest.approx(0.004)
    assert rates[-1] == 0.004
    optimizer = sgd(model)
    options = {"scheduler": make(optimizer), "scheduler_interval": interval}
    for epoch in range(4):
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", **options)
        assert optimizer.param_groups[0]["lr"] == expected[3 * (epoch + 1)]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_reduce_on_plateau_goes_by_the_test_loss_or_with_max_by_the_accuracy(mode, monkeypatch):
    results = [(1.0, 50.0), (0.9, 40.0), (0.95, 60.0), (0.5, 55.0)]  # loss, accuracy
    outcomes = iter([velasoka.EpochResult(*result, 1, 2, 1.0) for result in results])
    monkeypatch.setattr(velasoka, "test_cnn", lambda *_, **__: next(outcomes))
    model = linear_model()
    optimizer = sgd(model)
    _, rates = run(lambda o: lrs.ReduceLROnPlateau(o, mode, 0.5, patience=0), model, optimizer)
    expected = {"min": [0.05, 0.05, 0.05, 0.025, 0.025], "max": [0.05, 0.05, 0.025, 0.025, 0.0125]}
    assert rates[::3] == expected[mode]
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau .*start_cnn"):  # it has no test
        scheduler = lrs.ReduceLROnPlateau(optimizer)
        velasoka.train_cnn(model, BATCHES, CE, optimizer, "cpu", scheduler=scheduler)
    assert torch.equal(weights_of(model), before)


def test_the_rate_warms_up_and_ends_near_zero_and_starts_afresh_in_a_second_run():
    model = linear_model()
    optimizer = sgd(model, 0.1)
    for _ in range(2):
        rates = tiny_run(model, optimizer, loaders=(BATCHES * 17, BATCHES))[0].learning_rates
        peak = rates.index(max(rates))
        assert len(rates) == 2 * 51
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
    loss_fn = overflow(at=[4] if ending == "diverged" else [])
    with pytest.raises(KeyError) if ending == "failed" else nullcontext():
        history, _ = tiny_run(model, optimizer, loss_fn, (loader, BATCHES))
        assert history.status == ending
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.02]
