"""Texts on standard output, as they are."""

from importlib import metadata

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


def first_line(doing: str, dtype: str) -> str:
    """What a command begins with: versions, devices, type, what it does.

    Args:
        dtype: of the computation.
    """
    import jax  # not of commands that print texts alone

    try:
        version = metadata.version("esft-jax")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    return f"esft-jax {version}, JAX {jax.__version__}, {devices}, {dtype}: {doing}"
