"""The recipe in two processes (gloo, CPU), started by torchrun."""

import json
import subprocess
import sys

import pytest
import torch
from recipe_support import (
    assert_same_state,
    environment,
    fit_arguments,
    interruption,
    run_distributed,
    training_state,
    write_images,
)

pytest.importorskip("lightning")
from pyinvolution.recipes import cli as recipe_cli


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), train=26, val=7)


def first_gradients(data, folder, name, batch):
    """Arguments of a run of one step in float64 that writes its gradients to `folder`/`name`.pt."""
    return [
        *fit_arguments(data, folder / name, "--trainer.max_steps=1", "--trainer.precision=64-true"),
        "--model.options={layers: [1, 1], stem: small, base_channels: 16, kernel_size: 3, norm_eval: true}",
        f"--data.batch_size={batch}",
        "--trainer.callbacks+=recipe_support.KeepGradients",
        f"--trainer.callbacks.init_args.path={folder / name}.pt",
    ]


def test_two_processes(data, tmp_path):
    """They end with the same bits after a SIGTERM that reaches only one of them while gradients accumulate; and they
    give the gradients of one process with the double batch."""

    def accumulating(name):
        return fit_arguments(data, tmp_path / name, "--trainer.accumulate_grad_batches=2", "--data.batch_size=2")

    status, stderr = run_distributed([*accumulating("resumed"), *interruption(15, 4, batch_idx=2, rank=1)])
    assert status != 0
    assert "stopped by SIGTERM at step 5" in stderr
    assert training_state(tmp_path / "resumed" / "last.ckpt")["['global_step']"] == 5

    status, stderr = run_distributed(
        [*accumulating("resumed"), "--ckpt_path=last"],
        accumulating("uninterrupted"),
        first_gradients(data, tmp_path, "two", 4),
    )
    assert status == 0, stderr
    states = [training_state(tmp_path / name / "last.ckpt") for name in ("resumed", "uninterrupted")]
    assert_same_state(*states)
    assert states[0]["['global_step']"] == 9

    recipe_cli.run(first_gradients(data, tmp_path, "one", 8))
    two, one = (torch.load(tmp_path / f"{name}.pt") for name in ("two", "one"))
    assert any(gradient.abs().max() > 0.01 for gradient in one.values())
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-13)


LEAVES = """
import atexit, json, sys
import torch.distributed
atexit.register(lambda: print("left", not torch.distributed.is_initialized()))
from pyinvolution.recipes import cli
cli.run(json.loads(sys.argv[1]))
print("joined", torch.distributed.is_initialized())
"""


def test_the_process_group_ends_before_the_interpreter(data, tmp_path):
    """Its threads abort the process if they meet an interpreter that is gone."""
    arguments = fit_arguments(data, tmp_path, "--trainer.max_steps=1", "--trainer.devices=1", "--trainer.strategy=ddp")
    command = [sys.executable, "-c", LEAVES, json.dumps(arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["joined True", "left True"]
