"""The command line: exit status, what it prints, which files it writes."""

import io
import os
import re
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import Breaking
from PIL import Image

import velasoka

ONE_EPOCH = "--synthetic --epochs 1 --device cpu"


@pytest.fixture
def run(monkeypatch, pictures, capsys):
    """Runs a command line on few pictures with small models: exit status, output and errors."""
    monkeypatch.setattr(velasoka, "get_synthetic_dataset", lambda: pictures)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored afterwards
    for name, model in velasoka.MODELS.items():
        small = lambda model=model: model(fm_size=2)  # noqa: E731
        monkeypatch.setitem(velasoka.MODELS, name, small)

    def run(arguments):
        try:
            status = velasoka._main(arguments.split())
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def names(pattern):
    return {path.name for path in Path().glob(pattern)}


def test_the_default_run_trains_to_80_percent_and_says_so(run, image_folders, monkeypatch):
    (image_folders / "data").mkdir()
    for split in ("train", "test"):
        (image_folders / split).rename(image_folders / "data" / split)
    status, printed, errors = run("")
    assert (status, errors) == (1, "")  # of so few images
    last = printed.splitlines()[-1]
    assert "dilated-depthwise: completed, 1 of 1 epochs" in last
    assert "target of 80% is missed" in last
    assert "not CIFAR-10" not in printed


def test_without_cifar_10_it_says_why_and_that_every_line_is_of_drawn_pictures(run, no_network):
    status, printed, errors = run("--save net.pt --checkpoint run.pt --figures figures")
    assert (status, errors) == (0, "")  # it did what it announced
    reasons, _, rest = printed.partition("Continuing with drawn pictures: ")
    assert all(url in reasons for url in velasoka.CIFAR10_MIRRORS)
    assert reasons.count("no network?") == 1
    assert all("not CIFAR-10" in line for line in rest.splitlines() if line)
    assert "CIFAR-10 was unavailable" in rest.splitlines()[-1]
    assert "target" not in rest  # that of CIFAR-10
    passes = re.findall(r"^(\w+) Accuracy=\d+\.\d\d% loss=\d.*, \d+ batches in \d+ s$", rest, re.M)
    assert passes == ["Train", "Test"]
    assert names("*.pt") == {"net-synthetic.pt", "run-synthetic.pt"}
    kinds = "curves", "confusion-matrix", "mistakes"
    assert names("figures/*") == {f"{kind}-synthetic.png" for kind in kinds}


@pytest.mark.parametrize("arguments", ["--download", "--data new --download"])
def test_data_that_was_asked_for_is_never_replaced(arguments, run, no_network):
    status, printed, errors = run(arguments)
    assert status == 2
    assert "EPOCH" not in printed
    assert "no network?" in errors


