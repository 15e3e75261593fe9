"""Models as other people bring them, and what other people's tools make of ours."""

import copy
import pickle
import random
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import QUIET, conv_model, overflowing, random_batches, sgd, train, weights_of
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models.feature_extraction import create_feature_extractor

import velasoka

BATCHES = random_batches((8, 8))


def start(model, optimizer, device, epochs=1):
    return velasoka.start_cnn(model, optimizer, nn.CrossEntropyLoss(), (BATCHES, BATCHES), device, epochs, **QUIET)


# --- Frozen parts ---

MODES = {  # what has been put into eval mode, and the blocks that train then
    "a block": (lambda model: model.c1.eval(), {"c2", "c3", "c4"}),
    "the whole": (lambda model: model.eval(), {"c1", "c2", "c3", "c4"}),  # as a test leaves it, or a loaded model
    "the whole, then a new head": (lambda model: model.eval().c4.train(), {"c1", "c2", "c3", "c4"}),
}


@pytest.mark.parametrize("part", MODES)
def test_a_part_in_eval_mode_stays_so_but_a_whole_model_trains(part, device):
    model, (freeze, training) = velasoka.SimpleModel(fm_size=4), MODES[part]
    model.c4.append(nn.BatchNorm1d(10))
    freeze(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    start(model, sgd(model), device, 2)
    assert {name for name, block in model.named_children() if any(m.training for m in block.modules())} == training
    moved = {name[:2] for name, buffer in model.named_buffers() if not torch.equal(buffer.cpu(), before[name])}
    assert moved == training


# --- Tools ---

TOOLS = {
    "symbolic_trace": lambda model, images: torch.fx.symbolic_trace(model),
    "features": lambda model, images: lambda images: create_feature_extractor(model, ["c4"])(images)["c4"],
    "compile": lambda model, images: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model, images: torch.export.export(model, (images,)).module(),
    "jit.trace": lambda model, images: torch.jit.trace(model, images),
    "deepcopy": lambda model, images: copy.deepcopy(model),
    "pickle": lambda model, images: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "DataParallel": lambda model, images: nn.DataParallel(model),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Converting a")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_gives_the_logits_of_a_model_that_is_partly_frozen(tool, device):
    model = velasoka.DilatedDepthwiseModel(fm_size=2).to(device).eval()
    model.c1.requires_grad_(False)
    images = torch.randn(4, 3, 32, 32, device=device)
    torch.testing.assert_close(TOOLS[tool](model, images)(images), model(images))


def test_a_frozen_model_has_no_trainable_parameters(capsys):
    velasoka.model_summary(velasoka.SimpleModel(fm_size=2).requires_grad_(False), (3, 32, 32))
    assert "trainable: 0" in capsys.readouterr().out


def test_averaged_weights_are_tested_and_load_into_the_plain_model(model, loaders, device):
    model.to(device)
    averaged, trained = AveragedModel(model), []
    for _ in range(2):
        train(model, loaders, device, 1)
        averaged.update_parameters(model)
        trained.append(model.c4[1].weight.detach().clone())
    update_bn(loaders[0], averaged, device)
    torch.testing.assert_close(averaged.module.c4[1].weight, torch.stack(trained).mean(0))
    assert averaged.module.c1[1].num_batches_tracked == len(loaders[0])
    assert velasoka.test_cnn(averaged, loaders[1], device, **QUIET).total == 70
    velasoka.save_model(averaged, "averaged.pt")
    assert weights_of(velasoka.load_model(model, "averaged.pt")).equal(weights_of(averaged.module))


# --- Mirror pairs ---


def initialise(layer):
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter, 0.5, 0.1)


def assign(model, change=torch.clone):
    state = {name: change(tensor) if tensor.ndim else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # new parameters, without hooks


def assign_with_hooks(model):
    assign(model, torch.rand_like)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))  # the user's own


CHANGES = {  # how models are changed, and whether that breaks their mirror pairs
    "apply": (lambda model: model.apply(initialise), True),
    "other weights": (lambda model: assign(model, torch.rand_like), True),
    "other weights with hooks": (assign_with_hooks, True),
    "the same weights": (assign, False),
    "another last layer": (lambda model: setattr(model.c4, "1", nn.Conv2d(32, 10, 1)), False),
    "a frozen block": (lambda model: model.c1.requires_grad_(False), False),
}


