"""A whole search: table of costs, supernet, NSGA-II, and what the result is worth."""

import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, track
from scipy.stats import kendalltau, spearmanr

from pyinvolution.models.loading import load
from pyinvolution.recipes import cli, configs
from pyinvolution.recipes.data import data_of
from pyinvolution.recipes.errors import RecipeError
from pyinvolution.studies.files import read_json, write_json
from pyinvolution.studies.search import report
from pyinvolution.studies.search.config import SearchConfig
from pyinvolution.studies.search.costs import CostTable
from pyinvolution.studies.search.data import HeldOut, held_out_batches, training_batches
from pyinvolution.studies.search.evaluation import Evaluator
from pyinvolution.studies.search.space import Architecture, describe, involution_share, key
from pyinvolution.studies.search.study import Candidate, Study, front
from pyinvolution.studies.search.supernet import Supernet

__all__ = ["run"]

SAME_COST = 0.05
"""How far the costs of networks of equal cost may be apart, relative to the found one's."""


def run(config: SearchConfig) -> dict[str, Any]:
    """Search, and write ``report.json``, ``report.md``, ``search.png`` and ``found.yaml`` to ``config.output``.

    What is in the folder already is not done again, and an interrupted training goes on from its last checkpoint.

    Returns:
        The content of ``report.json``.

    Raises:
        RecipeError: the configuration or the data is wrong, or no network is within the budget.
    """
    config.claim()
    # The layers are small: a second thread gains little, and loses much on a machine that is busy with other things.
    threads = torch.get_num_threads()
    torch.set_num_threads(config.timing.threads)
    try:
        with _quiet():
            result = _Search(config).run()
    except (SystemExit, KeyboardInterrupt):
        Console(stderr=True).print(
            f"stopped; the same command goes on with what is in {config.folder}", highlight=False
        )
        raise
    finally:
        torch.set_num_threads(threads)
    report.write(result, config.folder)
    console = Console()
    console.rule("result")
    console.print(Markdown(report.markdown(result)))
    for name in ("report.md", "report.json", "search.png", "found.yaml"):
        console.print(f"  {config.folder / name}", highlight=False)
    return result


def fit(training: dict[str, Any], folder: Path) -> float:
    """Accuracy after a training by the recipe, which is kept in ``folder`` and not repeated.

    A training that was interrupted goes on.
    """
    done = folder / "result.json"
    if not done.is_file():
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
        config = configs.merge(training, {"trainer": quiet})
        path, last = folder / "recipe.yaml", folder / "last.ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(configs.dump(config))
        ckpt_path = str(last) if last.is_file() else None
        with cli.other_processes(["fit", "--config", str(path), *(["--ckpt_path", ckpt_path] if ckpt_path else [])]):
            trainer = cli.fit(config, ckpt_path)
        metrics: Mapping[str, Any] = trainer.callback_metrics
        if "val/top1" not in metrics:  # it had been interrupted after its last step
            metrics = trainer.validate(trainer.lightning_module, data_of(trainer), verbose=False)[0]
        write_json(done, {"top1": float(metrics["val/top1"])})
    return read_json(done)["top1"]


