"""EVA4_S7.ipynb: what is committed, and that it runs from top to bottom, here and as Colab runs it."""

import asyncio
import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import nbformat
import pytest
from conftest import save_images
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from traitlets import Unicode

import velasoka
from benchmarks.notebook import NOTEBOOK, REPOSITORY, digest, execute, pictures

HOME = "https://raw.githubusercontent.com/velasoka-repo/EVA4/master/Session-7"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small image folder: drawn pictures, learnt in an epoch, under the names of CIFAR-10's classes."""
    root = tmp_path_factory.mktemp("images")
    for split, drawn in zip(("train", "test"), velasoka.get_synthetic_dataset(1500, 100), strict=True):
        save_images(root / split, drawn.data, drawn.targets)
    return root


@pytest.fixture
def served(tmp_path):
    """A folder served on loopback, its `velasoka.py` this repository's; `url` is its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(REPOSITORY / "velasoka.py", folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_settings(notebook, **settings):
    """A copy of the notebook without outputs, its settings changed."""
    notebook = nbformat.from_dict(notebook)
    for name, value in settings.items():
        pattern, line = re.compile(rf"^{name} = .*?(?=  #|$)", re.MULTILINE), f"{name} = {value!r}"
        cell = next(cell for cell in code_cells(notebook) if pattern.search(cell.source))
        cell.source = pattern.sub(lambda _, line=line: line, cell.source)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def printed(notebook):
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def set_up(notebook, folder, **settings):
    """Run the settings and the set-up as a script in `folder`; its exit status and the last line of its errors."""
    sources = {cell.id: cell.source for cell in code_cells(with_settings(notebook, **settings))}
    script = f"{sources['settings']}\n{sources['setup'].replace('%pip', 'pass  # ')}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


def test_runs_from_top_to_bottom_beside_the_module(notebook, data, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    (tmp_path / "data").symlink_to(data)
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save(tmp_path / "own.png")  # neither square nor RGB
    executed = with_settings(notebook, EPOCHS=1, IMAGE="own.png")
    execute(executed, tmp_path)
    text = printed(executed)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert text.count("EPOCH: 1") == 4 and "EPOCH: 2" not in text
    assert "100.00% of the predictions are the same" in text
    drawn = [str(cell.outputs).count("image/png") for cell in code_cells(executed)]
    assert sum(drawn) == 12 and max(drawn) == 1  # none twice


class Interrupting(NotebookClient):
    """Runs a notebook, and interrupts the kernel, as the stop button does, a while after the cell called `stop_in`."""

    stop_in = Unicode()

    async def async_execute_cell(self, cell, *args, **options):
        if cell.id == self.stop_in:
            asyncio.get_running_loop().call_later(3, lambda: asyncio.ensure_future(self.km.interrupt_kernel()))
        return await super().async_execute_cell(cell, *args, **options)


def test_stopping_a_model_in_run_all_stops_the_run_in_one_line(notebook, data, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    (tmp_path / "data").symlink_to(data)
    executed = with_settings(notebook, EPOCHS=1000)
    place = {"metadata": {"path": tmp_path}}
    client = Interrupting(executed, resources=place, kernel_name="python3", stop_in="train-simple", timeout=300)
    with pytest.raises(CellExecutionError):
        client.execute()
    cells = {cell.id: cell for cell in code_cells(executed)}
    *streams, error = cells["train-simple"].outputs
    text = "".join(output.text for output in streams)
    assert text.count("Interrupted in epoch") == 1 and text.splitlines()[-1].startswith("Interrupted in epoch ")
    assert error.traceback == ["Stopped: to restart simple, run this cell again, then those below it"]
    assert cells["train-dilated"].execution_count is None


def test_a_point_that_is_not_met_is_named_at_the_end(notebook, data, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    (tmp_path / "data").symlink_to(data)
    executed = with_settings(notebook, EPOCHS=1)
    train = next(cell for cell in code_cells(executed) if cell.id == "train")
    train.source = train.source.replace("optimizer(model)", "optimizer(model, lr=1e-5)")  # it learns next to nothing
    with pytest.raises(CellExecutionError):
        execute(executed, tmp_path)
    end = code_cells(executed)[-1]
    assert end.id == "end" and end.outputs[-1].traceback == ["Stopped: not met: test accuracy 80% or more"]
    assert printed(executed).count("  met\n") == 7 and printed(executed).count("NOT MET\n") == 1


def test_without_a_network_it_says_how_to_go_on_and_runs_on_drawn_pictures(notebook, tmp_path, monkeypatch):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    executed = with_settings(notebook)
    with pytest.raises(CellExecutionError):
        execute(executed, tmp_path)
    data = next(cell for cell in code_cells(executed) if cell.id == "data")
    (line,) = data.outputs[-1].traceback
    assert line.startswith("Stopped: no CIFAR-10") and "DRAWN_PICTURES" in line
    executed = with_settings(notebook, DRAWN_PICTURES=True, EPOCHS=1)
    drawn = next(cell for cell in code_cells(executed) if cell.id == "data")
    drawn.source = drawn.source.replace("get_synthetic_dataset()", "get_synthetic_dataset(1500, 100)")
    execute(executed, tmp_path)
    assert "\non drawn pictures, not CIFAR-10 " in "\n" + printed(executed) and printed(executed).count("  met\n") == 8


def test_runs_as_in_colab_with_nothing_but_itself(notebook, data, served, tmp_path):
    folder = tmp_path / "content"
    colab = folder / "google" / "colab"
    colab.mkdir(parents=True)
    (folder / "data").symlink_to(data)
    (colab / "drive.py").write_text(
        "import velasoka\n"
        "def mount(path):\n"
        "    assert path == '/content/gdrive'\n"
        "    velasoka.get_drive_path = lambda folder, filename: f'drive/{folder}/{filename}'\n"
    )
    executed = with_settings(notebook, EPOCHS=1, USE_DRIVE=True, HOME=served.url)
    execute(executed, folder)
    assert printed(executed).count("  met\n") == 8
    assert (folder / "velasoka.py").read_bytes() == (REPOSITORY / "velasoka.py").read_bytes()
    checkpoints = {path.name for path in (folder / "drive" / "Session-7").iterdir()}
    assert checkpoints == {f"{name}-1-epochs.pt" for name in velasoka.MODELS}
    again = with_settings(executed)
    again.cells = again.cells[: 1 + next(i for i, cell in enumerate(again.cells) if cell.id == "train-simple")]
    execute(again, folder)
    assert "1 of 1 epochs are done" in printed(again) and "EPOCH:" not in printed(again)


FIRST_VERSION = '"""The first version."""\nimport torch\n'
OF_BEFORE = '"""An earlier version."""\n__version__ = "{}"\n'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (FIRST_VERSION, "not version 2 of velasoka"),
        (OF_BEFORE.format("1.9"), "not version 2 of velasoka"),
        (OF_BEFORE.format("2.0.0"), "earlier than version 2.3"),
        ("<html>Sign in</html>", "not version 2 of velasoka"),
        (None, "HTTP Error 404"),
    ],
)
def test_what_is_not_the_module_is_named_and_not_kept(content, why, notebook, served, tmp_path):
    (served.folder / "velasoka.py").unlink()
    if content is not None:
        (served.folder / "velasoka.py").write_text(content)
    status, error = set_up(notebook, tmp_path, HOME=served.url)
    assert status == 1 and why in error
    assert "put version 2.3 beside this notebook" in error
    assert not (tmp_path / "velasoka.py").exists()


def test_the_run_ends_there_and_shows_why(notebook, tmp_path):
    executed = with_settings(notebook, HOME="http://127.0.0.1:9")
    with pytest.raises(CellExecutionError):
        execute(executed, tmp_path)
    setup, after = code_cells(executed)[1:3]
    (line,) = setup.outputs[-1].traceback
    assert line.startswith("Stopped: velasoka.py cannot be used (") and "put version 2.3 beside this notebook" in line
    assert after.execution_count is None


def test_a_jupyter_without_torch_is_told_what_to_install(notebook, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    sources = {cell.id: cell.source for cell in code_cells(notebook)}
    command = [sys.executable, "-c", sources["setup"].replace("%pip", "pass  # ")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.endswith(f"install it with: {sys.executable} -m pip install torch\n")


@pytest.mark.parametrize(("body", "why"), [(OF_BEFORE.encode(), "IncompleteRead"), (b"\xff\xfe", "can't decode")])
def test_a_reply_that_breaks_off_or_is_no_text_is_not_kept(body, why, notebook, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_once, args=(server, body), daemon=True).start()
        status, error = set_up(notebook, tmp_path, HOME=f"http://127.0.0.1:{server.getsockname()[1]}")
    assert status == 1 and why in error
    assert not (tmp_path / "velasoka.py").exists()


def answer_once(server, body):
    """Send `body` as the first part of a text, then hang up."""
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        length = len(body) + 1000 * body.isascii()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, body))


def test_an_earlier_copy_is_named_and_never_replaced(notebook, served, tmp_path):
    local = tmp_path / "velasoka.py"
    for content in ('__version__ = "2.0.0"  # mine\n', FIRST_VERSION):
        local.write_text(content)
        status, error = set_up(notebook, tmp_path, HOME=served.url)
        assert status == 1 and local.read_text() == content
        assert f"{local} is earlier than version 2.3" in error


def test_the_committed_file_is_a_whole_run_that_any_page_can_show(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert kinds == {"text/plain", "image/png", "image/jpeg"}
    assert notebook.metadata.run.sources_sha256 == digest(notebook)  # what is shown is what was run
    text = printed(notebook)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert "50000/50000" in text and "10000/10000" in text and "CIFAR-10 (JPEG)" in notebook.cells[0].source
    assert "\r" not in text and "stderr" not in {output.get("name") for output in outputs}
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|work|opt|Users)/", NOTEBOOK.read_text())


def test_the_committed_file_opens_in_colab_on_a_gpu(notebook):
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info", "run"}
    assert {key for cell in notebook.cells for key in cell.metadata} == {"alt", "cellView"}
    pictured = [cell for cell in code_cells(notebook) if "image/png" in str(cell.outputs)]
    assert all(cell.metadata.alt for cell in pictured)  # for who cannot see it
    badge = "https://colab.research.google.com/github/velasoka-repo/EVA4/blob/master/Session-7/EVA4_S7.ipynb"
    assert badge in notebook.cells[0].source
    assert any(f'HOME = "{HOME}"' in cell.source for cell in code_cells(notebook))


def test_cells_are_short(notebook):
    shown = [cell for cell in code_cells(notebook) if cell.metadata.get("cellView") != "form"]  # that one is folded
    assert len(shown) == len(code_cells(notebook)) - 1
    assert max(len(cell.source.splitlines()) for cell in shown) <= 15
    assert max(len(line) for cell in code_cells(notebook) for line in cell.source.splitlines()) <= 120


def test_the_readme_shows_its_pictures_and_its_table(notebook):
    readme, rows = (REPOSITORY / "README.md").read_text(), re.findall(r"^\| `.*%", notebook.cells[0].source, re.M)
    rows += re.findall(r"^\| (?:two|the same) .*\|$", notebook.cells[0].source, re.M)  # of times
    assert len(rows) == 5 and all(row in readme for row in rows)
    for name, content in pictures(notebook).items():
        assert f"]({HOME}/benchmarks/{name})" in readme and (REPOSITORY / "benchmarks" / name).read_bytes() == content
