"""The command line: exit status, what it prints, which files it writes."""

import contextlib
import functools
import os
import re
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Breaking
from PIL import Image

import velasoka

with contextlib.suppress(ImportError):  # of Windows
    import fcntl
    import termios

MODULE = Path(velasoka.__file__)
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


def pt_files():
    return sorted(path.name for path in Path().glob("*.pt"))


# --- Data ---


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
    assert pt_files() == ["net-synthetic.pt", "run-synthetic.pt"]
    assert all(path.stem.endswith("-synthetic") for path in Path("figures").iterdir())


def test_drawn_pictures_are_called_so_in_every_line_one_a_pass(run):
    status, printed, errors = run("--synthetic --epochs 2 --device cpu")
    assert (status, errors) == (0, "")
    lines = [line for line in re.split("[\r\n]", printed) if line]
    assert all("not CIFAR-10" in line for line in lines)
    passes = [line for line in lines if re.match("Train|Test", line)]
    assert [line.split()[0] for line in passes] == ["Train", "Test"] * 2
    ends = r"Accuracy=\d+\.\d\d% loss=\d+\.\d{3}.*, \d+ batches in \d+ s$"
    assert all(re.search(ends, line) for line in passes)
    assert "2 of 2 epochs" in lines[-1]


@pytest.mark.parametrize("arguments", ["--download", "--data new --download", "--data ."])
def test_data_that_was_asked_for_is_never_replaced(arguments, run, no_network, tmp_path):
    status, printed, errors = run(arguments)
    assert status == 2
    assert "EPOCH" not in printed
    assert ("no network?" in errors) == ("--download" in arguments)
    assert "cifar-10" in errors


def test_a_data_folder_that_cannot_be_made_is_one_line(run, no_network):
    Path("data").touch()
    status, printed, errors = run("")
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert "data" in errors


# --- Files and options ---