def pairs(model):
    """Each parameter with a mirror image, detached, and that image."""
    layers = [layer for layer in model.modules() if hasattr(layer, "mirrored")]
    parameters = [(each.detach().cpu(), layer.mirrored) for layer in layers for each in layer.parameters()]
    return [(each, each.flip([dim for dim in dims if dim < each.ndim])) for each, dims in parameters]


@pytest.mark.parametrize("change", CHANGES)
def test_broken_mirror_pairs_are_mended_with_one_line_and_kept_in_training(change, device):
    model, (make, is_broken) = velasoka.SimpleModel(fm_size=4), CHANGES[change]
    make(model)
    before = [(each.clone(), mirror) for each, mirror in pairs(model)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        start(model, sgd(model, lr=0.0), device)
        for (old, mirror), (new, _) in zip(before, pairs(model), strict=True):
            expected = (old + mirror) / 2
            expected *= old.norm() / expected.norm() if old.ndim == 4 else 1
            torch.testing.assert_close(new, expected, atol=1e-5, rtol=1e-4)
        train(model, (BATCHES, BATCHES), device)
    for each, mirror in pairs(model):
        torch.testing.assert_close(each, mirror, atol=1e-3, rtol=1e-2)  # bfloat16 has 8 bits
    lines = [str(each.message) for each in warned if "mirror" in str(each.message)]
    assert len(lines) == is_broken
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("wrap", [torch.fx.symbolic_trace, nn.DataParallel, AveragedModel])
def test_what_wraps_a_model_is_trained_with_its_mirror_pairs(wrap, device):
    wrapped = wrap(velasoka.SimpleModel(fm_size=4).to(device).apply(initialise))
    with pytest.warns(UserWarning, match="mirror"):
        train(wrapped, (BATCHES, BATCHES), device)
    for each, mirror in pairs(wrapped):
        torch.testing.assert_close(each, mirror, atol=1e-3, rtol=1e-2)


# --- Summaries of odd models ---


def field_of(model, input_size=(3, 32, 32)):
    return velasoka.receptive_field(model, input_size)[-1]["receptive_field"]


class Then(nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Keeping(nn.Module):
    """Keeps what it computes, with its graph, and holds a lock."""

    def __init__(self):
        super().__init__()
        self.net, self.kept, self.lock = conv_model(), [], threading.Lock()
        self(torch.randn(1, 3, 32, 32))

    def forward(self, images):
        self.net[0].activation = self.net[0](images)
        self.kept.append(self.net(images))
        return self.kept[-1]


def changed(change):
    net = conv_model()
    change(net[0])
    return net


def fire(*_):
    raise AssertionError("a hook of the user's was called")


def with_hooks(layer):
    layer.register_forward_hook(fire, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(fire)


ODD = {
    "keeps tensors": Keeping,
    "weight_norm": lambda: changed(weight_norm),
    "parametrised": lambda: changed(parametrizations.weight_norm),
    "pruned": lambda: changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "hooks": lambda: changed(with_hooks),
    "half": lambda: conv_model().half(),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.MaxPool2d(2), nn.LazyConv2d(4, 3)),
}


def inside(model):
    return [(type(module), module.training, repr(vars(module))) for module in model.modules()]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_model_gets_the_right_field_and_stays_as_it_was(odd, capsys):
    model = ODD[odd]()
    before, random_state = inside(model), torch.get_rng_state()
    assert field_of(model) == 8
    velasoka.model_summary(model, (3, 32, 32))
    assert "Receptive field: 8" in capsys.readouterr().out
    assert inside(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.fixture
def own_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize(("dtype", "where"), [(torch.float64, None), (torch.float32, "meta")], ids=str)
def test_under_other_defaults_the_field_is_the_same(dtype, where, own_defaults, capsys):
    before = conv_model()
    torch.set_default_dtype(dtype)
    torch.set_default_device(where)
    assert field_of(before) == field_of(conv_model()) == 8
    velasoka.model_summary(before, (3, 32, 32))
    assert "Receptive field: 8" in capsys.readouterr().out


TUPLES = {
    "LSTM": lambda: nn.Sequential(Then(lambda x: x.mean(1)), nn.LSTM(32, 4), Then(lambda parts: parts[0][:, -1])),
    "a dict inside": lambda: conv_model(Then(lambda x: {"out": x}), Then(lambda parts: parts["out"])),
    "a list of dicts of tuples": lambda: conv_model(Then(lambda x: [{"out": (x, x)}])),
}


@pytest.mark.filterwarnings("ignore:the receptive field leaves out")
@pytest.mark.parametrize("name", TUPLES)
def test_where_torchsummary_has_no_table_a_line_says_so_and_the_rest_is_there(name, capsys):
    model = TUPLES[name]()
    velasoka.model_summary(model, (3, 32, 32))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "torchsummary" in line]) == 1
    assert not any("Layer (type)" in line or line.startswith(("---", "===")) for line in lines)
    assert any(f"Parameters: {velasoka.count_parameters(model):,}" in line for line in lines)
    assert name == "LSTM" or "Receptive field: 8" in lines


@pytest.mark.parametrize(
    ("build", "input_size"),
    [
        (conv_model, (1, 32, 32)),
        (lambda: velasoka.SimpleModel(fm_size=2), (3, 8, 8)),
        (lambda: Then(lambda images, masks: images * masks), (3, 32, 32)),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(3, 4, 3)), (3, 32, 32)),
    ],
    ids=["channels", "small", "two inputs", "lazy"],
)
def test_a_model_that_cannot_run_on_the_input_size_is_refused_in_one_line(build, input_size):
    with pytest.raises(ValueError, match=r"^[^\n]*(input_size|shape of images)[^\n]*$"):
        velasoka.model_summary(build(), input_size)


