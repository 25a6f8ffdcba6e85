"""Check on the accelerator at hand, or the CPU, that all kernels of a run compute what they should.

Every kernel and its gradients are compared with float64 on the host, and a small training step with
the CPU; kernels are timed. Without a configuration, layers of two well-known models are checked. No
weights or data are read. Exits with 1 if something is wrong.
"""

import json
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from esft_jax.checking.check import Finding
from esft_jax.checking.kernel import RESULT
from esft_jax.checking.run import Report, check_run, default_configs
from esft_jax.cli import Parser, add_config_arguments, command, named_config, option
from esft_jax.config import load_config
from esft_jax.files import write_text_atomic
from esft_jax.terminal import Terminal
from esft_jax.values import Count, LocalPath


@command
def main(argv: Sequence[str]) -> int:
    """Run `python -m esft_jax.selfcheck`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser, distributed=False)
    parser.add_argument(
        "--experts-per-layer",
        metavar="N",
        type=option(Count),
        help="experts to assume where none are chosen yet (default: a tenth of them)",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=option(LocalPath), help="write what was found, too"
    )
    args = parser.parse_args(argv)
    if args.config or args.arguments:
        configs = [load_config(*named_config(args))]
    else:
        configs = list(default_configs())
    console, reports = Terminal(), []
    for config in configs:
        console.say(f"{config.model}: checking, for some minutes ...")
        report = check_run(config, args.experts_per_layer)
        reports.append(report)
        console.print(_table(report))
    if args.json:
        found = [report.to_json() for report in reports]
        write_text_atomic(args.json, json.dumps(found, indent=2))
    problems = [problem for report in reports for problem in report.problems]
    count = sum(len(report.findings) for report in reports)
    if not problems:
        console.say(f"All {count} checks are right.")
        return 0
    console.say(f"{len(problems)} of {count} checks are wrong:")
    for problem in problems:
        console.say(f"- {problem}")
    return 1


def _table(report: Report) -> Table:
    title = f"{report.described}; on {report.device}, {report.seconds:.0f} s"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("check", "type", "by"):
        table.add_column(name)
    for name in ("error", "allowed", "ms", "of peak", "of least"):
        table.add_column(name, justify="right")
    before: Finding | None = None
    for finding in report.findings:
        style = "bold red" if finding.problem else None
        table.add_row(*_row(finding, before), style=style)
        before = finding
    return table


def _row(finding: Finding, before: Finding | None) -> list[str]:
    """The cells of a finding; what it has in common with the one before is not said again."""
    what = finding.what if finding.part == RESULT else f"{finding.what}: {finding.part}"
    named = [what, finding.dtype, finding.implementation]
    if before and (before.what, before.dtype) == (finding.what, finding.dtype):
        named = [f"  {finding.part}", "", ""]
    if finding.note:
        return [*named, finding.note]
    measured = [f"{finding.error:.1e}", f"{finding.tolerance:.1e}"]
    time = finding.time
    if time is None:
        return [*named, *measured, "", "", ""]
    shares = (time.share, None if time.least is None else time.seconds / time.least)
    forms = ("{:.1%}", "{:.1f} x")
    texts = [
        "unknown" if share is None else form.format(share)
        for share, form in zip(shares, forms, strict=True)
    ]
    return [*named, *measured, f"{time.seconds * 1e3:.3g}", *texts]


if __name__ == "__main__":
    sys.exit(main(None))
