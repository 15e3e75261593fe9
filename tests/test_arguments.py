"""Bad arguments, a row each: what is called, and what the one line says. Nothing has been trained by then."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import Subset, TensorDataset

import velasoka as v

NAN = math.nan
SIZE = (3, 32, 32)
TEN = v.CIFAR10_CLASSES
IMAGES, LABELS = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
NET = v.DilatedDepthwiseModel(fm_size=2)
SGD = v.get_sgd_optimizer(NET)
FROZEN = nn.Linear(2, 2).requires_grad_(False)
CE = nn.CrossEntropyLoss()


def batches(images=IMAGES, labels=LABELS):
    return [(images, labels)]


def data(images=np.zeros((2, 32, 32, 3), np.uint8), labels=(0, 1), classes=TEN):  # noqa: B008
    dataset = type("Data", (), {"data": images, "targets": labels, "classes": classes})
    return dataset, dataset


def train(model=NET, loader=(batches(), batches()), loss_fn=CE, optimizer=SGD, device="cpu", epochs=1, **options):  # noqa: B008
    return v.start_cnn(model, optimizer, loss_fn, loader, device, epochs, progress=False, **options)


class Tuple(nn.Linear):
    """Gives a tuple."""

    def __init__(self):
        super().__init__(1, 1)
        SGD.add_param_group({"params": list(self.parameters())})

    def forward(self, images):
        return images, images


class Wrong(nn.Module):
    """Gives logits of a wrong shape."""

    def __init__(self, *shape):
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.ones(())), shape

    def forward(self, images):
        return self.weight * torch.zeros(self.shape)


BAD = [
    # seeds, transforms
    (lambda: v.seed_everything(-1), ValueError, "seed=-1"),
    (lambda: v.seed_everything(2**32), ValueError, "seed=4294967296"),
    (lambda: v.seed_everything(1.5), ValueError, r"seed=1\.5"),
    (lambda: v.to_normalize((0.5, NAN, 0.5), (1, 1, 1)), ValueError, r"mean=\(0\.5, nan, 0\.5\)"),
    (lambda: v.to_normalize("abc", (1, 1, 1)), ValueError, "mean='abc'"),
    (lambda: v.to_normalize((0.5,) * 3, (1, 0, 1)), ValueError, r"std=\(1, 0, 1\): a finite number above 0"),
    (lambda: v.to_normalize((0.5,) * 3, (1, 1)), ValueError, r"std=\(1, 1\)"),
    (lambda: v.compose_transform(v.to_tensor(), 3), TypeError, r"args=\(ToTensor\(\), 3\)"),
    # data
    (lambda: v.download_cifar10(None), TypeError, "root=None"),
    (lambda: v.download_cifar10("new", mirrors="https://one.example"), TypeError, "mirrors='https://one.example'"),
    (lambda: v.download_cifar10("new", mirrors=[5]), TypeError, r"mirrors=\[5\]"),
    (lambda: v.get_cifar10_dataset(root=3), TypeError, "root=3"),
    (lambda: v.get_cifar10_dataset((0.5,) * 3, (0.0,) * 3), ValueError, "std="),
    (lambda: v.get_synthetic_dataset(0), ValueError, "num_train=0"),
    (lambda: v.get_synthetic_dataset(10, -1), ValueError, "num_test=-1"),
    (lambda: v.get_synthetic_dataset(10, 10, seed="a"), ValueError, "seed='a'"),
    (lambda: v.get_synthetic_dataset(mean=(0.5,), std=(0.5,)), ValueError, r"mean=\(0\.5,\)"),
    (lambda: v.get_cifar10_data_loader(data(), 0), ValueError, "batch_size=0"),
    (lambda: v.get_cifar10_data_loader(data(), -1), ValueError, "batch_size=-1"),
    (lambda: v.get_cifar10_data_loader(data(), 2.5), ValueError, r"batch_size=2\.5"),
    (lambda: v.get_cifar10_data_loader(data(), NAN), ValueError, "batch_size=nan"),
    (lambda: v.get_cifar10_data_loader(data(), True), ValueError, "batch_size=True"),
    (lambda: v.get_cifar10_data_loader(data(), device="gpu"), ValueError, "device='gpu'"),
    (lambda: v.get_cifar10_data_loader(data(), device="cuda:99"), ValueError, "device='cuda:99'"),
    (lambda: v.get_cifar10_data_loader(data(), augment="no"), TypeError, "augment='no'"),
    (lambda: v.get_cifar10_data_loader(data(), augment=1), TypeError, "augment=1"),
    (lambda: v.get_cifar10_data_loader(data(), seed=-1), ValueError, "seed=-1"),
    (lambda: v.get_cifar10_data_loader(data(), seed=2**70), ValueError, "seed=1180591620717411303424"),
    (lambda: v.get_cifar10_data_loader(data()[0]), TypeError, "dataset=.*a pair"),
    (lambda: v.get_cifar10_data_loader([TensorDataset(IMAGES)] * 2), TypeError, "TensorDataset has no"),
    (lambda: v.get_cifar10_data_loader(data(np.zeros((2, 32, 32), np.uint8))), ValueError, "N×H×W×3"),
    (lambda: v.get_cifar10_data_loader(data(np.zeros((2, 32, 32, 1), np.uint8))), ValueError, "N×H×W×3"),
    (lambda: v.get_cifar10_data_loader(data(np.zeros((2, 32, 32, 3)))), ValueError, "uint8.*not of float64"),
    (lambda: v.get_cifar10_data_loader(data(np.zeros((0, 32, 32, 3), np.uint8), ())), ValueError, r"\(0, 32, 32, 3\)"),
    (lambda: v.get_cifar10_data_loader(data(labels=(1,))), ValueError, "number of dataset.targets=1"),
    (lambda: v.get_cifar10_data_loader(data(labels=(0, 10))), ValueError, "one of dataset.targets=10"),
    (lambda: v.get_cifar10_data_loader(data(labels=(0, -1))), ValueError, "one of dataset.targets=-1"),
    (lambda: v.get_cifar10_data_loader(data(labels=(0.0, 1.0))), ValueError, r"dataset.targets=\(0\.0, 1\.0\)"),
    (lambda: v.get_cifar10_data_loader(data(labels=("cat", "dog"))), ValueError, "dataset.targets=.*whole"),
    (lambda: v.get_cifar10_data_loader([Subset(data()[0], [])] * 2), ValueError, r"dataset=\[\]"),
    # models, summary, optimisers, loss
    (lambda: v.SimpleModel(0), ValueError, "fm_size=0"),
    (lambda: v.DilatedModel(1.5), ValueError, r"fm_size=1\.5"),
    (lambda: NET(torch.zeros(2, 1, 32, 32)), ValueError, r"images=\(2, 1, 32, 32\): N×3×H×W"),
    (lambda: NET(torch.zeros(3, 32, 32)), ValueError, r"images=\(3, 32, 32\)"),
    (lambda: NET(torch.zeros(2, 3, 8, 8)), ValueError, "sides of 16"),
    (lambda: v.count_parameters(v.SimpleModel), TypeError, "model=.*not its class"),
    (lambda: v.receptive_field("net"), TypeError, "model='net'"),
    (lambda: v.receptive_field(NET, (3, 32)), ValueError, r"input_size=\(3, 32\)"),
    (lambda: v.model_summary(NET, 32), TypeError, "input_size=32"),
    (lambda: v.model_summary(NET, (3, 32, -1)), ValueError, "input_size=-1"),
    (lambda: v.model_summary(None, SIZE), TypeError, "model=None"),
    (lambda: v.get_sgd_optimizer(None), TypeError, "model=None"),
    (lambda: v.get_sgd_optimizer(NET, lr=0), ValueError, "lr=0"),
    (lambda: v.get_sgd_optimizer(NET, lr="0.1"), ValueError, "lr='0.1'"),
    (lambda: v.get_sgd_optimizer(NET, lr=10**400), ValueError, "lr="),
    (lambda: v.get_sgd_optimizer(NET, momentum=-0.1), ValueError, r"momentum=-0\.1"),
    (lambda: v.get_sgd_optimizer(NET, momentum=1.1), ValueError, r"momentum=1\.1"),
    (lambda: v.get_muon_optimizer(NET, lr=-1), ValueError, "lr=-1"),
    (lambda: v.get_muon_optimizer(NET, lr=NAN), ValueError, "lr=nan"),
    (lambda: v.get_muon_optimizer(NET, batch_size=0), ValueError, "batch_size=0"),
    (lambda: v.get_muon_optimizer(FROZEN), ValueError, "trainable parameters"),
    (lambda: v.get_muon_optimizer(nn.LazyLinear(2)), ValueError, "run a batch through the model first"),
    (lambda: v.get_sgd_optimizer(nn.LazyLinear(2)), ValueError, "model: its lazy layers .* run a batch"),
    (lambda: v.get_step_lr_scheduler("sgd"), TypeError, "optimizer='sgd'"),
    (lambda: v.get_multi_step_lr_scheduler(NET), TypeError, "optimizer="),
    (lambda: v.get_ce_loss(1.5), ValueError, r"label_smoothing=1\.5"),
    # loops
    (lambda: train(loss_fn=nn.CrossEntropyLoss), TypeError, "loss_fn="),
    (lambda: train(loss_fn=nn.CrossEntropyLoss(reduction="none")), ValueError, "loss=.*one number"),
    (lambda: train(loss_fn=lambda logits, labels: 1.0), ValueError, r"loss=1\.0"),
    (lambda: train(optimizer=torch.optim.LBFGS(NET.parameters())), ValueError, "optimizer=.*no closure"),
    (lambda: train(scheduler=5), ValueError, "scheduler=5"),
    (lambda: train(scheduler=StepLR(v.get_sgd_optimizer(NET), 1)), ValueError, "scheduler=.*of this optimizer"),
    (lambda: train(scheduler=ReduceLROnPlateau(v.get_sgd_optimizer(NET))), ValueError, "scheduler=.*of this optimizer"),
    (lambda: train(scheduler=StepLR(SGD, 1), scheduler_interval="step"), ValueError, "scheduler_interval='step'"),
    (lambda: train(scheduler=ReduceLROnPlateau(SGD), scheduler_interval="batch"), ValueError, "interval='batch'"),
    (lambda: v.train_cnn(NET, batches(), CE, SGD, "cpu", scheduler=ReduceLROnPlateau(SGD)), ValueError, "test loss"),
    (lambda: train(scheduler=ReduceLROnPlateau(SGD, mode="max")), ValueError, "mode='max'"),
    (lambda: v.train_cnn(NET, batches(), CE, SGD, "cpu", scheduler_interval=1), ValueError, "scheduler_interval=1"),
    (lambda: train(model=Tuple()), ValueError, "model: logits of 2 images × at least 1 classes.* not tuple"),
    (lambda: train(checkpoint_path="."), ValueError, r"checkpoint_path='\.'"),
    (lambda: v.test_cnn(NET, batches() + batches(labels=LABELS + 10), "cpu"), ValueError, "at least 11 classes"),
    (lambda: v.predict(NET, batches() + batches(labels=LABELS - 1), "cpu"), ValueError, "a label in data_loader=-1"),
    (lambda: train(model=v.SimpleModel), TypeError, "model="),
    (lambda: train(optimizer="sgd"), TypeError, "optimizer='sgd'"),
    (lambda: train(model=Wrong(2, 10)), ValueError, "optimizer=.*made for this model"),
    (lambda: train(loss_fn=None), TypeError, "loss_fn=None"),
    (lambda: train(device="gpu"), ValueError, "device='gpu'"),
    (lambda: train(device=None), ValueError, "device=None"),
    (lambda: train(epochs=-1), ValueError, "epochs=-1"),
    (lambda: train(epochs="2"), ValueError, "epochs='2'"),
    (lambda: train(epochs=0), ValueError, "epochs=0"),
    (lambda: train(epochs=NAN), ValueError, "epochs=nan"),
    (lambda: train(epochs=2.0), ValueError, r"epochs=2\.0"),
    (lambda: train(target_accuracy=NAN), ValueError, "target_accuracy=nan"),
    (lambda: train(target_accuracy=101), ValueError, "target_accuracy=101"),
    (lambda: train(target_accuracy=0.8), ValueError, r"target_accuracy=0\.8"),
    (lambda: train(target_accuracy=0), ValueError, "target_accuracy=0"),
    (lambda: train(target_accuracy="80"), ValueError, "target_accuracy='80'"),
    (lambda: train(checkpoint_path=3), TypeError, "checkpoint_path=3"),
    (lambda: train(resume=True), ValueError, "resume=True"),
    (lambda: train(loader=batches()), TypeError, "data_loader=.*a pair"),
    (lambda: train(loader=(batches(), None)), TypeError, "data_loader=.*iterable"),
    (lambda: train(loader=(3, batches())), TypeError, "data_loader=3"),
    (lambda: train(loader=([], batches())), ValueError, "no batches"),
    (lambda: train(loader=(batches(), [])), ValueError, "no batches"),
    (lambda: train(loader=(iter([]), iter([]))), ValueError, "no batches"),
    (lambda: train(loader=([IMAGES], batches())), TypeError, "not Tensor"),
    (lambda: train(loader=(batches(IMAGES.byte()), batches())), TypeError, r"torch\.uint8"),
    (lambda: train(loader=(batches(labels=LABELS.float()), batches())), TypeError, r"torch\.float32, torch\.float32"),
    (lambda: train(loader=(batches(labels=[0, 1]), batches())), TypeError, "not tuple"),
    (lambda: train(loader=(batches(labels=LABELS[:1]), batches())), ValueError, r"\(2, 3, 32, 32\) and \(1,\)"),
    (lambda: train(loader=(batches(IMAGES[0]), batches())), ValueError, r"not \(3, 32, 32\)"),
    (lambda: train(loader=(batches(IMAGES[:, :1]), batches())), ValueError, "N×3×H×W"),
    (lambda: train(loader=(batches(labels=LABELS - 1), batches())), ValueError, "a label in data_loader=-1"),
    (lambda: train(loader=(batches(labels=LABELS + 10), batches())), ValueError, "at least 11 classes"),
    (lambda: train(loader=(batches(), batches(labels=LABELS + 10))), ValueError, "at least 11 classes"),
    (lambda: v.train_cnn(NET, data(), CE, SGD, "cpu", progress=False), TypeError, "not type"),
    (lambda: v.test_cnn(Wrong(2), batches(), "cpu", progress=False), ValueError, r"logits.*not \(2,\)"),
    (lambda: v.test_cnn(Wrong(3, 10), batches(), "cpu", progress=False), ValueError, r"not \(3, 10\)"),
    (lambda: v.predict(Wrong(2, 5), batches(labels=LABELS + 5), "cpu"), ValueError, "at least 6 classes"),
    (lambda: v.test_cnn(NET, [], "cpu"), ValueError, "no batches"),
    (lambda: v.test_cnn(NET, iter([]), "cpu"), ValueError, "no batches"),
    (lambda: v.predict(NET, [], "cpu"), ValueError, "no batches"),
    (lambda: v.predict(NET, iter([]), "cpu"), ValueError, "no batches"),
    (lambda: v.predict(NET, 3, "cpu"), TypeError, "data_loader=3"),
    (lambda: v._classify(NET, "missing.png", "cpu"), FileNotFoundError, "missing.png"),
    (lambda: v._classify(NET, __file__, "cpu"), ValueError, "test_arguments.py: not a readable image"),
    # keeping
    (lambda: v.save_model("net", "net.pt"), TypeError, "model='net'"),
    (lambda: v.save_model(NET, None), TypeError, "path=None"),
    (lambda: v.save_model(NET, "."), ValueError, "path='.'"),
    (lambda: v.load_model(None, "net.pt"), TypeError, "model=None"),
    (lambda: v.load_model(NET, 3), TypeError, "path=3"),
    (lambda: v.get_drive_path(None, "net.pt"), TypeError, "folder=None"),
    (lambda: v.get_drive_path("Session-7", 7), TypeError, "filename=7"),
    # pictures
    (lambda: v.show_images(IMAGES[:1], LABELS, TEN), ValueError, "number of labels=2"),
    (lambda: v.show_images(IMAGES[0], LABELS, TEN), ValueError, "images="),
    (lambda: v.show_images([IMAGES[0], IMAGES[0, :, 1:]], LABELS, TEN), ValueError, "images=.*of a size"),
    (lambda: v.show_images(IMAGES[:, :1], LABELS, TEN), ValueError, "images=.*float N×3×H×W"),
    (lambda: v.show_images(torch.zeros(2, 32, 32, 3), LABELS, TEN), ValueError, "images="),
    (lambda: v.show_images(IMAGES.long(), LABELS, TEN), ValueError, "int64"),
    (lambda: v.show_images([], [], TEN), ValueError, "images="),
    (lambda: v.show_images(IMAGES, LABELS + 10, TEN), ValueError, "one of labels=10"),
    (lambda: v.show_images(IMAGES, LABELS, ""), ValueError, "classes=''"),
    (lambda: v.show_images(None, LABELS, TEN), ValueError, "images=None"),
    (lambda: v.show_images(["a", "b"], LABELS, TEN), ValueError, r"images=\['a', 'b'\]"),
    (lambda: v.show_images(IMAGES, None, TEN), ValueError, "labels=None"),
    (lambda: v.show_images(IMAGES, LABELS, 5), ValueError, "classes=5"),
    (lambda: v.show_images(IMAGES, LABELS, TEN, mean=(0, 0), std=(1, 1)), ValueError, r"mean=\(0, 0\)"),
    (lambda: v.show_misclassified(IMAGES, LABELS, None, TEN), ValueError, "logits="),
    (lambda: v.show_images(IMAGES, LABELS, TEN, columns=0), ValueError, "columns=0"),
    (lambda: v.show_misclassified(IMAGES, LABELS, torch.zeros(2, 9), TEN), ValueError, r"logits=\(2, 9\)"),
    (lambda: v.show_misclassified(IMAGES, LABELS, torch.zeros(2, 10), TEN, count=0), ValueError, "count=0"),
    (lambda: v.plot_history([1, 2]), TypeError, r"history=\[1, 2\]"),
    (lambda: v.plot_history({}), ValueError, "history={}"),
    (lambda: v.plot_confusion_matrix([0, 1], [0], TEN), ValueError, "number of predictions=1"),
    (lambda: v.plot_confusion_matrix([0, 1], [0, 10], TEN), ValueError, "one of predictions=10"),
    (lambda: v.plot_confusion_matrix([0.5], [0], TEN), ValueError, "labels="),
    (lambda: v.per_class_accuracy([-1], [0], TEN), ValueError, "one of labels=-1"),
    (lambda: v.per_class_accuracy([0], [0], "ten"), ValueError, "classes='ten'"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD, ids=[row[2] for row in BAD])
def test_a_bad_argument_is_named_in_one_line_before_anything_is_trained(call, error, says):
    before = [parameter.clone() for parameter in NET.parameters()]
    with pytest.raises(error, match=says) as caught:
        call()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(before, NET.parameters(), strict=True))


def test_every_public_function_that_takes_something_has_a_row():
    source = {name for call, *_ in BAD for name in call.__code__.co_names}
    source |= {"start_cnn"}  # through `train`
    without = {"get_available_device", "to_tensor", "to_pil", "EpochResult", "History", "DilatedDepthwiseModel"}
    functions = {name for name in v.__all__ if callable(getattr(v, name))}
    assert functions - without == functions & source - without
