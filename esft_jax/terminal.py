"""Texts on standard output, as they are."""

from rich.console import Console


class Terminal(Console):
    """A console for texts that hold names and paths: nothing in them is markup, an emoji or a link.

    Args:
        quiet: print nothing, as all processes but one do.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, quiet=quiet)

    def say(self, text: str) -> None:
        """Print a text as one line, however narrow the terminal is."""
        self.print(text, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Leave to `cli.command` what happens when its reader has closed the output."""
        raise  # rich calls this while it handles the exception
