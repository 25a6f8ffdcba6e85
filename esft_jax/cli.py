"""What all commands share, and `esft`, the one script that groups them.

`esft VERB ...` is the same as `python -m esft_jax.VERB ...`, and `esft` as `python -m esft_jax`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

import esft_jax
from esft_jax.config import QuantiseConfig, RunConfig, load_config
from esft_jax.errors import InputError, RunFailed, shown
from esft_jax.files import local_path
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.ops.quantisation import Quantisation
from esft_jax.strict_yaml import explain
from esft_jax.values import Count, CountOrZero

VERBS = {
    "init": "write a quickstart: a small model, a task, and the configuration that trains it",
    "convert": "write a Hugging Face checkpoint as a sharded Orbax checkpoint",
    "data": "show training examples as they are rendered, and what of them is learned",
    "score": "measure how relevant each expert is to a task",
    "select": "choose the experts to train from their scores",
    "report": "show which experts a task needs, why, how sure that is, and what it costs",
    "plan": "see whether a run fits a TPU slice or GPUs, without having them",
    "selfcheck": "check every kernel of a run on the accelerator at hand",
    "train": "train the chosen experts, or the whole model",
    "sweep": "compare methods on tasks, in a table of runs",
    "evaluate": "let a model complete task prompts, and judge the completions",
    "harness": "run the tasks of lm-evaluation-harness on a model",
    "generate": "let a model complete a prompt, or a file of them",
    "chat": "talk to a model in the terminal, alone or beside its base",
    "adapters": "list, show, compare and combine adapters, or take one out of a model",
    "push": "publish an adapter or an exported model on the Hugging Face hub",
    "export": "merge an adapter into its base as a Hugging Face folder",
}


def command(
    main: Callable[[Sequence[str]], int | None],
) -> Callable[[Sequence[str] | None], int]:
    """Turn the body of a command into a `main` that returns an exit code: the body's, or 0.

    The body gets the arguments; of `main`, None stands for the command line. Bad input is one line
    on stderr and code 2; a run that cannot go on, for lack of memory too, or what the operating
    system refuses, is one line and code 1; an interrupt is code 130; any other exception is a
    defect of the package and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Letters that a terminal cannot show must not end the command.
                stream.reconfigure(errors="backslashreplace")
        try:
            with _flushed_output():
                arguments = [_as_text(a) for a in (sys.argv[1:] if argv is None else argv)]
                from esft_jax.processes import skip_absent_tpu

                skip_absent_tpu()
                return main(arguments) or 0
        except InputError as error:
            return _fail(str(error), 2)
        except RunFailed as error:
            return _fail(str(error), 1)
        except BrokenPipeError:
            return _fail("the output was closed by its reader; the command has stopped", 1)
        except OSError as error:
            if error.strerror is None:  # from a library, about something else
                raise
            # It may be a file descriptor, a number that tells the user nothing.
            named = isinstance(error.filename, str | bytes | os.PathLike)
            where = f"{os.fsdecode(error.filename)}: " if named else ""
            return _fail(f"{where}{error.strerror}", 1)
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            from esft_jax.memory import out_of_memory

            failed = out_of_memory(error)
            if failed is None:
                raise
            return _fail(str(failed), 1)

    return run


@contextlib.contextmanager
def _flushed_output() -> Iterator[None]:
    """Output that cannot be written fails here, not when the interpreter ends."""
    try:
        yield
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            # What is left in the buffer would fail again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            raise


def _as_text(argument: str) -> str:
    """An argument as UTF-8, whatever the locale says."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise InputError(f"argument {argument!a}: expected UTF-8 text") from None


def _fail(message: str, code: int) -> int:
    # One line, whatever the names in it.
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda m: ascii(m[0])[1:-1], message)
    print(f"error: {line}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Options and other arguments in any order; what is wrong with them is an `InputError`."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse` does, with `key=value` after options too."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one line; `argparse` would print the usage first."""
        raise InputError(message.removeprefix("argument "))


def option(kind: Any) -> Callable[[str], Any]:
    """What reads an option for `argparse`: text to a type of `esft_jax.config`, such as `Seed`."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def parse(text: str) -> Any:
        try:
            return adapter.validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(explain(error.errors(include_url=False)[0])) from None

    return parse


def quantisation(text: str) -> Quantisation:
    """What reads `--quantise` for `argparse`: the keys of a configuration's section `quantise`, as
    KEY=VALUE,...
    """
    keys = [field.name for field in dataclasses.fields(QuantiseConfig)]
    pairs = [pair.partition("=") for pair in text.split(",")]
    values = {key: value for key, _, value in pairs}
    if len(values) < len(pairs) or not values.keys() <= set(keys):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected KEY=VALUE,..., each of {', '.join(keys)} once at most"
        )
    try:
        config = TypeAdapter(QuantiseConfig).validate_strings(values)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        key = ".".join(map(str, mistake["loc"]))
        raise argparse.ArgumentTypeError(f"{key}: {explain(mistake)}") from None
    if config.chosen is None:
        raise argparse.ArgumentTypeError(f"{text!r}; expected experts or rest")
    return config.chosen


def add_config_arguments(parser: argparse.ArgumentParser, *, distributed: bool = True) -> None:
    """Add what `open_config` reads: the file, `key=value` overrides, `--distributed`.

    Args:
        distributed: the command can run on several hosts together.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="configuration (YAML); its name alone, without --config, does too",
    )
    parser.add_argument(
        "arguments",
        metavar="KEY=VALUE",
        nargs="*",
        help="replaces a value of the configuration, such as train.steps=100",
    )
    if distributed:
        add_process_arguments(parser)


