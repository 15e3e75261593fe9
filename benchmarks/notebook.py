"""Run EVA4_S7.ipynb on real images; write it with its outputs, and the README's pictures.

    python -m benchmarks.notebook --data DIR

It runs in an empty folder, beside a copy of `velasoka.py`, with DIR as `./data`. Needs what the
tests need.
"""

import argparse
import base64
import copy
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from benchmarks.accuracy import machine

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "EVA4_S7.ipynb"
PICTURES = {"view": "receptive-fields.png", "curves": "curves.png"}  # by the cell that draws them


def execute(notebook, folder):
    """Run all cells of `notebook` in `folder`, as Jupyter would, and keep their outputs in it."""
    metadata = copy.deepcopy(notebook.metadata)
    place = {"metadata": {"path": folder}}
    options = {"kernel_name": "python3", "coalesce_streams": True, "record_timing": False}
    client = NotebookClient(notebook, resources=place, timeout=3600, **options)
    client.execute(env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    notebook.metadata = metadata  # the run adds what kernel it had


def digest(notebook):
    """Of the sources of all code cells: what was run."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def pictures(notebook):
    """The PNG files that the README shows, by name, as bytes."""
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    pngs = {name: outputs[cell][0].data["image/png"] for cell, name in PICTURES.items()}
    return {name: base64.b64decode(png) for name, png in pngs.items()}


def main():
    """Run the notebook and write it."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    where = "as for velasoka.py (default: %(default)s)"
    parser.add_argument("--data", type=Path, default=Path("data"), help=where)
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"--data {str(options.data)!r}: no such folder")
    start = time.perf_counter()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(REPOSITORY / "velasoka.py", folder)
        (Path(folder) / "data").symlink_to(options.data.resolve())
        execute(notebook, folder)
    notebook.metadata.run = {"sources_sha256": digest(notebook), **machine()}
    nbformat.write(notebook, NOTEBOOK)
    for name, content in pictures(notebook).items():
        (REPOSITORY / "benchmarks" / name).write_bytes(content)
    seconds = time.perf_counter() - start
    print(f"{NOTEBOOK.name}: run and written, {seconds:.0f} s; do its first cell's words hold?")


if __name__ == "__main__":
    main()
