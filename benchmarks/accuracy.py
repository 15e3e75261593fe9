"""Test accuracy by model, epochs and batch size, over several seeds, as a table and as JSON.

    python -m benchmarks.accuracy --data DIR --epochs 1 10 --seeds 5

Everything is the default of `velasoka.py`, plain accuracy on the whole test set. `--held-out` is
for choosing hyperparameters: it trains on 45,000 of the training images and reports on the other
5,000. `--without` leaves one technique of the recipe out, to see what it gives. Stopped and
started again, it continues with the runs that its JSON does not have.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
from contextlib import nullcontext, redirect_stdout
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm

import velasoka


def _pool_last(*layers):
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True))


def _sgd(model, batch_size, get_optimizer=velasoka.get_muon_optimizer):
    lr = get_optimizer(model, batch_size=batch_size).defaults["lr"]
    return velasoka.get_sgd_optimizer(model, lr)


def _one_rate(model, batch_size, get_optimizer=velasoka.get_muon_optimizer):
    optimizer = get_optimizer(model, batch_size=batch_size)
    for group in optimizer.param_groups[1:]:
        group["lr_scale"] = velasoka._OTHER_LR_SCALE
    return optimizer


def _constant_rate(optimizer, num_steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


class _AlwaysShifted(velasoka._DeviceDataset):
    def set_epoch(self, epoch):
        pass


KEYS = "epochs", "model", "batch_size", "without", "seed"  # what tells a run from the others
WITHOUT = {  # what stands in for which parts of velasoka.py to leave a technique out
    "nothing": {},
    "mirrored-channels": {"_with_mirror": lambda parameter, dims: parameter},
    "pool-before-norm": {"_block": _pool_last},
    "muon": {"get_muon_optimizer": _sgd},
    "fast-biases": {"get_muon_optimizer": _one_rate},
    "label-smoothing": {"get_ce_loss": nn.CrossEntropyLoss},
    "decay": {"_triangular_schedule": _constant_rate},
    "first-epoch-unshifted": {"_DeviceDataset": _AlwaysShifted},
    "shifts": {"_MAX_SHIFT": 0},
}


def machine():
    """What a figure depends on: the machine, its precision, torch, and the code."""
    device = velasoka.get_available_device()
    processor = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor
    code = hashlib.sha256(Path(velasoka.__file__).read_bytes()).hexdigest()[:12]
    return {
        "device": f"{device}: {name}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "precision": str(velasoka._fastest_precision(device)),
        "torch": torch.__version__,
        "velasoka": f"{velasoka.__version__}, sha256 {code}",
    }


def held_out(dataset, size=5000):
    """`(train, held-out)`: the training set in two parts, always the same."""
    generator = torch.Generator().manual_seed(velasoka.SEED)
    order = torch.randperm(len(dataset[0]), generator=generator).tolist()
    return Subset(dataset[0], order[size:]), Subset(dataset[0], order[:size])


def peak_memory():
    """The most memory in MB that this process has used so far; on a GPU, the GPU's."""
    if velasoka.get_available_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1000  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run(
    dataset,
    epochs,
    name,
    batch_size=velasoka._BATCH_SIZE,
    without="nothing",
    seed=velasoka.SEED,
    tta=False,
):
    """Train one model from one seed; its final accuracies in percent, the seconds of training."""
    kind = dict(zip(KEYS, (epochs, name, batch_size, without, seed), strict=True))
    with mock.patch.multiple(velasoka, **WITHOUT[without]) if WITHOUT[without] else nullcontext():
        return kind | _run(dataset, epochs, name, batch_size, seed, tta)


