"""What all commands share, and `esft`, the one script that groups them.

`esft VERB ...` is the same as `python -m esft_jax.VERB ...`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence

from esft_jax.config import RunConfig, load_config
from esft_jax.errors import InputError, RunFailed
from esft_jax.huge_pages import restart_with_huge_pages

VERBS = {
    "convert": "write a Hugging Face checkpoint as a sharded Orbax checkpoint",
    "score": "measure how relevant each expert is to a task",
    "select": "choose the experts to train from their scores",
    "report": "show which experts a task needs, why, how sure that is, and what it costs",
    "plan": "see whether a run fits a TPU slice or GPUs, without having them",
    "train": "train the chosen experts, or the whole model",
    "sweep": "compare methods on tasks, in a table of runs",
    "evaluate": "let a model complete task prompts, and judge the completions",
    "harness": "run the tasks of lm-evaluation-harness on a model",
    "generate": "let a model complete one prompt",
    "export": "merge an adapter into its base as a Hugging Face folder",
}


def command(
    main: Callable[[Sequence[str] | None], int | None],
) -> Callable[[Sequence[str] | None], int]:
    """Turn the body of a command into a `main` that returns an exit code: the body's, or 0.

    Bad input is one line on stderr and code 2, a run that cannot go on, for lack of memory too, is
    one line and code 1, an interrupt is code 130; any other exception is a defect of ours and keeps
    its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            from esft_jax.memory import out_of_memory

            failed = out_of_memory(error)
            if failed is None:
                raise
            print(f"error: {failed}", file=sys.stderr)
            return 1

    return run


def add_config_arguments(parser: argparse.ArgumentParser, *, distributed: bool = True) -> None:
    """Add what `open_config` reads: `--config FILE`, `key=value` overrides, `--distributed`.

    Args:
        distributed: the command can run on several hosts together.
    """
    parser.add_argument("--config", metavar="FILE", required=True, help="run configuration (YAML)")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="replaces a value of the configuration, such as train.steps=100",
    )
    if distributed:
        add_process_arguments(parser)


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
    group.add_argument("--processes", metavar="N", type=int, help="how many there are")
    group.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")
    group.add_argument(
        "--peer-timeout",
        metavar="SECONDS",
        type=int,
        default=100,
        help="end the run when one of the others has not been heard of for so long (100)",
    )


def open_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments name, with JAX's devices set up for it.

    Raises:
        InputError: in the configuration, or in what is said of other processes.
    """
    from esft_jax.mesh import split_cpu

    _check_processes(args)
    config = load_config(args.config, args.overrides)
    split_cpu(config.mesh.cpu_devices)
    join_processes(args)
    return config


def join_processes(args: argparse.Namespace) -> None:
    """Join the other processes, if the arguments say so, before JAX touches its devices.

    Raises:
        InputError: in what is said of other processes.
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
    if not 0 <= args.process < args.processes:
        raise InputError(
            f"--process: {args.process}; expected 0 to {args.processes - 1} (--processes)"
        )
    if ":" not in args.coordinator:
        raise InputError(f"--coordinator: {args.coordinator!r}; expected HOST:PORT")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `esft VERB ...`; the verb's module, and JAX with it, is imported only then."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="esft",
        description="Expert-Specialized Fine-Tuning of Mixture-of-Experts language models.",
        epilog="\n".join(["verbs:", *(f"  {verb:<10}{text}" for verb, text in VERBS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="esft [-h] VERB ...",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="`esft VERB --help` says more")
    # Everything after the verb belongs to the verb.
    verb = parser.parse_args(arguments[:1]).verb
    if argv is None and verb in ("train", "sweep"):
        restart_with_huge_pages()
    sys.argv[0] = f"esft {verb}"  # the name of the command in its own usage line
    exit_code: int = importlib.import_module(f"esft_jax.{verb}").main(arguments[1:])
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
