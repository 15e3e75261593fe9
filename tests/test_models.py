import copy

import pytest
import torch
import torchvision
from torch import nn

import velasoka

COUNTS = {"simple": 576_842, "dilated": 413_002, "dilated-depthwise": 348_106}
FIELDS = {"simple": 60, "dilated": 64, "dilated-depthwise": 64}
every_model = pytest.mark.parametrize("name", velasoka.MODELS)


@every_model
def test_has_exactly_its_parameters_and_fewer_than_a_million(name):
    assert velasoka.count_parameters(velasoka.MODELS[name]()) == COUNTS[name] < velasoka.MAX_PARAMETERS


@every_model
@pytest.mark.parametrize("side", [16, 32, 33, 64])
def test_returns_ten_logits_for_images_of_any_size(name, side, device):
    model = velasoka.MODELS[name](fm_size=4).to(device)
    assert model(torch.zeros(2, 3, side, side, device=device)).shape == (2, 10)


def test_models_take_their_images_by_keyword_and_from_a_subclass():
    class Grey(velasoka.SimpleModel):
        def forward(self, images):
            return super().forward(images.repeat(1, 3, 1, 1))

    images = torch.randn(2, 3, 32, 32)
    model = velasoka.SimpleModel(fm_size=2).eval()
    assert torch.equal(model(images=images), model(images))
    assert Grey(fm_size=2)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


@every_model
def test_every_parameter_learns(name, device):
    model = velasoka.MODELS[name]().to(device)
    model(torch.randn(8, 3, 32, 32, device=device)).square().sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())
    still = {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() == 0}
    assert all(name.endswith("bias") for name in still)  # a bias in front of a batch norm has no effect in training


@every_model
def test_has_three_max_pools_then_global_average_pooling_then_the_classes(name):
    model = velasoka.MODELS[name]()
    for block in (model.c1, model.c2, model.c3):
        assert [type(layer) for layer in block][-4:] == [nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU]
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in block) == 1
    assert [type(layer) for layer in model.c4] == [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.Flatten]


def test_one_is_dilated_and_one_is_depthwise_separable_too():
    for model, dilated, depthwise in zip((M() for M in velasoka.MODELS.values()), (0, 1, 1), (0, 0, 1), strict=True):
        convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert sum(layer.dilation == (2, 2) for layer in convolutions) == dilated
        assert sum(layer.groups == layer.in_channels == 64 for layer in convolutions) == depthwise
        assert all(layer.padding == (0, 0) for layer in convolutions if layer.kernel_size == (1, 1))


def mirrored(model, images):
    """The logits of `images` and of their mirror images, in eval mode."""
    model.eval()
    return model(images), model(images.flip(-1))


def test_mirror_images_have_the_same_logits_and_the_same_gradients(device):
    model, images = velasoka.SimpleModel(fm_size=4).double().to(device), torch.randn(8, 3, 32, 32, device=device)
    gradients = []
    for logits in mirrored(model, images.double()):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@every_model
@pytest.mark.parametrize("copied", [False, True])
def test_training_keeps_the_mirror_pairs(name, copied, device):
    model, labels = velasoka.MODELS[name](fm_size=4), torch.arange(8, device=device)
    model = (copy.deepcopy(model) if copied else model).to(device)
    optimizer = velasoka.get_muon_optimizer(model)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32, device=device)), labels).backward()
        optimizer.step()
    first, *_, last = weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    for weight in weights:
        dims = {id(first): (0, 3), id(last): (1, 3)}.get(id(weight), (0, 1, 3))
        torch.testing.assert_close(weight, weight.flip(dims), atol=1e-3, rtol=1e-2)  # matrices multiply in bfloat16
    one, other = mirrored(model, torch.randn(8, 3, 32, 32, device=device))
    assert (one - other).std() < 0.2 * one.std()  # batch statistics, and a side of 7 pooled to 4, are not symmetric


def linear(model):
    """A copy of `model` in which the gradient flows to every pixel that a cell sees: all weights 1, pools averaging."""
    model = copy.deepcopy(model).double().eval()
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, ceil_mode=layer.ceil_mode))
            elif isinstance(layer, (nn.ReLU, nn.BatchNorm2d)):
                setattr(parent, name, nn.Identity())
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


def measured_field(layers, side):
    """The side of the region of an image that the middle cell of the output depends on."""
    images = torch.zeros(1, 3, side, side, dtype=torch.double, requires_grad=True)
    output = linear(layers)(images)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    seen = images.grad[0, 0].nonzero()
    return tuple((seen.max(0).values - seen.min(0).values + 1).tolist())


@every_model
def test_receptive_field_is_the_one_measured_by_gradients(name):
    model = velasoka.MODELS[name](fm_size=2)
    rows = velasoka.receptive_field(model)
    c3_ends = next(row for row in rows if row["layer"] == f"c3.{len(model.c3) - 3}")  # its max-pool
    blocks = nn.Sequential(model.c1, model.c2, model.c3)
    assert measured_field(blocks, 200) == (c3_ends["receptive_field"],) * 2
    # global average pooling of 32×32 images is a 4×4 average: its view is measured on images larger than itself
    assert measured_field(nn.Sequential(blocks, nn.AvgPool2d(4, 4)), 400) == (rows[-1]["receptive_field"],) * 2
    assert rows[-1]["receptive_field"] == FIELDS[name] > 44


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 2, 5, stride=2), nn.Conv2d(2, 2, 3, dilation=3), nn.MaxPool2d(3, 2)],
        [nn.Conv2d(3, 2, (1, 3)), nn.AvgPool2d(2), nn.Conv2d(2, 2, (5, 2), stride=(1, 2)), nn.Conv2d(2, 1, 3)],
        [nn.Conv2d(3, 4, 1, stride=2), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4, padding=1)],
    ],
)
def test_receptive_field_of_any_sequential_model_is_the_measured_one(layers):
    model = nn.Sequential(*layers)
    field = velasoka.receptive_field(model, (3, 64, 64))[-1]["receptive_field"]
    assert (field if isinstance(field, tuple) else (field, field)) == measured_field(model, 64)


