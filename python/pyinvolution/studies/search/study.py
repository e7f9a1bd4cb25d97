"""The search: NSGA-II over accuracy and cost (Deb et al., 2002, constrained domination), by Optuna."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pyinvolution.recipes.data import seed_from
from pyinvolution.studies.search.space import Architecture, SearchSpace

__all__ = ["Candidate", "Study", "front"]

EXCESS = "excess"


@dataclass(frozen=True)
class Candidate:
    """An architecture that the search has seen.

    Attributes:
        architecture: its network.
        accuracy: with the weights of the supernet.
        cost: in the unit of the search.
        feasible: whether the cost is within the budget.
    """

    architecture: Architecture
    accuracy: float
    cost: float
    feasible: bool


class Study:
    """A search kept in a SQLite file, which goes on where it stopped.

    The random numbers of a trial depend on the seed and on the number of trials before it, so an interrupted
    search ends with the same trials as one that was not.

    Args:
        space: what is searched.
        accuracy: of an architecture, to be large.
        cost: of an architecture, to be small.
        budget: largest cost; networks within it are always better than others.
        path: the SQLite file.
        population: networks of a generation.
        seed: of the search.
    """

    def __init__(
        self,
        space: SearchSpace,
        accuracy: Callable[[Architecture], float],
        cost: Callable[[Architecture], float],
        budget: float,
        path: Path,
        population: int = 25,
        seed: int = 0,
    ) -> None:
        self.space, self.accuracy, self.cost, self.budget = space, accuracy, cost, budget
        self.population, self.seed = population, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            storage=RDBStorage(f"sqlite:///{path}"),
            study_name="search",
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )

    def run(self, trials: int, done: Callable[[int], None] = lambda _: None) -> None:
        """Go on until there are ``trials``; ``done`` is called with the number that there are."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # of a search that was killed
        for count in range(len(self._complete), trials):
            self.study.sampler = NSGAIISampler(population_size=self.population, seed=seed_from(self.seed, count))
            self.study.optimize(self._objective, n_trials=1)
            done(count + 1)

    @property
    def candidates(self) -> list[Candidate]:
        """The architectures of all trials, in order, each once."""
        found = {}
        for trial in self._complete:
            accuracy, cost = trial.values
            code = tuple(trial.params[name] for name in self.space.genes)
            architecture = self.space.decode(code)
            found[architecture] = Candidate(architecture, accuracy, cost, trial.constraints[EXCESS] <= 0)
        return [*found.values()]

    @property
    def _complete(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _objective(self, trial: optuna.Trial) -> tuple[float, float]:
        code = tuple(trial.suggest_int(name, 0, count - 1) for name, count in self.space.genes.items())
        architecture = self.space.decode(code)
        cost = self.cost(architecture)
        trial.set_constraint(EXCESS, cost - self.budget)
        return self.accuracy(architecture), cost


def front(candidates: list[Candidate]) -> list[Candidate]:
    """Those within the budget that none of the others beats in accuracy at no higher cost, by ascending cost."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.cost, -candidate.accuracy)):
        if candidate.feasible and (not best or candidate.accuracy > best[-1].accuracy):
            best.append(candidate)
    return best
