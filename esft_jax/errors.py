"""The one exception that stands for a mistake in what the user gave us."""


class InputError(ValueError):
    """Bad input; one line: file and line or key, what is wrong, what was expected."""
