"""Models as other people bring them, and what other people's tools make of ours."""

import copy
import pickle
import random
import re
import threading
import warnings
from bisect import bisect_left
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import QUIET, overflowing, random_batches, train
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.models.feature_extraction import create_feature_extractor

import velasoka

every_model = pytest.mark.parametrize("name", velasoka.MODELS)
BATCHES = random_batches((8, 8))


def epoch(loop, model, optimizer, device):
    """An epoch of `model` in `train_cnn` or `start_cnn`."""
    if loop == "train_cnn":
        return velasoka.train_cnn(model, BATCHES, velasoka.get_ce_loss(), optimizer, device, **QUIET)
    return velasoka.start_cnn(model, optimizer, velasoka.get_ce_loss(), (BATCHES, BATCHES), device, 1, **QUIET)


both_loops = pytest.mark.parametrize("loop", ["train_cnn", "start_cnn"])

# --- Frozen parts ---

FROZEN = {  # what puts a part of the model in eval mode, and the blocks that still train
    "a block": (lambda model: model.c1.eval(), {"c2", "c3", "c4"}),
    "two blocks": (lambda model: (model.c1.eval(), model.c3.eval()), {"c2", "c4"}),
    "all but a block": (lambda model: model.eval().c4.train(), {"c4"}),
    "nothing": (lambda model: None, {"c1", "c2", "c3", "c4"}),
    "the whole": (lambda model: model.eval(), {"c1", "c2", "c3", "c4"}),  # as a test leaves it, or a loaded model
}


@both_loops
@pytest.mark.parametrize("part", FROZEN)
def test_what_is_in_eval_mode_stays_so_but_a_model_that_is_so_as_a_whole_trains(part, loop, device):
    model, (freeze, training) = velasoka.SimpleModel(fm_size=4), FROZEN[part]
    model.c4.append(nn.BatchNorm1d(10))
    freeze(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    epoch(loop, model, velasoka.get_sgd_optimizer(model), device)
    assert {name for name, block in model.named_children() if any(m.training for m in block.modules())} == training
    moved = {name[:2] for name, buffer in model.named_buffers() if not torch.equal(buffer.cpu(), before[name])}
    assert moved == training


# --- Tools ---

TOOLS = {
    "symbolic_trace": lambda model, images: torch.fx.symbolic_trace(model),
    "compile": lambda model, images: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model, images: torch.export.export(model, (images,)).module(),
    "jit.trace": lambda model, images: torch.jit.trace(model, images),
    "deepcopy": lambda model, images: copy.deepcopy(model),
    "pickle": lambda model, images: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "DataParallel": lambda model, images: nn.DataParallel(model),
    "AveragedModel": lambda model, images: torch.optim.swa_utils.AveragedModel(model),
}
every_tool = pytest.mark.parametrize("tool", TOOLS)
quiet_tools = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Converting a")


@quiet_tools
@every_tool
@every_model
def test_a_tool_gives_the_logits_of_the_model(name, tool, device):
    model = velasoka.MODELS[name](fm_size=2).to(device).eval()
    images = torch.randn(4, 3, 32, 32, device=device)
    torch.testing.assert_close(TOOLS[tool](model, images)(images), model(images))


@quiet_tools
@every_tool
def test_a_tool_takes_a_model_with_frozen_parameters(tool, device):
    model = velasoka.DilatedDepthwiseModel(fm_size=2).to(device).eval()
    model.c1.requires_grad_(False)
    images = torch.randn(4, 3, 32, 32, device=device)
    torch.testing.assert_close(TOOLS[tool](model, images)(images), model(images))


@every_model
def test_features_are_extracted_by_torchvision(name):
    model, images = velasoka.MODELS[name](fm_size=2).eval(), torch.randn(2, 3, 32, 32)
    found = create_feature_extractor(model, ["c1", "c3"])(images)
    assert list(found) == ["c1", "c3"]
    assert torch.equal(found["c1"], model.c1(images))
    assert torch.equal(found["c3"], model.c3(model.c2(model.c1(images))))


def test_a_summary_of_a_frozen_model(capsys):
    model = velasoka.SimpleModel(fm_size=2).requires_grad_(False)
    assert velasoka.receptive_field(model)[-1]["receptive_field"] == 60
    velasoka.model_summary(model, (3, 32, 32))
    assert "trainable: 0" in capsys.readouterr().out


# --- Mirror pairs ---


def pairs(model):
    """Each parameter of one of our models that equals its own mirror image, and along which dimensions."""
    first, *rest, last, _ = model.parameters()  # the classes' biases have none
    return [(first, (0, 3)), *((each, (0, 1, 3) if each.ndim == 4 else (0,)) for each in rest), (last, (1, 3))]


def assert_paired(model):
    for parameter, dims in pairs(model):
        torch.testing.assert_close(parameter, parameter.flip(dims), atol=1e-3, rtol=1e-2)  # bfloat16 has 8 bits


def initialise(layer):
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter, 0.5, 0.1)


