"""What a recipe raises when the user can put it right: the command line prints it as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["RecipeError", "TrainingDiverged", "naming", "require"]


class RecipeError(Exception):
    """A configuration, data set or checkpoint that cannot work; the message says what was expected."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


def require(argument: str, value: object, valid: bool, expected: str) -> None:
    """Raise a RecipeError that names ``argument``, its value and what was expected, unless it is ``valid``."""
    if not valid:
        raise RecipeError(f"{argument} is {value!r}, expected {expected}")


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Turn an error that the value of an ``argument`` causes into a RecipeError that names it.

    Raises:
        RecipeError: instead of an OSError, TypeError or ValueError.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"{argument}: {' '.join(str(error).split())}") from error
