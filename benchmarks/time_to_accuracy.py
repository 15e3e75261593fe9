"""Training time until a test accuracy is passed: this recipe against the first version's, in one run.

    python -m benchmarks.time_to_accuracy --data DIR

The first version trained the same layers, the norm before the pool, with a `DataLoader` of two workers, batches of 4,
images normalised with 0.5, no augmentation, float32, and SGD of learning rate 0.001, momentum 0.9 and no schedule.
Times are of training with its loader, tests left out. Where the first version does not get to the target, its whole
time stands as a lower bound, beside the time to what it had reached after four epochs. The machine must be idle.
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


def first_version(dataset, name, epochs, target):
    """`(seconds of training so far, test accuracy)` after each epoch of the first version, up to the `target`."""
    device = velasoka.get_available_device()
    with mock.patch.multiple(
        velasoka, **WITHOUT["mirrored-channels"], **WITHOUT["pool-before-norm"]
    ):
        model = velasoka.MODELS[name]().to(device)
    train, test = (
        DataLoader(split, batch_size=4, shuffle=split is dataset[0], num_workers=2)
        for split in dataset
    )
    optimizer, loss_fn = (
        torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9),
        nn.CrossEntropyLoss(),
    )
    seconds, after = 0.0, []
    while len(after) < epochs and (not after or after[-1][1] < target):
        start = perf_counter()
        for images, labels in tqdm(
            train, desc=f"{name}, first version, epoch {len(after) + 1}", leave=False
        ):
            optimizer.zero_grad()
            loss_fn(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        seconds += perf_counter() - start
        after.append((seconds, velasoka.test_cnn(model, test, device, progress=False).accuracy))
    return after


def main():
    """Run both, write the JSON, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="./data", help="as for velasoka.py (default: %(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=velasoka.MODELS, default=list(velasoka.MODELS)
    )
    parser.add_argument(
        "--target", type=float, default=80.0, help="test accuracy in percent (default: %(default)s)"
    )
    parser.add_argument(
        "--first-epochs", type=int, default=8, help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("time_to_accuracy.json"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    mean_and_std = (0.5,) * 3, (0.5,) * 3
    with redirect_stdout(sys.stderr):  # the bars; standard output is the table's
        dataset, plain = (
            velasoka.get_cifar10_dataset(*m, root=options.data) for m in ((), mean_and_std)
        )
    results, lines = (
        [],
        ["| model | target (%) | ours, s | first version, s | ratio |", "|---|---|---|---|---|"],
    )
    for name in options.models:
        ours = run(dataset, epochs=1, name=name)
        first = first_version(plain, name, options.first_epochs, options.target)
        results.append({"model": name, "ours": ours, "first_version": first})
        keep(machine(), results, options.json)
        for target, (seconds, accuracy) in (
            (options.target, first[-1]),
            (first[:4][-1][1], first[:4][-1]),
        ):
            bound = "" if accuracy >= target else "over "
            reached = f"{ours['seconds']:.1f}" if ours["accuracy"] >= target else "not reached"
            ratio = seconds / ours["seconds"]
            ratio = (
                f"{bound}{int(ratio) if bound else round(ratio)}"
                if ours["accuracy"] >= target
                else "–"
            )
            lines.append(f"| {name} | {target:.2f} | {reached} | {bound}{seconds:.0f} | {ratio} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
