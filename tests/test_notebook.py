"""EVA4_S7.ipynb and README.md: what is committed, and that all of it runs, here and in Colab."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import random_images, save_images
from PIL import Image

import velasoka
from benchmarks.notebook import NOTEBOOK, REPOSITORY, digest, execute, pictures

HOME = "https://raw.githubusercontent.com/velasoka-repo/EVA4/master/Session-7"
README = REPOSITORY / "README.md"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def served(tmp_path):
    """A folder served on loopback, in it this repository's `velasoka.py`; `url` is its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(REPOSITORY / "velasoka.py", folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.folder = folder
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_settings(notebook, **settings):
    """A copy of the notebook without outputs, its settings changed."""
    notebook = nbformat.from_dict(notebook)
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
        for name, value in settings.items():
            pattern = rf"^{name} = .*?(?=  #|$)"
            cell.source = re.sub(pattern, f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
    return notebook


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def set_up(notebook, folder, home=NOWHERE, **environment):
    """Run the set-up as a script in `folder`: exit status, and the last line of its errors."""
    cells = with_settings(notebook, HOME=home).cells
    script = "\n".join(cell.source for cell in cells if cell.id in ("settings", "setup"))
    command = [sys.executable, "-c", script.replace("%pip", "pass  # ")]
    options = {"cwd": folder, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, check=False)  # noqa: S603
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


def only(notebook, pattern):
    """The cells of `notebook` whose ids match, by id; the others are removed."""
    notebook.cells = [cell for cell in notebook.cells if re.fullmatch(pattern, cell.id)]
    return {cell.id: cell for cell in notebook.cells}


def test_runs_as_in_colab_with_nothing_but_itself_and_resumes(notebook, served, tmp_path):
    folder = tmp_path / "content"
    drive = folder / "google" / "colab" / "drive.py"
    drive.parent.mkdir(parents=True)
    drive.write_text(
        "import velasoka\n"
        "def mount(path):\n"
        "    assert path == '/content/gdrive'\n"
        "    velasoka.get_drive_path = lambda folder, filename: f'drive/{folder}/{filename}'\n"
    )
    train, test = velasoka.get_synthetic_dataset(1000, 100)
    save_images(folder / "data" / "train", train.data, train.targets)
    save_images(folder / "data" / "test", test.data, test.targets)
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save(folder / "own.png")

    settings = {"EPOCHS": 1, "USE_DRIVE": True, "HOME": served.url, "IMAGE": "own.png"}
    executed = with_settings(notebook, **settings)
    (simple,) = (cell for cell in executed.cells if cell.id == "train-simple")
    again = nbformat.v4.new_code_cell(simple.source)
    executed.cells.append(again)
    execute(executed, folder)
    assert "1 of 1 epochs are done" in again.outputs[0].text
    assert "EPOCH:" not in again.outputs[0].text
    text = printed(executed)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert text.count("EPOCH: 1") == 4 and "EPOCH: 2" not in text
    assert "100.00% of the predictions are the same" in text
    drawn = [str(cell.outputs).count("image/png") for cell in code_cells(executed)]
    assert sum(drawn) == 12 and max(drawn) == 1  # none twice
    assert (folder / "velasoka.py").read_bytes() == (REPOSITORY / "velasoka.py").read_bytes()
    assert len(list((folder / "drive" / "Session-7").iterdir())) == 3


class Stop(Exception):  # noqa: N818
    pass


def test_stopping_a_model_in_run_all_stops_the_run_in_one_line(notebook, pictures, monkeypatch):
    interrupted = velasoka.History(status="interrupted")
    monkeypatch.setattr(velasoka, "start_cnn", lambda *_, **__: interrupted)
    values = {"velasoka": velasoka, "Stop": Stop, "train": pictures[0], "test": pictures[1]}
    values |= {"USE_DRIVE": False, "DRAWN_PICTURES": True, "EPOCHS": 3, "device": "cpu"}
    cells = only(with_settings(notebook), "train|train-simple")
    with pytest.raises(Stop, match="to restart simple, run this cell again"):
        for cell in cells.values():
            exec(cell.source, values)  # noqa: S102


def test_a_point_that_is_not_met_is_named_at_the_end(notebook, capsys):
    cells = only(with_settings(notebook), "points|end")
    lists = "counts", "pools", "dilated", "separable", "pooled"
    values = dict.fromkeys(lists, ["some"] * 3)
    values |= {"velasoka": velasoka, "Stop": Stop, "DRAWN_PICTURES": True, "in_order": [True]}
    values |= {"device": torch.device("cpu"), "devices": ["cpu"] * 3, "ours": velasoka.MODELS}
    values |= {"fields": [60, 64, 64], "parameters": [3, 2, 1], "accuracies": [82, 79.99, 81]}
    values["models"] = {}  # that the last table shows
    exec(cells["points"].source, values)  # noqa: S102
    with pytest.raises(Stop, match=r"^not met: test accuracy 80% or more$"):
        exec(cells["end"].source, values)  # noqa: S102
    text = capsys.readouterr().out
    assert text.count("  met\n") == 7 and text.count("NOT MET\n") == 1
    assert text.startswith("on drawn pictures, not CIFAR-10 ")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'\n__version__ = "2.3.0"\n', "not version 3 of velasoka"),
        (b"\xff\xfe", "can't decode"),
        (None, "HTTP Error 404"),
    ],
)
def test_what_is_not_the_module_is_named_and_not_kept(content, why, notebook, served, tmp_path):
    (served.folder / "velasoka.py").unlink()
    if content is not None:
        (served.folder / "velasoka.py").write_bytes(content)
    status, error = set_up(notebook, tmp_path, served.url)
    assert status == 1 and why in error
    assert "put version 3 beside this notebook" in error
    assert not (tmp_path / "velasoka.py").exists()


