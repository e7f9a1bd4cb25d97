"""The architecture search on a tiny space: codes, shared weights, costs, resumption, and a whole search."""

import json
import math
import random
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_support import assert_same_state, one_thread, write_images  # noqa: F401
from scipy.stats import spearmanr
from torch import nn

pytest.importorskip("optuna")
import yaml

from pyinvolution import Involution2d, cli
from pyinvolution.models import SearchableNet, create_model
from pyinvolution.models.loading import load_backbone
from pyinvolution.recipes import cli as recipe_cli
from pyinvolution.recipes import configs
from pyinvolution.studies.search import OPERATORS, HeldOut, SearchSpace, StageChoice, Supernet, config, pipeline
from pyinvolution.studies.search.costs import CostTable, Timing, multiply_adds
from pyinvolution.studies.search.evaluation import Evaluator
from pyinvolution.studies.search.study import Candidate, Study, front

SPACE = {
    "stem": "small",
    "stem_channels": 8,
    "stages": [
        {"channels": 16, "widths": [8, 16], "depths": [1, 2]},
        {"channels": 24, "widths": [16, 32], "depths": [1, 3], "stride": 2},
    ],
}
space = SearchSpace.from_dict(SPACE)
codes = st.tuples(*(st.integers(0, count - 1) for count in space.genes.values()))
architectures = codes.map(space.decode)


def test_operators_are_those_whose_groups_divide_every_width():
    assert len(OPERATORS) == 13
    assert space.stage_operators[0] == ("conv3", "inv3x8", "inv5x8", "inv7x8", "inv9x8")
    assert space.stage_operators[1] == tuple(name for name in OPERATORS if not name.endswith("x32"))
    assert len(space) == 2 * (5 + 5**2) * 2 * (9 + 9**3)


@given(codes)
def test_code_round_trip(code):
    architecture = space.decode(code)
    canonical = space.encode(architecture)
    assert space.decode(canonical) == architecture
    assert space.encode(space.decode(canonical)) == canonical
    assert all(mine == given for mine, given in zip(canonical, code, strict=True) if mine), "only unused entries change"


def test_wrong_codes_are_refused():
    code = space.encode(space.sample(random.Random(0)))
    for wrong, error, message in (
        (code[1:], ValueError, f"the code has {len(code) - 1} entries, expected {len(code)}"),
        ((2, *code[1:]), ValueError, "depth1 of the code is 2, expected 0 to 1"),
        ((-1, *code[1:]), ValueError, "depth1 of the code is -1, expected 0 to 1"),
        ((0.5, *code[1:]), TypeError, "depth1 of the code is 0.5, expected an int"),
    ):
        with pytest.raises(error, match=message):
            space.decode(wrong)


@given(st.integers(0, 2**32))
def test_samples_are_of_the_space(seed):
    architecture = space.sample(random.Random(seed))
    assert space.decode(space.encode(architecture)) == architecture
    assert architecture == space.sample(random.Random(seed))


def test_samples_are_uniform():
    generator = random.Random(0)
    drawn = [space.sample(generator, by_kind=True)[0].operators[0] for _ in range(3000)]
    assert abs(drawn.count("conv3") - 1500) < 5 * 1500**0.5
    assert {*drawn} == {*space.stage_operators[0]}
    drawn = [space.sample(generator) for _ in range(3000)]
    for choices in (
        [len(architecture[1].operators) for architecture in drawn],
        [architecture[0].width for architecture in drawn],
        [architecture[0].operators[0] for architecture in drawn],
    ):
        counts = [choices.count(value) for value in {*choices}]
        expected = len(drawn) / len(counts)
        assert max(abs(count - expected) for count in counts) < 5 * expected**0.5


@settings(max_examples=20)
@given(architectures)
def test_neighbours_differ_in_one_choice(architecture):
    neighbours = [*space.neighbours(architecture)]
    assert len({*neighbours}) == len(neighbours)
    assert architecture not in neighbours
    expected = 0
    for stage, choices, operators in zip(architecture, space.stages, space.stage_operators, strict=True):
        deeper = len(stage.operators) == choices.depths[0]
        expected += 1 + len(stage.operators) * (len(operators) - 1) + (len(operators) if deeper else 1)
    assert len(neighbours) == expected
    for other in neighbours:
        assert space.decode(space.encode(other)) == other
        ((mine, theirs),) = ((a, b) for a, b in zip(architecture, other, strict=True) if a != b)
        shared = min(len(mine.operators), len(theirs.operators))
        differences = [a != b for a, b in zip(mine.operators, theirs.operators, strict=False)]
        longer = max(mine.operators, theirs.operators, key=len)
        assert (mine.width != theirs.width) + sum(differences) + (len(mine.operators) != len(theirs.operators)) == 1
        assert len({*theirs.operators[shared:]}) <= 1 or longer == mine.operators