# --- Lazy layers ---


def lazy_model():
    layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(*layers)


def test_lazy_layers_train_with_an_optimizer_made_beforehand(device):
    model = lazy_model()
    optimizer = sgd(model)
    velasoka.train_cnn(model, BATCHES, nn.CrossEntropyLoss(), optimizer, device, **QUIET)
    assert len(optimizer.state) == len([*model.parameters()]) == 6


def test_lazy_layers_whose_loss_is_never_finite_end_as_diverged(device):
    model, loss_fn = lazy_model(), overflowing(velasoka.get_ce_loss(), at=range(10))
    with pytest.warns(UserWarning, match="diverged in epoch 1"):
        velasoka.start_cnn(model, sgd(model), loss_fn, (BATCHES, BATCHES), device, 1, **QUIET)
    assert velasoka.predict(model, BATCHES, device)[0].isfinite().all()


# --- Fine-tuning with Muon ---


def muon_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 32, 32, device=model[0].weight.device)).square().mean().backward()
    optimizer.step()


@pytest.fixture
def classifier(device):
    return conv_model(nn.Flatten(), nn.Linear(4 * 13 * 13, 10)).to(device)


def test_small_steps_of_muon_leave_a_trained_model_as_it_is(classifier):
    with torch.no_grad():
        classifier[3].weight.mul_(7)  # far from the norm of a new one
    before, optimizer = copy.deepcopy(classifier), velasoka.get_muon_optimizer(classifier, lr=1e-6)
    for _ in range(4):
        muon_step(classifier, optimizer)
        for old, new in zip(before.parameters(), classifier.parameters(), strict=True):
            assert (new - old).norm() < 1e-3 * old.norm()


