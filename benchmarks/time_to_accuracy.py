"""Training time until a test accuracy is passed: this recipe against the first version's.

    python -m benchmarks.time_to_accuracy --data DIR

The first version trained the same layers, the norm before the pool, with a `DataLoader` of two
workers, batches of 4, images normalised with 0.5, no augmentation, float32, and SGD of learning
rate 0.001, momentum 0.9 and no schedule. Times are of training with its loader, tests left out.
Where the first version does not get to the target, its whole time stands as a lower bound, beside
the time to what it had reached after four epochs. The machine must be idle.
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from time import perf_counter
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import velasoka
from benchmarks.accuracy import WITHOUT, keep, machine, run


def _plain_convolution(*arguments, dims=None, **options):
    return nn.Conv2d(*arguments[:3], **options)


FIRST_LAYERS = {  # what stands in for which parts of velasoka.py
    "_MirroredConv2d": _plain_convolution,
    "_MirroredBatchNorm2d": nn.BatchNorm2d,
    **WITHOUT["pool-before-norm"],
}


def first_version(dataset, name, epochs, target):
    """`(seconds of training so far, test accuracy)` after each of its epochs, up to `target`."""
    device = velasoka.get_available_device()
    with mock.patch.multiple(velasoka, **FIRST_LAYERS):
        model = velasoka.MODELS[name]().to(device)
    train, test = (
        DataLoader(split, batch_size=4, shuffle=split is dataset[0], num_workers=2)
        for split in dataset
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    seconds = 0.0
    after = []
    while len(after) < epochs and (not after or after[-1][1] < target):
        start = perf_counter()
        title = f"{name}, first version, epoch {len(after) + 1}"
        for images, labels in tqdm(train, desc=title, leave=False):
            optimizer.zero_grad()
            loss_fn(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        seconds += perf_counter() - start
        after.append((seconds, velasoka.test_cnn(model, test, device, progress=False).accuracy))
    return after


def row(name, ours, target, seconds, accuracy):
    """A line of the table: `ours` against `seconds` that the first version took to `accuracy`."""
    bound = "" if accuracy >= target else "over "
    reached = ratio = "not reached"
    if ours["accuracy"] >= target:
        reached = f"{ours['seconds']:.1f}"
        times = seconds / ours["seconds"]
        ratio = f"{bound}{int(times) if bound else round(times)}"  # a bound is rounded down
    return f"| {name} | {target:.2f} | {reached} | {bound}{seconds:.0f} | {ratio} |"


def main():
    """Run both, write the JSON, print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    models = list(velasoka.MODELS)
    add("--data", default="./data", help="as for velasoka.py (default: %(default)s)")
    add("--models", nargs="+", choices=models, default=models)
    percent = "test accuracy in percent (default: %(default)s)"
    add("--target", type=float, default=80.0, help=percent)
    add("--first-epochs", type=int, default=8, help="at most (default: %(default)s)")
    add("--json", type=Path, default=Path("time_to_accuracy.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # the bars; standard output is the table's
        dataset = velasoka.get_cifar10_dataset(root=options.data)
        plain = velasoka.get_cifar10_dataset((0.5,) * 3, (0.5,) * 3, root=options.data)
    results = []
    lines = ["| model | target (%) | ours, s | first version, s | ratio |", "|---|---|---|---|---|"]
    for name in options.models:
        ours = run(dataset, epochs=1, name=name)
        first = first_version(plain, name, options.first_epochs, options.target)
        results.append({"model": name, "ours": ours, "first_version": first})
        keep(machine(), results, options.json)
        lines.append(row(name, ours, options.target, *first[-1]))
        after_four = first[:4][-1]
        lines.append(row(name, ours, after_four[1], *after_four))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
