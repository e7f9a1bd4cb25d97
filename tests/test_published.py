"""Published weights: downloaded from a server on this machine, resumed, converted once, compared by their hash."""

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server
from threading import Thread

import pytest
import torch
from test_paddle import paddle_arrays

from pyinvolution.models import create_model, published
from pyinvolution.models.published import PUBLISHED, load_published, published_file

FILE = "RedNet26_pretrained.pdparams"


@dataclass
class Server:
    """Serves one file, and remembers what it was asked for."""

    content: bytes
    address: str = ""
    ranges: bool = True
    tags: bool = True
    lengths: bool = True
    break_after: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return create_model("rednet26")


@pytest.fixture(scope="module")
def content(source) -> bytes:
    return pickle.dumps(paddle_arrays(source), 4)


@pytest.fixture
def server(content, tmp_path, monkeypatch) -> Iterator[Server]:
    state = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if not self.path.endswith(FILE):
                return self.send_error(404)
            tag = f'"{hashlib.md5(state.content).hexdigest()}"' if state.tags else None
            whole = not asked or not state.ranges or self.headers.get("If-Range") not in (None, tag)
            first = 0 if whole else int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(state.content):
                return self.send_error(416)
            body = state.content[first:]
            self.send_response(206 if first else 200)
            if state.lengths:
                self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(state.content) - 1}/{len(state.content)}")
            self.end_headers()
            self.wfile.write(body if state.break_after is None else body[: state.break_after])
            return None

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name, weights in PUBLISHED.items():
        monkeypatch.setitem(PUBLISHED, name, replace(weights, url=f"{state.address}/{weights.url.rsplit('/', 1)[-1]}"))
    yield state
    http.shutdown()
    http.server_close()


def folder(tmp_path):
    return tmp_path / "hub" / "checkpoints"


