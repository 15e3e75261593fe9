import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import Breaking

import velasoka

MODULE = Path(velasoka.__file__)


@pytest.fixture
def run(monkeypatch, pictures, capsys):
    """Runs the command line on a few pictures with small models; returns exit status, output and errors."""
    monkeypatch.setattr(velasoka, "get_synthetic_dataset", lambda: pictures)
    small = {name: lambda model=model: model(fm_size=2) for name, model in velasoka.MODELS.items()}
    monkeypatch.setattr(velasoka, "MODELS", small)

    def run(*arguments):
        try:
            status = velasoka._main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(request, timeout):
        raise urllib.error.URLError(f"no route to {request.host}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_synthetic_pictures_are_called_so_in_every_line(run):
    status, printed, _ = run("--synthetic", "--epochs", "2")
    assert status == 0
    lines = [line for line in re.split("[\r\n]", printed) if line.strip()]
    assert all("not CIFAR-10" in line for line in lines)
    assert "dilated-depthwise (not CIFAR-10): completed" in lines[-1]
    assert "2 of 2 epochs" in lines[-1]


def test_without_data_and_network_it_says_why_and_goes_on_with_synthetic_pictures(run, no_network):
    status, printed, _ = run()
    assert status == 1  # 200 pictures are too few to learn that much from
    for url in velasoka.CIFAR10_MIRRORS:
        assert re.search(re.escape(url) + ".*no route", printed)
    assert "target of 80% is missed" in printed.splitlines()[-1]
    assert "not CIFAR-10" in printed.splitlines()[-1]


def test_the_same_happens_if_the_data_folder_cannot_be_made(run, no_network):
    Path("data").touch()
    status, printed, _ = run("--epochs", "1")
    assert status == 0
    assert "not CIFAR-10" in printed.splitlines()[-1]


def test_data_that_was_asked_for_is_never_replaced(run, no_network, tmp_path):
    status, _, errors = run("--data", str(tmp_path))
    assert status == 2
    assert "no route" in errors


def test_trains_on_image_folders(run, image_folders):
    status, printed, errors = run("--data", str(image_folders), "--epochs", "1", "--model", "simple", "--device", "cpu")
    assert (status, errors) == (0, "")
    assert "simple: completed, 1 of 1 epochs" in printed
    assert "not CIFAR-10" not in printed


def test_all_trains_the_three_and_keeps_each_under_its_own_name(run, tmp_path):
    files = ("--save", str(tmp_path / "net.pt"), "--checkpoint", str(tmp_path / "run.pt"))
    status, printed, _ = run("--synthetic", "--model", "all", "--epochs", "1", *files)
    assert status == 0
    names = [f"{stem}-{name}.pt" for stem in ("net", "run") for name in velasoka.MODELS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [line.split()[0] for line in printed.splitlines() if "completed" in line] == list(velasoka.MODELS)
    velasoka.load_model(velasoka.SimpleModel(fm_size=2), tmp_path / "net-simple.pt")


def test_a_target_that_is_reached_ends_training_well_and_one_that_is_missed_does_not(run):
    status, printed, _ = run("--synthetic", "--epochs", "3", "--target", "1")
    assert status == 0
    assert "EPOCH: 2" not in printed
    assert "target of 1% is reached" in printed
    status, printed, _ = run("--synthetic", "--epochs", "1", "--target", "100")
    assert status == 1
    assert "target of 100% is missed" in printed


def test_the_same_seed_gives_the_same_results(run):
    def results(seed):
        _, printed, _ = run("--synthetic", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--seed", seed)
        return re.findall(r"Accuracy=([\d.]+).*?loss=([\d.]+)", printed)[-1]

    assert results("1") == results("1") != results("2")


def test_the_options_reach_the_loader_and_the_optimizer(run, monkeypatch):
    asked = []
    for name in ("get_cifar10_data_loader", "get_muon_optimizer"):
        get = getattr(velasoka, name)
        monkeypatch.setattr(
            velasoka, name, lambda *args, get=get, **kw: asked.append((*args[1:], kw)) or get(*args, **kw)
        )
    run("--synthetic", "--epochs", "1", "--batch-size", "50", "--seed", "9", "--device", "cpu")
    assert asked == [(50, {"device": torch.device("cpu"), "seed": 9}), ({"batch_size": 50},)]


def test_an_interrupt_keeps_the_checkpoint_to_resume_from(run, monkeypatch, tmp_path):
    get_loaders = velasoka.get_cifar10_data_loader

    def breaking(*args, **options):
        train, test = get_loaders(*args, **options)
        return Breaking(train, KeyboardInterrupt(), at=len(train) + 1), test

    arguments = ("--synthetic", "--epochs", "3", "--checkpoint", str(tmp_path / "run.pt"))
    with monkeypatch.context() as patch:
        patch.setattr(velasoka, "get_cifar10_data_loader", breaking)
        status, printed, errors = run(*arguments)
    assert status == 130
    assert "interrupted in epoch 2 of 3" in errors
    assert "interrupted" in printed.splitlines()[-1]
    status, printed, _ = run(*arguments, "--resume")
    assert status == 0
    assert "1 of 3 epochs are done" in printed
    assert "EPOCH: 1" not in printed
    assert "EPOCH: 2" in printed


def test_an_interrupt_before_training_is_no_traceback(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(velasoka, "get_synthetic_dataset", interrupted)
    status, _, errors = run("--synthetic")
    assert (status, errors) == (130, "velasoka: interrupted\n")


def test_a_loss_that_diverges_ends_with_status_1(run, monkeypatch):
    monkeypatch.setattr(velasoka, "get_ce_loss", lambda: lambda logits, labels: logits.sum() * torch.nan)
    status, printed, errors = run("--synthetic", "--epochs", "2")
    assert status == 1
    assert "diverged in epoch 1 of 2" in errors
    assert "diverged" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--model huge", "huge"),
        ("--epochs 0", "--epochs=0: a whole number from 1"),
        ("--epochs 1.5", "'1.5'"),
        ("--epochs many", "'many'"),
        ("--target 0", "--target=0.0: a percentage from 1 to 100"),
        ("--target 101", "--target=101.0"),
        ("--target nan", "--target=nan"),
        ("--batch-size -4", "--batch-size=-4"),
        ("--seed -1", "--seed=-1"),
        ("--device tpu", "'tpu'"),
        ("--device cuda:99", "'cuda:99'"),
        ("--data nowhere", "nowhere"),
        ("--data . --synthetic", "--synthetic"),
        ("--data=", "--data ''"),
        ("--seed 5000000000", "--seed=5000000000: a whole number from 0 to 4294967295"),
        ("--synthetic --save .", "cannot be written"),
        ("--synthetic --checkpoint torn.pt/run.pt", "cannot be written"),
        ("--resume", "--checkpoint"),
        ("--learning-rate 1", "--learning-rate"),
        ("--synthetic --resume --checkpoint torn.pt", "torn.pt"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments, named, run):
    Path("torn.pt").write_bytes(b"torn")
    status, _, errors = run(*arguments.split())
    assert status == 2
    assert errors.count("\n") == 1
    assert named in errors


def test_runs_as_a_program_too():
    command = [sys.executable, str(MODULE), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    options = {"--model", "--epochs", "--target", "--data", "--synthetic", "--batch-size", "--device", "--seed"}
    assert options | {"--checkpoint", "--resume", "--save"} <= set(re.findall(r"--[\w-]+", shown))
