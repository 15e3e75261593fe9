import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Breaking
from PIL import Image

import velasoka

with contextlib.suppress(ImportError):  # of Windows
    import fcntl
    import termios

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
    assert status == 0  # it did what it announced
    for url in velasoka.CIFAR10_MIRRORS:
        assert re.search(re.escape(url) + ".*no route", printed)
    assert "80%" not in printed and "target" not in printed  # that of CIFAR-10
    last = printed.splitlines()[-1]
    assert "CIFAR-10 was unavailable" in last and "not CIFAR-10" in last and "--data DIR" in last


def test_what_is_written_of_drawn_pictures_instead_does_not_take_the_name_that_was_asked_for(run, no_network):
    assert run("--save", "net.pt", "--checkpoint", "run.pt", "--figures", "figures")[0] == 0
    assert {path.name for path in Path().glob("*.pt")} == {"net-synthetic.pt", "run-synthetic.pt"}
    assert all(path.stem.endswith("-synthetic") for path in Path("figures").iterdir())


def test_a_download_that_was_asked_for_and_fails_is_an_error(run, no_network):
    status, printed, errors = run("--download")
    assert status == 2 and "no route" in errors and "EPOCH" not in printed


def test_download_fills_the_folder_that_is_named(run, monkeypatch, tmp_path, batches_folder):
    def fetch(root, *, mirrors):
        assert mirrors == velasoka.CIFAR10_MIRRORS
        shutil.copytree(batches_folder / velasoka._BATCHES, root / velasoka._BATCHES)
        return root / velasoka._BATCHES

    monkeypatch.setattr(velasoka, "download_cifar10", fetch)
    assert run("--data", "new", "--download", "--epochs", "1")[0] == 0
    assert Path("new", velasoka._BATCHES).is_dir()


def test_the_same_happens_if_the_data_folder_cannot_be_made(run, no_network):
    Path("data").touch()
    status, printed, _ = run("--epochs", "1")
    assert status == 0
    assert "not CIFAR-10" in printed.splitlines()[-1]


def test_data_that_was_asked_for_is_never_replaced(run, no_network, tmp_path):
    status, _, errors = run("--data", str(tmp_path))
    assert status == 2
    assert errors.startswith(f"velasoka: no CIFAR-10 in {tmp_path}: neither {velasoka._BATCHES} nor")
    assert errors.endswith("(--download fetches it)\n") and errors.count("\n") == 1
    assert not any(tmp_path.iterdir())
    status, _, errors = run("--data", str(tmp_path / "new"), "--download")
    assert status == 2
    assert "no route" in errors and str(tmp_path / "new" / velasoka._ARCHIVE) in errors


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
    head, *rows = printed.splitlines()[-4:]
    assert head.split()[:5] == ["model", "parameters", "field", "accuracy", "seconds"]
    for row, (name, model) in zip(rows, velasoka.MODELS.items(), strict=True):
        parameters = f"{velasoka.count_parameters(model()):,}"
        assert row.split()[:2] == [name, parameters] and "%" in row and "not CIFAR-10" in row


