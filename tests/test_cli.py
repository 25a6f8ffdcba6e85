"""The frame around every command: exit codes, config arguments, and the `esft` script."""

import argparse
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import esft_jax
from esft_jax import cli
from esft_jax.errors import InputError
from esft_jax.values import LocalPath, Seed


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


def parsed(*arguments: str) -> argparse.Namespace:
    parser = cli.Parser()
    cli.add_config_arguments(parser)
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--seed", type=cli.option(Seed))
    parser.add_argument("--adapter", type=cli.option(LocalPath))
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "file", "overrides"),
    [
        (["--config", "c.yaml", "a=1", "b.c=[2, 3]"], "c.yaml", ["a=1", "b.c=[2, 3]"]),
        (["--config", "c.yaml"], "c.yaml", []),
        (
            ["--config=c.yaml", "a=1", "--flag", "b=2", "--seed", "3", "c=/x"],
            "c.yaml",
            ["a=1", "b=2", "c=/x"],
        ),
        (["a=1", "--config", "c.yaml", "b=2"], "c.yaml", ["a=1", "b=2"]),
        (["c.yaml", "a=1"], "c.yaml", ["a=1"]),
        (["a=1", "--flag", "c.yaml", "b=-1"], "c.yaml", ["a=1", "b=-1"]),
        (["runs/lr=1e-4/config.yaml", "a=runs/x"], "runs/lr=1e-4/config.yaml", ["a=runs/x"]),
        (["--config", "lr=1.yaml", "a=1"], "lr=1.yaml", ["a=1"]),
        (["./lr=1.yaml"], "./lr=1.yaml", []),
        (["~/c.yaml"], "/home/me/c.yaml", []),
        (["--config", "~/c.yaml"], "/home/me/c.yaml", []),
    ],
)
def test_config_arguments(
    arguments: list[str], file: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.named_config(parsed(*arguments)) == (file, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: missing; expected a configuration file"),
        (["a=1"], "--config: missing; expected a configuration file"),
        (["--config", "c.yaml", "d.yaml"], "'d.yaml': 'c.yaml' is the configuration already"),
        (["c.yaml", "train.steps"], "'train.steps': 'c.yaml' is the configuration already"),
        (["--config", "c.yaml", "--config", "d.yaml"], "'d.yaml': 'c.yaml' is the configuration"),
        (["gs://bucket/c.yaml"], "'gs://bucket/c.yaml' is a URL"),
        (["c.yaml", "--unknown", "a=1"], "unrecognized arguments: --unknown"),
        (["c.yaml", "--seed"], "--seed: expected one argument"),
        (["c.yaml", "--seed", str(2**63)], "--seed: expected less than 4294967296, got '92233"),
        (["c.yaml", "--seed", "9" * 5000], "--seed: "),
        (["c.yaml", "--seed", "-1"], "--seed: expected greater than or equal to 0, got '-1'"),
        (["c.yaml", "--seed", "x"], "--seed: expected a valid integer"),
        (["c.yaml", "--peer-timeout", "0"], "--peer-timeout: expected greater than or equal to 1"),
        (["c.yaml", "--adapter", "s3://b/a"], "--adapter: 's3://b/a' is a URL"),
        (["c.yaml", "--adapter", ""], "--adapter: expected at least 1 character, got ''"),
        (["c.yaml", "--adapter", "a\0"], r"--adapter: 'a\x00' has a zero byte"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        cli.named_config(parsed(*arguments))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("command", [*cli.VERBS])
def test_paths_of_every_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command takes a URL for a folder, or `~` for one of that name, whichever option it is."""
    kinds = {}

    def parse_args(parser: argparse.ArgumentParser, *_: object) -> None:
        kinds.update({a.dest: a for a in parser._actions if a.metavar and a.dest != "arguments"})
        raise InputError("seen")

    monkeypatch.setattr(cli.Parser, "parse_args", parse_args)
    if command == "harness":  # its arguments are those of another library
        return
    assert importlib.import_module(f"esft_jax.{command}").main([]) == 2
    assert capsys.readouterr().err == "error: seen\n"
    for name, action in kinds.items():
        if action.metavar in ("FILE", "FOLDER", "DIR", "PATH", "MODEL") and name != "config":
            assert action.type is not None, name
            with pytest.raises(argparse.ArgumentTypeError, match="is a URL"):
                action.type("gs://bucket/x")
        if action.metavar in ("N", "K", "I", "SEED", "S", "T", "P", "TOKENS", "SECONDS"):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type("1" * 5000)


def test_troubles_of_the_system_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(PermissionError(13, "Permission denied", "/secret/run")) == 1
    assert capsys.readouterr().err == "error: /secret/run: Permission denied\n"
    assert raising(OSError(28, "No space left on device", 3)) == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    with pytest.raises(OSError, match="of a library"):
        raising(OSError("of a library"))
    assert raising(InputError("a\nb: \x1b[31m\u2028")) == 2
    assert capsys.readouterr().err == "error: a\\nb: \\x1b[31m\\u2028\n"


SAY = (
    "import sys; from esft_jax import cli\n"
    "from esft_jax.terminal import Terminal\n"
    "@cli.command\n"
    "def main(argv):\n"
    "    terminal = Terminal()\n"
    "    terminal.say(argv[0] * 3)\n"
    "    for _ in range(int(argv[1])): terminal.say('x' * 1000)\n"
    "raise SystemExit(main(None))"
)


def say(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", SAY, *arguments]
    return subprocess.run(command, **{"capture_output": True} | options)


def test_a_terminal_without_the_letters() -> None:
    for environment in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = say("ü[b]:smile:", "0", env=os.environ | environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == rb"\xfc[b]:smile:" * 3 + b"\n"


def test_arguments_that_are_no_text() -> None:
    done = say(b"\xff", "0")
    assert done.returncode == 2
    assert done.stderr == rb"error: argument '\udcff': expected UTF-8 text" + b"\n"


def test_nobody_reads_the_output() -> None:
    for count in ("0", "1000"):  # once at the end, once while writing
        reader, writer = os.pipe()
        os.close(reader)
        done = say("x", count, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert done.returncode == 1
        assert done.stderr == (
            b"error: the output was closed by its reader; the command has stopped\n"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_output_to_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        done = say("x", "1000", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


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
    with pytest.raises(InputError, match=message):
        cli.open_config(parsed("--config", "c.yaml", *options))


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


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("tain", "'tain': unknown verb; did you mean train? Expected one of init, convert, "),
        ("Report", "'Report': unknown verb; did you mean report? Expected one of init, "),
        ("xyz", "'xyz': unknown verb; expected one of init, convert, "),
        ("", "'': unknown verb; expected one of init, convert, "),
    ],
)
def test_unknown_verb(verb: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert esft_jax.__version__ == version("esft-jax")
    expected = f"esft_jax {esft_jax.__version__} (JAX {version('jax')}, Python 3."
    assert capsys.readouterr().out.startswith(expected)


def test_the_package_lists_its_verbs_without_importing_jax() -> None:
    code = (
        "import runpy, sys; sys.argv = ['-m']\n"
        "try: runpy.run_module('esft_jax', run_name='__main__')\n"
        "finally: assert 'jax' not in sys.modules, 'jax was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb, text in cli.VERBS.items():
        assert f"{verb:<10}{text}" in result.stdout