def random_weights(model):
    return {name: torch.rand_like(tensor) if tensor.ndim else tensor for name, tensor in model.state_dict().items()}


BREAKS = {
    "apply": lambda model: model.apply(initialise),
    "one layer": lambda model: initialise(model.c2[0]),
    "only biases": lambda model: nn.init.normal_(model.c1[-2].bias),
    "load_state_dict": lambda model: model.load_state_dict(random_weights(model)),
    "assign": lambda model: model.load_state_dict(random_weights(model), assign=True),
    "a new parameter": lambda model: setattr(model.c3[0], "weight", nn.Parameter(torch.randn(16, 16, 3, 3))),
}
REPLACED = {
    "nothing": lambda model: None,
    "assign": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "another last layer": lambda model: setattr(model.c4, "1", nn.Conv2d(32, 10, 1)),
    "a frozen block": lambda model: model.c1.requires_grad_(False),
}


def mirror_warnings(warned):
    return [str(each.message) for each in warned if "mirror" in str(each.message)]


@both_loops
@pytest.mark.parametrize("way", BREAKS)
def test_broken_mirror_pairs_are_mended_at_the_start_with_one_line(way, loop, device):
    model = velasoka.SimpleModel(fm_size=4)
    BREAKS[way](model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.warns(UserWarning, match="mirror") as warned:
        epoch(loop, model, torch.optim.SGD(model.parameters(), lr=0.0), device)
    (line,) = mirror_warnings(warned)
    assert "\n" not in line
    for old, (new, dims) in zip(before, pairs(model), strict=False):
        expected = (old + old.flip(dims)) / 2
        if old.ndim == 4:
            expected *= old.norm() / expected.norm()
        torch.testing.assert_close(new.detach().cpu(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal([*model.parameters()][-1].cpu(), before[-1])


@pytest.mark.parametrize("way", BREAKS)
@every_model
def test_once_mended_training_keeps_the_mirror_pairs(name, way, device):
    model = velasoka.MODELS[name](fm_size=4)
    BREAKS[way](model)
    with pytest.warns(UserWarning, match="mirror") as warned:
        train(model, (BATCHES, BATCHES), device, 2)
    assert len(mirror_warnings(warned)) == 1
    assert_paired(model)


@pytest.mark.filterwarnings("error:.*mirror")
@both_loops
@pytest.mark.parametrize("way", REPLACED)
def test_mirror_pairs_that_are_whole_are_left_alone_without_a_word(way, loop, device):
    model = velasoka.SimpleModel(fm_size=4)
    REPLACED[way](model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    epoch(loop, model, torch.optim.SGD(model.parameters(), lr=0.0), device)
    assert all(torch.equal(old, new.cpu()) for old, new in zip(before, model.parameters(), strict=True))
    epoch(loop, model, velasoka.get_sgd_optimizer(model), device)
    model.c4 = velasoka.SimpleModel(fm_size=4).c4 if way == "another last layer" else model.c4
    assert_paired(model)


@pytest.mark.parametrize("tool", ["compile", "DataParallel", "symbolic_trace", "deepcopy", "AveragedModel"])
def test_what_wraps_a_model_is_trained_with_its_mirror_pairs(tool, device):
    model = velasoka.SimpleModel(fm_size=4).to(device)
    model.apply(initialise)
    wrapped = TOOLS[tool](model, None)
    if tool in ("deepcopy", "AveragedModel"):
        model = getattr(wrapped, "module", wrapped)
    with pytest.warns(UserWarning, match="mirror"):
        assert train(wrapped, (BATCHES, BATCHES), device).status == "completed"
    assert_paired(model)


# --- Summaries of odd models ---


def plain(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), *more)  # field 8


class Keeping(nn.Module):
    """Keeps what it computes, with its graph, and holds on to `thing`."""

    def __init__(self, keep=None, thing=None):
        super().__init__()
        self.net, self.keep, self.thing = plain(), keep, thing
        self(torch.randn(1, 3, 32, 32))

    def forward(self, images):
        output = self.net(images)
        if self.keep:
            self.keep(self, output)
        return output


def changed(change):
    net = plain()
    change(net)
    net(torch.randn(1, 3, 32, 32))
    return net


def fire(*_):
    raise AssertionError("a hook of the user's was called")


def hooked(net):
    for module in (net, net[0], net[3]):
        module.register_forward_hook(fire)
        module.register_forward_hook(fire, with_kwargs=True, always_call=True)
        module.register_forward_pre_hook(fire)
        module.register_forward_pre_hook(fire, with_kwargs=True)
    return net


ODD = {
    "a tensor in an attribute": lambda: Keeping(lambda model, output: setattr(model, "features", output)),
    "tensors in a list": lambda: Keeping(lambda model, output: model.thing.append(output), []),
    "tensors in a dict": lambda: Keeping(lambda model, output: model.thing.update({"one": [output]}), {}),
    "a tensor on a layer": lambda: Keeping(lambda model, output: setattr(model.net[0], "activation", output)),
    "a lock": lambda: Keeping(thing=threading.Lock()),
    "an iterator": lambda: Keeping(thing=[(number for number in range(3))]),
    "weight_norm": lambda: changed(lambda net: weight_norm(net[0])),
    "spectral_norm": lambda: changed(lambda net: spectral_norm(net[0])),
    "parametrised": lambda: changed(lambda net: parametrizations.weight_norm(net[0])),
    "pruned": lambda: changed(lambda net: prune.l1_unstructured(net[0], "weight", 0.5)),
    "hooks": lambda: hooked(plain()),
    "half": lambda: plain().half(),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.MaxPool2d(2), nn.LazyConv2d(4, 3)),
}
quiet_norms = pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*spectral_norm")


def inside(model):
    return [(type(module), module.training, repr(vars(module))) for module in model.modules()]


@quiet_norms
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_model_gets_the_right_field_and_stays_as_it_was(odd, capsys):
    model = ODD[odd]()
    before, random_state = inside(model), torch.get_rng_state()
    assert velasoka.receptive_field(model)[-1]["receptive_field"] == 8
    velasoka.model_summary(model, (3, 32, 32))
    assert "Receptive field: 8" in capsys.readouterr().out
    assert inside(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


@contextmanager
def defaults(dtype, device):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("made", ["before", "under them"])
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")], ids=str
)
def test_under_other_defaults_the_field_is_the_same(dtype, device, made, capsys):
    with defaults(dtype, device) if made == "under them" else nullcontext():
        model = plain(nn.Flatten(), nn.Linear(4 * 13 * 13, 10))
    with defaults(dtype, device):
        assert velasoka.receptive_field(model)[-1]["receptive_field"] == 32
        velasoka.model_summary(model, (3, 32, 32))
    assert "Receptive field: 32" in capsys.readouterr().out


class Then(nn.Module):
    """Calls `function`, after `layer` if there is one."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer or nn.Identity()

    def forward(self, images):
        return self.function(self.layer(images))


def vision_transformer():
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    return torchvision.models.VisionTransformer(**sizes)


UNTABLED = {
    "VisionTransformer": vision_transformer,
    "LSTM": lambda: nn.Sequential(Then(lambda x: x.mean(1)), nn.LSTM(32, 4), Then(lambda parts: parts[0][:, -1])),
    "tuple": lambda: plain(Then(lambda x: (x, x.mean((2, 3)))), Then(lambda parts: parts[0])),
    "dict": lambda: plain(Then(lambda x: {"out": x}), Then(lambda parts: parts["out"])),
}


@pytest.mark.filterwarnings("ignore:the receptive field leaves out")
@pytest.mark.parametrize("name", UNTABLED)
def test_where_torchsummary_has_no_table_a_line_says_so_and_the_rest_is_there(name, capsys):
    model = UNTABLED[name]()
    velasoka.model_summary(model, (3, 32, 32))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "torchsummary" in line]) == 1
    assert not any("Layer (type)" in line or line.startswith(("---", "===")) for line in lines)
    assert any(f"Parameters: {velasoka.count_parameters(model):,}" in line for line in lines)
    if name in ("tuple", "dict"):
        assert "Receptive field: 8" in lines


@pytest.mark.parametrize("wrap", [lambda x: (x, x.mean((2, 3))), lambda x: {"out": x}, lambda x: [{"out": (x,)}]])
def test_a_summary_of_a_model_that_gives_a_tuple_or_a_dict(wrap, capsys):
    velasoka.model_summary(Then(wrap, plain()), (3, 32, 32))
    printed = capsys.readouterr().out
    assert "Parameters: 260," in printed
    assert "Receptive field: 8" in printed


class TwoInputs(nn.Module):
    def forward(self, images, masks):
        return images * masks


@pytest.mark.parametrize(
    ("build", "input_size"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), (3, 32, 32)),
        (plain, (1, 32, 32)),
        (plain, (3, 2, 2)),
        (lambda: velasoka.SimpleModel(fm_size=2), (3, 8, 8)),
        (lambda: nn.Embedding(10, 2), (3, 32, 32)),
        (TwoInputs, (3, 32, 32)),
        (lambda: Then(lambda x: x["image"]), (3, 32, 32)),
        (lambda: Then(lambda x: {}["key"]), (3, 32, 32)),
    ],
    ids=["linear", "channels", "small", "ours", "integers", "two inputs", "a dict", "an error of its own"],
)
@pytest.mark.parametrize("call", [velasoka.receptive_field, velasoka.model_summary])
def test_a_model_that_cannot_run_on_the_input_size_is_refused_in_one_line(call, build, input_size):
    with pytest.raises(ValueError, match=r"input_size|shape of images") as error:
        call(build(), input_size)
    assert "\n" not in str(error.value)


# --- Lazy layers ---


def lazy():
    layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.LazyLinear(10)
    return nn.Sequential(*layers)


def test_lazy_layers_are_as_lazy_after_a_summary(capsys):
    model = lazy()
    assert velasoka.receptive_field(model, (1, 32, 32))[-1]["receptive_field"] == 30  # the pool drops two rows
    velasoka.model_summary(model, (1, 32, 32))
    assert all(layer.has_uninitialized_params() for layer in (model[0], model[1], model[5]))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@both_loops
def test_lazy_layers_train_with_an_optimizer_made_beforehand(loop, device):
    model = lazy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    epoch(loop, model, optimizer, device)
    assert len(optimizer.state) == len([*model.parameters()]) == 6
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lazy_layers_whose_loss_is_never_finite_end_as_diverged(device):
    model, loss_fn = lazy(), overflowing(velasoka.get_ce_loss(), at=range(10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="diverged in epoch 1"):
        velasoka.start_cnn(model, optimizer, loss_fn, (BATCHES, BATCHES), device, 1, **QUIET)
    assert velasoka.predict(model, BATCHES, device)[0].isfinite().all()


@pytest.mark.parametrize("get_optimizer", [velasoka.get_sgd_optimizer, velasoka.get_muon_optimizer])
def test_an_optimiser_of_lazy_layers_says_to_run_a_batch_first(get_optimizer):
    model = lazy()
    with pytest.raises(ValueError, match=r"^[^\n]*run a batch through the model first[^\n]*$"):
        get_optimizer(model)
    model(BATCHES[0][0])
    assert sum(len(group["params"]) for group in get_optimizer(model).param_groups) == 6


# --- Fine-tuning with Muon ---


def test_small_steps_of_muon_leave_a_trained_model_as_it_is(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 10, 14))
    model.append(nn.Flatten()).to(device)
    with torch.no_grad():
        model[2].weight.mul_(7)  # far from √8
    before, (images, labels) = copy.deepcopy(model), (part.to(device) for part in BATCHES[0])
    optimizer = velasoka.get_muon_optimizer(model, lr=1e-6)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        for old, new in zip(before.parameters(), model.parameters(), strict=True):
            assert (new - old).norm() < 1e-3 * old.norm()
        assert (model(images) - before(images)).norm() < 1e-2 * before(images).norm()


def muon_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 32, 32, device=model[0].weight.device)).square().sum().backward()
    optimizer.step()


def test_muon_keeps_the_norm_of_the_first_step_through_its_state_dict(device):
    model = plain(nn.Flatten(), nn.Linear(4 * 13 * 13, 10)).to(device)
    norms = [model[index].weight.norm().item() for index in (0, 3)]
    optimizer = velasoka.get_muon_optimizer(model, lr=0.01)
    muon_step(model, optimizer)
    again = velasoka.get_muon_optimizer(model, lr=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        model[0].weight.mul_(3)
    muon_step(model, again)
    assert [model[index].weight.norm().item() for index in (0, 3)] == pytest.approx(norms, rel=0.03)


def test_muon_moves_filters_that_begin_at_zero(device):
    model = plain(nn.Flatten(), nn.Linear(4 * 13 * 13, 10)).to(device)
    nn.init.zeros_(model[3].weight)
    optimizer = velasoka.get_muon_optimizer(model, lr=0.01)
    for _ in range(2):
        muon_step(model, optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model[3].weight.any()


# --- Receptive field ---


def measured(model, size, axis):
    """The rows (`axis` 1) or columns (2) of an image that the middle output cell depends on: NaN goes everywhere."""
    model, number = copy.deepcopy(model).double().eval(), size[axis]

    def reaches(lines):
        images = torch.zeros(1, *size, dtype=torch.double)
        images.transpose(2, axis + 1)[:, :, lines] = torch.nan
        with torch.no_grad():
            output = model(images)
        return output[0, :, output.shape[2] // 2, output.shape[3] // 2].isnan().any().item()

    before = bisect_left(range(number), True, key=lambda index: reaches(slice(index + 1)))
    after = bisect_left(range(number), True, key=lambda index: reaches(slice(number - 1 - index, None)))
    return number - before - after


def calculated(model, size=(3, 32, 32)):
    """Rows and columns by `receptive_field`, and what it warns of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        field = velasoka.receptive_field(model, size)[-1]["receptive_field"]
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


def random_network(rng):
    """Convolutions, pools and branches in any order; the cells of branches that meet lie in the same places."""
    layers = [nn.Conv2d(3, 2, 1)]
    for stride in rng.choices([1, 2], k=3):
        branches = [
            lambda s=stride: nn.Sequential(convolution(rng, s), nn.BatchNorm2d(2), nn.ReLU()),
            lambda s=stride: nn.Sequential(convolution(rng), convolution(rng, s), convolution(rng)),
            lambda s=stride: nn.AvgPool2d(3, s, padding=1),
            lambda s=stride: Then(lambda x: F.max_pool2d(x, 3, s, 1), convolution(rng)),
            lambda s=stride: nn.Identity() if s == 1 else nn.Conv2d(2, 2, 1, 2),
        ]
        pools = nn.MaxPool2d(2), Then(lambda x: F.avg_pool2d(x, 2)), Then(lambda x: F.max_pool2d(x, (2, 1)))
        chosen = [make() for make in rng.choices(branches, k=rng.choice([1, 2, 3]))]
        layers += [Merge(rng.random() < 0.5, *chosen), *rng.choices(pools, k=rng.choice([0, 0, 1]))]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("seed", range(12))
def test_the_field_of_a_random_network_is_what_its_output_depends_on(seed):
    model = random_network(random.Random(seed))
    field, warned = calculated(model, (3, 128, 128))
    assert not warned
    rows, columns = (side + 128 for side in field)  # it fits inside
    assert (measured(model, (3, rows, 64), 1), measured(model, (3, 64, columns), 2)) == field


class Two(nn.Module):
    """Calls a 3×3 and a 5×5 convolution in some `order` and puts out what is chosen."""

    def __init__(self, order, choose):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)
        self.order, self.choose = order, choose

    def forward(self, images):
        return self.choose(**{name: getattr(self, name)(images) for name in self.order})


@pytest.mark.parametrize("order", [("narrow", "wide"), ("wide", "narrow")])
@pytest.mark.parametrize(
    ("choose", "field"),
    [(lambda narrow, wide: narrow, 3), (lambda narrow, wide: wide, 5), (lambda narrow, wide: narrow * wide, 5)],
    ids=["narrow", "wide", "both"],
)
def test_the_last_row_is_the_outputs_whichever_branch_ran_last(order, choose, field):
    assert velasoka.receptive_field(Two(order, choose))[-1]["receptive_field"] == field


def between(step, width=16):
    """A 3×3 convolution to 30×30, `step` and a 1×3 convolution: 3 rows and 5 columns, if the step looks nowhere."""
    return nn.Sequential(nn.Conv2d(3, width, 3), step, nn.LazyConv2d(4, (1, 3)))


FOLLOWED = {
    "channel slice": lambda x: x[:, :8],
    "every other channel": lambda x: x[:, ::2],
    "channels by index": lambda x: x[:, [3, 1, 2]],
    "ellipsis": lambda x: x[:, 1:, ...],
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "split": lambda x: torch.cat(x.split(2, 1)[::-1], 1),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "shuffle": lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "reshaped shuffle": lambda x: x.reshape(len(x), -1, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "channel attention of one cell": lambda x: x * x.softmax(1) + x.mean(1, keepdim=True),
    "norm in NHWC": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
    "linear in NHWC": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(4, x.shape[1]).to(x)).permute(0, 3, 1, 2),
    "constant beside it": lambda x: torch.cat([x, torch.zeros_like(x)], 1).clone().contiguous(),
    "one more dimension": lambda x: x.unsqueeze(2).squeeze(2)[None][0],
}
every_width = pytest.mark.parametrize("width", [16, 30])  # 30: as many channels as rows


@every_width
@pytest.mark.parametrize("step", FOLLOWED)
def test_a_step_within_each_cell_is_followed_without_a_warning(step, width):
    model = between(Then(FOLLOWED[step]), width)
    assert calculated(model) == ((3, 5), [])


PERMUTATION = torch.arange(30).flip(0)


def attention(x):
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


class MultiHead(nn.MultiheadAttention):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return super().forward(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


NAMED = {
    "transposed": nn.ConvTranspose2d(16, 4, 2, 2),
    "transposed, same size": nn.ConvTranspose2d(16, 4, 3, padding=1),
    "conv_transpose2d": Then(lambda x: F.conv_transpose2d(x, torch.ones(16, 4, 3, 3).to(x), padding=1)),
    "interpolate": Then(lambda x: F.interpolate(x, scale_factor=2)),
    "interpolate, bilinear": Then(lambda x: F.interpolate(x, size=(15, 15), mode="bilinear")),
    "attention": Then(attention),
    "MultiheadAttention": MultiHead(16, 2, batch_first=True),
    "every other row": Then(lambda x: x[:, :, ::2]),
    "rows by index": Then(lambda x: x[:, :, PERMUTATION]),
    "columns by index": Then(lambda x: x[..., PERMUTATION]),
    "index_select": Then(lambda x: x.index_select(2, PERMUTATION)),
    "roll": Then(lambda x: torch.roll(x, 3, 2)),
    "roll, method": Then(lambda x: x.roll((1, 1), (2, 3))),
    "pixel_shuffle": Then(lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": nn.PixelUnshuffle(2),
}


@pytest.mark.parametrize("step", NAMED)
def test_a_step_that_cannot_be_followed_is_named_in_a_warning(step):
    _, warned = calculated(between(NAMED[step]))
    assert warned
    assert all(re.fullmatch(r"the receptive field leaves out .+, which it cannot follow", line) for line in warned)


NEVER_WRONG = {
    "running sum": lambda x: x.cumsum(2),
    "softmax over columns": lambda x: x.softmax(3),
    "softmax over all": lambda x: x.flatten(2).softmax(2).reshape(x.shape),
    "rows for columns": lambda x: x.transpose(2, 3),
    "channels for columns": lambda x: x.permute(0, 2, 3, 1),
    "flipped": lambda x: x.flip(2),
    "mixed columns": lambda x: x @ torch.ones(30, 30).to(x),
    "mixed rows": lambda x: torch.einsum("nchw,hk->nckw", x, torch.ones(30, 30).to(x)),
    "Fourier": lambda x: torch.fft.fft2(x).real,
    "one half above the other": lambda x: torch.cat([x[:, :, 15:], x[:, :, :15]], 2),
    "written shifted": lambda x: torch.zeros_like(x).index_copy(2, PERMUTATION, x),
    "less the mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "over the spread": lambda x: x / x.std((2, 3), keepdim=True),
    "of unit length": lambda x: F.normalize(x, dim=2),
    "largest of a row": lambda x: x.amax(3, keepdim=True).expand_as(x),
    "reshaped": lambda x: x.reshape(len(x), -1, 30, 15, 2).transpose(3, 4).reshape(x.shape),
    "unfolded": lambda x: F.unfold(x, 3, padding=1).unflatten(2, (30, 30)),
}


@every_width
@pytest.mark.parametrize("step", NEVER_WRONG)
def test_any_other_step_is_followed_rightly_or_named_in_a_warning(step, width):
    model = between(Then(NEVER_WRONG[step]), width)
    field, warned = calculated(model)
    model.double()(torch.zeros(1, 3, 32, 32).double())  # no longer lazy
    seen = tuple(measured(model, (3, 32, 32), axis) for axis in (1, 2))
    assert warned or tuple(min(side, 32) for side in field) == seen


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "efficientnet_b0", "squeezenet1_1"]
)
def test_networks_of_torchvision_are_followed_to_their_end_without_a_warning(name):
    (rows, columns), warned = calculated(getattr(torchvision.models, name)(), (3, 64, 64))
    assert not warned
    assert rows == columns >= 64  # global pooling sees all


def test_googlenet_is_followed_without_a_warning():
    model = torchvision.models.googlenet(aux_logits=False, init_weights=False)
    assert calculated(model, (3, 64, 64))[1] == []
