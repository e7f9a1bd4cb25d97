"""Every block of code in the documentation runs (C++ in test_consumer.py), what it names exists, the site builds."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from documents import BLOCKS, PAGES, ROOT, Block, spans

from pyinvolution import cli, commands

COMMANDS = list(dict.fromkeys(line for b in BLOCKS if b.language == "bash" and not b.reason for line in b.commands()))


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Block) else None


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not block.reason]


def test_every_block_is_executed_or_says_why_not() -> None:
    assert of("python")
    assert COMMANDS
    for block in BLOCKS:
        # test_consumer.py builds those of the C++ guide.
        known = ("python", "bash", "cpp", "cmake") if block.name.startswith("docs/cpp.md") else ("python", "bash")
        assert block.reason or block.language in known, f"{block.name}: nothing executes a block in {block.language}"


@pytest.mark.parametrize("block", of("python"), ids=name_of)
def test_python(
    block: Block, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    # Some install a stand-in under another module's name.
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})
    for name, module in [*sys.modules.items()]:
        if not name.startswith("pyinvolution") and getattr(module, "__name__", "").startswith("pyinvolution.compat"):
            del sys.modules[name]
    printed = capsys.readouterr().out
    for line in block.outputs():
        assert line in printed


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands find the data and checkpoints that they name, small ones."""
    pytest.importorskip("lightning")
    from recipe_support import fit_arguments, write_images

    place = tmp_path_factory.mktemp("place")
    for name in ("data/imagenet", "DIR"):
        write_images(place / name, train=4, val=4)
    shutil.copytree(place / "DIR/val/class0", place / "photos")
    (place / "TASK").mkdir()
    shutil.copy(Path(commands.__file__).parents[1] / "recipes/configs/digits/rednet.yaml", place / "TASK/MODEL.yaml")
    cli.main(fit_arguments(place / "DIR", place / "run", "--trainer.max_epochs=1"))
    for name in ("runs/rednet50", "runs/..."):
        (place / name).mkdir(parents=True)
        shutil.copy(place / "run/best.ckpt", place / name)
    return place


