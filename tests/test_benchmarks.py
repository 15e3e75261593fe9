"""The benchmarks run, on a few images; what they measure is in benchmarks/README.md."""

import json
import sys
from pathlib import Path

import pytest

import velasoka
from benchmarks import accuracy, launches


@pytest.fixture
def run(image_folders, monkeypatch):
    """Runs a benchmark on small models; the results in the JSON that it writes."""

    def run(benchmark, *arguments):
        command = ["benchmark", "--data", ".", "--json", "result.json", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        return json.loads(Path("result.json").read_text())["results"]

    for name, model in velasoka.MODELS.items():
        small = lambda model=model: model(fm_size=4)  # noqa: E731
        monkeypatch.setitem(velasoka.MODELS, name, small)
    return run


def test_accuracy_is_kept_by_model_and_seed(run, capsys):
    found = run(accuracy, "--models", "simple", "dilated-depthwise", "--seeds", "2", "--tta")
    kinds = [(one["model"], one["seed"]) for one in found]
    assert kinds == [(model, seed) for model in ("simple", "dilated-depthwise") for seed in (0, 1)]
    assert all(0 <= one[key] <= 100 for one in found for key in ("accuracy", "tta"))
    assert all(10 < one["peak_memory_mb"] < 1500 for one in found)
    rows = capsys.readouterr().out.splitlines()
    row = next(line for line in rows if line.startswith("| 1 | simple | 64 | nothing | 2 |"))
    assert f"{(found[0]['accuracy'] + found[1]['accuracy']) / 2:.2f} ± " in row
    again = run(accuracy, "--models", "simple", "dilated-depthwise", "--seeds", "3", "--tta")
    assert all(one in again for one in found)  # continued


def test_a_step_asks_for_few_launches(monkeypatch):
    small = lambda: velasoka.DilatedDepthwiseModel(fm_size=4)  # noqa: E731
    monkeypatch.setitem(velasoka.MODELS, "dilated-depthwise", small)  # the one with the most
    _, of_optimizer, of_step = launches.count("dilated-depthwise")
    assert of_optimizer <= 112
    assert of_step <= 375