def test_receptive_field_has_a_row_for_each_layer_that_widens_or_moves_the_view():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1800, 10)
    columns = ("layer", "kernel_size", "stride", "dilation", "output_size", "jump", "receptive_field")
    expected = [("0", 3, 1, 1, 30, 1, 3), ("3", 2, 2, 1, 15, 2, 4), ("4", 15, 15, 1, 1, 30, 32)]
    rows = velasoka.receptive_field(nn.Sequential(*layers))
    assert rows == [dict(zip(columns, row, strict=True)) for row in expected]


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ([nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((None, 1))], (3, 32)),
        ([nn.Conv2d(3, 4, 3), nn.Flatten(2)], 3),
        ([nn.Conv2d(3, 4, 3), nn.LPPool2d(2, 2)], 4),
        ([nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 4)], 32),
    ],
)
def test_receptive_field_of_less_common_layers(layers, field):
    assert velasoka.receptive_field(nn.Sequential(*layers))[-1]["receptive_field"] == field


def test_receptive_field_follows_steps_that_are_no_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 13 * 13, 10)

        def forward(self, x):
            x = self.two(nn.functional.max_pool2d(self.one(x), 2))
            return self.last(x.view(len(x), -1))

    rows = velasoka.receptive_field(Net())
    assert [(row["layer"], row["receptive_field"]) for row in rows] == [
        ("one", 3),
        ("max_pool2d", 4),
        ("two", 8),
        ("view", 32),
    ]


def test_receptive_field_warns_of_a_step_that_it_cannot_follow():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match="leaves out 1, which it cannot follow"):
        velasoka.receptive_field(model)


class Branches(nn.Module):
    """Two ways from the input, joined by `join`, and then a 3×3 convolution."""

    def __init__(self, one, other, join):
        super().__init__()
        self.one, self.other, self.join, self.last = one, other, join, nn.LazyConv2d(4, 3)

    def forward(self, x):
        return self.last(self.join(self.one(x), self.other(x)))


def concatenate(*parts):
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Branches(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2), concatenate), 7),
        (lambda: Branches(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 1, 2), torch.add), 7),
        (lambda: nn.Sequential(torchvision.models.resnet18().layer1, nn.Conv2d(64, 4, 1)), 9),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-2]), 435),
        (lambda: nn.Sequential(*list(torchvision.models.resnet50().children())[:-2]), 427),
        (lambda: torchvision.models.alexnet().features, 195),
        (lambda: torchvision.models.vgg16().features, 212),
        (lambda: torchvision.models.mobilenet_v2().features, 491),
    ],
    ids=["concatenated", "added", "two residual blocks", "resnet18", "resnet50", "alexnet", "vgg16", "mobilenet_v2"],
)
def test_receptive_field_where_branches_meet(build, field):
    model = build()
    channels = next(parameter.shape[1] for parameter in model.parameters() if parameter.ndim == 4)
    assert velasoka.receptive_field(model, (channels, 224, 224))[-1]["receptive_field"] == field


@pytest.mark.parametrize("wrap", [lambda x: {"features": x}, lambda x: (x, x), lambda x: None])
def test_receptive_field_of_a_model_with_another_kind_of_output(wrap):
    class Net(nn.Sequential):
        def forward(self, images):
            return wrap(super().forward(images))

    assert velasoka.receptive_field(Net(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)))[-1]["receptive_field"] == 4


@every_model
def test_no_border_and_no_cell_is_lost(name):
    model = linear(velasoka.MODELS[name](fm_size=2))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.double, requires_grad=True)
    model(images)[0, 0].backward()
    assert images.grad.abs().min() > 0
    cells = torch.zeros(1, 16, 4, 4, dtype=torch.double, requires_grad=True)
    model.c4(cells)[0, 0].backward()
    assert cells.grad.unique().numel() == 1  # GAP weighs every cell alike


@pytest.mark.parametrize("summary_device", [None, "cpu", velasoka.get_available_device()])
def test_summary_prints_the_facts_and_changes_nothing(summary_device, model, device, capsys):
    model.to(device).train()
    model.c2.eval()
    modes = [module.training for module in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    velasoka.model_summary(model=model, input_size=(3, 32, 32), device=summary_device)
    printed = capsys.readouterr().out
    assert "Conv2d-1" in printed
    assert f"Parameters: {velasoka.count_parameters(model):,}" in printed
    assert "Receptive field: 64" in printed
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_summary_counts_a_module_used_twice_once(capsys):
    shared = nn.Conv2d(3, 3, 3, padding=1)
    velasoka.model_summary(nn.Sequential(shared, nn.ReLU(), shared), (3, 8, 8))
    assert "Parameters: 84," in capsys.readouterr().out