def test_model_is_as_described():
    architecture = (StageChoice(16, ("conv3", "inv9x8")), StageChoice(32, ("inv5x16",)))
    model = space.to_model(architecture, 5)
    assert model(torch.randn(2, 3, 17, 20)).shape == (2, 5)
    conv, large, small = (block.involution for stage in (model.layer1, model.layer2) for block in stage)
    assert isinstance(conv, nn.Conv2d)
    assert conv.kernel_size == (3, 3)
    assert isinstance(large, Involution2d)
    assert (large.kernel_size, large.groups, large.stride) == ((9, 9), 2, (1, 1))
    assert (small.kernel_size, small.groups, small.stride) == ((5, 5), 2, (2, 2))
    assert model.num_features == 24


@pytest.mark.parametrize(("stem", "strides"), [("imagenet", [2, 4, 4, 8]), ("small", [2, 2, 2, 4])])
def test_features_of_a_found_network(stem, strides):
    stages = [
        {"width": 16, "channels": 24, "operators": ["conv3", "inv5x8"]},
        {"width": 16, "channels": 40, "operators": ["inv3x16"], "stride": 1},
        {"width": 32, "channels": 48, "operators": ["inv5x16"]},
    ]
    model = create_model("searchable", num_classes=3, stages=stages, stem=stem, stem_channels=32).eval()
    image = torch.randn(2, 3, 48, 64)
    with torch.inference_mode():
        maps = [model.stem(image), *model.features(image)]
        assert torch.equal(model.head(maps[-1].mean((2, 3))), model(image))
    assert [info["module"] for info in model.feature_info] == ["stem", "layer1", "layer2", "layer3"]
    assert [info["reduction"] for info in model.feature_info] == strides
    for info, level in zip(model.feature_info, maps, strict=True):
        assert level.shape == (2, info["num_chs"], 48 // info["reduction"], 64 // info["reduction"])


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet", "faster_rcnn", "retinanet"])
def test_found_network_is_a_backbone(name):
    stages = [{"width": 16, "channels": 24 + 8 * i, "operators": ["conv3" if i == 0 else "inv5x8"]} for i in range(4)]
    small = {"channels": 16} if name in ("faster_rcnn", "retinanet") else {"head_channels": 16}
    detector = "channels" in small
    prefix = "backbone.body." if detector else "backbone."
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, backbone="searchable", backbone_options={"stages": stages}, **small)
    body = model.backbone.body if detector else model.backbone
    trained = create_model("searchable", num_classes=5, stages=stages)
    load_backbone(body, {"state_dict": {f"net.{key}": value for key, value in trained.state_dict().items()}})
    own = create_model("searchable", num_classes=0, stages=stages)
    own.load_state_dict({key: value for key, value in trained.state_dict().items() if not key.startswith("head.")})
    same = create_model(name, num_classes=3, backbone=own, **small)
    assert isinstance(same.backbone.body if detector else same.backbone, SearchableNet)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith(prefix)}
    same.load_state_dict(rest, strict=False)
    model.eval()
    same.eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        ours, others = ([*net.backbone(images).values()] if detector else [net(images)] for net in (model, same))
    assert ours[0].shape[2:] == {"faster_rcnn": (16, 24), "retinanet": (8, 12)}.get(name, (64, 96))
    assert all(torch.equal(*pair) for pair in zip(ours, others, strict=True)), "the trained backbone"
    model.train()
    if detector:
        target = {"boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": torch.tensor([1])}
        sum(model([*images], [target]).values()).backward()
    else:
        model(images.expand(2, -1, -1, -1)).sum().backward()
    assert body.stem.conv.weight.grad.abs().sum() > 0, "all of the backbone is trained"


