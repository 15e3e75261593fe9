"""Figures, and the numbers behind them."""

import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import velasoka

RESULTS = [velasoka.EpochResult(2.0, 10.0, 1, 10, 1.0), velasoka.EpochResult(1.0, 30.0, 3, 10, 1.0)]


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_show_images_draws_each_image_as_it_is_under_its_class(pictures, loaders):
    dataset = pictures[1]
    images, labels = next(iter(loaders[1]))
    for given in (images, dataset.data[:32], [dataset[i][0] for i in range(32)]):
        figure = velasoka.show_images(given, labels, dataset.classes, columns=5)
        assert isinstance(figure, Figure)
        assert titles(figure) == [dataset.classes[label] for label in labels]
        drawn = torch.as_tensor(figure.axes[7].images[0].get_array()).double()
        drawn = drawn / 255 if drawn.max() > 1 else drawn
        torch.testing.assert_close(drawn, torch.tensor(dataset.data[7] / 255), atol=1e-3, rtol=0)
    assert not plt.get_fignums()  # or Jupyter would draw it a second time


def test_pictures_of_one_channel_are_grey():
    pixels = np.arange(32).reshape(2, 4, 4).astype(np.uint8)
    images = torch.tensor(pixels[:, None] / 255).float()
    whole = {"mean": (0.0,), "std": (1.0,)}
    for given in (images, pixels, pixels[..., None]):
        shown = velasoka.show_images(given, [0, 1], "ab", **whole).axes[1].images[0]
        assert shown.get_cmap().name == "gray"
        drawn = np.array(shown.get_array(), dtype=float).reshape(4, 4)
        assert np.allclose(drawn / drawn.max(), pixels[1] / 31, atol=1e-4)
        assert shown.get_clim() in ((0, 1), (0, 255))  # not stretched to what is in the picture
    with pytest.raises(ValueError, match=r"1 channels: mean and std"):  # they are of three
        velasoka.show_images(images, [0, 1], "ab")


def test_show_misclassified_shows_the_surest_mistakes_first(pictures):
    images, labels, names = pictures[1].data, pictures[1].targets, pictures[1].classes
    logits = 10.0 * torch.eye(10)[labels]
    figure = velasoka.show_misclassified(images, np.array(labels), logits, names)
    assert figure.get_suptitle() == "none of the 70 images is misclassified"
    assert len(figure.axes) == 1  # or Jupyter would not show it
    logits[3] = torch.eye(10)[0] * 2
    logits[5] = torch.eye(10)[1] * 5
    figure = velasoka.show_misclassified(images, labels, logits, names)
    shown = [title.partition(" (")[0] for title in titles(figure)]
    assert shown == [f"{names[5]}, taken for\n{names[1]}", f"{names[3]}, taken for\n{names[0]}"]
    with pytest.raises(ValueError, match="70 images, 70 labels, 3 logits"):
        velasoka.show_misclassified(images, labels, logits[:3], names)


def test_plot_history_draws_accuracy_and_loss_of_one_run_or_several():
    history = velasoka.History(RESULTS, RESULTS)
    figure = velasoka.plot_history(history)
    for axis, values in zip(figure.axes, ([10, 30], [2, 1]), strict=True):
        assert [list(line.get_ydata()) for line in axis.lines] == [values] * 2
        assert list(axis.lines[0].get_xdata()) == [1, 2]
        assert all(tick == round(tick) for tick in axis.get_xticks())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["test", "train"]
    other = velasoka.History(RESULTS[:1], RESULTS[:1])
    both = velasoka.plot_history({"one": history, "other": other})
    labels = {line.get_label() for line in both.axes[0].lines}
    assert labels == {"one test", "one train", "other test", "other train"}
    velasoka.plot_history(velasoka.History()).canvas.draw()  # before the first epoch


def test_confusion_matrix_has_numbers_and_names_and_no_grid():
    labels = [0, 0, 0, 1]
    predictions = torch.tensor([0, 0, 1, 1])
    with plt.style.context("ggplot"):
        figure = velasoka.plot_confusion_matrix(labels, predictions, ["cat", "dog"])
    axis = figure.axes[0]
    assert texts(figure) == ["2", "1", "0", "1"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert not any(line.get_visible() for line in axis.get_xgridlines() + axis.get_ygridlines())


def test_confusion_matrix_of_a_hundred_classes_is_quick_and_without_numbers():
    start = time.process_time()
    names = [f"class {index}" for index in range(100)]
    figure = velasoka.plot_confusion_matrix(range(100), range(100), names)
    figure.canvas.draw()
    assert time.process_time() - start < 3
    assert texts(figure) == []
    assert len(figure.axes[0].get_xticklabels()) <= 30


def test_accuracy_by_class_in_percent_is_nan_without_images():
    accuracies = velasoka.per_class_accuracy([0, 0, 0, 1], [0, 0, 1, 1], "abc")
    assert accuracies == pytest.approx({"a": 200 / 3, "b": 100, "c": math.nan}, nan_ok=True)
