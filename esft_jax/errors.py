"""The exceptions that stand for a mistake in what the user gave us."""


class InputError(ValueError):
    """Bad input; one line: file and line or key, what is wrong, what was expected."""


def one_line(error: Exception) -> str:
    """What another library says, as a part of such a line."""
    return " ".join(str(error).split())[:200]


class Diverged(InputError):
    """A run whose loss or gradients are not finite any more."""
