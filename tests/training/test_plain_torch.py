"""Files of PyTorch read without PyTorch, against PyTorch; what they may not hold is refused."""

import collections
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest

from idml_jax.errors import UserError
from idml_jax.training.weights import files, plain_torch

torch = pytest.importorskip("torch")


def tensors():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    named = {
        "a.weight": base, "a.transposed": base.T, "a.part": base[1:3, ::2], "half": base.half(),
        "brain": base.bfloat16(), "double": base.double(), "count": torch.tensor(7), "empty": torch.zeros(0, 3),
        "flags": base > 0,
        "parameter": torch.nn.Parameter(base[0]),
    }  # fmt: skip
    return named


@pytest.fixture(params=["zip", "sequence"])
def save(request, tmp_path):
    def save(content, name="w.pth"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=request.param == "zip")
        return tmp_path / name

    return save


@pytest.fixture
def read(monkeypatch):
    """``files.read_torch`` where PyTorch is not installed."""

    def read(path):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch", None)
            return files.read_torch(path)

    return read


def test_the_same_tensors_as_torch(save, read):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = save(
        {"epoch": 3, "name": "x", "state_dict": net.state_dict(), "more": tensors(), "optimizer": {"lr": [0.1]}}
    )
    found = read(path)
    assert set(found) == {"state_dict", "more"}
    for place, expected in (("state_dict", net.state_dict()), ("more", tensors())):
        assert list(found[place]) == list(expected)
        for name, value in expected.items():
            got = found[place][name]
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, value.detach().float().numpy(), err_msg=name)


class Attack:
    def __reduce__(self):
        return os.system, ("echo attacked",)


def test_more_than_tensors_is_refused(save, read, capfd):
    sparse = torch.eye(3).to_sparse()
    for content in ({"w": torch.ones(2), "x": Attack()}, {"w": sparse}, {"w": torch.nn.Linear(2, 2)}):
        with pytest.raises(UserError, match=r"w.pth: is damaged, or holds more .*PyTorch, which is not installed"):
            read(save(content))
    assert "attacked" not in capfd.readouterr().out


def test_repeated_storage_and_wrong_sizes_are_refused(save, tmp_path, read):
    with pytest.raises(UserError, match="larger than its storage"):
        read(save({"w": torch.zeros(1).expand(1_000_000)}))
    path = save({"w": torch.ones(100)})
    data = path.read_bytes()
    for cut in (10, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="is damaged"):
            read(path)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps(collections.OrderedDict(a=1), 2))
        archive.writestr("x/data/0", bytes(1_000_000))
    content, _ = plain_torch.read(tmp_path / "bomb.pth")
    assert content == {"a": 1}