def test_muon_keeps_the_norm_of_the_first_step_through_its_state_dict(classifier):
    norms = [classifier[index].weight.norm().item() for index in (0, 3)]
    optimizer = velasoka.get_muon_optimizer(classifier, lr=0.01)
    muon_step(classifier, optimizer)
    again = velasoka.get_muon_optimizer(classifier, lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        classifier[0].weight.mul_(3)
    muon_step(classifier, again)
    assert [classifier[index].weight.norm().item() for index in (0, 3)] == pytest.approx(norms, rel=0.03)


@pytest.mark.parametrize("is_new", [True, False])
def test_muon_brings_filters_of_a_new_model_to_the_norm_that_batch_norms_expect(is_new, model, device):
    model.to(device)
    model.c1[1].running_mean.fill_(0 if is_new else 1)
    norm = model.c2[0].weight.norm().item()
    velasoka.train_cnn(
        model, BATCHES, nn.CrossEntropyLoss(), velasoka.get_muon_optimizer(model, lr=1e-3), device, **QUIET
    )
    expected = len(model.c2[0].weight) ** 0.5 if is_new else norm
    assert norm != pytest.approx(len(model.c2[0].weight) ** 0.5, rel=0.1)
    assert model.c2[0].weight.norm().item() == pytest.approx(expected, rel=0.02)


def test_muon_turns_filters_by_the_same_angle_whatever_their_norm(classifier):
    weight, turns = classifier[0].weight, []
    weight.grad = torch.randn_like(weight)
    for factor in (1, 7):
        with torch.no_grad():
            weight.mul_(factor)
        old = weight.detach().clone()
        velasoka.get_muon_optimizer(classifier, lr=0.01).step()
        turns.append(((weight - old).norm() / old.norm()).item())
    assert turns[1] == pytest.approx(turns[0], rel=0.05)


def test_muon_moves_filters_that_begin_at_zero(classifier):
    nn.init.zeros_(classifier[3].weight)
    optimizer = velasoka.get_muon_optimizer(classifier, lr=0.01)
    for _ in range(2):
        muon_step(classifier, optimizer)
    assert all(parameter.isfinite().all() for parameter in classifier.parameters())
    assert classifier[3].weight.any()


# --- Receptive field ---


def measured(model, size, axis):
    """The rows (`axis` 1) or columns (2) of an image that the middle output cell depends on, by the NaN it gets."""
    images = torch.zeros(size[axis], *size)
    for line, image in enumerate(images):
        image.select(axis, line).fill_(torch.nan)
    with torch.no_grad():
        output = model.eval()(images)
    middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
    (seen,) = middle.isnan().any(1).nonzero(as_tuple=True)
    return (seen.max() - seen.min() + 1).item()


def calculated(model, size=(3, 32, 32)):
    """Rows and columns by `receptive_field`, and what it warns of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        field = field_of(model, size)
    return (field if isinstance(field, tuple) else (field, field)), [str(each.message) for each in warned]


class Merge(nn.Module):
    """Branches from one input, added or concatenated."""

    def __init__(self, adds, *branches):
        super().__init__()
        self.adds, self.branches, self.mix = adds, nn.ModuleList(branches), nn.Conv2d(2 * len(branches), 2, 1)

    def forward(self, x):
        parts = [branch(x) for branch in self.branches]
        return sum(parts) if self.adds else self.mix(torch.cat(parts, 1))


def convolution(rng, stride=1):
    side, dilation = rng.choice([(1, 1), (3, 1), (3, 2), (5, 1)])
    return nn.Conv2d(2, 2, side, stride, dilation * (side // 2), dilation)


def branch(rng, stride):
    """One of five ways that keep the side, or halve it with stride 2."""
    ways = (
        nn.Sequential(convolution(rng, stride), nn.BatchNorm2d(2), nn.ReLU()),
        nn.Sequential(convolution(rng), convolution(rng, stride)),
        nn.AvgPool2d(3, stride, padding=1),
        Then(lambda x: F.max_pool2d(x, 3, stride, 1)),
        nn.Conv2d(2, 2, 1, stride),
    )
    return rng.choice(ways)


@pytest.mark.parametrize("seed", range(8))
def test_the_field_of_a_random_network_is_what_its_output_depends_on(seed):
    rng = random.Random(seed)
    pools = nn.Identity(), nn.MaxPool2d(2), Then(lambda x: F.avg_pool2d(x, 2)), Then(lambda x: F.max_pool2d(x, (2, 1)))
    layers = [nn.Conv2d(3, 2, 1)]
    for stride in rng.choices([1, 2], k=2):
        branches = [branch(rng, stride) for _ in range(rng.choice([1, 2, 3]))]
        layers += [Merge(rng.random() < 0.5, *branches), rng.choice(pools)]
    model = nn.Sequential(*layers)
    field, warned = calculated(model, (3, 64, 64))
    assert not warned
    rows, columns = (side + 32 for side in field)  # it fits inside
    assert (measured(model, (3, rows, 16), 1), measured(model, (3, 16, columns), 2)) == field


@pytest.mark.parametrize("sides", [(3, 5), (5, 3)])
@pytest.mark.parametrize("chosen", [0, 1])
def test_the_last_row_is_the_outputs_whichever_branch_ran_last(sides, chosen):
    class Two(nn.ModuleList):
        def forward(self, images):
            return [convolution(images) for convolution in self][chosen]

    assert field_of(Two(nn.Conv2d(3, 4, side) for side in sides)) == sides[chosen]


def attention(x, attend=F.scaled_dot_product_attention):
    tokens = x.flatten(2).transpose(1, 2)
    return attend(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


def multi_head(*tokens):
    return nn.MultiheadAttention(tokens[0].shape[2], 2, batch_first=True)(*tokens)[0]


def like(x, *shape):
    return torch.ones(*shape).to(x)


BACKWARDS = torch.arange(30).flip(0)
FOLLOWED = {  # within each cell
    "channel slice": lambda x: x[:, :8],
    "channels by index": lambda x: x[:, [3, 1, 2]],
    "ellipsis": lambda x: x[:, 1:, ...],
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "shuffle": lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "channel attention of one cell": lambda x: x * x.softmax(1) + x.mean(1, keepdim=True),
    "norm in NHWC": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
    "linear in NHWC": lambda x: F.linear(x.permute(0, 2, 3, 1), like(x, 4, x.shape[1])).permute(0, 3, 1, 2),
    "constant beside it": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "one more dimension": lambda x: x.unsqueeze(2).squeeze(2)[None][0],
    "reflected border": lambda x: F.avg_pool2d(F.pad(x, (14, 14, 14, 14), mode="reflect"), 29, 1),
    "channel attention": lambda x: x * x.mean((2, 3))[:, :, None, None].expand_as(x),
    "spread over a map": lambda x: torch.cat([F.interpolate(F.adaptive_avg_pool2d(x, 1), x.shape[2:]), x], 1),
}
NAMED = {  # in a warning
    "sorted": lambda x: x.sort(2)[0],
    "the largest": lambda x: x.topk(30, 3)[0],
    "NumPy": lambda x: torch.from_numpy(x.numpy()),
    "transposed": lambda x: F.conv_transpose2d(x, like(x, x.shape[1], 4, 2, 2), stride=2),
    "transposed, same size": lambda x: F.conv_transpose2d(x, like(x, x.shape[1], 4, 3, 3), padding=1),
    "interpolate": lambda x: F.interpolate(x, size=(15, 15), mode="bilinear"),
    "attention": attention,
    "MultiheadAttention": lambda x: attention(x, multi_head),
    "every other row": lambda x: x[:, :, ::2],
    "rows by index": lambda x: x[:, :, BACKWARDS],
    "columns by index": lambda x: x[..., BACKWARDS],
    "index_select": lambda x: x.index_select(2, BACKWARDS),
    "roll": lambda x: x.roll((1, 1), (2, 3)),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
}
EITHER = {
    "running sum": lambda x: x.cumsum(2),
    "softmax over columns": lambda x: x.softmax(3),
    "rows for columns": lambda x: x.transpose(2, 3),
    "mixed columns": lambda x: x @ like(x, 30, 30),
    "Fourier": lambda x: torch.fft.fft2(x).real,
    "one half above the other": lambda x: torch.cat([x[:, :, 15:], x[:, :, :15]], 2),
    "less the mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "largest of a row": lambda x: x.amax(3, keepdim=True).expand_as(x),
    "reshaped": lambda x: x.reshape(len(x), -1, 30, 15, 2).transpose(3, 4).reshape(x.shape),
    "unfolded": lambda x: F.unfold(x, 3, padding=1).unflatten(2, (30, 30)),
}
STEPS = FOLLOWED | NAMED | EITHER


@pytest.mark.parametrize("width", [16, 30])  # 30: as many channels as rows
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_followed_rightly_or_named_in_a_warning(step, width):
    model = nn.Sequential(nn.Conv2d(3, width, 3), Then(STEPS[step]), nn.LazyConv2d(4, (1, 3)))
    field, warned = calculated(model)
    assert all(re.fullmatch(r"the receptive field leaves out .+, which it cannot follow", line) for line in warned)
    assert step in EITHER or bool(warned) == (step in NAMED)
    if not warned:
        assert tuple(min(side, 32) for side in field) == tuple(measured(model, (3, 32, 32), axis) for axis in (1, 2))


def test_a_compiled_model_has_the_field_of_the_plain_one(capsys):
    compiled = torch.compile(conv_model(), backend="eager")
    assert calculated(compiled) == calculated(conv_model())
    velasoka.model_summary(compiled, (3, 32, 32))
    assert "Receptive field: 8" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_shows_nothing_of_its_inside_which_is_said():
    traced = torch.jit.trace(conv_model(), torch.zeros(1, 3, 32, 32))
    with pytest.warns(UserWarning, match="leaves out the output"):
        assert velasoka.receptive_field(traced) == []


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "densenet121", "efficientnet_b0"])
def test_networks_of_torchvision_are_followed_to_their_end_without_a_warning(name):
    (rows, columns), warned = calculated(getattr(torchvision.models, name)(), (3, 64, 64))
    assert not warned
    assert rows == columns >= 64  # global pooling sees all
