"""Trainings in processes of their own, which go on where they were stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
import yaml

from pyinvolution.models.checkpoint import read
from pyinvolution.recipes import configs, plots
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies.comparison.definition import Training
from pyinvolution.studies.files import read_json, write_json
from pyinvolution.studies.timing import processor_name

__all__ = ["Runner", "commit", "metric_of", "without_folder"]

PATIENCE = 120.0
"""Seconds that a training has to save itself after SIGTERM."""


@dataclass
class Runner:
    """Runs trainings below ``folder``, each in FOLDER/RUN/LABEL: recipe.yaml, log.txt, checkpoints, logs, result.json.

    Args:
        folder: of the comparison.
        jobs: trainings at the same time, each with one thread.
        deadline: `time.monotonic` after which none is running any more; None for no limit.
        tell: is called with a line for the user.
    """

    folder: Path
    jobs: int = 1
    deadline: float | None = None
    tell: Callable[[str], None] = print

    def place(self, training: Training) -> Path:
        return self.folder / training.run / training.label

    def result(self, training: Training) -> dict[str, Any]:
        """What a finished training came to, with "diverged" if it ended so; empty if it is not finished.

        Raises:
            RecipeError: its folder holds a training by another configuration.
        """
        path = self.place(training) / "recipe.yaml"
        result = read_json(self.place(training) / "result.json")
        if (path.is_file() or result) and _settings(path) != _settings(self.recipe(training)):
            raise RecipeError(
                f"{path} is not the configuration of this comparison's {training.run}, {training.label}: give another "
                "--output, or delete the folder"
            )
        return result

    def recipe(self, training: Training) -> str:
        """The configuration of a training in its folder, for ``pyinvolution fit``."""
        return configs.dump(
            configs.merge(training.config, {"trainer": {"default_root_dir": str(self.place(training))}})
        )

    def run(self, trainings: Sequence[Training], metrics: Sequence[str]) -> bool:
        """Bring the trainings to their end, as far as the time allows; whether all are finished.

        Raises:
            RecipeError: some failed; the others were finished before.
            SystemExit: 143 after SIGTERM, on which the trainings save themselves.
        """
        waiting = [training for training in trainings if not self.result(training)]
        running: list[tuple[Training, subprocess.Popen]] = []
        failed: list[str] = []
        stop = _Stop()
        with stop:
            try:
                while (waiting or running) and not stop.received and not self._late:
                    while waiting and len(running) < self.jobs:
                        training = waiting.pop(0)
                        running.append((training, self._start(training)))
                    time.sleep(0.1)
                    for training, process in [pair for pair in running if pair[1].poll() is not None]:
                        running.remove((training, process))
                        if training.tuning and process.returncode == 1 and self._says_why(training):
                            self._note_divergence(training)
                        elif process.returncode:
                            failed.append(f"{training.run}, {training.label} (see {self.place(training) / 'log.txt'})")
                            self.tell(f"failed: {failed[-1]}")
                        else:
                            self._finish(training, metrics)
            finally:
                self._stop(running)
        if stop.received:
            sys.exit(128 + signal.SIGTERM)
        if failed:
            raise RecipeError(f"{len(failed)} of {len(trainings)} trainings failed: {'; '.join(failed)}")
        return not waiting and not running

    @property
    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _start(self, training: Training) -> subprocess.Popen:
        folder = self.place(training)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(self.recipe(training))
        arguments = [sys.executable, "-m", "pyinvolution", "fit", "--config", str(folder / "recipe.yaml")]
        last = folder / "last.ckpt"
        if last.is_file():
            arguments += ["--ckpt_path", str(last)]
        self.tell(f"{'goes on' if last.is_file() else 'begins'}: {training.run}, {training.label}")
        # More threads gain little in small layers, and lose much where several trainings share a machine.
        with (folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                arguments, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def _stop(self, running: Sequence[tuple[Training, subprocess.Popen]]) -> None:
        for _, process in running:
            process.terminate()
        end = time.monotonic() + PATIENCE
        for training, process in running:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
            self.tell(f"stopped: {training.run}, {training.label}; the same command goes on with it")

    def _says_why(self, training: Training) -> bool:
        """Whether a training that failed did so with an error of its own, not with a traceback."""
        lines = (self.place(training) / "log.txt").read_text(errors="replace").splitlines()
        return bool(lines) and lines[-1].startswith("pyinvolution fit: error:")

    def _note_divergence(self, training: Training) -> None:
        """Values that cannot be trained with are a result of tuning."""
        write_json(
            self.place(training) / "result.json",
            {"diverged": True, "seed": training.seed, "values": training.values, "commit": commit()},
        )
        self.tell(f"diverged: {training.run}, {training.label}")

    def _finish(self, training: Training, metrics: Sequence[str]) -> None:
        """Collect what a training came to.

        Raises:
            RecipeError: it did not come to its end, or did not evaluate there.
        """
        folder, name = self.place(training), f"{training.run}, {training.label}"
        checkpoint = read(folder / "last.ckpt")
        steps, total = checkpoint["global_step"], checkpoint["total_steps"]
        if steps != total:
            raise RecipeError(f"{name}: {folder / 'last.ckpt'} is of step {steps}, expected the last one, {total}")
        logged = plots.read_metrics(folder)
        found, curves = {}, {}
        for metric in metrics:
            if metric not in logged or logged[metric][0][-1] < total - 1:
                known = ", ".join(each for each in logged if each.startswith("val/"))
                raise RecipeError(
                    f"{name}: there is no {metric} of the last step, {total}: let trainer.check_val_every_n_epoch "
                    f"divide trainer.max_epochs; it logs {known}"
                )
            at, values = logged[metric]
            found[metric] = float(values[-1])
            curves[metric] = [[int(step), float(value)] for step, value in zip(at, values, strict=True)]
        seconds = {
            name: median(logged[f"train/{name}"][1].tolist()) if f"train/{name}" in logged else None
            for name in ("epoch_s", "epoch_cpu_s")
        }
        result = {
            "metrics": found,
            "validation": {
                name: float(values[-1])
                for name, (at, values) in logged.items()
                if name.startswith("val/") and at[-1] >= total - 1
            },
            "steps": total,
            "seed": training.seed,
            "values": training.values,
            **seconds,
            "curves": curves,
            "machine": processor_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        write_json(folder / "result.json", result)
        self.tell(f"done: {name}: {', '.join(f'{metric} {value:.4f}' for metric, value in found.items())}")


def metric_of(result: Mapping[str, Any], metric: str) -> float:
    """A metric of a finished training, also one that the comparison did not ask for when it ended.

    Raises:
        RecipeError: it was not evaluated.
    """
    known = {**result.get("validation", {}), **result["metrics"]}
    if metric not in known:
        raise RecipeError(f"metrics has {metric}, expected some of what the trainings logged: {', '.join(known)}")
    return float(known[metric])


def _settings(recipe: Path | str) -> Any:
    """What a recipe says, but for its folder, which may be written in several ways."""
    if isinstance(recipe, Path):
        recipe = recipe.read_text() if recipe.is_file() else "{}"
    return without_folder(yaml.safe_load(recipe) or {})


def without_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values but for the folder of the training, which a comparison chooses."""
    return {**config, "trainer": {**config.get("trainer", {}), "default_root_dir": None}}


class _Stop:
    """Notes SIGTERM within it, in the main thread."""

    received = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def commit() -> str | None:
    """The commit that the package is at, with "+" if files differ from it; None outside of a repository."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
    if found.returncode:
        return None
    changed = subprocess.run(["git", "status", "--porcelain", "-uno", "."], cwd=here.parents[1], capture_output=True)
    return found.stdout.strip() + ("+" if changed.stdout else "")
