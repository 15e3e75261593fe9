"""Files of weights."""

import copy
import functools
import os
import pickle
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import Bomb, weights_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import velasoka


def test_weights_come_back_as_they_were_saved(model, device, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    with pytest.raises(FileNotFoundError, match=r"net\.pt: no such file$"):
        velasoka.load_model(model, "~/new folder/net.pt")
    velasoka.save_model(model.to(device), "~/new folder/net.pt")
    other = velasoka.DilatedDepthwiseModel(fm_size=4)
    assert velasoka.load_model(other, "~/new folder/net.pt", device) is other
    assert torch.equal(weights_of(other), weights_of(model))
    assert next(other.parameters()).device.type == device.type
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["net.pt"]
    velasoka.save_model(model, "~unknown.pt")
    assert Path("~unknown.pt").is_file()


def test_a_write_that_breaks_off_leaves_the_file_that_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    velasoka.save_model(model, path)
    before = path.read_bytes()

    monkeypatch.setattr(velasoka.os, "fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        velasoka.save_model(velasoka.SimpleModel(fm_size=2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_symbolic_link_stays_one_and_its_target_is_written_and_keeps_its_mode(model, tmp_path):
    target = tmp_path / "drive" / "net.pt"
    target.parent.mkdir()
    target.touch(mode=0o600)
    link = tmp_path / "link.pt"
    link.symlink_to(target)
    velasoka.save_model(model, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    velasoka.load_model(model, target)
    assert list(target.parent.iterdir()) == [target]
    reader, writer = os.pipe()  # no regular file, so it is written into
    velasoka.save_model(torch.nn.Linear(1, 1), f"/dev/fd/{writer}")
    assert os.read(reader, 2) == b"PK"  # as the zip files of torch begin


WEIGHTS = velasoka.DilatedDepthwiseModel(fm_size=4).state_dict()
NO_WEIGHTS = [  # what is in the file, and what is said of it
    (b"no weights", "not a file of weights"),
    (pickle.dumps(Bomb(), protocol=2), "not a file of weights"),
    (Bomb(), "not a file of weights"),
    ([1, 2], "not a file of weights"),
    ({"best": 93.1, 3: "x"}, "not the weights of this"),
    ({"best": 93.1, "history": []}, "not the weights of this"),
    (velasoka.DilatedModel(fm_size=4).state_dict(), r"c2\.3\.weight"),
    (WEIGHTS | {"c4.1.bias": torch.zeros(11)}, r"c4.1.bias: \[11\]"),
    (WEIGHTS | {"c4.1.other": torch.zeros(10)}, r"c4.1.other: \[10\] in the file"),
    (WEIGHTS | {"c4.1.bias": torch.full([10], torch.nan)}, "c4.1.bias has NaN"),
]


@pytest.mark.parametrize(("content", "said"), NO_WEIGHTS)
def test_what_are_no_weights_of_this_model_is_refused_in_one_line(content, said, model):
    if isinstance(content, bytes):
        Path("net.pt").write_bytes(content)
    else:
        torch.save(content, "net.pt")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=said) as error:
        velasoka.load_model(model, "net.pt")
    assert str(error.value).startswith("net.pt: ")
    assert "\n" not in str(error.value)
    assert not Path("exploded").exists()
    assert torch.equal(weights_of(model), weights_of(before))


compiled = functools.partial(torch.compile, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [compiled, nn.DataParallel, AveragedModel, lambda model: compiled(nn.DataParallel(model))],
)
def test_weights_of_a_wrapped_model_load_into_the_plain_one_and_back(wrap, model):
    wrapped = wrap(model)
    velasoka.save_model(wrapped, "wrapped.pt")
    other = velasoka.DilatedDepthwiseModel(fm_size=4)
    velasoka.load_model(other, "wrapped.pt")
    assert torch.equal(weights_of(other), weights_of(model))
    velasoka.load_model(wrapped, "wrapped.pt")


def test_drive_path_warns_only_if_the_drive_is_not_mounted(monkeypatch):
    path = "/content/gdrive/My Drive/Colab Notebooks/EVA4/Session-7/net.pt"
    with pytest.warns(UserWarning, match="not mounted"):
        assert velasoka.get_drive_path("Session-7", "net.pt") == path
    monkeypatch.setattr(velasoka.os.path, "ismount", lambda path: path == "/content/gdrive")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert velasoka.get_drive_path(folder="Session-7", filename="net.pt") == path