def test_kernel_norm_is_that_of_every_involution():
    stages = [{"width": 16, "channels": 32, "operators": ["inv7x16", "conv3"]}] * 2
    model = create_model("searchable", num_classes=3, stages=stages, stem="small", kernel_norm="l2")
    involutions = [module for module in model.modules() if isinstance(module, Involution2d)]
    assert [layer.kernel_norm for layer in involutions] == ["l2", "l2"]
    with pytest.raises(ValueError, match="kernel_norm is 'l1'"):
        create_model("searchable", num_classes=3, stages=stages, kernel_norm="l1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "at least one stage"),
        (
            {"stages": [{"channels": 8, "widths": [16], "depths": [2, 1]}]},
            r"depths of a stage is \[2, 1\], expected positive numbers in ascending",
        ),
        (
            {"stages": [{"channels": 8, "widths": [12], "depths": [1]}], "operators": ["inv3x8"]},
            r"widths of stages\[0\] are \[12\], expected multiples",
        ),
        ({"operators": ["inv7"]}, "operator is 'inv7', expected"),
        ({"operators": ["conv3", "conv3"]}, "operators are conv3, conv3, expected each only once"),
        ({"stem": "big"}, "stem is 'big', expected"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_space_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SearchSpace.from_dict(SPACE | change)


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        (
            {"width": 12, "channels": 8, "operators": ["inv3x8"]},
            ValueError,
            "width of a stage is 12, expected a multiple of the 8",
        ),
        ({"width": 16, "channels": 8, "operators": "conv3"}, ValueError, "a list with an operator for each block"),
        ({"width": 16, "operators": ["conv3"]}, ValueError, r"stages\[0\] has the keys .*, expected channels"),
        (
            {"width": "16", "channels": 8, "operators": ["conv3"]},
            TypeError,
            r"stages\[0\].width is '16', expected an int",
        ),
    ],
)
def test_wrong_stage_is_refused(stage, error, message):
    with pytest.raises(error, match=message):
        create_model("searchable", stages=[stage])


@pytest.fixture(scope="module")
def supernet():
    torch.manual_seed(0)
    net = Supernet(space, num_classes=4)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def without_statistics(architecture):
    return space.to_model(architecture, 4, norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=0.0))


@settings(max_examples=10, deadline=None)
@given(architectures)
def test_network_with_shared_weights_gives_the_logits_of_its_path(supernet, architecture):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = without_statistics(architecture)
    missing, unexpected = network.load_state_dict(supernet.state_dict_of(architecture), strict=False)
    assert not unexpected
    assert all("running" in name or "num_batches" in name for name in missing)
    logits = network.train()(images)
    path = supernet(images, architecture)
    assert torch.equal(logits, path)

    supernet.zero_grad()
    logits.square().sum().backward()
    path.square().sum().backward()
    for part in ("stem.conv.weight", "head.weight", "layer1.0.conv3.weight"):
        ours, theirs = network.get_parameter(part).grad, supernet.net.get_parameter(part).grad
        torch.testing.assert_close(theirs[tuple(slice(size) for size in ours.shape)], ours)


def test_what_networks_share(supernet):
    """The first channels and groups, the central taps, and nothing between convolution and involution."""
    small = supernet.state_dict_of((StageChoice(8, ("inv3x8",)), StageChoice(16, ("inv5x16",))))
    large = supernet.state_dict_of((StageChoice(16, ("inv9x8",)), StageChoice(32, ("inv9x8",))))
    assert torch.equal(small["layer1.0.conv1.weight"], large["layer1.0.conv1.weight"][:8])
    assert torch.equal(small["layer1.0.conv3.weight"], large["layer1.0.conv3.weight"][:, :8])
    for stage, groups, kernel, reduced in ((1, 1, 3, 2), (2, 1, 5, 4)):
        name = f"layer{stage}.0.involution.span"
        for kind in ("weight", "bias"):
            taps = large[f"{name}.{kind}"].unflatten(0, (-1, 9, 9))
            margin = (9 - kernel) // 2
            taps = taps[:groups, margin : 9 - margin, margin : 9 - margin].flatten(0, 2)
            expected = taps[:, :reduced] if kind == "weight" else taps
            assert torch.equal(small[f"{name}.{kind}"], expected)

    architecture = (StageChoice(8, ("conv3",)), StageChoice(16, ("inv3x8",)))
    supernet.zero_grad()
    supernet(torch.randn(2, 3, 16, 16), architecture).square().sum().backward()
    block = supernet.net.layer1[0]
    conv = block.involution["conv"].weight.grad
    assert conv[:8, :8].abs().max() > 0
    assert conv[8:].abs().max() == conv[:, 8:].abs().max() == 0
    assert block.involution["involution"].span.weight.grad is None
    assert all(parameter.grad is None for parameter in supernet.net.layer1[1].parameters()), "deeper than the path"