def named_config(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The configuration file and the overrides that the arguments name.

    An argument is an override if it has a `=`, and no `/` before it; else it is the file.

    Raises:
        InputError: there is no file, or more than one.
    """
    overrides = [a for a in args.arguments if "=" in a and "/" not in a.partition("=")[0]]
    files = [*args.config, *(a for a in args.arguments if a not in overrides)]
    if not files:
        raise InputError("--config: missing; expected a configuration file")
    if len(files) > 1:
        raise InputError(
            f"{shown(files[1])}: {shown(files[0])} is the configuration already; expected "
            "KEY=VALUE, such as train.steps=100"
        )
    return local_path(files[0]), overrides


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `join_processes` reads: `--distributed` and who the others are."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this is one process of several: join the others first; who they are is known to TPU "
        "VMs, GKE and Slurm, and elsewhere said by the next three options",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", metavar="N", type=option(Count), help="how many there are")
    group.add_argument(
        "--process", metavar="I", type=option(CountOrZero), help="which one this is, from 0"
    )
    group.add_argument(
        "--peer-timeout",
        metavar="SECONDS",
        type=option(Count),
        default=100,
        help="end the run after this time without news of one of the others (100)",
    )


def open_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments name, with JAX's devices set up for it.

    Raises:
        InputError: in the configuration, or in the options about other processes.
    """
    from esft_jax.processes import split_cpu

    _check_processes(args)
    config = load_config(*named_config(args))
    split_cpu(config.mesh.cpu_devices)
    join_processes(args)
    return config


def join_processes(args: argparse.Namespace) -> None:
    """Join the other processes, if the arguments say so, before JAX touches its devices.

    Raises:
        InputError: in the options about other processes.
    """
    import jax

    _check_processes(args)
    if not args.distributed:
        return
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            heartbeat_timeout_seconds=args.peer_timeout,
            # A process that ends with an error waits for the others, too, before it goes.
            shutdown_timeout_seconds=args.peer_timeout,
        )
    except ValueError as error:
        raise InputError(
            f"--distributed: JAX finds no others ({error}); expected --coordinator, --processes "
            "and --process"
        ) from None


def _check_processes(args: argparse.Namespace) -> None:
    given = [args.coordinator, args.processes, args.process]
    if given == [None, None, None]:
        return
    if not args.distributed or None in given:
        raise InputError(
            "--coordinator, --processes and --process: expected all of them, with --distributed"
        )
    if args.process >= args.processes:
        raise InputError(
            f"--process: {args.process}; expected 0 to {args.processes - 1} (--processes)"
        )
    if not re.fullmatch(r".+:\d{1,5}", args.coordinator):
        raise InputError(f"--coordinator: {args.coordinator!r}; expected HOST:PORT")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `esft VERB ...`; the verb's module, and JAX with it, is imported only then."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="esft",
        description="Expert-Specialized Fine-Tuning of Mixture-of-Experts language models.",
        epilog="\n".join(["verbs:", *(f"  {verb:<10}{text}" for verb, text in VERBS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="esft [-h] [--version] VERB ...",
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument("verb", nargs="?", metavar="VERB", help="`esft VERB --help` says more")
    # Everything after the verb belongs to the verb.
    verb = parser.parse_args(arguments[:1]).verb
    if verb is None:
        parser.print_help()
        return 0
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {nearest[0]}? Expected" if nearest else "expected"
        return _fail(f"{shown(verb)}: unknown verb; {hint} one of {', '.join(VERBS)}", 2)
    if argv is None and verb in ("train", "sweep"):
        restart_with_huge_pages()
    sys.argv[0] = f"esft {verb}"  # the name of the command in its own usage line
    exit_code: int = importlib.import_module(f"esft_jax.{verb}").main(arguments[1:])
    return exit_code


def _versions() -> str:
    """The versions that the report of a defect needs."""
    python = ".".join(map(str, sys.version_info[:3]))
    return f"esft_jax {esft_jax.__version__} (JAX {metadata.version('jax')}, Python {python})"