class _Search:
    """The stages of a search."""

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.space, self.folder = config, config.search_space, config.folder
        self.console = Console()
        self.seconds = read_json(self.folder / "seconds.json")
        self.data = HeldOut(**config.data, held_out=config.held_out)
        self.data.setup("fit")
        _, *size = image = tuple(self.data.val_samples[0][0].shape)
        self.table = CostTable(self.space, config.num_classes, image, config.timing, self.folder / "costs.json")
        self.console.rule(f"{len(self.space):,} networks on images of {size[0]} x {size[1]}")

    def run(self) -> dict[str, Any]:
        with self._stage("table", "costs of all layers, and of some whole networks to check the table by"):
            self.table.fill()
            reference, limit = self._budget()
            # At once: a machine that is busier later would be held against the table.
            latency = self._latency()
        with self._stage("supernet", "the supernet: another network at every step"):
            fit(self.config.supernet_training(), self.folder / "supernet")
            evaluate = self._evaluator()
        with self._stage("search", f"{self.config.trials} networks by NSGA-II: accuracy and {self.config.cost}"):
            candidates = self._search(evaluate, limit)
            best = front(candidates)
            if not best:
                raise RecipeError(f"none of {len(candidates)} networks is within budget={self.config.budget}: raise it")
            found = best[-1].architecture
            self._export(found)
        self.console.print(f"found  {describe(found)}", highlight=False)
        with self._stage("correlation", f"{self.config.networks} networks trained alone, for the rank correlation"):
            correlation = self._correlation(self._spread(), evaluate)
        with self._stage("comparison", "the found network and random ones of its cost"):
            comparison = self._comparison(found)
        return {
            "space": {"networks": len(self.space), "operators": list(self.space.operators)},
            "objective": {
                "cost": self.config.cost,
                "budget": self.config.budget,
                "limit": limit,
                "all_conv": reference,
            },
            "candidates": [self._entry(candidate) for candidate in candidates],
            "front": [self._entry(candidate) for candidate in best],
            "found": self._entry(best[-1]),
            "without_budget": self._entry(max(candidates, key=lambda candidate: candidate.accuracy)),
            "rank_correlation": correlation,
            "latency": latency,
            "comparison": comparison,
            "seconds": self.seconds,
        }

    @contextmanager
    def _stage(self, name: str, text: str) -> Iterator[None]:
        """Time of a stage, that of earlier runs included."""
        self.console.rule(text, align="left")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
            write_json(self.folder / "seconds.json", self.seconds)

    def _cost(self, architecture: Architecture) -> float:
        return self.table.cost(architecture, self.config.cost)

    def _budget(self) -> tuple[float, float]:
        """Cost of the all-convolution network, and the largest cost that the search accepts."""
        reference = self._cost(self.space.largest("conv3"))
        limit = self.config.budget * reference
        generator = random.Random(self.config.seed)
        cheapest = min(self._cost(architecture) for architecture in self._drawn(generator))
        if cheapest > limit:
            raise RecipeError(
                f"budget={self.config.budget} is out of reach: the cheapest of 1000 random networks costs "
                f"{cheapest / reference:.2f} of the all-convolution network"
            )
        return reference, limit

    def _evaluator(self) -> Evaluator:
        supernet = Supernet(self.space, self.config.num_classes)
        load(supernet, self.folder / "supernet" / "last.ckpt")
        supernet.to("cuda" if torch.cuda.is_available() else "cpu")
        training = training_batches(self.data, self.config.recalibration_images)
        return Evaluator(supernet, training, held_out_batches(self.data), self.folder / "accuracies.json")

    def _search(self, evaluate: Evaluator, limit: float) -> list[Candidate]:
        study = Study(
            self.space, evaluate, self._cost, limit, self.folder / "study.db", self.config.population, self.config.seed
        )
        with Progress(console=self.console) as progress:
            task = progress.add_task("trials", total=self.config.trials)
            study.run(self.config.trials, lambda count: progress.update(task, completed=count))
        return study.candidates

    def _export(self, found: Architecture) -> None:
        training = configs.merge(
            self.config.training(found), {"trainer": {"default_root_dir": str(self.folder / "found")}}
        )
        text = configs.dump(training)
        path = self.folder / "found.yaml"
        path.write_text(f"# {describe(found)}\n# To train it: pyinvolution fit --config {path}\n{text}")

    def _spread(self) -> list[Architecture]:
        """Networks at even distances in cost, from the cheapest to the dearest of many random ones."""
        generator = random.Random(self.config.seed)
        costs = {architecture: self._cost(architecture) for architecture in self._drawn(generator)}
        low, high = min(costs.values()), max(costs.values())
        spread: list[Architecture] = []
        for target in torch.linspace(low, high, min(self.config.networks, len(costs)), dtype=torch.float64).tolist():
            nearest = min(costs, key=lambda architecture: abs(costs[architecture] - target))
            spread.append(nearest)
            del costs[nearest]
        return spread

    def _drawn(self, generator: random.Random) -> Iterator[Architecture]:
        for _ in range(1000):
            yield self.space.sample(generator)

    def _correlation(self, networks: list[Architecture], evaluate: Evaluator) -> dict[str, Any]:
        shared, costs = [[*map(value, networks)] for value in (evaluate, self._cost)]
        scores = self._trained(networks, "alone", self.config.selection_training)
        alone = [fmean(values) for values in scores]
        pairs = combinations(zip(*scores, strict=True), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant accuracies; the correlation is then not a number
            spearman, kendall = (float(test(shared, alone).statistic) for test in (spearmanr, kendalltau))
            of_cost = float(spearmanr(costs, alone).statistic)
            between = [float(spearmanr(one, other).statistic) for one, other in pairs]
        entries = [
            {"network": describe(network), "cost": cost, "supernet": ours, "alone": theirs, "accuracies": values}
            for network, cost, ours, theirs, values in zip(networks, costs, shared, alone, scores, strict=True)
        ]
        return {
            "spearman": _number(spearman),
            "kendall": _number(kendall),
            "of_cost": _number(of_cost),
            "between_seeds": _number(sum(between) / len(between)) if between else None,
            "networks": entries,
        }

    def _latency(self) -> dict[str, Any]:
        generator = random.Random(self.config.seed)
        networks = [self.space.sample(generator) for _ in range(self.config.networks)]
        entries: list[dict[str, Any]] = []
        for architecture in track(networks, "networks", console=self.console):
            table, measured = self.table.cost(architecture, "latency"), self.table.measured(architecture)
            error = abs(table - measured) / measured
            entries.append({"network": describe(architecture), "table": table, "measured": measured, "error": error})
        errors = [entry["error"] for entry in entries]
        return {
            "machine": self.config.timing.machine(),
            "layers": len(self.table.layers),
            "mean_error": fmean(errors),
            "largest_error": max(errors),
            "networks": entries,
        }

    def _comparison(self, found: Architecture) -> dict[str, Any]:
        networks = [found, *self._rivals(found)]
        scores = self._trained(networks, "compared", self.config.training)
        entries: list[dict[str, Any]] = [
            {
                "network": describe(architecture),
                "cost": self._cost(architecture),
                "involutions": involution_share(architecture),
                "accuracies": values,
                "mean": fmean(values),
                "std": stdev(values) if len(values) > 1 else None,
            }
            for architecture, values in zip(networks, scores, strict=True)
        ]
        ours, *theirs = (entry["mean"] for entry in entries)
        return {
            "seeds": self.config.seeds,
            "difference": ours - fmean(theirs),
            "better_than": sum(ours > mean for mean in theirs),
            "networks": entries,
        }

    def _rivals(self, found: Architecture) -> list[Architecture]:
        generator = random.Random(self.config.seed + 1)
        cost = self._cost(found)
        rivals: dict[Architecture, None] = {}
        for _ in range(50_000):
            architecture = self.space.sample(generator)
            if architecture != found and abs(self._cost(architecture) - cost) <= SAME_COST * cost:
                rivals[architecture] = None
            if len(rivals) == self.config.opponents:
                return [*rivals]
        raise RecipeError(
            f"only {len(rivals)} of 50000 random networks cost as much as the found one (within {SAME_COST:.0%}), "
            f"opponents={self.config.opponents} are wanted"
        )

    def _trained(
        self, networks: list[Architecture], kind: str, training: Callable[[Architecture], dict[str, Any]]
    ) -> list[list[float]]:
        """Accuracies of each network after its trainings by the recipe, one for each seed."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        scores: dict[Architecture, list[float]] = {architecture: [] for architecture in networks}
        runs = [(architecture, seed) for seed in seeds for architecture in networks]
        for architecture, seed in track(runs, "trainings", console=self.console):
            base = training(architecture)
            epochs = base.get("trainer", {}).get("max_epochs") or 1
            # Only the last epoch counts.
            quiet = {"logger": False, "num_sanity_val_steps": 0, "check_val_every_n_epoch": epochs}
            folder = self.folder / kind / f"{key(self.space.encode(architecture))}-seed{seed}"
            scores[architecture].append(fit(configs.merge(base, {"seed_everything": seed, "trainer": quiet}), folder))
        return [scores[architecture] for architecture in networks]

    def _entry(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "network": describe(candidate.architecture),
            "code": list(self.space.encode(candidate.architecture)),
            "accuracy": candidate.accuracy,
            "macs": self.table.cost(candidate.architecture, "macs"),
            "latency": self.table.cost(candidate.architecture, "latency"),
            "involutions": involution_share(candidate.architecture),
            "feasible": candidate.feasible,
        }


def _number(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if value == value else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of every run."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="lightning.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