def test_figures_are_written_as_png(run, tmp_path):
    folder = tmp_path / "new" / "figures"
    assert run("--synthetic", "--epochs", "1", "--figures", str(folder))[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["confusion-matrix.png", "curves.png", "mistakes.png"]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 50


def test_an_image_is_classified_whatever_its_size_and_mode(model):
    picture = Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    picture.save("rgb.png")
    expected = velasoka._classify(model, "rgb.png", "cpu", count=10)
    assert sum(expected.values()) == pytest.approx(100) and set(expected) == set(velasoka.CIFAR10_CLASSES)
    picture.convert("RGBA").save("rgba.png")
    assert velasoka._classify(model, "rgba.png", "cpu", count=10) == expected
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    picture.rotate(180).save("turned.png", exif=exif)
    assert velasoka._classify(model, "turned.png", "cpu", count=10) == expected
    Image.new("RGB", (40, 40), "white").save("white.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save("clear.png")
    assert velasoka._classify(model, "clear.png", "cpu") == velasoka._classify(model, "white.png", "cpu")
    for mode in ("CMYK", "L", "P"):
        picture.convert(mode).save("other.tiff")
        assert len(velasoka._classify(model, "other.tiff", "cpu")) == 3
    Image.new("I;16", (40, 40), 5000).save("deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: not a readable image \(mode I;16"):
        velasoka._classify(model, "deep.png", "cpu")


def test_images_of_ones_own_are_classified_by_saved_weights(run, tmp_path):
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save("own.png")
    run("--synthetic", "--epochs", "1", "--save", "net.pt")
    status, printed, errors = run(
        "--synthetic", "--load", "net.pt", "--device", "cpu", "--predict", "own.png", "own.png"
    )
    assert (status, errors) == (0, "")
    model = velasoka.load_model(velasoka.MODELS["dilated-depthwise"](), "net.pt")
    expected = velasoka._classify(model, "own.png", "cpu", classes=velasoka._SHAPES)
    assert printed.splitlines() == 2 * ["own.png: " + ", ".join(f"{n} {p:.1f}%" for n, p in expected.items())]
    assert len(expected) == 3 and list(expected.values()) == sorted(expected.values(), reverse=True)
    for wrong in ("own.png net.pt", "missing.png"):
        status, _, errors = run("--load", "net.pt", "--predict", *wrong.split())
        assert (status, errors.count("\n")) == (2, 1) and wrong.split()[-1] in errors


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
    assert errors == ""
    assert printed.count("nterrupted in epoch 2 of 3") == 1
    kept = f"the weights of epoch 1, the best; resume=True (--resume) continues from {arguments[-1]}"
    assert printed.count(kept) == 1
    assert "interrupted, 1 of 3 epochs" in printed.splitlines()[-1]
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
        ("--device gpu", "--device='gpu': a device of this machine ("),
        ("--device cuda:99", "'cuda:99'"),
        ("--data nowhere", "nowhere"),
        ("--data . --synthetic", "--synthetic"),
        ("--download --synthetic", "--download"),
        ("--data=", "--data ''"),
        ("--seed 5000000000", "--seed=5000000000: a whole number from 0 to 4294967295"),
        ("--synthetic --save .", "cannot be written"),
        ("--synthetic --checkpoint torn.pt/run.pt", "cannot be written"),
        ("--synthetic --figures torn.pt", "cannot be written"),
        ("--resume", "--checkpoint"),
        ("--predict torn.pt", "--load"),
        ("--predict torn.pt --load torn.pt --save net.pt", "--save"),
        ("--load torn.pt", "--predict"),
        ("--model all --load torn.pt --predict torn.pt", "--model"),
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


# --- Where the output goes ---

PROGRAM = """
import torch, velasoka
torch.set_num_threads(1)
velasoka.MODELS = {name: lambda model=model: model(2) for name, model in velasoka.MODELS.items()}
velasoka.get_synthetic_dataset = lambda get=velasoka.get_synthetic_dataset: get(3000, 1000)
raise SystemExit(velasoka._main(["--synthetic", "--epochs", "2", "--device", "cpu"]))
"""


def start(*command, **options):
    path = os.pathsep.join(filter(None, (str(MODULE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen([sys.executable, *command], env=environment, **options)  # noqa: S603


def test_a_log_has_one_line_a_pass():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    printed, errors = (each.decode() for each in start("-c", PROGRAM, **pipes).communicate())
    assert errors == "" and "\r" not in printed
    passes = [line for line in printed.splitlines() if re.match("Train|Test", line)]
    assert [line.split()[0] for line in passes] == ["Train", "Test"] * 2
    assert all(re.search(r"Accuracy=\d+\.\d\d% loss=\d+\.\d{3}.*, \d+ batches in \d+ s$", line) for line in passes)


@pytest.mark.parametrize("last", ["parameters", "EPOCH: 1", "completed"])
def test_a_reader_that_has_read_enough_ends_it_quietly(last):
    program = start("-c", PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while last.encode() not in (line := program.stdout.readline()):
        assert line
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == (0 if last == "completed" else 141)


def test_the_last_lines_may_find_no_reader_either():
    program = "import velasoka; print('x'); raise SystemExit(velasoka._main(['--predict', 'x', '--load', 'x']))"
    program = program.replace("raise", "velasoka._predict_files = lambda options: print('y') or 0; raise")
    ours, theirs = os.pipe()
    os.close(ours)
    ended = start("-c", program, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert ended.communicate()[1] == b"" and ended.returncode == 141


def test_output_may_go_to_an_object_that_can_only_write(model, loaders, device, monkeypatch):
    written = []
    only_writes = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", only_writes)
    velasoka.test_cnn(model, loaders[1], device)
    assert "".join(written).startswith("Test Accuracy=")
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    velasoka.test_cnn(model, loaders[1], device)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal of this kind")
def test_an_interrupt_of_the_imports_is_no_traceback():
    Path("torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    Path("velasoka.py").write_text(MODULE.read_text())
    program = start("velasoka.py", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout.readline() == b"importing\n"
    program.send_signal(signal.SIGINT)
    assert program.communicate() == (b"", b"")
    assert program.returncode == -signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
@pytest.mark.parametrize("columns", [50, 80, 200])
def test_a_bar_fits_the_terminal_and_shows_what_matters(columns):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    program = start("-c", PROGRAM, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert program.wait() == 0
    lines = [line for line in re.split("[\r\n]+", shown.decode()) if line]
    assert max(map(len, lines)) <= columns
    bars = [line for line in lines if line.startswith(("Train Accuracy", "Test Accuracy"))]
    assert len(bars) >= 4 and all(": 100%|" in line for line in bars if line.startswith("Test"))  # not before the end
    assert all(re.match(r"\w+ Accuracy=\d+\.\d\d%: +\d+%\|.+\| \d\d:\d\d<\d\d:\d\d", line) for line in bars)
    if columns > 50:
        assert all(re.search(r" loss=\d\.\d{3}( lr=\d\.\de-\d\d)? \(not CIFAR-10\)$", line) for line in bars)
