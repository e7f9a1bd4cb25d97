"""ImageNet weights of RedNet that are published: PaddleClas's, which were converted from the authors'.

The accuracies are those of PaddleClas's documents (``docs/zh_CN/models/ImageNet1k/RedNet.md``); none was measured
here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torch import Tensor, nn

from pyinvolution._files import replacing
from pyinvolution.models.official import load_official
from pyinvolution.models.paddle import read_pdparams

__all__ = ["PUBLISHED", "PublishedWeights", "load_published"]

_ADDRESS = "https://paddle-imagenet-models-name.bj.bcebos.com/dygraph"
_CHUNK = 1 << 18


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of an ImageNet classifier, and what its images must look like.

    Attributes:
        name: of the model.
        url: of the file.
        top1: accuracy on ImageNet's validation images in percent, as its publisher gives it.
        resize: pixels of the shorter side before the crop.
        crop: pixels of both sides.
        mean, std: by which an image in [0, 1], RGB, is normalised.
        num_classes: of ImageNet.
    """

    name: str
    url: str
    top1: float
    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 1000

    @property
    def categories(self) -> list[str]:
        """Names of the classes in the order of the logits (torchvision's list)."""
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])

    def transforms(self) -> Callable[[Any], Tensor]:
        """An image (PIL, or uint8 of shape (..., 3, H, W)) to the network's input, float32 (..., 3, crop, crop)."""
        from torchvision.transforms import v2

        return v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(self.resize, v2.InterpolationMode.BILINEAR, antialias=True),
                v2.CenterCrop(self.crop),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
                v2.ToPureTensor(),
            ]
        )


PUBLISHED = {
    f"rednet{depth}": PublishedWeights(f"rednet{depth}", f"{_ADDRESS}/RedNet{depth}_pretrained.pdparams", top1)
    for depth, top1 in ((26, 75.95), (38, 77.47), (50, 78.33), (101, 78.94), (152, 79.17))
}
"""By the name of the model."""


def load_published(model: nn.Module, name: str, *, head: bool = True, progress: bool = True) -> nn.Module:
    """Load the published weights of the model ``name``; its attribute ``weights`` then is their `PublishedWeights`.

    The file is downloaded once into ``torch.hub.get_dir()``/checkpoints, read without executing anything
    (`read_pdparams`) and kept as a file of torch. An interrupted download is resumed, if the server says that it still
    has the same file. The SHA-256 of the first one that could be read is kept, and a later download must have it.

    Args:
        model: a `RedNet` of that depth.
        head: False keeps the model's own classifier.
        progress: show a bar on stderr.

    Raises:
        ValueError: there are no such weights, they do not fit the model, or the file is not the one of the first time.
        ConnectionError: the file cannot be had.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name is {name!r}, expected one with published weights: {', '.join(PUBLISHED)}")
    weights = PUBLISHED[name]
    load_official(model, published_file(weights, progress), head=head)
    model.weights = weights  # type: ignore[assignment]
    return model


def published_file(weights: PublishedWeights, progress: bool = True) -> Path:
    """The file in torch's format and the authors' names, downloaded and converted if it is not there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    ready = folder / f"{weights.name}-paddleclas.pth"
    if ready.is_file():
        return ready
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{ready}.lock"):  # the processes of a distributed run ask at the same time
        if not ready.is_file():
            source = folder / weights.url.rsplit("/", 1)[-1]
            downloaded = not source.is_file()
            if downloaded:
                _download(weights, source, progress)
            found = _check_hash(source, weights)
            try:
                state = read_pdparams(source)
            except ValueError as error:
                if not downloaded:
                    raise
                source.unlink()  # else it would be taken for the weights the next time
                raise ValueError(f"{weights.url} did not send the weights of {weights.name}: {error}") from error
            with replacing(ready) as part:
                torch.save(state, part)
                _write(_hash_file(source), f"{found}  {source.name}\n")
            source.unlink()
    return ready


def _download(weights: PublishedWeights, to: Path, progress: bool) -> None:
    part = to.with_name(f"{to.name}.part")
    try:
        _fetch(weights.url, part, progress)
    except (OSError, HTTPException) as error:
        reason = f"{error.code} {error.reason}" if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise ConnectionError(
            f"cannot download the weights of {weights.name} from {weights.url}: {reason}; expected a connection, or "
            f"the file at {to}. models.load_official(model, path) loads a copy of it, or a file of the authors"
        ) from None
    part.replace(to)
    _version_file(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path, progress: bool) -> None:
    from torch.hub import tqdm

    version = _version_file(part)
    # Without knowing what version of the file the part is of, the rest may be of another.
    have = part.stat().st_size if part.is_file() and version.is_file() else 0
    headers = {"User-Agent": "pyinvolution"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text()}
    try:
        response = urlopen(Request(url, headers=headers), timeout=60)
    except HTTPError as error:
        if error.code != 416 or not have:  # 416: there is nothing from that byte on
            raise
        part.unlink()
        return _fetch(url, part, progress)
    with response:
        if response.status != 206:
            have = 0
            version.unlink(missing_ok=True)
            tag = response.headers.get("ETag", "")
            identity = response.headers.get("Last-Modified") if tag.startswith("W/") or not tag else tag
            if identity:
                _write(version, identity)
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"it sent {response.headers.get('Content-Range')!r}, expected the bytes from {have} on")
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(total=total, initial=have, disable=not progress, unit="B", unit_scale=True, unit_divisor=1024)
        with part.open("ab" if have else "wb") as file, bar:
            while data := response.read(_CHUNK):
                file.write(data)
                bar.update(len(data))
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes; the next attempt goes on from there")
    return None


def _check_hash(file: Path, weights: PublishedWeights) -> str:
    """The SHA-256 of a file, which must be that of the first download."""
    found, kept = _digest(file), _hash_file(file)
    expected = kept.read_text().split() if kept.is_file() else []
    if expected and found != expected[0]:
        file.unlink()
        raise ValueError(
            f"the weights of {weights.name} from {weights.url} have SHA-256 {found}, expected {expected[0]}, that of "
            f"the first download; remove {kept} to accept the new file"
        )
    return found


def _hash_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _version_file(part: Path) -> Path:
    """Holds what the server calls the version that a part is of."""
    return part.with_name(f"{part.name}.version")


def _write(file: Path, text: str) -> None:
    with replacing(file) as part:
        part.write_text(text)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()
