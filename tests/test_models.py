"""The models: their size, their mirror pairs, and what other tools make of them."""

import copy
import pickle

import pytest
import torch
from conftest import random_batches, train, weights_of
from torch import nn
from torch.optim.swa_utils import update_bn

import velasoka

COUNTS = {"simple": 576_842, "dilated": 413_002, "dilated-depthwise": 348_106}
every_model = pytest.mark.parametrize("name", velasoka.MODELS)


def images_on(device):
    return torch.randn(8, 3, 32, 32, device=device)


def with_plain_layers(model):
    """A copy of `model` of torch's own layers, as version 2 had them."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        for plain in (nn.Conv2d, nn.BatchNorm2d):
            if isinstance(layer, plain):
                layer.__class__ = plain
    return model


@every_model
def test_has_the_parameters_and_the_blocks_of_the_contract(name):
    model = velasoka.MODELS[name]()
    assert velasoka.count_parameters(model) == COUNTS[name] < velasoka.MAX_PARAMETERS
    assert all(parameter.requires_grad for parameter in model.parameters())
    for block in (model.c1, model.c2, model.c3):
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in block) == 1
    assert isinstance(model.c4[0], nn.AdaptiveAvgPool2d)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert model.c4[1].kernel_size == (1, 1)
    assert sum(layer.dilation == (2, 2) for layer in convolutions) == (name != "simple")
    assert sum(layer.groups == 64 for layer in convolutions) == (name == "dilated-depthwise")


@every_model
def test_returns_a_logit_for_each_class_for_images_of_any_size(name, device):
    for side, num_classes in ((16, 10), (32, 100), (33, 2), (64, 3)):
        model = velasoka.MODELS[name](fm_size=4, num_classes=num_classes).to(device)
        assert model(torch.zeros(2, 3, side, side, device=device)).shape == (2, num_classes)


def test_mirror_images_have_the_same_logits_and_teach_the_same(device):
    model = velasoka.SimpleModel(fm_size=4).double().to(device)  # no side is odd
    images = images_on(device).double()
    outcomes = []
    for view in (images, images.flip(-1)):
        model.zero_grad()
        logits = model(view)
        logits.square().sum().backward()
        outcomes.append([logits.detach(), *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*outcomes)


@every_model
def test_training_keeps_the_mirror_pairs(name, device):
    model = velasoka.MODELS[name](fm_size=4)
    batches = random_batches((8, 8, 8))
    train(copy.deepcopy(model), (batches, batches), device, 1)  # of a copy, a copy's own
    train(model, (batches, batches), device, 1)
    for key, weight in model.state_dict().items():
        if weight.ndim == 4:  # colours and classes have no mirror image
            dims = {"c1.0.weight": (0, 3), "c4.1.weight": (1, 3)}.get(key, (0, 1, 3))
            torch.testing.assert_close(weight, weight.flip(dims), atol=1e-3, rtol=1e-2)


@every_model
def test_weights_of_version_2_load_by_name_and_give_the_logits_that_they_gave(name):
    layers = "c1.0 c1.1 c1.3 c1.5 c2.0 c2.1 c2.3 c2.5 c3.0 c3.1 c3.3 c3.5 c4.1"
    if name == "dilated-depthwise":
        layers = layers.replace("c2.5", "c2.4 c2.6")
    old = with_plain_layers(velasoka.MODELS[name](fm_size=4)).eval()
    assert {key.rpartition(".")[0] for key in old.state_dict()} == set(layers.split())
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(0.6)
    torch.save(old.state_dict(), "net.pt")
    new = velasoka.load_model(velasoka.MODELS[name](fm_size=4), "net.pt").eval()
    images = images_on("cpu")
    torch.testing.assert_close(new(images), old(images))


TOOLS = {
    "torch.fx": lambda model, images: torch.fx.symbolic_trace(model),
    "jit.script": lambda model, images: torch.jit.script(model),
    "jit.trace": lambda model, images: torch.jit.trace(model, images),
    "pickle": lambda model, images: pickle.loads(pickle.dumps(model)),  # noqa: S301
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Conv")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_gives_the_logits_of_the_model(tool, device):
    model = velasoka.DilatedDepthwiseModel(fm_size=2).to(device).eval()
    images = images_on(device)
    torch.testing.assert_close(TOOLS[tool](model, images)(images), model(images))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norms_average_as_torchs_do_in_training_and_apply_it_in_testing(momentum, device):
    model = velasoka.SimpleModel(fm_size=4).to(device)
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = momentum
    plain = with_plain_layers(model)
    for images, _ in random_batches((8, 8)):
        torch.testing.assert_close(model(images.to(device)), plain(images.to(device)))
    images = images_on(device)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    for each in (model, plain):
        update_bn(random_batches((8, 8), seed=1), each, device)
    torch.testing.assert_close(weights_of(model), weights_of(plain))