def assert_equal(model, source):
    for (name, value), expected in zip(model.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_a_model_has_its_weights(server, source, content, tmp_path, capsys):
    model = create_model("rednet26", pretrained=True)
    assert_equal(model, source)
    assert model.model_config == {"name": "rednet26"}
    assert "100%" in capsys.readouterr().err
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert server.asked == [None], "downloaded twice"
    names = sorted(path.name for path in folder(tmp_path).iterdir() if path.suffix != ".lock")
    assert names == [f"{FILE}.sha256", "rednet26-paddleclas.pth"]
    assert (folder(tmp_path) / f"{FILE}.sha256").read_text().split()[0] == hashlib.sha256(content).hexdigest()


def test_what_comes_with_them(server):
    pytest.importorskip("torchvision")
    weights = create_model("rednet26", pretrained=True).weights
    assert weights.top1 == 75.95
    assert len(weights.categories) == 1000
    assert weights.categories[207] == "golden retriever"
    image = torch.full((3, 300, 500), 128, dtype=torch.uint8)
    ready = weights.transforms()(image)
    assert ready.shape == (3, 224, 224)
    mean, std = torch.tensor(weights.mean), torch.tensor(weights.std)
    torch.testing.assert_close(ready[:, 5, 7], (128 / 255 - mean) / std)


def test_other_classes_and_other_arguments(server, source):
    model = create_model("rednet26", 7, pretrained=True, grad_checkpointing=True)
    assert model.head.weight.shape == (7, 2048)
    assert torch.equal(model.layer4[0].conv3.weight, source.layer4[0].conv3.weight)
    assert model.model_config == {"name": "rednet26", "num_classes": 7, "grad_checkpointing": True}
    assert_equal(
        torch.nn.Sequential(create_model("rednet26", 0, pretrained=True).layer1), torch.nn.Sequential(source.layer1)
    )
    with pytest.raises(ValueError, match="does not fit the model"):
        create_model("rednet26", pretrained=True, base_channels=32)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(ranges, server, source, content):
    server.break_after, server.ranges = 1_000_000, ranges
    with pytest.raises(ConnectionError, match="the next attempt goes on from there"):
        create_model("rednet26", pretrained=True)
    server.break_after = None
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert server.asked == [None, "bytes=1000000-"]


def changed(content: bytes) -> bytes:
    """Another file of the same size, whose last array differs."""
    at = content.rindex(bytes(64)) if bytes(64) in content else len(content) - 5000
    return content[:at] + bytes(value ^ 1 for value in content[at : at + 64]) + content[at + 64 :]


@pytest.mark.parametrize("tags", [True, False])
def test_parts_of_two_files_are_not_joined(tags, server, source, content):
    server.tags, server.break_after, server.content = tags, 1_000_000, changed(content)
    with pytest.raises(ConnectionError):
        create_model("rednet26", pretrained=True)
    server.break_after, server.content = None, content
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert server.asked == [None, "bytes=1000000-" if tags else None]


def test_a_part_that_is_too_long_is_dropped(server, source, content, tmp_path):
    folder(tmp_path).mkdir(parents=True)
    (folder(tmp_path) / f"{FILE}.part").write_bytes(content + b"more")
    (folder(tmp_path) / f"{FILE}.part.version").write_text(f'"{hashlib.md5(content).hexdigest()}"')
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert server.asked == [f"bytes={len(content) + 4}-", None]


def test_another_file_is_noticed(server, source, content, tmp_path):
    create_model("rednet26", pretrained=True)
    (folder(tmp_path) / "rednet26-paddleclas.pth").unlink()
    server.content = pickle.dumps(paddle_arrays(source), 3)
    with pytest.raises(ValueError, match=r"SHA-256 .*, expected .*, that of the first download; remove"):
        create_model("rednet26", pretrained=True)
    server.content = content
    assert_equal(create_model("rednet26", pretrained=True), source)


@pytest.mark.parametrize("instead", ["page", "cut"])
def test_what_is_not_the_file_is_not_kept(instead, server, source, content, tmp_path):
    """A page to log in, and a connection that ends without the server having said how long the file is."""
    server.content, server.lengths = (b"<html>log in</html>", True) if instead == "page" else (content[:500_000], False)
    with pytest.raises(ValueError, match=r"did not send the weights of rednet26: .* is not a file of named"):
        create_model("rednet26", pretrained=True)
    assert not [path for path in folder(tmp_path).iterdir() if path.suffix != ".lock"]
    server.content = content
    assert_equal(create_model("rednet26", pretrained=True), source)


def test_an_empty_hash_is_none(server, source, tmp_path):
    folder(tmp_path).mkdir(parents=True)
    (folder(tmp_path) / f"{FILE}.sha256").touch()
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert (folder(tmp_path) / f"{FILE}.sha256").read_text()


def test_an_answer_that_is_not_of_http(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"who is there?\r\n\r\n")

        Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/{FILE}"
        with pytest.raises(ConnectionError, match="cannot download the weights of rednet26"):
            published_file(replace(PUBLISHED["rednet26"], url=url))


def test_a_cache_that_cannot_be_written(server, source, tmp_path, monkeypatch):
    create_model("rednet26", pretrained=True)
    monkeypatch.setattr(published, "FileLock", None)
    assert_equal(create_model("rednet26", pretrained=True), source)


def test_offline_and_gone(server, monkeypatch, tmp_path):
    with pytest.raises(
        ConnectionError, match=r"RedNet38_pretrained\.pdparams: 404 Not Found; expected a connection"
    ) as gone:
        create_model("rednet38", pretrained=True)
    assert "\n" not in str(gone.value)
    monkeypatch.setitem(PUBLISHED, "rednet26", replace(PUBLISHED["rednet26"], url=f"http://127.0.0.1:9/{FILE}"))
    with pytest.raises(ConnectionError, match=f"{FILE}.*load_official"):
        create_model("rednet26", pretrained=True)


def test_a_file_that_was_put_there(server, source, content, tmp_path):
    """What the message offers to those who are offline."""
    folder(tmp_path).mkdir(parents=True)
    (folder(tmp_path) / FILE).write_bytes(content)
    assert_equal(create_model("rednet26", pretrained=True), source)
    assert server.asked == []


def test_models_without_weights(server):
    with pytest.raises(ValueError, match="expected a model with weights: rednet26"):
        create_model("rednet", layers=(1, 1), pretrained=True)
    with pytest.raises(ValueError, match="name is 'resnet', expected one with published weights"):
        load_published(torch.nn.Identity(), "resnet")


def test_several_processes_download_once(server, source):
    threads = [Thread(target=published_file, args=(PUBLISHED["rednet26"], False)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None]
    assert published_file(PUBLISHED["rednet26"]).is_file()


def test_addresses():
    assert [weights.url.rsplit("/", 1)[-1] for weights in PUBLISHED.values()] == [
        f"RedNet{depth}_pretrained.pdparams" for depth in (26, 38, 50, 101, 152)
    ]
    assert published._ADDRESS.startswith("https://")


def test_timm(server, source):
    timm = pytest.importorskip("timm", minversion="1.0.12")
    import pyinvolution.timm  # noqa: F401

    assert_equal(timm.create_model("rednet26", pretrained=True), source)
    tuned = timm.create_model("rednet26", pretrained=True, num_classes=4, in_chans=1)
    assert tuned.head.weight.shape == (4, 2048)
    torch.testing.assert_close(tuned.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))


def test_timm_takes_the_weights_that_are_named(server, source, tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0.12")
    import pyinvolution.timm  # noqa: F401

    mine = create_model("rednet26")
    torch.save(mine.state_dict(), tmp_path / "mine.pth")
    for named in (
        {"pretrained_cfg": {"file": str(tmp_path / "mine.pth"), "num_classes": 1000, "classifier": "head"}},
        {"pretrained_cfg_overlay": {"file": str(tmp_path / "mine.pth")}},
    ):
        assert_equal(timm.create_model("rednet26", pretrained=True, **named), mine)
    assert server.asked == []
    net = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.9})
    assert_equal(net, source)
    assert net.pretrained_cfg["crop_pct"] == 0.9