def parses(line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That the command line takes ``line``. Evaluations and predictions run, training prints its configuration."""
    command, *options = line
    if command == "fit":
        options += [] if any(re.fullmatch(r"--\w+\.help", option) for option in options) else ["--print_config"]
    elif command not in cli.TRAINING:
        monkeypatch.setattr(commands.find()[command], "main", lambda options: None)
    code = None
    try:
        cli.main([command, *options])
    except SystemExit as ended:
        code = ended.code
    assert not code, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(line)
    if program == "pyinvolution":
        monkeypatch.chdir(place)
        parses(arguments, monkeypatch, capsys)
    elif program == "make":
        makes(arguments)
    else:  # test_installations, test_consumer.py, test_openvino.py
        assert program in ("pip", "cmake"), f"nothing executes {line}"


def makes(arguments: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    result = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_installations() -> None:
    # Not by importing: with pip in a process, setuptools, which torch.compile needs, cannot be imported any more.
    for package in ("pip", "scikit-build-core", "optuna", "onnxscript", "openvino", "cmake", "natten-mps"):
        if not list(metadata.distributions(name=package)):
            pytest.skip(f"needs {package}")
    lines = [line.split() for line in [*COMMANDS, *spans("pip install .*")] if line.startswith("pip ")]
    assert all(line[1] == "install" for line in lines)
    # Everything is here: pip would install this package alone. All at once, since each would resolve the same.
    given = dict.fromkeys(word.strip('"') for line in lines for word in line[2:] if word != "--editable")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", *given]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stderr


@pytest.mark.parametrize("span", spans(r"(pyinvolution|make|python -m) [\w-].*"))
def test_commands_in_the_text(span: str, monkeypatch, capsys) -> None:
    program, *arguments = shlex.split(span)
    if program == "make":
        makes(arguments)
    elif program == "python":
        assert importlib.util.find_spec(arguments[1])
    elif len(arguments) == 1:
        assert arguments[0] in (*cli.TRAINING, *commands.find())
    else:
        parses(arguments, monkeypatch, capsys)


@pytest.mark.parametrize("span", spans(r"--(config|(model|data|trainer)\.\w+)( .*)?"))
def test_options_in_the_text(span: str, monkeypatch, capsys) -> None:
    pytest.importorskip("lightning")
    monkeypatch.setenv("COLUMNS", "200")
    option, *rest = span.split()
    if option == "--config":
        return parses(["fit", *(span.split() if rest else ["--config", "digits/rednet.yaml"])], monkeypatch, capsys)
    classes = {"model": "pyinvolution.recipes.Classification", "data": "pyinvolution.recipes.ImageFolderData"}
    section, _, field = option.removeprefix("--").partition(".")
    if field in ("help", "class_path"):
        rest = [classes[section]]
    parses(["fit", "--config", "digits/rednet.yaml", option, *(rest or ["2"])], monkeypatch, capsys)


@pytest.mark.parametrize("span", spans(r"(coco|cityscapes|imagenet|digits)[\w-]*/\w+(\.yaml)?"))
def test_configurations_in_the_text(span: str) -> None:
    from pyinvolution.recipes import configs

    assert configs.load(f"{span.removesuffix('.yaml')}.yaml")


def test_options_of_programs_in_the_text() -> None:
    sources = [*ROOT.glob("benchmarks/*.py"), *Path(commands.__file__).parent.glob("*.py"), Path(cli.__file__)]
    text = "".join(source.read_text() for source in sources)
    known = {"--print_config", "--ckpt_path", "--no-build-isolation"}  # of Lightning and pip
    known |= set(re.findall(r"(--[\w-]+)\)", (ROOT / "benchmarks/gpu_session.sh").read_text()))
    for span in spans(r"--[\w-]+( .*)?"):
        for option in re.findall(r"--[\w-]+(?!\.|[\w-])", span):
            assert option in known or f'"{option}"' in text or option == "--config", span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert "://" in link or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:benchmarks|cmake|cpp|cuda|docs|python|tests)/[\w./*-]+)`", text):
        assert [*ROOT.glob(path)], path


def rows_of(heading: str) -> dict[str, str]:
    """The table below a heading of CONTRIBUTING.md: its first column, and the rest of each row."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("|")]
    return dict(rows[2:])


def test_places_to_touch() -> None:
    """Every path of the table is there, and every word in capitals is in one of the files of its row."""
    rows = rows_of("I want to add ...")
    assert {"an instruction set", "a CUDA strategy", "a parameter of the operator", "a dtype", "a block"} <= rows.keys()
    assert {"a recipe", "an export format"} <= rows.keys()
    missing = []
    for name, text in rows.items():
        spans = re.findall(r"`([^`]+)`", text)
        paths = [ROOT / span for span in spans if "/" in span]
        assert paths, name
        missing += [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
        files = "".join(path.read_text() for path in paths if path.is_file())
        missing += [f"{name}: {span}" for span in spans if re.fullmatch(r"[A-Z]\w+", span) and span not in files]
    assert missing == []


def test_site(tmp_path: Path) -> None:
    """It builds without a warning, and its pages load nothing from other hosts."""
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "--quiet", "-c", "docs", ".", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert pages
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"([^\"]+)", page.read_text())
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page


def test_every_switch_is_in_contributing() -> None:
    """What is read from the environment, or an option of CMake."""
    folders = ("cmake", "cpp", "cuda", "python", "tests", "CMakeLists.txt")
    files = [file for name in folders for file in (ROOT / name, *(ROOT / name).rglob("*")) if file.is_file()]
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh", ".in", ".txt", ".cmake")
    text = "".join(file.read_text() for file in files if file.suffix in kinds)
    read = re.findall(r"(?:environ\S*|getenv|option|\$ENV)[\[({]\"?(PYINVOLUTION_\w+)", text)
    read += re.findall(r"set\((PYINVOLUTION_\w+)[^)]*\bCACHE\b", text)
    assert read
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert {name for name in read if f"`{name}" not in contributing} == set()