def test_all_trains_the_three_and_keeps_each_under_its_own_name(run):
    options = "--model all --save net.pt --checkpoint run.pt --figures new/figures"
    status, printed, _ = run(f"{ONE_EPOCH} {options}")
    assert status == 0
    names = list(velasoka.MODELS)
    assert pt_files() == sorted(f"{stem}-{name}.pt" for stem in ("net", "run") for name in names)
    figures = {path.stem for path in Path("new/figures").glob("*.png")}
    of_each = [f"{kind}-{name}" for kind in ("confusion-matrix", "mistakes") for name in names]
    assert figures == {"curves", *of_each}
    assert Path("new/figures/curves.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = printed.splitlines()[-4:]
    assert head.split()[0] == "model"
    assert len(head) <= 50
    for row, (name, model) in zip(rows, velasoka.MODELS.items(), strict=True):
        assert row.split()[:2] == [name, f"{velasoka.count_parameters(model()):,}"]
        assert "%" in row
        assert "not CIFAR-10" in row


def test_the_options_reach_what_they_are_for(run, monkeypatch):
    asked = {}

    def recorded(name, call, *args, **options):
        asked[name] = *args[1:], options
        return call(*args, **options)

    for name in ("get_cifar10_data_loader", "get_muon_optimizer", "start_cnn"):
        call = functools.partial(recorded, name, getattr(velasoka, name))
        monkeypatch.setattr(velasoka, name, call)
    options = "--batch-size 50 --seed 9 --lr 0.02 --precision bfloat16 --target 30"
    run(f"{ONE_EPOCH} --model simple {options}")
    cpu = torch.device("cpu")
    assert asked["get_cifar10_data_loader"] == (50, {"device": cpu, "seed": 9})
    assert asked["get_muon_optimizer"] == (0.02, {"batch_size": 50})
    *_, device, epochs, options = asked["start_cnn"]
    assert (device, epochs) == (cpu, 1)
    assert (options["precision"], options["target_accuracy"]) == (torch.bfloat16, 30)


def test_a_target_that_is_reached_ends_training_well(run):
    status, printed, _ = run("--synthetic --epochs 3 --target 1 --device cpu")
    assert status == 0
    assert "EPOCH: 2" not in printed
    assert "target of 1% is reached" in printed


def test_a_loss_that_diverges_ends_with_status_1(run, monkeypatch):
    nan_loss = lambda logits, labels: logits.sum() * torch.nan  # noqa: E731
    monkeypatch.setattr(velasoka, "get_ce_loss", lambda: nan_loss)
    status, printed, errors = run(ONE_EPOCH)
    assert status == 1
    assert "diverged in epoch 1 of 1" in errors.lower()
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
    assert status == 130
    assert "nterrupted in epoch 2 of 3" in printed
    last = printed.splitlines()[-1]
    assert "interrupted, 1 of 3 epochs" in last
    assert "--resume" in last
    status, printed, _ = run(f"{arguments} --resume")
    assert status == 0
    assert "1 of 3 epochs are done" in printed
    assert "EPOCH: 1" not in printed
    assert "EPOCH: 2" in printed


def test_an_interrupt_before_training_is_no_traceback(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(velasoka, "get_synthetic_dataset", interrupt)
    assert run("--synthetic") == (130, "", "velasoka: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--model huge", "huge"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs 1.5", "'1.5'"),
        ("--target 0", "--target 0"),
        ("--target 0.8", "--target 0.8"),
        ("--target nan", "--target nan"),
        ("--batch-size -4", "--batch-size -4"),
        ("--lr 0", "--lr 0"),
        ("--precision int8", "int8"),
        ("--seed 5000000000", "--seed 5000000000"),
        ("--device gpu", "--device gpu"),
        ("--device cuda:99", "--device cuda:99"),
        ("--data nowhere", "nowhere"),
        ("--data . --synthetic", "--synthetic"),
        ("--download --synthetic", "--synthetic"),
        ("--save .", "cannot be written"),
        ("--checkpoint torn.pt/run.pt", "cannot be written"),
        ("--figures torn.pt", "cannot be written"),
        ("--resume", "--checkpoint"),
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


def test_version(run):
    assert run("--version") == (0, f"{velasoka.__version__}\n", "")


# --- Pictures of one's own ---


@pytest.fixture
def own_pictures(run):
    """Two pictures, a page, and weights of the simple model."""
    for name in ("one.png", "two.webp"):
        Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save(name)
    Path("page.html").write_text("<html>")
    velasoka.save_model(velasoka.MODELS["simple"](), "net.pt")


def test_each_picture_is_classified_by_the_model_that_the_weights_fit(run, own_pictures):
    files = "one.png page.html none.png *.webp"
    status, printed, errors = run(f"--load net.pt --predict {files} --device cpu")
    assert status == 2
    model = velasoka.load_model(velasoka.MODELS["simple"](), "net.pt")
    likeliest = velasoka.classify_image(model, "one.png", "cpu")
    named = ", ".join(f"{name} {share:.1f}%" for name, share in likeliest.items())
    assert printed.splitlines() == [f"one.png: {named}", f"two.webp: {named}"]
    page, missing = errors.splitlines()
    assert page.startswith("velasoka: page.html: not an image")
    assert missing == "velasoka: none.png: no such file"
    assert run("--load net.pt --predict one.png --device cpu --model simple")[0] == 0


def test_weights_that_fit_none_of_the_models_say_which_were_tried(run, own_pictures):
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    status, _, errors = run("--load other.pt --predict one.png --device cpu")
    assert (status, errors.count("\n")) == (2, 1)
    assert all(name in errors for name in velasoka.MODELS)
    status, _, errors = run("--load net.pt --predict one.png --device cpu --model dilated")
    assert status == 2
    assert "c3.3.weight" in errors


# --- Where the output goes ---

PROGRAM = """
import sys, torch, velasoka
torch.set_num_threads(1)
for name, model in velasoka.MODELS.items():
    velasoka.MODELS[name] = lambda model=model: model(2)
pictures = velasoka.get_synthetic_dataset(200, 70)
velasoka.get_synthetic_dataset = lambda: pictures
sys.exit(velasoka._main(["--synthetic", "--epochs", "1", "--device", "cpu", *sys.argv[1:]]))
"""


def start(*arguments, environment=None, **options):
    path = os.pathsep.join(filter(None, (str(MODULE.parent), os.environ.get("PYTHONPATH"))))
    variables = os.environ | {"PYTHONPATH": path} | (environment or {})
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=variables, **options)  # noqa: S603


def test_neither_an_ascii_stream_nor_a_backend_that_is_missing_ends_a_run(run):
    assert run(f"{ONE_EPOCH} --checkpoint läuft.pt")[0] == 0
    arguments = ["--checkpoint", "läuft.pt", "--resume", "--figures", "größen"]
    environment = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://missing.backend"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    program = start(*arguments, environment=environment, **pipes)
    printed = program.communicate()[0].decode("ascii")
    assert program.returncode == 0, printed
    assert "l\\xe4uft.pt: 1 of 1 epochs are done" in printed
    assert len(list(Path("größen").glob("*.png"))) == 3


def test_a_reader_that_has_read_enough_ends_it_quietly():
    with start(stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert b"parameters" in program.stdout.readline()
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 141


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
@pytest.mark.parametrize("columns", [50, 80])
def test_a_bar_fits_the_terminal_and_shows_what_matters(columns):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    program = start(stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert program.wait() == 0
    lines = [line for line in re.split("[\r\n]+", shown.decode()) if line]
    assert max(map(len, lines)) <= columns
    ends = dict.fromkeys(["Train", "Test"], r" loss=\d\.\d{3}")
    if columns == 80:
        ends["Train"] += r" \(not CIFAR-10\) lr=\d\.\de-\d\d"
        ends["Test"] += r" \(not CIFAR-10\)"
    for phase, end in ends.items():
        bar = [line for line in lines if line.startswith(phase)][-1]
        begins, _, rest = bar.partition(": 100%|")
        assert re.fullmatch(rf"{phase} Accuracy=\d+\.\d\d%", begins)
        drawn, _, details = rest.partition("|")
        assert len(drawn) >= (10 if columns == 80 else 1)
        assert re.match(end, details)
