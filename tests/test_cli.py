"""The frame around every command: exit codes, config arguments, and the `esft` script."""

import argparse
import subprocess
import sys
import types
from collections.abc import Sequence

import pytest

from esft_jax import cli
from esft_jax.errors import InputError


def raising(error: BaseException | None) -> int:
    @cli.command
    def main(argv: Sequence[str] | None) -> None:
        """Say it."""
        if error:
            raise error

    assert main.__doc__ == "Say it."
    return main(["x"])


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(None) == 0
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")
    assert raising(InputError("run.yaml:3: wrong; expected right")) == 2
    assert capsys.readouterr() == ("", "error: run.yaml:3: wrong; expected right\n")
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_config_arguments() -> None:
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(["--config", "c.yaml", "a=1", "b.c=[2, 3]"])
    assert (arguments.config, arguments.overrides) == ("c.yaml", ["a=1", "b.c=[2, 3]"])
    assert parser.parse_args(["--config", "c.yaml"]).overrides == []


def test_dispatches_all_that_follows_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def main(argv: Sequence[str]) -> int:
        seen.extend([*argv, argparse.ArgumentParser().prog])
        return 5

    module = types.ModuleType("esft_jax.train")
    monkeypatch.setattr(module, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, "esft_jax.train", module)
    monkeypatch.setattr(sys, "argv", ["esft"])
    assert cli.main(["train", "--config", "c", "--help", "-h"]) == 5
    assert seen == ["--config", "c", "--help", "-h", "esft train"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "host:1", "--processes", "2", "--process", "0"], "with --distributed"),
        (["--distributed", "--processes", "2"], "expected all of them"),
        (
            ["--distributed", "--coordinator", "host:1", "--processes", "2", "--process", "2"],
            "--process: 2; expected 0 to 1",
        ),
        (
            ["--distributed", "--coordinator", "host", "--processes", "2", "--process", "0"],
            "--coordinator: 'host'; expected HOST:PORT",
        ),
    ],
)
def test_what_is_said_of_other_processes_is_checked(options: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    with pytest.raises(InputError, match=message):
        cli.open_config(parser.parse_args(["--config", "c.yaml", *options]))


def test_others_that_nobody_names() -> None:
    """JAX itself ends with a traceback, which a launcher takes for a failure to be tried again."""
    code = (
        "import argparse; from esft_jax import cli\n"
        "run = cli.command(lambda argv: cli.join_processes(args))\n"
        "parser = argparse.ArgumentParser(); cli.add_process_arguments(parser)\n"
        "args = parser.parse_args(['--distributed']); raise SystemExit(run([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --distributed: JAX finds no others")


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tain"])
    assert caught.value.code == 2
    assert "invalid choice: 'tain'" in capsys.readouterr().err


def test_help_names_every_verb_without_importing_jax() -> None:
    code = (
        "import sys; from esft_jax import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert 'jax' not in sys.modules, 'jax was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb, text in cli.VERBS.items():
        assert f"{verb:<10}{text}" in result.stdout