def test_all_trains_the_three_whatever_the_backend_and_keeps_each_under_its_own_name():
    program = """
        import sys, torch, velasoka
        torch.set_num_threads(1)
        for name, model in velasoka.MODELS.items():
            velasoka.MODELS[name] = lambda model=model: model(2)
        pictures = velasoka.get_synthetic_dataset(200, 70)
        velasoka.get_synthetic_dataset = lambda: pictures
        sys.exit(velasoka._main(sys.argv[1:]))
    """
    options = "--model all --save net.pt --checkpoint run.pt --figures new/figures"
    command = [sys.executable, "-c", textwrap.dedent(program), *f"{ONE_EPOCH} {options}".split()]
    folder = Path(velasoka.__file__).parent
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "module://missing.backend"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
    models = list(velasoka.MODELS)
    assert names("*.pt") == {f"{kind}-{name}.pt" for kind in ("net", "run") for name in models}
    kinds = "confusion-matrix", "mistakes"
    figures = {f"{kind}-{name}.png" for kind in kinds for name in models}
    assert names("new/figures/*") == {"curves.png", *figures}
    assert Path("new/figures/curves.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = done.stdout.splitlines()[-4:]
    assert len(head) <= 50
    for row, (name, model) in zip(rows, velasoka.MODELS.items(), strict=True):
        count = velasoka.count_parameters(model(fm_size=2))
        assert re.fullmatch(rf"{name} +{count:,} +6\d +\d+\.\d\d% +\d s \(not CIFAR-10\)", row)


def test_the_options_reach_what_they_are_for_and_a_target_ends_training(run, monkeypatch):
    asked = {}
    for name in ("get_cifar10_data_loader", "get_muon_optimizer", "start_cnn"):
        asked[name] = Mock(wraps=getattr(velasoka, name))
        monkeypatch.setattr(velasoka, name, asked[name])
    options = "--batch-size 50 --seed 9 --lr 0.02 --precision bfloat16 --target 1"
    status, printed, _ = run(f"--synthetic --epochs 3 --device cpu --model simple {options}")
    assert status == 0
    assert "EPOCH: 2" not in printed
    assert "target of 1% is reached" in printed
    loader, optimizer, start = (call.call_args for call in asked.values())
    cpu = torch.device("cpu")
    assert (loader.args[1:], loader.kwargs) == ((50,), {"device": cpu, "seed": 9})
    assert (optimizer.args[1:], optimizer.kwargs) == ((0.02,), {"batch_size": 50})
    assert start.args[4:] == (cpu, 3)
    assert start.kwargs.items() >= {"precision": torch.bfloat16, "target_accuracy": 1}.items()


def test_a_loss_that_diverges_ends_with_status_1(run, monkeypatch):
    nan_loss = lambda logits, labels: logits.sum() * torch.nan  # noqa: E731
    monkeypatch.setattr(velasoka, "get_ce_loss", lambda: nan_loss)
    status, printed, errors = run(ONE_EPOCH)
    assert status == 1 and "diverged in epoch 1 of 1" in errors.lower()
    assert "diverged" in printed.splitlines()[-1]


def test_an_interrupt_keeps_the_checkpoint_to_resume_from(run, monkeypatch):
    get_loaders = velasoka.get_cifar10_data_loader

    def breaking(*args, **options):
        train, test = get_loaders(*args, **options)
        return Breaking(train, KeyboardInterrupt(), at=len(train) + 1), test

    arguments = "--synthetic --epochs 3 --checkpoint run.pt --device cpu"
    with monkeypatch.context() as patch:
        patch.setattr(velasoka, "get_cifar10_data_loader", breaking)
        status, printed, _ = run(arguments)
    assert status == 130 and "Interrupted in epoch 2 of 3" in printed
    assert re.search(r"interrupted, 1 of 3 epochs .*--resume", printed.splitlines()[-1])
    status, printed, _ = run(f"{arguments} --resume")
    assert status == 0 and "1 of 3 epochs are done" in printed
    assert re.findall(r"EPOCH: (\d)", printed) == ["2", "3"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--epochs 0", "--epochs 0"),
        ("--target 0", "--target 0"),
        ("--target 0.8", "--target 0.8"),
        ("--target nan", "--target nan"),
        ("--batch-size -4", "--batch-size -4"),
        ("--lr 0", "--lr 0"),
        ("--seed 5000000000", "--seed 5000000000"),
        ("--device cuda:99", "--device cuda:99"),
        ("--data .", "cifar-10"),
        ("--data torn.pt --download", "torn.pt"),
        ("--data . --synthetic", "--synthetic"),
        ("--download --synthetic", "--synthetic"),
        ("--save .", "cannot be written"),
        ("--figures torn.pt", "cannot be written"),
        ("--resume", "--checkpoint"),
        ("--save new/../net.pt --checkpoint net.pt", "--checkpoint"),
        ("--save out --figures out", "--figures"),
        ("--predict torn.pt", "--load"),
        ("--load torn.pt", "--predict"),
        ("--predict torn.pt --load torn.pt", "torn.pt: not a file of weights"),
        ("--predict torn.pt --load none.pt", "none.pt: no such file"),
        ("--synthetic --resume --checkpoint torn.pt", "torn.pt"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(arguments, named, run, no_network):
    Path("torn.pt").write_bytes(b"torn")
    status, printed, errors = run(arguments)
    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith("velasoka: ")
    assert named in errors
    assert "EPOCH" not in printed
    assert not Path("data").exists()


def test_each_picture_is_classified_by_the_model_that_the_weights_fit(run):
    for name in ("[o]ne.png", "one.png", "two.webp"):
        Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save(name)
    Path("page.html").write_text("<html>")
    model = velasoka.MODELS["simple"]()
    velasoka.save_model(model, "net.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    likeliest = velasoka.classify_image(model, "one.png", "cpu")
    named = ", ".join(f"{name} {share:.1f}%" for name, share in likeliest.items())
    files = "[o]ne.png page.html none.png *.webp"
    status, printed, errors = run(f"--load net.pt --predict {files} --device cpu")
    assert (status, printed) == (2, f"[o]ne.png: {named}\ntwo.webp: {named}\n")
    page, missing = errors.splitlines()
    assert page.startswith("velasoka: page.html: not an image")
    assert missing == "velasoka: none.png: no such file"
    predict = "--predict one.png --device cpu --load"
    assert run(f"{predict} net.pt --model simple") == (0, f"one.png: {named}\n", "")
    status, _, errors = run(f"{predict} net.pt --model dilated")
    assert status == 2
    assert "c3.3.weight" in errors
    status, _, errors = run(f"{predict} other.pt")
    assert (status, errors.count("\n")) == (2, 1)
    assert all(name in errors for name in velasoka.MODELS)


def test_a_stream_that_cannot_carry_a_name_shows_it_escaped(run, monkeypatch):
    assert run(f"{ONE_EPOCH} --checkpoint läuft.pt")[0] == 0
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(f"{ONE_EPOCH} --checkpoint läuft.pt --resume")[0] == 0
    assert b"l\\xe4uft.pt: 1 of 1 epochs are done" in stream.buffer.getvalue()


def test_a_reader_that_has_read_enough_ends_it_quietly(run, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(ONE_EPOCH) == (141, "", "")


@pytest.mark.parametrize(
    ("columns", "least_bar", "rate"), [(50, 1, ""), (80, 10, r" \(not CIFAR-10\) lr=\d\.\de-\d\d")]
)
def test_a_bar_fits_the_terminal_and_shows_what_matters(columns, least_bar, rate, run, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(ONE_EPOCH)[0] == 0
    lines = re.split("[\r\n]+", stream.buffer.getvalue().decode())
    for phase, end in (("Train", rate), ("Test", "")):
        *_, bar = (line for line in lines if line.startswith(f"{phase} "))
        assert len(bar) <= columns
        begins = rf"{phase} Accuracy=\d+\.\d\d%: 100%"
        assert re.match(rf"{begins}\|[^|]{{{least_bar},}}\| loss=\d\.\d{{3}}{end}", bar)
