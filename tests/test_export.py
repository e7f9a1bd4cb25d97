"""Exported models: archives, ONNX and the translation of the operators into it. AOTInductor: test_consumer.py."""

from pathlib import Path

import pytest
import torch
from onnx_support import SMALL, Operators, operator_inputs, small_rednet
from torch import nn

import pyinvolution
from pyinvolution import cli
from pyinvolution.export import export, load_model, onnx_decompositions, onnx_translations
from pyinvolution.models import create_model, save_pretrained

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("functions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # ONNX Runtime has no float64 convolution
def test_operators_in_onnx(dtype: torch.dtype, functions: bool) -> None:
    inputs = operator_inputs(dtype)
    program = torch.export.export(Operators(), inputs)
    if functions:
        from onnx.inliner import inline_local_functions

        from pyinvolution._onnx_functions import translate

        model = translate(program, 18)
        called = {node.op_type for node in model.graph.node if node.domain == "pyinvolution"}
        names = ("involution2d", "span_involution2d", "involution_layer2d")
        assert called == {f"{name}{number}" for name in names for number in ("", "_2", "_3", "_4")} | {
            f"span_involution2d_{number}" for number in range(5, 13)
        }
        models = [model, inline_local_functions(model)]
    else:
        plain = program.run_decompositions(onnx_decompositions())
        models = [torch.onnx.export(plain, (), opset_version=18, dynamo=True, verbose=False).model_proto]
        assert {opset.domain for opset in models[0].opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in models[-1].graph.node} <= {"", "ai.onnx"}
    for model in models:
        onnx.checker.check_model(model, full_check=True)
        assert {opset.domain: opset.version for opset in model.opset_import}[""] == 18
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        flat = torch.utils._pytree.tree_leaves(inputs)
        feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), flat, strict=True)}
        for found, expected in zip(session.run(None, feed), Operators()(*inputs), strict=True):
            tolerance = {torch.float16: 2e-2, torch.float32: 2e-5}[dtype]
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("dynamo", "optimized"), [(True, False), (True, True), (False, False)], ids=["dynamo", "optimized", "torchscript"]
)
def test_torch_onnx_export_needs_no_help(dynamo: bool, optimized: bool, tmp_path: Path) -> None:
    model = small_rednet().eval()
    net = pyinvolution.optimize_for_inference(model) if optimized else model
    path, example = tmp_path / "model.onnx", torch.randn(2, 3, 64, 96)
    names = {0: "batch", 2: "height", 3: "width"}
    if dynamo:
        sizes = {axis: torch.export.Dim(name, min=1 if axis == 0 else 33) for axis, name in names.items()}
        torch.onnx.export(net, (example,), path, input_names=["input"], dynamic_shapes=(sizes,), verbose=False)
    else:
        torch.onnx.export(
            net, (example,), path, input_names=["input"], dynamic_axes={"input": names}, opset_version=18, dynamo=False
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 96), (3, 3, 41, 75)):
        images = torch.randn(shape)
        (found,) = session.run(None, {"input": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-4)


def test_the_table_of_translations_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="needs no custom_translation_table"):
        assert onnx_translations() == {}


@pytest.mark.parametrize(("format", "custom_ops"), [("pt2", False), ("onnx", False), ("onnx", True)])
def test_any_batch_and_size(format: str, custom_ops: bool, tmp_path: Path) -> None:
    model = small_rednet()
    path = tmp_path / f"model.{format}"
    result = export(model, path, format, torch.rand(2, 3, 64, 96), custom_ops=custom_ops)
    assert result.dynamic == ("batch", "height", "width")
    assert result.difference < 1e-4 < result.scale
    for shape in ((1, 3, 33, 33), (5, 3, 75, 41)):
        images = torch.randn(shape)
        if format == "pt2":
            found = torch.export.load(path).module()(images)
        else:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
        torch.testing.assert_close(found, model.eval()(images).detach(), rtol=1e-4, atol=1e-4)
    assert model.stem.conv1.weight.requires_grad


def test_fixed_size_and_unoptimized(tmp_path: Path) -> None:
    result = export(
        small_rednet(), tmp_path / "m.pt2", example_input=torch.rand(2, 3, 64, 64), dynamic=False, optimize=False
    )
    assert result.dynamic == ()
    assert result.difference == 0
    program = torch.export.load(tmp_path / "m.pt2")
    assert "batch_norm" in str(program.graph)


