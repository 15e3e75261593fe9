"""EVA4_S7.ipynb: what is committed, and that it runs from top to bottom, here and in Colab."""

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

import velasoka
from benchmarks.notebook import NOTEBOOK, REPOSITORY, digest, execute, pictures

HOME = "https://raw.githubusercontent.com/velasoka-repo/EVA4/master/Session-7"
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


def replace(notebook, cell_id, old, new):
    """Change the source of a cell."""
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


def printed(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def run_script(notebook, cell_ids, folder, **environment):
    """Run cells as a script in `folder`: exit status, and the last line of its errors."""
    sources = [cell.source for cell in notebook.cells if cell.id in cell_ids]
    script = "\n".join(sources).replace("%pip", "pass  # ")
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


def set_up(notebook, folder, home):
    return run_script(with_settings(notebook, HOME=home), ("settings", "setup"), folder)


def test_runs_as_in_colab_with_nothing_but_itself_and_again(notebook, served, tmp_path):
    folder = tmp_path / "content"
    drive = folder / "google" / "colab" / "drive.py"
    drive.parent.mkdir(parents=True)
    drive.write_text(
        "import velasoka\n"
        "def mount(path):\n"
        "    assert path == '/content/gdrive'\n"
        "    velasoka.get_drive_path = lambda folder, filename: f'drive/{folder}/{filename}'\n"
    )
    for split, drawn in zip(("train", "test"), velasoka.get_synthetic_dataset(1500, 100)):
        save_images(folder / "data" / split, drawn.data, drawn.targets)
    # a picture that is neither square nor RGB
    Image.effect_mandelbrot((90, 60), (-3, -2.5, 2, 2.5), 100).save(folder / "own.png")

    settings = {"EPOCHS": 1, "USE_DRIVE": True, "HOME": served.url, "IMAGE": "own.png"}
    executed = with_settings(notebook, **settings)
    execute(executed, folder)
    text = printed(executed)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert text.count("EPOCH: 1") == 4 and "EPOCH: 2" not in text
    assert "100.00% of the predictions are the same" in text
    drawn = [str(cell.outputs).count("image/png") for cell in code_cells(executed)]
    assert sum(drawn) == 12 and max(drawn) == 1  # none twice
    assert (folder / "velasoka.py").read_bytes() == (REPOSITORY / "velasoka.py").read_bytes()
    checkpoints = {path.name for path in (folder / "drive" / "Session-7").iterdir()}
    assert checkpoints == {f"{name}-1-epochs.pt" for name in velasoka.MODELS}

    again = with_settings(executed, HOME=NOWHERE)  # the module is there now
    ids = [cell.id for cell in again.cells]
    again.cells = again.cells[: ids.index("train-simple") + 1]
    execute(again, folder)
    assert "1 of 1 epochs are done" in printed(again) and "EPOCH:" not in printed(again)


class Interrupting(NotebookClient):
    """Runs a notebook, and interrupts the kernel, as the stop button does, when training begins."""

    interrupts = 0

    def output(self, outs, msg, display_id, cell_index):
        if "EPOCH: 1" in msg["content"].get("text", "") and not self.interrupts:
            self.interrupts += 1
            asyncio.ensure_future(self.km.interrupt_kernel())
        return super().output(outs, msg, display_id, cell_index)


def test_stopping_a_model_in_run_all_stops_the_run_in_one_line(notebook, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    executed = with_settings(notebook, EPOCHS=1000, DRAWN_PICTURES=True)
    place = {"metadata": {"path": tmp_path}}
    client = Interrupting(executed, resources=place, kernel_name="python3", timeout=300)
    with pytest.raises(CellExecutionError):
        client.execute()
    cells = {cell.id: cell for cell in code_cells(executed)}
    *streams, error = cells["train-simple"].outputs
    lines = "".join(output.text for output in streams).splitlines()
    assert lines[-1].startswith("Interrupted in epoch 1 of 1000")
    how = "Stopped: to restart simple, run this cell again, then those below it"
    assert error.traceback == [how]
    assert cells["train-dilated"].execution_count is None


def test_a_point_that_is_not_met_is_named_at_the_end(notebook, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    executed = with_settings(notebook, EPOCHS=1, DRAWN_PICTURES=True)
    replace(executed, "data", "get_synthetic_dataset()", "get_synthetic_dataset(100, 50)")
    replace(executed, "train", "optimizer(model)", "optimizer(model, lr=1e-5)")  # it hardly learns
    with pytest.raises(CellExecutionError):
        execute(executed, tmp_path)
    end = code_cells(executed)[-1]
    assert end.outputs[-1].traceback == ["Stopped: not met: test accuracy 80% or more"]
    text = printed(executed)
    assert text.count("  met\n") == 7 and text.count("NOT MET\n") == 1
    assert "\non drawn pictures, not CIFAR-10 " in text


def test_without_a_network_it_says_how_to_go_on(notebook, tmp_path):
    shutil.copy(REPOSITORY / "velasoka.py", tmp_path)
    cells = "settings", "setup", "data"
    status, error = run_script(notebook, cells, tmp_path, https_proxy=NOWHERE)
    assert status == 1
    assert "no CIFAR-10. " in error and "DRAWN_PICTURES" in error


def test_a_set_up_that_fails_ends_the_run_and_shows_why(notebook, tmp_path):
    executed = with_settings(notebook, HOME=NOWHERE)
    with pytest.raises(CellExecutionError):
        execute(executed, tmp_path)
    setup, after = code_cells(executed)[1:3]
    (line,) = setup.outputs[-1].traceback
    assert line.startswith("Stopped: velasoka.py cannot be used (")
    assert "put version 3 beside this notebook" in line
    assert after.execution_count is None


def version(number):
    return f'"""A version."""\n__version__ = "{number}"\n'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('"""The first version."""\n', "not version 3 of velasoka"),
        (version("2.3.0"), "not version 3 of velasoka"),
        ("<html>Sign in</html>", "not version 3 of velasoka"),
        (None, "HTTP Error 404"),
    ],
)
def test_what_is_not_the_module_is_named_and_not_kept(content, why, notebook, served, tmp_path):
    (served.folder / "velasoka.py").unlink()
    if content is not None:
        (served.folder / "velasoka.py").write_text(content)
    status, error = set_up(notebook, tmp_path, served.url)
    assert status == 1 and why in error
    assert "put version 3 beside this notebook" in error
    assert not (tmp_path / "velasoka.py").exists()


@pytest.mark.parametrize(
    ("body", "why"), [(version("3.0.0").encode(), "IncompleteRead"), (b"\xff\xfe", "can't decode")]
)
def test_a_reply_that_breaks_off_or_is_no_text_is_not_kept(body, why, notebook, tmp_path):
    length = len(body) + 1000 * body.isascii()

    def answer(server):
        """Send `body` as the first part of a text, then hang up."""
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, body))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        home = f"http://127.0.0.1:{server.getsockname()[1]}"
        status, error = set_up(notebook, tmp_path, home)
    assert status == 1 and why in error
    assert not (tmp_path / "velasoka.py").exists()