def test_the_committed_file_is_a_whole_run_that_any_page_can_show(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.run.sources_sha256 == digest(notebook)  # shown is what was run
    assert NOTEBOOK.stat().st_size < 2_000_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"text/plain", "image/png", "image/jpeg"}
    text = printed(notebook)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert "not CIFAR-10" not in text and "CIFAR-10 (JPEG)" in notebook.cells[0].source
    assert "\r" not in text and "stderr" not in {output.get("name") for output in outputs}
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|work|opt|Users)/", NOTEBOOK.read_text())


def test_the_committed_cells_are_short_and_open_in_colab_on_a_gpu(notebook):
    assert (notebook.metadata.accelerator, notebook.metadata.colab.gpuType) == ("GPU", "T4")
    assert "/EVA4/blob/master/Session-7/EVA4_S7.ipynb" in notebook.cells[0].source
    assert any(f'HOME = "{HOME}"' in cell.source for cell in code_cells(notebook))
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"alt", "cellView"}
        lines = cell.source.splitlines()
        if cell.cell_type == "code":
            assert cell.metadata.get("alt") or "image/png" not in str(cell.outputs)  # for the blind
            is_folded = cell.metadata.get("cellView") == "form"
            assert is_folded == (cell.id == "setup")
            assert len(lines) <= 17 or is_folded
        for line in lines:  # a row of a table or a badge cannot be broken
            assert len(line) <= 100 or line.startswith(("|", "[![")), line
        assert not re.search(r"velasoka\._[a-z]", cell.source)


def test_the_readme_shows_its_pictures_and_its_table(notebook):
    readme = README.read_text()
    rows = re.findall(r"^\| (?:`.*%|(?:two|the same) .*\|$)", notebook.cells[0].source, re.M)
    assert len(rows) == 6 and all(row in readme for row in rows)
    for name, content in pictures(notebook).items():
        assert f"]({HOME}/benchmarks/{name})" in readme
        assert (REPOSITORY / "benchmarks" / name).read_bytes() == content


def test_the_examples_in_the_readme_run(monkeypatch):
    pictures = velasoka.get_synthetic_dataset(100, 40)
    monkeypatch.setattr(velasoka, "get_cifar10_dataset", lambda: pictures)
    Image.new("RGB", (90, 60)).save("cat.jpg")
    for part in ("train", "test"):
        save_images(Path("pictures", part), random_images(2)[..., 0], [0, 1])  # gray
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(example, names)  # noqa: S102
    images, _ = next(iter(names["own_loader"][0]))
    assert images.shape == (2, 3, 64, 64) and names["own_model"].cpu()(images.cpu()).shape == (2, 2)
    history, parts = names["history"], names["parts"]
    assert history.status == ("stopped" if names["callback"](history) else "completed")
    assert Path("run.pt").exists() and parts[1].dataset is pictures[0] and len(parts[1]) == 10