def test_a_wrong_export_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyinvolution import export as module

    def write(program, path, opset):
        path.write_text("wrong")
        return lambda image: [torch.zeros(len(image), 10)]

    monkeypatch.setitem(module.FORMATS, "pt2", module.Format(".pt2", write))
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(RuntimeError, match="outputs differ from the model's by"):
        export(small_rednet(), tmp_path / "m.pt2", example_input=torch.rand(2, 3, 64, 64), dynamic=False)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.pt2", "before")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "tflite"}, "format is 'tflite', expected one of pt2, aoti, onnx"),
        ({"opset": 17}, "opset is 17, expected at least 18"),
        ({"custom_ops": True}, "custom_ops is True, expected False for format pt2"),
        ({"example_input": torch.rand(3, 64, 64)}, r"has shape \(3, 64, 64\), expected \(N, C, H, W\)"),
        (
            {"example_input": torch.rand(2, 3, 64, 32)},
            "is 64 x 32, expected at least 33 x 33; only a fixed size",
        ),
        ({"format": "aoti", "path": "m.so"}, r"path is m\.so, expected one that ends in \.pt2"),
        (
            {"format": "onnx", "example_input": torch.rand(2, 3, 64, 64).bfloat16()},
            r"the model is in torch\.bfloat16, expected torch\.float32 or torch\.float16 for format onnx",
        ),
    ],
)
def test_wrong_arguments(arguments: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        export(small_rednet(), **({"path": tmp_path / "m.pt2"} | arguments))
    with pytest.raises(TypeError, match="example_input is a tuple, expected a tensor"):
        export(small_rednet(), tmp_path / "m.pt2", example_input=(2, 3, 64, 64))


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    class Branching(nn.Conv2d):
        def forward(self, input):
            return super().forward(input if input.sum() > 0 else -input)

    with (
        pytest.warns(UserWarning, match="exported as it is, not optimized"),
        pytest.raises(ValueError, match=r"torch\.export cannot export Branching"),
    ):
        export(Branching(3, 4, 1), tmp_path / "m.pt2", example_input=torch.rand(2, 3, 8, 8), dynamic=False)


def test_segmentation(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    backbone = create_model("rednet", **{**SMALL, "layers": (1, 1, 1, 1)}, num_classes=0, global_pool="")
    model = create_model("semantic_fpn", backbone=backbone, num_classes=5)
    result = export(model, tmp_path / "m.pt2", example_input=torch.rand(2, 3, 64, 96))
    assert result.dynamic == ("batch", "height", "width")
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.rand(1, 3, 81, 75)).shape == (1, 5, 81, 75)


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_detection(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    backbone = create_model("rednet", **{**SMALL, "layers": (1, 1, 1, 1)}, num_classes=0, global_pool="")
    threshold = {"score_thresh": 0.0} if name == "retinanet" else {"box_score_thresh": 0.0}
    options = {"num_classes": 5, "channels": 32, "min_size": 96, "max_size": 128, **threshold}
    model = create_model(name, backbone=backbone, **options)
    if name == "retinanet":  # whose scores are all the same at first
        nn.init.normal_(model.head.classification_head.cls_logits.weight)
    result = export(model, tmp_path / "m.pt2", example_input=torch.rand(1, 3, 96, 128))
    assert result.dynamic == ()
    image = torch.rand(1, 3, 96, 128)
    boxes, labels, scores, *masks = torch.export.load(tmp_path / "m.pt2").module()(image)
    (expected,) = model.eval()([image[0]])
    assert len(boxes) == len(expected["boxes"]) > 0
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, expected["boxes"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(labels, expected["labels"])
    assert [mask.shape[1:] for mask in masks] == ([(1, 28, 28)] if name == "mask_rcnn" else [])


def test_command_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    model = small_rednet().eval()
    checkpoint = {
        "hyper_parameters": {"name": "rednet", "num_classes": 10, "options": SMALL},
        "state_dict": {f"net.{key}": value for key, value in model.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "best.ckpt")
    image = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(load_model(str(tmp_path / "best.ckpt")).eval()(image), model(image))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = load_model("rednet", str(tmp_path / "state.pt"), 10, SMALL)
    torch.testing.assert_close(loaded.eval()(image), model(image))

    # A folder of this library's own, as a model and on the command line; a name comes before a folder of another kind.
    saved = save_pretrained(model, tmp_path / "saved")
    torch.testing.assert_close(load_model(saved).eval()(image), model(image))
    (tmp_path / "rednet26").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sum(value.numel() for value in load_model("rednet26").parameters()) == 9_233_166
    result = export(saved, tmp_path / "saved.pt2", example_input=torch.rand(1, 3, 33, 40))
    assert result.dynamic == ("batch", "height", "width")
    found = torch.export.load(tmp_path / "saved.pt2").module()(image)
    torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-4)

    output = tmp_path / "model.onnx"
    cli_arguments = [
        "export",
        str(saved),
        "--format",
        "onnx",
        "--size",
        "48",
        "64",
        "--output",
        str(output),
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(cli_arguments)
    assert not ended.value.code
    assert "free batch, height, width; largest difference" in capsys.readouterr().out
    onnx.checker.check_model(output)

    (tmp_path / "noise.ckpt").write_bytes(b"noise")
    torch.save({"x": torch.ones(1)}, tmp_path / "other.ckpt")
    torch.save({**checkpoint, "hyper_parameters": {"name": "rednet", "options": {"x": 1}}}, tmp_path / "wrong.ckpt")
    for wrong, words in (
        (["rednet500"], "expected a file, a folder or the name of a model"),
        ([""], "expected a file, a folder or the name of a model"),
        ([str(tmp_path)], "is not a folder of save_pretrained: there is no"),
        ([str(tmp_path / "saved"), "--num-classes", "3"], "num_classes is 3, expected None"),
        ([str(tmp_path / "best.ckpt"), "--num-classes", "3"], "num_classes is 3, expected None"),
        ([str(tmp_path / "wrong.ckpt")], "was not saved from a model of this library"),
        ([str(tmp_path / "noise.ckpt")], "is not a checkpoint: it is damaged or holds more than tensors"),
        ([str(tmp_path / "other.ckpt")], "does not say which model it is of"),
        (["rednet26", "--weights", str(tmp_path / "other.ckpt")], "other.ckpt is of another model"),
        (["rednet26", "--weights", str(tmp_path / "none")], "there is no file"),
        (["rednet26", "--format", "aoti", "--output", "m.so"], "path is m.so, expected one that ends in .pt2"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", *wrong])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1


def test_cmake_dir(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--cmake-dir"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{pyinvolution.cmake_prefix_path}\n"
    assert (Path(pyinvolution.cmake_prefix_path) / "pyinvolution/pyinvolutionConfig.cmake").is_file()
