"""The exceptions that end a command with one line instead of a traceback."""

import reprlib

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200


class InputError(ValueError):
    """Bad input; one line: file and line or key, what is wrong, what was expected. Exit code 2."""


class RunFailed(RuntimeError):
    """Good input whose run cannot go on; one line: what happened, what can be done. Exit code 1."""


class Diverged(RunFailed):
    """A run whose loss, gradients or parameters are not finite any more."""


def one_line(error: BaseException) -> str:
    """What another library says, as a part of such a line."""
    return " ".join(str(error).split())[:200]


def shown(value: object) -> str:
    """What was found, as a part of such a line: its `repr`, shortened where it is long."""
    return _SHOWN.repr(value)
