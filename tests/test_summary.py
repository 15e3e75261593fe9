"""`count_parameters`, `receptive_field` and `model_summary`, of our models and other people's."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import conv_model
from torch import nn

import velasoka


def field_of(model, input_size=(3, 32, 32)):
    """The receptive field, of which nothing may be left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return velasoka.receptive_field(model, input_size)[-1]["receptive_field"]


class Then(nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize(("name", "field"), [*zip(velasoka.MODELS, (60, 64, 64), strict=True)])
def test_the_field_of_our_models(name, field):
    assert field_of(velasoka.MODELS[name](fm_size=2)) == field


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ([nn.Conv2d(3, 2, 5, 2), nn.Conv2d(2, 2, 3, dilation=3), nn.MaxPool2d(3, 2)], 21),
        ([nn.Conv2d(3, 2, (1, 3)), nn.AvgPool2d(2), nn.Conv2d(2, 1, (5, 2))], (10, 6)),
        ([nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 1, 3, padding=2, dilation=(1, 2))], (7, 11)),
    ],
)
def test_the_field_of_a_sequence_of_layers(layers, field):
    assert field_of(nn.Sequential(*layers), (3, 64, 64)) == field


@pytest.mark.parametrize(
    ("name", "last", "field"),
    [
        ("resnet18", -2, 435),
        ("resnet50", -2, 427),
        ("mobilenet_v2", 1, 491),
        ("alexnet", 1, 195),
        ("vgg16", 1, 212),
        ("inception_v3", -3, 1311),
    ],
)
def test_the_field_of_known_networks_is_the_published_one(name, last, field):
    options = {"aux_logits": False} if name == "inception_v3" else {}
    if name in ("vgg16", "inception_v3"):
        options["init_weights"] = False  # it takes long
    network = getattr(torchvision.models, name)(**options)
    features = nn.Sequential(*list(network.children())[:last])  # without the head
    assert field_of(features, (3, 299, 299)) == field


def test_there_is_a_row_for_each_layer_or_function_that_widens_or_moves_the_view():
    pool = Then(lambda x: F.max_pool2d(F.relu(x), 2))
    flatten = Then(lambda x: x.view(len(x), -1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 4, 1), flatten, nn.Linear(900, 9))
    names = "layer kernel_size stride dilation output_size jump receptive_field"
    expected = [("0", 3, 1, 1, 30, 1, 3), ("1", 2, 2, 1, 15, 2, 4), ("3", 15, 15, 1, 1, 30, 32)]
    rows = velasoka.receptive_field(model)
    assert rows == [dict(zip(names.split(), row, strict=True)) for row in expected]


@pytest.mark.parametrize(
    ("join", "field"),
    [
        (torch.add, 5),
        (lambda wide, narrow: torch.cat([wide, narrow], 1), 5),
        (lambda wide, narrow: wide, 5),  # though the narrow one ran last
        (lambda wide, narrow: narrow, 3),
        (lambda wide, narrow: {"wide": wide, "other": (narrow, 3)}, 5),
        (lambda wide, narrow: (narrow, wide), 5),
    ],
)
def test_where_branches_meet_the_larger_view_counts(join, field):
    class Branches(nn.Module):
        def forward(self, x):
            wide = F.conv2d(x, torch.ones(4, 3, 5, 5), padding=2)
            narrow = F.conv2d(x, torch.ones(4, 3, 3, 3), padding=1)
            return join(wide, narrow)

    assert field_of(Branches()) == field


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (lambda x: x.mean((2, 3)) + x.flatten(2).mean(-1), 32),
        (lambda x: F.adaptive_avg_pool2d(x, (None, 1)), (3, 32)),
        (lambda x: x * x.mean((2, 3))[:, :, None, None].expand_as(x), 32),  # channel attention
        (lambda x: torch.cat([x, torch.zeros_like(x)], 1), 3),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], 4),
        (lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1), 5),
    ],
)
def test_what_keeps_the_cells_apart_or_pools_them_is_followed(step, field):
    assert field_of(nn.Sequential(nn.Conv2d(3, 4, 3), Then(step))) == field


MIXING = [
    torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 8),
    torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4]),
    Then(lambda x: x.roll((1, 1), (2, 3))),
    Then(lambda x: x.sort(2)[0]),
    Then(lambda x: x @ torch.ones(32, 32)),
    Then(lambda x: torch.einsum("nchw,hk->nckw", x, torch.ones(32, 32))),
    Then(lambda x: x[:, :, ::2]),
    Then(lambda x: F.interpolate(x, scale_factor=2)),
    Then(lambda x: F.conv_transpose2d(x, torch.ones(3, 3, 3, 3), padding=1)),
    Then(lambda x: torch.from_numpy(x.numpy())),
]


@pytest.mark.parametrize("model", MIXING)
def test_what_mixes_cells_is_named_in_one_warning(model):
    with pytest.warns(UserWarning, match=r"^receptive field: cannot follow [^\n]+$") as warned:
        velasoka.receptive_field(model)
    assert len(warned) == 1


class GradCam(nn.Module):
    """Keeps an activation of its last pass, with its graph, and asks for its gradient."""

    def __init__(self):
        super().__init__()
        self.net = conv_model()
        self(torch.randn(1, 3, 32, 32))

    def forward(self, images):
        self.kept = self.net(images)
        self.kept.register_hook(print)
        return self.kept


@pytest.mark.parametrize(
    "build",
    [
        GradCam,
        lambda: conv_model().half(),
        lambda: torch.compile(conv_model(), backend="eager"),
        lambda: conv_model(nn.Dropout()).requires_grad_(False),
    ],
)
def test_the_summary_of_such_a_model_is_whole_and_leaves_it_as_it_was(build, capsys):
    model = build().train()
    list(model.modules())[-1].eval()
    before = [(repr(vars(module)), module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    velasoka.model_summary(model, (3, 32, 32))
    printed = capsys.readouterr().out
    assert "Conv2d-1" in printed
    assert f"Parameters: 260, of them trainable: {velasoka.count_parameters(model)}\n" in printed
    assert printed.endswith("Receptive field: 8\n")
    assert [(repr(vars(module)), module.training) for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_where_torchsummary_has_no_table_a_line_says_so_and_the_rest_is_there(capsys):
    model = conv_model(Then(lambda x: {"out": x}))
    velasoka.model_summary(model, (3, 32, 32))
    first, *rest = capsys.readouterr().out.splitlines()
    assert "torchsummary" in first
    assert rest[0].startswith(f"Parameters: {velasoka.count_parameters(model):,}")
    assert rest[-1] == "Receptive field: 8"
    assert field_of(GradCam().requires_grad_(False)) == 8  # torchsummary has none for this, either
