"""The exceptions that stand for a mistake in what the user gave us."""


class InputError(ValueError):
    """Bad input; one line: file and line or key, what is wrong, what was expected."""


class Diverged(InputError):
    """A run whose loss or gradients are not finite any more."""