def test_an_earlier_copy_is_named_and_never_replaced(notebook, served, tmp_path):
    local = tmp_path / "velasoka.py"
    local.write_text(version("2.3.0"))
    status, error = set_up(notebook, tmp_path, served.url)
    assert status == 1 and local.read_text() == version("2.3.0")
    assert f"{local} is earlier than version 3" in error


def test_a_jupyter_without_torch_is_told_what_to_install(notebook, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    _, error = run_script(notebook, ("setup",), tmp_path, PYTHONPATH=str(tmp_path))
    assert error.endswith(f"install it with: {sys.executable} -m pip install torch")


def test_the_committed_file_is_a_whole_run_that_any_page_can_show(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 2_000_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    types = {output.output_type for output in outputs}
    assert types <= {"stream", "display_data", "execute_result"}
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"text/plain", "image/png", "image/jpeg"}
    text = printed(notebook)
    assert text.count("  met\n") == 8 and "NOT MET" not in text
    assert "50000/50000" in text and "10000/10000" in text
    assert "CIFAR-10 (JPEG)" in notebook.cells[0].source
    assert "\r" not in text and "stderr" not in {output.get("name") for output in outputs}
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|work|opt|Users)/", NOTEBOOK.read_text())


def test_what_is_shown_is_what_was_run(notebook):
    assert notebook.metadata.run.sources_sha256 == digest(notebook)


def test_the_committed_file_opens_in_colab_on_a_gpu(notebook):
    keys = {"accelerator", "colab", "kernelspec", "language_info", "run"}
    assert set(notebook.metadata) == keys
    assert (notebook.metadata.accelerator, notebook.metadata.colab.gpuType) == ("GPU", "T4")
    assert {key for cell in notebook.cells for key in cell.metadata} == {"alt", "cellView"}
    pictured = [cell for cell in code_cells(notebook) if "image/png" in str(cell.outputs)]
    assert all(cell.metadata.alt for cell in pictured)  # for who cannot see it
    page = "https://colab.research.google.com/github/velasoka-repo/EVA4/blob/master/Session-7"
    assert f"{page}/EVA4_S7.ipynb" in notebook.cells[0].source
    assert any(f'HOME = "{HOME}"' in cell.source for cell in code_cells(notebook))


def test_cells_are_short_and_call_public_names_only(notebook):
    folded = [cell for cell in code_cells(notebook) if cell.metadata.get("cellView") == "form"]
    assert [cell.id for cell in folded] == ["setup"]
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        if cell.cell_type == "code" and cell not in folded:
            assert len(lines) <= 17
        for line in lines:  # a row of a table or a badge cannot be broken
            assert len(line) <= 100 or line.startswith(("|", "[![")), line
        assert not re.search(r"velasoka\._[a-z]", cell.source)


def test_the_readme_shows_its_pictures_and_its_table(notebook):
    readme = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\| (?:`.*%|(?:two|the same) .*\|$)", notebook.cells[0].source, re.M)
    assert len(rows) == 5 and all(row in readme for row in rows)
    for name, content in pictures(notebook).items():
        assert f"]({HOME}/benchmarks/{name})" in readme
        assert (REPOSITORY / "benchmarks" / name).read_bytes() == content
