"""Launches of one training step by where they come from, counted without a GPU.

    python -m benchmarks.launches

A GPU computes a step of these networks faster than the host can ask for it, so an epoch takes as
long as its launches. Counted are the operations that torch dispatches, views left out, in a step
of `train_cnn` with the default batch.
"""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

import velasoka


class CountLaunches(TorchDispatchMode):
    """Counts, in `launches`, the operations that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run `operation`, and count it unless it makes a view or only marks a profile."""
        if not operation.is_view and operation.namespace != "profiler":
            self.launches[str(operation)] += 1
        return operation(*args, **kwargs or {})


def count(name):
    """The launches of a step of the model `name`: of its loader, its optimiser, and the whole."""
    device = velasoka.get_available_device()
    model = velasoka.MODELS[name]()
    dataset = velasoka.get_synthetic_dataset(256, 64)
    loader, _ = velasoka.get_cifar10_data_loader(dataset, device=device)
    optimizer = velasoka.get_muon_optimizer(model)
    arguments = model, loader, velasoka.get_ce_loss(), optimizer, device
    velasoka.train_cnn(*arguments, progress=False)  # makes the momentum
    with CountLaunches() as of_whole:
        velasoka.train_cnn(*arguments, progress=False)
    with CountLaunches() as of_loader:
        list(loader)
    with CountLaunches() as of_optimizer:
        optimizer.step()
    steps = len(loader)
    counted = (of_loader, steps), (of_optimizer, 1), (of_whole, steps)
    return [counter.launches.total() / steps for counter, steps in counted]


def main():
    """Print the table."""
    print("| model | loader | optimiser | whole step |\n|---|---|---|---|")
    for name in velasoka.MODELS:
        print(f"| {name} | {' | '.join(f'{launches:.0f}' for launches in count(name))} |")


if __name__ == "__main__":
    main()
