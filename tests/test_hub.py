"""Models on Hugging Face's hub, whose client is replaced: what is uploaded and downloaded, cards, and errors."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("safetensors")
from pyinvolution.models import create_model, from_pretrained, hub, model_card, push_to_hub

OPTIONS = {"layers": [1], "stem": "small", "stem_channels": 32, "base_channels": 16, "kernel_size": 3, "num_classes": 4}


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A hub in a folder; what it was asked for."""
    asked = []

    class HfApi:
        def __init__(self, token=None):
            asked.append(("token", token))

        def create_repo(self, name, private, exist_ok):
            asked.append(("create", name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(name, revision, allow_patterns):
        asked.append(("download", name, revision, allow_patterns))
        if not (tmp_path / "hub" / name).is_dir():
            raise OSError("404\n\nnot found")
        return str(tmp_path / "hub" / name)

    fake = SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setattr(hub, "_hub", lambda: fake)
    monkeypatch.chdir(tmp_path)
    return asked


def test_there_and_back(client, tmp_path):
    model = create_model("rednet", **OPTIONS)
    assert push_to_hub(model, "me/small", private=True, token="t", image=(3, 32, 32)) == "https://hub/me/small/commit/1"
    assert client == [("token", "t"), ("create", "me/small", True, True)]
    assert {path.name for path in (tmp_path / "hub/me/small").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    again = from_pretrained("me/small", revision="main")
    assert client[-1] == ("download", "me/small", "main", ["config.json", "model.safetensors"])
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_folders_come_first(client, tmp_path):
    """A folder here is never looked for on the hub, nor one that is missing in a folder here."""
    (tmp_path / "me").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no me/none/config\.json"):
        from_pretrained("me/none")
    for name in (str(tmp_path / "other/none"), "none", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            from_pretrained(name)
    assert client == []


def test_what_the_hub_refuses(client):
    with pytest.raises(ConnectionError, match=r"path is 'you/none', which is not a folder here, .*: 404 not found"):
        from_pretrained("you/none")
    with pytest.raises(ValueError, match="repository is 'small', expected OWNER/NAME"):
        push_to_hub(create_model("rednet", **OPTIONS), "small")
    with pytest.raises(TypeError, match="model is a Linear of unknown arguments"):
        push_to_hub(torch.nn.Linear(1, 1), "me/linear")
    assert not [entry for entry in client if entry[0] == "create"]


def test_without_the_client(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(hub, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        from_pretrained("you/none")


def test_card(tmp_path):
    """Configuration, counts, and how it was trained, without what belongs to one machine."""
    model = create_model("rednet", **OPTIONS).train()
    text = model_card(model, image=(3, 32, 32))
    assert f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |" in text
    assert "for an image of 3 x 32 x 32 |" in text
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == {"name": "rednet", **OPTIONS}
    assert "Nothing is known of how it was trained." in text
    assert model.training
    assert '"data set": "digits"' in model_card(model, {"data set": "digits"})
    content = {
        "hyper_parameters": {"lr": 0.1, "init_from": "/home/me/x.ckpt", "_class_path": "x"},
        "datamodule_hyper_parameters": {
            "root": "/home/me/data",
            "batch_size": 8,
            "train_annotations": "/home/me/train.json",
            "val_annotations": "instances.json",
            "transforms": [{"Paste": {"folder": "~/cut", "p": 0.5}}, "/home/me/x"],
        },
        "state_dict": {},
        "epoch": 3,
        "global_step": 12,
    }
    torch.save(content, tmp_path / "last.ckpt")
    text = model_card(model, tmp_path / "last.ckpt")
    facts = json.loads(text.split("```json\n")[2].split("```")[0])
    data = {"batch_size": 8, "val_annotations": "instances.json", "transforms": [{"Paste": {"p": 0.5}}]}
    assert facts == {"model": {"lr": 0.1}, "data": data, "epochs": 3, "steps": 12}
    assert 'from_pretrained("me/net")' in model_card(model, repository="me/net")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain\.ckpt, expected the checkpoint of a recipe's run"):
        model_card(model, Path(tmp_path, "plain.ckpt"))
