import importlib
import math
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, train
from matplotlib.figure import Figure

import velasoka

# --- Weights ---


def test_weights_come_back_as_they_were_saved(model, device, tmp_path):
    path = tmp_path / "new folder" / "net.pt"
    velasoka.save_model(model.to(device), path)
    other = velasoka.DilatedDepthwiseModel(fm_size=4)
    assert velasoka.load_model(other, str(path), device) is other
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert next(other.parameters()).device.type == device.type
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_breaks_off_leaves_the_file_that_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    velasoka.save_model(model, path)
    before = path.read_bytes()

    def break_off(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(velasoka.os, "fsync", break_off)
    with pytest.raises(KeyboardInterrupt):
        velasoka.save_model(velasoka.SimpleModel(fm_size=2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def saved(content):
    torch.save(content, "made.pt")
    return Path("made.pt").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"no weights",
        lambda: saved(velasoka.DilatedDepthwiseModel(fm_size=4).state_dict())[:-1000],
        lambda: saved(velasoka.SimpleModel(fm_size=4).state_dict()),
        lambda: saved([1, 2]),
        lambda: saved(velasoka.DilatedDepthwiseModel(fm_size=4).state_dict() | {"epoch": 3}),
        lambda: saved(Bomb()),
        lambda: pickle.dumps(Bomb()),
    ],
)
def test_a_file_that_holds_no_weights_of_this_model_is_refused_in_one_line_and_runs_nothing(content, model):
    Path("net.pt").write_bytes(content())
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"net\.pt: not ") as error:
        velasoka.load_model(model, "net.pt")
    assert "\n" not in str(error.value)
    assert not Path("exploded").exists()
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))


def test_a_missing_file_is_named(model):
    with pytest.raises(FileNotFoundError, match=r"net\.pt"):
        velasoka.load_model(model, "net.pt")


def test_drive_path_warns_only_if_the_drive_is_not_mounted(monkeypatch):
    path = "/content/gdrive/My Drive/Colab Notebooks/EVA4/Session-7/net.pt"
    with pytest.warns(UserWarning, match="not mounted"):
        assert velasoka.get_drive_path("Session-7", "net.pt") == path
    monkeypatch.setattr(velasoka.os.path, "ismount", lambda path: path == "/content/gdrive")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert velasoka.get_drive_path("Session-7", "net.pt") == path


# --- Pictures ---


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_show_images_draws_each_image_as_it_is_under_its_class(pictures, loaders):
    dataset = pictures[1]
    images, labels = next(iter(loaders[1]))
    for figure in (
        velasoka.show_images(images, labels, dataset.classes, columns=5),
        velasoka.show_images(dataset.data[:32], dataset.targets[:32], dataset.classes, columns=5),
        velasoka.show_images([dataset[i][0] for i in range(32)], dataset.targets[:32], dataset.classes, columns=5),
    ):
        assert isinstance(figure, Figure)
        assert titles(figure) == [dataset.classes[label] for label in labels]
        drawn = torch.as_tensor(figure.axes[7].images[0].get_array()).double()
        drawn = drawn / 255 if drawn.max() > 1 else drawn
        torch.testing.assert_close(drawn, torch.tensor(dataset.data[7] / 255.0), atol=1e-3, rtol=0)


def test_show_misclassified_shows_the_surest_mistakes_first(pictures):
    dataset = pictures[1]
    logits = torch.nn.functional.one_hot(torch.tensor(dataset.targets), 10) * 10.0
    logits[3], logits[5] = torch.eye(10)[0] * 2, torch.eye(10)[1] * 5
    figure = velasoka.show_misclassified(dataset.data, dataset.targets, logits, dataset.classes)
    names = dataset.classes
    assert [title.partition(" (")[0] for title in titles(figure)] == [
        f"{names[5]}, taken for\n{names[1]}",
        f"{names[3]}, taken for\n{names[0]}",
    ]


