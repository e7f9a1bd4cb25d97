"""The benchmarks: both, small and on the CPU, the arithmetic of the GPU's floors, and the verdicts on its targets."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import REDNET50, same

from benchmarks import (
    ROOT,
    counts,
    cpu,
    engines,
    family,
    gpu,
    harness,
    loader,
    operators,
    predict,
    roofline,
    systems,
    targets,
)
from benchmarks.roofline import H200, Work, batched
from pyinvolution import ops
from pyinvolution.studies import timing
from pyinvolution.studies.compare_systems import Workload

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _settings_of_torch():
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, False


def test_layers_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"gmac_per_s": 50.0, "copy_gb_per_s": 10.0}
    case = same(32, 14, 7, 2)
    monkeypatch.setattr(cpu, "REDNET50", {"32@14 s2": case})
    monkeypatch.setattr(cpu, "limits", lambda threads: rates)
    monkeypatch.setattr(cpu, "interleaved", lambda functions, seconds, *rest: timing.interleaved(functions, 0.01))
    monkeypatch.setattr("sys.argv", ["cpu", "--only", "layers", "--threads", "1", "--output", str(tmp_path)])
    cpu.main()
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".csv", ".md", ".png"}
    data = json.loads(files[".json"].read_text())
    assert data["about"]["limits"] == {"1": rates}
    operators = {
        "fused": "span_involution2d",
        "whole layer": "whole layer",
        "fused backward": "span_involution2d backward",
    }
    assert [row["what"] for row in data["rows"]] == list(operators)
    for row in data["rows"]:
        work, seconds = Work.of(operators[row["what"]], case, "float32"), row["ms"] / 1e3
        assert row["fma_share"] == pytest.approx(work.fma / seconds / 50e9)
        assert row["copy_share"] == pytest.approx(work.bytes / seconds / 10e9)
        against = "oneDNN 3x3 backward" if "backward" in row["what"] else "oneDNN 3x3"
        assert row[f"{against}: low"] <= row[f"{against}: ratio"] <= row[f"{against}: high"]
    text = files[".md"].read_text()
    assert "| 32@14 s2 N=1 | 1 |" in text
    assert "ResNet-50 |" not in text, "a table without rows"


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides load the same images; the row has the images a second of the median."""
    for module in ("lightning", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.setattr(cpu, "limits", lambda threads: {})
    monkeypatch.setattr(cpu, "loader", lambda report: loader.loader(report, 4, 0.01))
    monkeypatch.setattr(cpu, "chart", lambda report, path: None)
    monkeypatch.setattr("sys.argv", ["cpu", "--only", "loader", "--threads", "1", "--output", str(tmp_path)])
    cpu.main()
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["images_per_s"] == pytest.approx(4 / (row["ms"] / 1e3))
    assert row["Pillow, float: images_per_s"] == pytest.approx(4 / (row["Pillow, float: ms"] / 1e3))
    assert "| data loading | images/s |" in path.with_suffix(".md").read_text()


def test_steps_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each RedNet for CIFAR-10 is measured against the ResNet of its size, in both precisions."""
    made: list[str] = []
    recipe_net = cpu.recipe_net
    monkeypatch.setattr(cpu, "recipe_net", lambda name: made.append(name) or recipe_net(name))
    monkeypatch.setattr(cpu, "interleaved", lambda steps, seconds: {n: [2.0 + (n == "ResNet")] * 2 for n in steps})
    monkeypatch.setattr(cpu, "limits", lambda threads: {})
    monkeypatch.setattr(cpu, "chart", lambda report, path: None)
    monkeypatch.setattr("sys.argv", ["cpu", "--only", "recipes", "--threads", "1", "--output", str(tmp_path)])
    cpu.main()
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    names = ["rednet_small", "rednet_small_mixed", "rednet_large", "rednet_large_mixed"]
    assert [row["name"] for row in rows] == [f"{name}, N=128" for name in names] * 2
    assert [("bfloat16" in row["what"], row["ResNet: ratio"]) for row in rows] == [(False, 1.5)] * 4 + [(True, 1.5)] * 4
    rivals = [name for name in made if name.startswith("resnet")]
    assert rivals == ["resnet_small"] * 4 + ["resnet_large"] * 4 + ["resnet_small"] * 4 + ["resnet_large"] * 4
    assert "| rednet_large_mixed, N=128, bfloat16 | 1 |" in path.with_suffix(".md").read_text()


def test_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    models = {
        "RedNet-50": partial(cpu.recipe_net, "rednet_small"),
        "ResNet-50": partial(cpu.recipe_net, "resnet_small"),
    }
    monkeypatch.setattr(engines, "MODELS", models)
    monkeypatch.setattr(engines, "SIZE", 48)
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package == "torchao" else package)
    parts = ["onnxruntime", "openvino", "eager", "int8-onnxruntime", "int8-pytorch"]
    sizes = ["--threads", "1", "--batches", "1", "2", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", ["engines", "--only", *parts, *sizes, "--output", str(tmp_path)])
    engines.main()
    (file,) = tmp_path.glob("*.json")
    data = json.loads(file.read_text())
    assert data["about"]["notes"] == {"openvino": "needs --openvino-extension", "int8-pytorch": "needs torchao"}
    kinds = ("ONNX Runtime, float32", "eager, float32", "int8, ONNX Runtime")
    assert [(row["what"], row["name"]) for row in data["rows"]] == [(k, f"N={n}") for k in kinds for n in (1, 2)]
    for row in data["rows"]:
        assert row["ResNet-50: low"] <= row["ResNet-50: ratio"] <= row["ResNet-50: high"]
        assert (f"{engines.STANDARD}: ratio" in row) == (row["what"] == kinds[0])
        assert ("RedNet-50: logit error" in row) == (row["what"] == kinds[2])
    text = file.with_suffix(".md").read_text()
    assert "| int8, ONNX Runtime | 2 | 1 |" in text
    assert "Not measured: openvino: needs --openvino-extension." in text


def test_systems_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "timm"):
        pytest.importorskip(module)
    small = [replace(system, size=size) for system, size in zip(systems.SYSTEMS, ((64, 96), (96, 128)), strict=True)]
    small[1] = replace(small[1], prepare=lambda size: Workload(size, proposals=4, masks=2))
    monkeypatch.setattr(systems, "SYSTEMS", small)
    monkeypatch.setattr(systems, "interleaved", lambda functions, *rest: timing.interleaved(functions, 0.0, 1))
    report = cpu.Report({})
    systems.systems(report, 1)
    assert [row["what"] for row in report.rows] == ["system: semantic FPN"] * 4 + ["system: Mask R-CNN"] * 4
    assert [row["name"] for row in report.rows[:4]] == [
        f"{name}, 64 x 96, {mode}"
        for mode in ("eager", "optimized")
        for name in ("RedNet-50", "RedNet-50, involution neck")
    ]
    for row in report.rows:
        assert row["ResNet-50: ratio"] == pytest.approx(row["ResNet-50: ms"] / row["ms"])


def test_the_family(tmp_path: Path) -> None:
    """In a process of its own, since it forks. Every call that is measured has a small one of its kind."""
    pytest.importorskip("torchvision")
    command = [sys.executable, "-m", "benchmarks.family", "--quick", "--threads", "1", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".csv", ".md", ".png"}
    rows = json.loads(files[".json"].read_text())["rows"]
    small, full = family.calls(quick=True), family.calls()
    assert [row["name"] for row in rows if "threads" in row] == [call.name for call in small]
    for row, call in zip(rows, small, strict=False):
        assert {*call.usual, *call.rulers} == set(family.contenders_of(row))
        assert {name: row[f"{name}: wanted"] for name in call.wanted} == call.wanted
    assert [(call.wanted, call.training, call.less_memory) for call in small] == [
        (call.wanted, call.training, call.less_memory) for call in full
    ]
    (memory,) = [row for row in rows if "mb" in row]
    assert memory["less"] == pytest.approx(memory["unfold + nearest: mb"] / max(memory["mb"], 1e-3))
    assert files[".md"].read_text().count("\n| ") == 1 + sum(len(family.contenders_of(row)) for row in rows) + 1


def test_a_wrong_result_of_the_family_stops_the_run() -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    for call in family.calls(quick=True):
        tensors = call.tensors()
        upstream = torch.randn_like(call.ours(*tensors)) if call.training else None
        family.check(call, tensors, upstream)

        def wrong(*tensors: torch.Tensor, call: family.Call = call) -> torch.Tensor:
            output = call.ours(*tensors).clone()
            output[(-1,) * output.dim()] += 1
            return output

        usual = {**call.usual, "another": wrong}
        for other in (replace(call, ours=wrong), replace(call, usual=usual)):
            with pytest.raises(AssertionError, match=re.escape(call.name)):
                family.check(other, tensors, upstream)


def test_a_training_step_lowers_the_loss() -> None:
    torch.manual_seed(0)
    for name in ("rednet_small", "resnet_small"):
        step = cpu.training_step(cpu.recipe_net(name), 8, 32, classes=10)
        first = step()
        assert min(step() for _ in range(8)) < first


def dry_run(folder: Path, *more: str) -> None:
    gpu.main(["--device", "cpu", "--quick", "--output", str(folder), *more])


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(tmp_path, "--only", "ops")
    files = {path.name.split("dry-run")[1]: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".csv", ".md", "-roofline.png", "-ratios.png"}
    assert all(path.stat().st_size > 10_000 for name, path in files.items() if name.endswith("png"))

    data = json.loads(files[".json"].read_text())
    about = data["about"]
    assert about["dry_run"] is True
    assert about["left_out"] == about["does_not_fit"] == []
    for key in ("date", "machine", "commit", "build", "command", "limits", "device", "versions"):
        assert about[key], key
    assert files[".md"].read_text().startswith("**A dry run")
    assert all(target["met"] is None for target in data["targets"]), "a dry run meets no target"

    rows = data["rows"]
    found = {(r["what"], r["shape"], r["dtype"], r["layout"]) for r in rows}
    assert len(found) == len(rows) == len(roofline.OPERATORS) * len(gpu.TINY) * 2 * 2
    for row in rows:
        assert 0 < row["ms: low"] <= row["ms"] <= row["ms: high"]
        assert row["floor_ms"] == max(row["floor_bytes_ms"], row["floor_fma_ms"])
        assert row["copy_share"] == pytest.approx(row["gb_per_s"] / about["limits"]["copy_gb_per_s"])
        others = {c.removesuffix(": ratio") for c in row if c.endswith(": ratio")}
        assert not [c for c in row if c.endswith(": note")], row
        expected = {"3x3 convolution"} if "forward +" not in row["what"] else {targets.LIBRARY}
        if row["what"].startswith("involution2d"):
            expected |= {"unfold", "depthwise 7x7", "variant scalar"}
        assert expected <= others
    assert any("unfold, compiled: ratio" in r for r in rows)
    with files[".csv"].open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["ms"]) for r in table] == [r["ms"] for r in rows]
    assert "unfold" in capsys.readouterr().out


def test_models_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(gpu, "PEERS", ("RedNet-26", "ResNet-50"))
    dry_run(tmp_path, "--only", "models")
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    by = {(r["what"], r["mode"], r["model"]): r for r in rows}
    for key in (("inference", "eager"), ("inference", "torch.compile"), ("training step", "eager")):
        row = by[(*key, "RedNet-26")]
        assert row["ResNet-50: ratio"] > 0
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    assert "needs a GPU" in by["inference", "CUDA graph", "RedNet-26"]["model: note"]


@pytest.mark.parametrize(
    "operator", ["involution2d", "involution2d_backward", "span_involution2d", "span_involution2d_backward"]
)
def test_a_wrong_result_stops_the_run(operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, operator)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        last = result if isinstance(result, torch.Tensor) else result[-1]
        last[(-1,) * last.dim()] += 1
        return result

    monkeypatch.setattr(ops, operator, wrong)
    with pytest.raises(AssertionError, match=r"output|gradient|grad_"):
        dry_run(tmp_path, "--only", "ops")
    assert not list(tmp_path.iterdir())


def test_an_image_of_a_large_batch_is_checked() -> None:
    case = batched(REDNET50["512@7"], 20)
    assert harness.sampled_images(case) == [0, 3, 5, 8, 11, 14, 16, 19]
    assert harness.sampled_images(batched(case, 3)) == [0, 1, 2]


def test_floor_by_hand() -> None:
    """64 channels in 4 groups, 56 x 56, K = 7, a batch of 256, bfloat16."""
    case = batched(REDNET50["64@56"], 256)
    pixels = 256 * 56 * 56
    x, w, r, s = 64 * pixels, 4 * 49 * pixels, 16 * pixels, 196 * 16 + 196
    assert Work.of("involution2d", case, "bfloat16") == Work(2 * (2 * x + w), 64 * 49 * pixels)
    assert Work.of("involution2d backward", case, "float32") == Work(4 * (3 * x + 2 * w), 2 * 64 * 49 * pixels)
    fused = Work.of("span_involution2d", case, "bfloat16")
    assert fused == Work(2 * (2 * x + r + s), (64 * 49 + 196 * 16) * pixels)
    # 520 MB at 4.3 TB/s, and 5.03 billion multiply-adds at 33.5 thousand billion a second.
    assert H200.floor(Work.of("involution2d", case, "bfloat16"), "bfloat16").ms == pytest.approx(0.12098, rel=1e-4)
    assert H200.floor(fused, "bfloat16").bytes_ms == pytest.approx(0.05377, rel=1e-3)
    assert H200.floor(fused, "float32").fma_ms == pytest.approx(0.15030, rel=1e-3)
    assert "not measured" in roofline.floors_table(H200, "bfloat16")


GPU = predict.GPUS["h200"]


def test_a_predicted_time_is_its_longest_resource() -> None:
    """132 multiprocessors at 1.755 GHz: 231.66 clocks in a nanosecond, four instructions in each."""
    count = counts.Count(instructions=4e9, wavefronts=5e8, tensor_flop=788e6, scratch_bytes=4.3e6)
    time = predict.kernel_time(GPU, count, 8.6e6)
    assert time.dram == pytest.approx(3.0)
    assert time.issue == pytest.approx(1e9 / 231_660 / predict.REACHED)
    assert time.shared == pytest.approx(time.issue / 2)
    assert time.tensor == pytest.approx(1.0)
    assert (time.us, time.bound) == (time.issue, "issue")


def test_counts_are_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "strategy": "fused", "kernel": "forward", "dtype": "bfloat16", "layout": "nhwc", "shape": "64@56", "batch": 256,
        "blocks": 10, "instructions": {"all": 7, "mma": 3},
        "traffic": {"shared read wavefronts": 2, "shared copy wavefronts": 4, "shared read bytes": 99},
    }  # fmt: skip
    sums = row | {"kernel": "sum_partials", "blocks": 2, "traffic": {"global read bytes": 6}}
    monkeypatch.setattr(counts, "table", lambda: {"rows": [row, sums]})
    assert counts.counts_of("fused", ("forward",), "64@56", 512) == counts.Count(140, 120, 60 * 4096)
    both = counts.counts_of("fused", ("forward", "sum_partials"), "64@56", 256)
    assert both == counts.Count(84, 60, 36 * 4096, 24)
    assert counts.counts_of("mma", ("forward",), "64@56", 256) is None


@pytest.mark.parametrize(("name", "parameters", "gmac"), [("ResNet-50", 25.56, 4.09), ("RedNet-50", 15.54, 2.61)])
def test_every_layer_is_counted(name: str, parameters: float, gmac: float) -> None:
    """Against the published counts of both, in millions and billions; norms are counted apart."""
    pytest.importorskip("torchvision")
    found = predict.network(name, 2)
    assert sum(op.parameters for op in found) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert sum(op.multiply_adds for op in found) / 2e9 == pytest.approx(gmac, rel=0.02)
    assert sum(op.added for op in found) == 16
    assert sum(op.case is not None for op in found) == (17 if name == "RedNet-50" else 0)


def test_predictions_of_networks() -> None:
    """Less work never takes longer, and a measured GPU gives the rates."""
    pytest.importorskip("torchvision")
    for mode in predict.MODES:
        times = {layer: predict.network_us(GPU, "RedNet-50", mode, 256, layer) for layer in predict.LAYERS}
        bare = [times[n] for n in (predict.COMPOSED, predict.COUNTED, predict.OPERATOR, predict.LAYER, predict.FREE)]
        assert bare == sorted(bare, reverse=True)
        assert predict.network_us(GPU, "ResNet-50", mode) > times[predict.FREE]
    assert predict.Gpu.of(roofline.Limits("cpu", "", 10.0, {})) is None
    twice = predict.Gpu.of(replace(H200, copy_gb_per_s=8600.0, issue_gfma=2 * 132 * 128 * 1.755))
    assert twice is not None
    case = batched(REDNET50["128@28"], 256)
    once, other = (predict.forward_ways(gpu, "128@28", case.input[0])[0].kernels["involution"] for gpu in (GPU, twice))
    assert other.dram == pytest.approx(once.dram / 2)
    assert other.issue == pytest.approx(once.issue / 2)


def test_what_the_library_fuses_is_predicted_to_be_faster() -> None:
    """`fused` refuses a shape whose convolution and involution should take less time on an H200. The fused gradients
    may take a fifth longer than the composed ones, whose W and gradient of W need memory; what `fused_slower` in
    cuda/fused/variant.cu leaves to these, they should compute faster."""
    fused = 0
    for shape, case in REDNET50.items():
        for ways, allowed in ((predict.forward_ways, 1.0), (predict.backward_ways, 1.2)):
            by = {way.name: way.us for way in ways(GPU, shape)}
            if "fused" not in by:
                continue
            if ways is predict.backward_ways and case.input[1] // 4 >= 64 and case.stride == (2, 2):
                assert by["composed"] < by["fused"], (shape, by)
                continue
            fused += 1
            assert by["fused"] <= allowed * by["composed"], (shape, ways.__name__, by)
    for images, faster in ((128, "fused"), (64, "composed")):
        by = {way.name: way.us for way in predict.backward_ways(GPU, "256@14", images)}
        assert min(by, key=by.__getitem__) == faster, (images, by)
    assert fused >= 8


def test_a_measurement_is_compared_with_its_prediction() -> None:
    setting = operators.Setting("64@56", batched(REDNET50["64@56"], 256), "bfloat16", "channels_last", "cuda")
    times = {name: predict.predicted_ms(name, setting, GPU) for name in ("involution2d", "span_involution2d")}
    assert all(value is not None and 0.05 < value < 1.0 for value in times.values())
    for other in (
        replace(setting, dtype="float32"),
        replace(setting, layout="NCHW"),
        replace(setting, shape="256@50x84"),
    ):
        assert predict.predicted_ms("span_involution2d", other, GPU) is None
    row = {"what": "involution2d", "shape": "64@56", "batch": 256, "ms": 0.3, "predicted_ms": 0.15}
    assert "| involution2d | 64@56 | 256 | 300 | 150 | 2.00 |" in predict.comparison([row, {"what": "no prediction"}])
    assert predict.comparison([{"what": "no prediction"}]) == ""


def test_the_page_has_the_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks.gpu --predict` prints what benchmarks/README.md shows."""
    pytest.importorskip("torchvision")
    gpu.main(["--predict"])
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "benchmarks" / "README.md").read_text()
    gpu.main(["--predict", "a100"])
    assert "A100" in capsys.readouterr().out