def _run(dataset, epochs, name, batch_size, seed, tta):
    velasoka.seed_everything(seed)
    device = velasoka.get_available_device()
    model = velasoka.MODELS[name]()
    loaders = velasoka.get_cifar10_data_loader(dataset, batch_size, device=device, seed=seed)
    optimizer = velasoka.get_muon_optimizer(model, batch_size=batch_size)
    loss_fn = velasoka.get_ce_loss()
    with redirect_stdout(sys.stderr):  # the bars of each epoch; standard output is the table's
        history = velasoka.start_cnn(model, optimizer, loss_fn, loaders, device, epochs)
    if history.status != "completed":
        raise SystemExit(f"{name}, seed {seed}: {history.status}")
    result = {"accuracy": history.test[-1].accuracy}
    if tta:
        tested = velasoka.test_cnn(model, loaders[1], device, tta=True, progress=False)
        result["tta"] = tested.accuracy
    seconds = sum(epoch.seconds for epoch in history.train)
    return result | {"seconds": seconds, "peak_memory_mb": peak_memory()}


def keep(about, results, path):
    """Write the JSON beside `path`, then rename it: whenever that is stopped, the file is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(about | {"results": results}, indent=1))
    part.replace(path)


def table(results):
    """The results by epochs, model, batch size and technique left out, as Markdown."""
    head = *KEYS[:-1], "seeds", "accuracy (%)", "lowest", "with TTA", "training, s", "MB"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    kinds = [tuple(result[key] for key in KEYS[:-1]) for result in results]
    for kind in dict.fromkeys(kinds):
        rows = [result for result, its_kind in zip(results, kinds, strict=True) if its_kind == kind]
        plain, tta, seconds = (
            [row[key] for row in rows if key in row] for key in ("accuracy", "tta", "seconds")
        )
        cost = f"{statistics.mean(seconds):.0f}", f"{rows[-1]['peak_memory_mb']:.0f}"
        cells = [*kind, len(rows), spread(plain), f"{min(plain):.2f}", spread(tta), *cost]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def spread(values):
    """Mean ± sample standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main():
    """Run what the options ask for, write the JSON after every run, print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    size = velasoka._BATCH_SIZE
    models = list(velasoka.MODELS)
    add("--data", default="./data", help="as for velasoka.py (default: %(default)s)")
    add("--models", nargs="+", choices=models, default=models)
    add("--epochs", nargs="+", type=int, default=[1])
    images = f"images a step (default: {size})"
    add("--batch-sizes", nargs="+", type=int, default=[size], help=images)
    add("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    add("--tta", action="store_true", help="also with test-time augmentation")
    held = "report on 5,000 training images not trained on"
    add("--held-out", action="store_true", help=held)
    left_out = {"nargs": "*", "choices": WITHOUT, "default": ["nothing"]}
    add("--without", **left_out, help="leave out each of these in turn; none named: of all")
    add("--json", type=Path, default=Path("accuracy.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    data = Path(options.data).resolve().name
    about = machine() | {"data": data, "held_out": options.held_out, "tta": options.tta}
    way_out = "name another file"
    try:
        found = json.loads(options.json.read_text()) if options.json.exists() else about
        results = found.pop("results", [])
    except (ValueError, AttributeError, TypeError):
        parser.error(f"--json {options.json} exists and is not of this benchmark: {way_out}")
    if found != about:
        what = f"holds runs of {found}, these are of {about}"
        parser.error(f"--json {options.json} {what}: {way_out}")
    with redirect_stdout(sys.stderr):
        dataset = velasoka.get_cifar10_dataset(root=options.data)
    dataset = held_out(dataset) if options.held_out else dataset
    kinds = options.epochs, options.models, options.batch_sizes, options.without or WITHOUT
    runs = product(*kinds, range(options.seeds))
    done = {tuple(result[key] for key in KEYS) for result in results}
    with tqdm([each for each in runs if each not in done], unit=" runs") as bar:
        for each in bar:
            results.append(run(dataset, *each, tta=options.tta))
            bar.set_postfix_str(f"{', '.join(map(str, each))}: {results[-1]['accuracy']:.2f}%")
            keep(about, results, options.json)
    print(table(results))


if __name__ == "__main__":
    main()
