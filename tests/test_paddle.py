"""PaddleClas's files: names, layouts and pickle protocols, and files that try to run something."""

import copyreg
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from pyinvolution.models import RedNet, create_model, load_official, official_state_dict, paddle
from pyinvolution.models.loading import load
from pyinvolution.models.paddle import read_pdparams

DATA = os.environ.get("PYINVOLUTION_TEST_DATA")
NAME = "StructuredToParameterName@@"


def small(**kwargs):
    torch.manual_seed(0)
    model = RedNet((1, 2), 10, stem_channels=32, base_channels=16, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def paddle_arrays(model):
    """What `paddle.save(model.state_dict())` pickles of PaddleClas's network with these weights."""
    arrays = {}
    for name, value in official_state_dict(model).items():
        name = name.removeprefix("backbone.").removeprefix("head.")
        name = name.replace(".running_mean", "._mean").replace(".running_var", "._variance")
        if not name.endswith("num_batches_tracked"):
            arrays[name] = np.ascontiguousarray((value.t() if name == "fc.weight" else value).numpy())
    return {**arrays, NAME: {name: f"parameter_{index}" for index, name in enumerate(arrays)}}


def write(path: Path, content, protocol=4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("numpy_name", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_every_weight(dtype, protocol, numpy_name, tmp_path):
    model = small(dtype=dtype)
    data = pickle.dumps(paddle_arrays(model), protocol)
    found = b"numpy._core.multiarray" if b"numpy._core.multiarray" in data else b"numpy.core.multiarray"
    if protocol < 4:  # there, names end with a line
        data = data.replace(found, numpy_name.encode())
    elif numpy_name.encode() != found:
        pytest.skip("names have their length before them")
    path = tmp_path / "RedNet_pretrained.pdparams"
    path.write_bytes(data)
    other = RedNet((1, 2), 10, stem_channels=32, base_channels=16, dtype=dtype)
    assert load_official(other, path) is other
    expected = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert load(RedNet((1, 2), 10, stem_channels=32, base_channels=16, dtype=dtype), path).head.weight.equal(
        model.head.weight
    )


@pytest.mark.skipif(
    DATA is None, reason="PYINVOLUTION_TEST_DATA does not name the folder with paddle/mini_rednet.pdparams"
)
def test_a_file_that_paddle_wrote():
    folder = Path(str(DATA)) / "paddle"
    facts = json.loads((folder / "mini_rednet.json").read_text())
    model = RedNet(facts["layers"], 10, stem_channels=32, base_channels=16)
    load_official(model.eval(), folder / "mini_rednet.pdparams")
    x = torch.sin(0.37 * torch.arange(2 * 3 * 64 * 96, dtype=torch.float64)).reshape(2, 3, 64, 96)
    with torch.no_grad():
        single, double = model(x.float()), model.double()(x)
    torch.testing.assert_close(single, torch.tensor(facts["logits_float32"]), rtol=0, atol=1e-5)
    # Paddle keeps a norm's eps of 1e-5 as a float32.
    torch.testing.assert_close(double, torch.tensor(facts["logits_float64"], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.skipif(DATA is None, reason="PYINVOLUTION_TEST_DATA does not name the folder with paddle/keys_*.txt")
@pytest.mark.parametrize("depth", [26, 50])
def test_names_and_shapes_of_paddleclas(depth):
    lines = (Path(str(DATA)) / "paddle" / f"keys_rednet{depth}.txt").read_text().splitlines()
    theirs = dict(line.split(" ", 1) for line in lines if line.strip())
    with torch.device("meta"):
        model = create_model(f"rednet{depth}")
    ours = {}
    for name, value in official_state_dict(model).items():
        name = name.removeprefix("backbone.").removeprefix("head.")
        name = name.replace(".running_mean", "._mean").replace(".running_var", "._variance")
        if not name.endswith("num_batches_tracked"):
            ours[name] = str(tuple(value.t().shape if name == "fc.weight" else value.shape))
    assert ours == theirs


def test_another_network_is_refused(tmp_path):
    arrays = paddle_arrays(small())
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {
        "missing": {name: value for name, value in arrays.items() if name != "layer2.1.bn3._mean"},
        "unexpected": {**arrays, "layer2.7.bn1.weight": np.zeros(4, np.float32)},
        "wrong shape": {**arrays, "fc.bias": np.zeros(11, np.float32)},
    }
    for fault, content in wrong.items():
        with pytest.raises(ValueError, match=fault):
            load_official(model, write(tmp_path / "other.pdparams", content))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(marker: Path):
    """Pickles each of which would make ``marker`` in an ordinary unpickler."""
    command = f"touch {marker}"
    calls = {
        "a command": Calls(os.system, command),
        "code": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "in a value": {"fc.bias": Calls(os.system, command)},
        "in a name": {(1, Calls(os.system, command)): np.zeros(2)},
        "after the weights": {**paddle_arrays(small()), NAME: Calls(os.system, command)},
        "an attribute": {"x": Calls(getattr, command, "upper")},
        "in an array of objects": {"x": np.array([Calls(os.system, command)], dtype=object)},
    }
    return {name: pickle.dumps(content, 4) for name, content in calls.items()}


@pytest.mark.parametrize("name", hostile(Path("nowhere")))
def test_nothing_is_executed(name, tmp_path):
    marker = tmp_path / "executed"
    data = hostile(marker)[name]
    path = tmp_path / "hostile.pdparams"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a file of named arrays"):
        read_pdparams(path)
    assert not marker.exists()
    if name != "an attribute":
        pickle.loads(data)
        assert marker.exists(), "the pickle is not hostile"


def test_a_module_is_not_imported(tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        path = tmp_path / "import.pdparams"
        path.write_bytes(b"\x80\x02ctrap\nValue\n)R.")
        with pytest.raises(ValueError, match=r"it names trap\.Value, which is not called"):
            read_pdparams(path)
        assert "trap" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("known", [False, True], ids=["new", "used before"])
def test_registered_extensions_are_not_called(known, tmp_path):
    module = types.ModuleType("extension_of_the_test")
    module.run = lambda: pytest.fail("called")  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    copyreg.add_extension(module.__name__, "run", 240)
    try:
        path = tmp_path / "extension.pdparams"
        path.write_bytes(b"\x80\x02\x82\xf0)R.")
        if known:
            assert pickle.loads(b"\x80\x02\x82\xf0.") is module.run
        with pytest.raises(ValueError, match="which is not called"):
            read_pdparams(path)
    finally:
        copyreg.remove_extension(module.__name__, "run", 240)
        del sys.modules[module.__name__]


def test_a_file_does_not_change_the_reader(tmp_path):
    path = tmp_path / "state.pdparams"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.")
    before = paddle._encode.__defaults__
    with pytest.raises(ValueError, match="it sets the state of a function"):
        read_pdparams(path)
    assert paddle._encode.__defaults__ == before


def test_damaged_files(tmp_path):
    good = pickle.dumps({"fc.bias": np.zeros(3, np.float32)}, 4)
    array = np.zeros((2, 3), np.float32)
    bad = {
        "empty": b"",
        "cut off": good[:-20],
        "text": b"<html>not found</html>",
        "a list": pickle.dumps([array]),
        "no arrays": pickle.dumps({}),
        "a number": pickle.dumps({"fc.bias": 3}),
        "a number as a name": pickle.dumps({3: array}),
        "Fortran's order": pickle.dumps({"x": np.asfortranarray(array)}),
        "complex numbers": pickle.dumps({"x": array.astype(np.complex64)}),
        "the other byte order": pickle.dumps({"x": array.astype(">f4" if sys.byteorder == "little" else "<f4")}),
        "a matrix of three dimensions": pickle.dumps({"fc.weight": np.zeros((2, 2, 2), np.float32)}),
        "two of one name": pickle.dumps({"bn._mean": array, "bn.running_mean": array}),
        "a record": pickle.dumps({"x": np.zeros(2, [("a", "f4")])}),
        "more elements than bytes": good.replace(b"K\x03\x85", b"K\x07\x85"),
    }
    assert bad["more elements than bytes"] != good
    for name, data in bad.items():
        path = tmp_path / f"{name}.pdparams"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a file of named arrays") as error:
            read_pdparams(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_pdparams(tmp_path / "nowhere.pdparams")