def test_show_misclassified_of_a_model_that_makes_no_mistake_says_so(pictures):
    images, labels = pictures[1].data[:4], pictures[1].targets[:4]
    logits = torch.eye(10)[labels]
    figure = velasoka.show_misclassified(images, np.array(labels, dtype=np.uint16), logits, pictures[1].classes)
    assert [text.get_text() for text in figure.axes[0].texts] == ["of 4 images none is misclassified"]
    assert not any(axis.get_images() for axis in figure.axes)


def test_plot_history_of_no_epoch_says_so():
    figure = velasoka.plot_history(velasoka.History())
    assert [text.get_text() for text in figure.axes[0].texts] == ["no epoch has been completed yet"]
    result = velasoka.EpochResult(1.0, 50.0, 5, 10, 1.0)
    assert len(velasoka.plot_history(velasoka.History(test=[result])).axes) == 2


def test_plot_history_draws_accuracy_and_loss_of_one_run_or_several():
    results = [velasoka.EpochResult(2.0, 10.0, 1, 10, 1.0), velasoka.EpochResult(1.0, 30.0, 3, 10, 1.0)]
    history = velasoka.History(results, results)
    accuracy, loss = velasoka.plot_history(history).axes
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[10, 30]] * 2
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1]] * 2
    assert list(loss.lines[0].get_xdata()) == [1, 2]
    assert len(velasoka.plot_history({"one": history, "two": history}).axes[0].lines) == 4


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_plot_history_has_ticks_at_whole_epochs_and_hollow_markers_for_train(epochs):
    results = [velasoka.EpochResult(2.0, 10.0 + epoch, 1, 10, 1.0) for epoch in range(epochs)]
    figure = velasoka.plot_history(velasoka.History(results, results))
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
        faces = {line.get_label(): line.get_markerfacecolor() for line in axis.lines}
        assert faces.keys() == {"train", "test"}
        assert faces["train"] == "white" != faces["test"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"train", "test"}


def test_a_reload_of_the_module_takes_what_was_made_before(model, loaders, device):
    result, names = velasoka.EpochResult(1.0, 50.0, 5, 10, 1.0), dict(vars(velasoka))
    old = velasoka.History([result], [result])
    try:
        importlib.reload(velasoka)
        assert velasoka.History is not type(old)
        assert len(velasoka.plot_history(old).axes) == 2
        new = train(model, loaders, device, 1)
        assert len(velasoka.plot_history({"old": old, "new": new}).axes[0].lines) == 4
    finally:  # other tests hold the classes of before
        vars(velasoka).clear()
        vars(velasoka).update(names)


def test_what_is_made_here_has_a_short_repr(pictures, loaders):
    results = [velasoka.EpochResult(1.0, 50.25, 201, 400, 1.0)] * 30
    for thing, number in [
        *((dataset, len(dataset)) for dataset in pictures),
        *((loader, len(loader)) for loader in loaders),
        *((loader.dataset, len(loader.dataset)) for loader in loaders),
        (velasoka.History(results, results, "completed", 50.25, 1), "30 epochs"),
        (velasoka.History(results[:1], results[:1]), "1 epoch"),
        (velasoka.History(), "History"),
    ]:
        text = repr(thing)
        assert re.search(rf"\b{number}\b", text), text
        assert len(text) <= 100
        assert "\n" not in text
        assert "0x" not in text


def test_confusion_matrix_and_accuracy_by_class():
    labels, predictions = [0, 0, 0, 1], torch.tensor([0, 0, 1, 1])
    assert velasoka.per_class_accuracy(labels, predictions, ["a", "b"]) == {"a": pytest.approx(200 / 3), "b": 100.0}
    assert math.isnan(velasoka.per_class_accuracy(labels, predictions, ["a", "b", "c"])["c"])
    axis = velasoka.plot_confusion_matrix(labels, predictions, ["cat", "dog"]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["2", "1", "0", "1"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