def measured_rows(share: float, ratio: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shape in targets.K7:
        for dtype in roofline.WIDTH:
            row = {"shape": shape, "batch": 256, "dtype": dtype, "layout": "channels_last", "copy_share": share}
            rows += [{"what": what, **row} for what in ("involution2d", "involution2d backward")]
        row = {"shape": shape, "batch": 256, "dtype": "bfloat16", "layout": "channels_last", "ms": 1.0, "floor_ms": 0.9}
        variant = "composed" if shape == "512@7" else "fused"
        rows.append({"what": "span_involution2d", **row, "variant": variant, f"{targets.LIBRARY}: ratio": ratio})
    for model, mb in (("RedNet-50", 90.0), ("ResNet-50", 100.0)):
        row = {"what": "training step", "model": model, "batch": 128, "mode": "eager", "peak_mb": mb}
        rows.append({**row, "ResNet-50: ratio": 1.1} if model == "RedNet-50" else row)
    return rows


def test_targets_are_judged_by_the_worst_row() -> None:
    def verdicts(share: float, ratio: float, drop: int = 0) -> dict[str, targets.Verdict]:
        return {v.target.split(" (")[0]: v for v in targets.evaluate(measured_rows(share, ratio)[drop:], H200)}

    forward = "unfused forward, channels_last, N=256, share of the copy bandwidth"
    library = "fused forward, bfloat16, against library span + unfused"
    good = verdicts(0.81, 1.8)
    assert good[forward].met is True
    assert good[library].met is True
    assert good["training memory of RedNet-50 over ResNet-50's, eager"].value == pytest.approx(0.9)
    assert good["RedNet-50 against ResNet-50, training step, N=128, eager"].met is True
    assert good["RedNet-50 against ResNet-50, inference, N=256, eager"].met is None
    assert good["unfused forward, NCHW, N=256, share of the copy bandwidth"].met is None
    assert verdicts(0.79, 1.6)[forward].met is False
    assert verdicts(0.79, 1.6)[library].met is False
    incomplete = verdicts(0.81, 1.8, drop=3)[forward]
    assert incomplete.met is None
    assert "not everything measured" in incomplete.cells()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    output = capsys.readouterr().out
    assert "There is no GPU here" in output
    assert "computed, not measured" in output


@pytest.mark.parametrize(
    "arguments", [["--device", "cpu"], ["--official", "nowhere"], ["--minutes", "0"], ["--only", "everything"]]
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err