def test_paths_are_drawn_uniformly_or_by_kind(monkeypatch):
    """The default is uniform over the operators."""
    images = torch.randn(2, 3, 4, 4)
    for options, expected in (({}, 1 / 5), ({"sampling": "operators"}, 1 / 5), ({"sampling": "kinds"}, 1 / 2)):
        net, drawn = Supernet(space, num_classes=4, **options), []
        monkeypatch.setattr(net, "_skeleton", lambda architecture, drawn=drawn: drawn.append(architecture) or nn.ReLU())
        torch.manual_seed(0)
        for _ in range(1000):
            net(images)
        share = sum(architecture[0].operators[0] == "conv3" for architecture in drawn) / 1000
        assert abs(share - expected) < 0.07
    with pytest.raises(ValueError, match="sampling is 'paths', expected 'operators' or 'kinds'"):
        Supernet(space, num_classes=4, sampling="paths")


def test_paths_are_drawn_from_torchs_generator(supernet):
    images = torch.randn(2, 3, 16, 16)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(supernet(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_recalibration_computes_the_statistics_of_the_training_images(supernet):
    generator = torch.Generator().manual_seed(2)
    training = [(3 + 2 * torch.randn(8, 3, 16, 16, generator=generator), torch.zeros(8, dtype=int)) for _ in range(3)]
    evaluate = Evaluator(supernet, training, training)
    architecture = space.sample(random.Random(0))
    network = evaluate.network(architecture)
    assert not network.training
    features = torch.cat([network.stem.conv(images) for images, _ in training])
    torch.testing.assert_close(network.stem.norm.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    means = torch.stack([network.stem.conv(images).var((0, 2, 3)) for images, _ in training]).mean(0)
    torch.testing.assert_close(network.stem.norm.running_var, means, rtol=1e-4, atol=1e-4)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.running_var != 1).any() for norm in norms)
    right = sum((network(images).argmax(1) == targets).sum().item() for images, targets in training)
    assert evaluate(architecture) == right / 24


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return CostTable(space, 4, (3, 16, 16), Timing(batch=2, seconds=0), tmp_path_factory.mktemp("costs") / "costs.json")


@settings(max_examples=8, deadline=None)
@given(architectures)
def test_multiply_adds_are_the_sum_of_the_table(table, architecture):
    assert table.cost(architecture, "macs") == multiply_adds(space.to_model(architecture, 4), (3, 16, 16))


def test_latency_is_the_sum_of_measured_layers(table):
    architecture = (StageChoice(8, ("conv3", "inv3x8")), StageChoice(16, ("inv5x16",)))
    total = table.cost(architecture, "latency")
    names = [name for name, _ in table._split(architecture)]
    assert [name.split()[0] for name in names] == ["stem", "conv3", "inv3x8", "inv5x16", "head"]
    assert total == sum(table.layers[name]["latency"] for name in names) > 0
    again = CostTable(space, 4, (3, 16, 16), table.timing, table.path)
    assert again.layers == table.layers, "measured once"
    assert not CostTable(space, 4, (3, 16, 16), Timing(batch=3), table.path).layers, "of another batch"
    assert table.measured(architecture) == table.measured(architecture) > 0


def points(count):
    """Stand-ins for accuracy and cost that need no network."""
    return Candidate((), *count)


def test_front_holds_what_nothing_within_the_budget_beats():
    candidates = [points(values) for values in ((0.5, 1, True), (0.4, 2, True), (0.7, 3, True), (0.9, 9, False))]
    assert front([*candidates, points((0.5, 1.5, True))]) == [candidates[0], candidates[2]]


def accuracy(architecture):
    return sum(choice.width * len(choice.operators) for choice in architecture) / 200


def cost(architecture):
    return float(sum(choice.width * (1 + choice.operators.count("conv3")) for choice in architecture))


def test_an_interrupted_study_ends_like_another(tmp_path):
    def study(name):
        return Study(space, accuracy, cost, 60, tmp_path / name, population=4, seed=1)

    whole = study("whole.db")
    whole.run(14)

    calls = []

    def killed(architecture):
        calls.append(architecture)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return accuracy(architecture)

    with pytest.raises(KeyboardInterrupt):
        Study(space, killed, cost, 60, tmp_path / "parts.db", population=4, seed=1).run(14)
    resumed = study("parts.db")
    assert 0 < len(resumed.candidates) <= 6
    resumed.run(14)
    assert resumed.candidates == whole.candidates
    assert {candidate.feasible for candidate in whole.candidates} == {True, False}
    assert all(candidate.feasible == (candidate.cost <= 60) for candidate in whole.candidates)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=24, val=10)


