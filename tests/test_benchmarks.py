"""The benchmarks run, on a few images; what they measure is in benchmarks/README.md."""

import json
import sys
from pathlib import Path

import pytest

import velasoka
from benchmarks import accuracy, launches, time_to_accuracy


def run(monkeypatch, benchmark, *arguments):
    """The results in the JSON that `benchmark` writes with these arguments."""
    command = ["benchmark", "--data", ".", "--json", "result.json", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    return json.loads(Path("result.json").read_text())["results"]


def test_accuracy_is_kept_by_model_and_seed(image_folders, monkeypatch, capsys):
    models = ["simple", "dilated-depthwise"]
    found = run(monkeypatch, accuracy, "--models", *models, "--seeds", "2", "--tta")
    kinds = [(one["model"], one["seed"]) for one in found]
    assert kinds == [(model, seed) for model in models for seed in (0, 1)]
    assert all(0 <= one[key] <= 100 for one in found for key in ("accuracy", "tta"))
    assert all(10 < one["peak_memory_mb"] < 1500 for one in found)
    rows = capsys.readouterr().out.splitlines()
    row = next(line for line in rows if line.startswith("| 1 | simple | 64 | nothing | 2 |"))
    assert f"{(found[0]['accuracy'] + found[1]['accuracy']) / 2:.2f} ± " in row


@pytest.mark.parametrize("technique", accuracy.WITHOUT)
def test_each_technique_can_be_left_out(technique, image_folders, monkeypatch):
    parts = {name: getattr(velasoka, name) for name in accuracy.WITHOUT[technique]}
    arguments = "--models", "dilated", "--seeds", "1", "--without", technique
    (found,) = run(monkeypatch, accuracy, *arguments)
    assert found["without"] == technique
    assert all(getattr(velasoka, name) is part for name, part in parts.items())


def test_a_stopped_benchmark_goes_on_and_mixes_nothing(image_folders, monkeypatch, capsys):
    arguments = "--models", "dilated", "--without", "nothing", "decay", "--seeds"
    before = run(monkeypatch, accuracy, *arguments, "1")
    after = run(monkeypatch, accuracy, *arguments, "2")
    assert after[:2] == before
    assert [(one["without"], one["seed"]) for one in after[2:]] == [("nothing", 1), ("decay", 1)]
    with pytest.raises(SystemExit):
        run(monkeypatch, accuracy, *arguments, "2", "--held-out")
    assert "--json result.json holds runs of " in capsys.readouterr().err


def test_a_file_that_is_not_of_the_benchmark_is_left_alone(monkeypatch, capsys):
    Path("result.json").write_text("[]")
    with pytest.raises(SystemExit):
        run(monkeypatch, accuracy)
    assert "--json result.json exists and is not of this benchmark" in capsys.readouterr().err
    assert Path("result.json").read_text() == "[]"


def test_held_out_images_are_not_trained_on(pictures):
    kept, held_out = accuracy.held_out(pictures, 50)
    assert sorted([*kept.indices, *held_out.indices]) == list(range(200))
    assert (len(held_out), held_out.dataset) == (50, pictures[0])


def test_time_to_accuracy_compares_with_the_first_version(image_folders, monkeypatch, capsys):
    arguments = "--models", "dilated", "--target", "100", "--first-epochs", "2"
    (found,) = run(monkeypatch, time_to_accuracy, *arguments)
    assert [len(after) for after in found["first_version"]] == [2, 2]
    assert found["first_version"][1][0] > found["first_version"][0][0] > 0
    output = capsys.readouterr().out
    assert output.startswith("| model | target (%) |")
    assert "| dilated | 100.00 | not reached | over " in output


def test_a_step_asks_for_few_launches():
    _, of_optimizer, of_step = launches.count("dilated-depthwise")  # the one with the most
    assert of_optimizer <= 112
    assert of_step <= 375
