"""What a recipe raises when the user can put it right: the command line prints it as one line, without a traceback."""


class RecipeError(Exception):
    """A configuration, data set or checkpoint that cannot work; the message says what was expected."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""