def test_held_out_images_are_of_the_training_set(data):
    def split(seed):
        held = HeldOut(root=str(data), held_out=0.25, num_workers=0, seed=seed)
        held.setup("fit")
        return [sorted(samples.files) for samples in (held.train_samples, held.val_samples)]

    train, val = split(0)
    assert (len(train), len(val)) == (18, 6)
    assert [target for _, target in val] == [0] * 3 + [1] * 3
    assert all("/train/" in path for path, _ in train + val)
    assert not {*train} & {*val}
    assert split(5) == [train, val], "the same for every seed"


@pytest.fixture(scope="module")
def search_config(data, tmp_path_factory):
    """A file with a search of seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    values = {
        "space": SPACE | {"operators": ["conv3", "inv3x8", "inv7x8"]},
        "budget": 0.6,
        "trials": 6,
        "population": 4,
        "networks": 3,
        "opponents": 1,
        "seeds": 2,
        "recalibration_images": 8,
        "timing": {"batch": 2, "seconds": 0},
        "recipe": {
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
            "model": {"num_classes": 2, "lr": 0.05, "reference_batch": None, "warmup_steps": 0},
            "data": {"root": str(data), "batch_size": 6, "num_workers": 0, "size": 16, "resize": 16},
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


def search(capsys, *arguments):
    """Exit status and stderr of `pyinvolution search`."""
    status = 0
    try:
        cli.main(["search", *map(str, arguments)])
    except SystemExit as exit:
        status = exit.code or 0
    return status, capsys.readouterr().err


@pytest.fixture(scope="module")
def searched(search_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "run"
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result = pipeline.run(config.read(str(search_config), {"output": str(folder)}))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "also between trainings"
    finally:
        signal.signal(signal.SIGTERM, handler)
    return folder, result


def test_search_reports_everything(searched):
    folder, result = searched
    assert json.loads((folder / "report.json").read_text()) == result
    assert all((folder / name).stat().st_size for name in ("search.png", "report.md", "found.yaml", "study.db"))
    found, limit = result["found"], result["objective"]["limit"]
    assert limit == 0.6 * result["objective"]["all_conv"]
    assert all(entry["feasible"] == (entry["macs"] <= limit) for entry in result["candidates"])
    assert found["accuracy"] == max(entry["accuracy"] for entry in result["candidates"] if entry["feasible"])
    correlation = result["rank_correlation"]
    ranks = [[entry[name] for entry in correlation["networks"]] for name in ("supernet", "alone")]
    assert len(ranks[0]) == 3
    costs = [entry["cost"] for entry in correlation["networks"]]
    assert costs == sorted({*costs}), "spread over the costs"
    for name, other in (("spearman", ranks[0]), ("of_cost", costs)):
        value = math.nan if correlation[name] is None else correlation[name]
        assert value == pytest.approx(spearmanr(other, ranks[1]).statistic, nan_ok=True)
    assert all(entry["alone"] == pytest.approx(sum(entry["accuracies"]) / 2) for entry in correlation["networks"])
    errors = [abs(e["table"] / e["measured"] - 1) for e in result["latency"]["networks"]]
    assert result["latency"]["largest_error"] == pytest.approx(max(errors))
    ours, rival = result["comparison"]["networks"]
    assert ours["network"] == found["network"] != rival["network"]
    assert abs(rival["cost"] / ours["cost"] - 1) <= 0.05
    assert len(ours["accuracies"]) == len(rival["accuracies"]) == 2
    assert result["comparison"]["difference"] == pytest.approx(ours["mean"] - rival["mean"])
    assert found["network"] in (folder / "report.md").read_text().replace(" / ", " | ")


def test_search_goes_on_from_what_is_there(searched, search_config, tmp_path, monkeypatch):
    """More trials, and nothing trained that was."""
    before, result = searched
    folder = shutil.copytree(before, tmp_path / "copy")
    trained = []
    fit = recipe_cli.fit
    monkeypatch.setattr(recipe_cli, "fit", lambda *arguments: trained.append(arguments) or fit(*arguments))
    overrides = {"output": str(folder)}
    again = pipeline.run(config.read(str(search_config), overrides))
    assert not trained
    parts = ("candidates", "found", "rank_correlation", "latency", "comparison")
    assert all(again[part] == result[part] for part in parts)
    shutil.rmtree(folder / "compared")
    once_more = pipeline.run(config.read(str(search_config), overrides))
    assert len(trained) == 4
    assert once_more["comparison"] == result["comparison"], "the same by seed"


def test_interrupted_supernet_ends_like_another(searched, search_config, tmp_path):
    folder, _ = searched
    training = config.read(str(search_config), {}).supernet_training()
    stop = {"class_path": "recipe_support.Interrupt", "init_args": {"signum": int(signal.SIGTERM), "step": 0}}
    with pytest.raises(SystemExit):
        pipeline.fit(configs.merge(training, {"trainer": {"callbacks": [stop]}}), tmp_path)
    paths = [tmp_path / "last.ckpt", folder / "supernet" / "last.ckpt"]
    parts, whole = (torch.load(path, weights_only=True) for path in paths)
    assert parts["global_step"] == 1 < whole["global_step"]
    pipeline.fit(training, tmp_path)
    assert_same_state(torch.load(paths[0], weights_only=True)["state_dict"], whole["state_dict"])


def test_exported_network_trains_by_the_ordinary_recipe(searched, tmp_path):
    folder, result = searched
    run = recipe_cli.run(
        [
            "fit",
            "--config",
            str(folder / "found.yaml"),
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert [*run.model.net.state_dict()] == [
        *SearchSpace.from_dict(SPACE | {"operators": ["conv3", "inv3x8", "inv7x8"]})
        .to_model(space_of_found(result).decode(tuple(result["found"]["code"])), 2)
        .state_dict()
    ]
    assert type(run.datamodule).__name__ == "ImageFolderData"
    assert len(run.datamodule.train_samples) == 24
    assert (tmp_path / "best.ckpt").is_file()


def space_of_found(result):
    return SearchSpace.from_dict(SPACE | {"operators": result["space"]["operators"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trails: 3", "Option 'trails' is not accepted"),
        ("trials: 0", "trials is 0, expected at least 1"),
        ("cost: watts", 'key "cost"'),
        ("timing: {batch: 0}", "expected batch and threads of at least 1"),
        ("budget: 0.001", "budget=0.001 is out of reach: the cheapest of 1000 random networks costs 0."),
        ("held_out: 1.5", r"held_out is 1.5, expected a value in (0, 1)"),
        ("space: {stages: 3}", "stages is 3, expected a list of mappings"),
        ("recipe: {model: {class_path: Other}}", "trains image classification"),
        ("data_root: /nowhere", "data.root=/nowhere has no folder"),
        ("[", "is not YAML"),
    ],
)
def test_wrong_configuration_is_one_line(capsys, search_config, tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    values = yaml.safe_load(search_config.read_text())
    path.write_text(change if change == "[" else yaml.safe_dump(configs.merge(values, yaml.safe_load(change))))
    status, error = search(capsys, "--config", path, "--output", tmp_path / "run")
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_another_search_does_not_mix_with_one_that_is_there(capsys, searched, search_config):
    folder, _ = searched
    status, error = search(capsys, "--config", search_config, "--output", folder, "--seed", 5)
    assert status == 2
    assert f"{folder} holds a search with another seed" in error
    status, error = search(capsys, "--config", "nothing.yaml")
    assert (status, "expected a file or one of digits.yaml" in error) == (2, True)


def test_search_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("pyinvolution.commands.search.find_spec", lambda name: None)
    status, error = search(capsys, "--config", "digits.yaml")
    assert status == 2
    assert 'pip install "pyinvolution[search]"' in error


def test_packaged_search_is_a_search():
    digits = config.read("digits.yaml", {})
    assert digits.make_data == "digits"
    assert digits.networks >= 8
    assert (digits.seeds, digits.opponents) >= (3, 3)
    assert {*digits.search_space.operators} == {*OPERATORS}
