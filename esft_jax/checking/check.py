"""A kernel's result and gradients against float64, and how long they take."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from esft_jax.accelerators import Peaks
from esft_jax.checking.experts import Make, expert_kernels
from esft_jax.checking.kernel import RESULT, Kernel, Limits, Subject, to_host
from esft_jax.checking.reference import Array64
from esft_jax.checking.tokens import XLA, token_kernels
from esft_jax.checking.tolerance import error, tolerance
from esft_jax.errors import InputError, one_line
from esft_jax.ops.platform import KERNELS, portable

GRADIENTS = "gradients"
# A measurement lasts so many seconds at least, by several calls if one does not; all of them
# together about so long, but there are a few in any case.
_SHORTEST, _TOGETHER = 0.01, 1.0
_FEWEST, _MOST = 3, 11


@dataclass(frozen=True)
class Time:
    """How long a kernel takes with rows as long as the run's.

    Attributes:
        seconds: median of several calls.
        shape: its sizes, in words.
        share: operations per second, of the device's peak in bfloat16; None if that is unknown.
        least: seconds that it must take by the device's peaks, operands and results moved once;
            None if these are unknown.
    """

    seconds: float
    shape: str
    share: float | None
    least: float | None


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        what: the kernel, or the training step.
        part: `result`, `gradients`, or what of a step.
        shape: sizes, in words.
        dtype: of what goes through it.
        implementation: what computes it.
        error: the largest one; infinity if there is no finite result.
        tolerance: what it may be.
        worst: which of several results it is of.
        time: in the run's type alone.
        problem: what is wrong, what was expected and what to do; None if nothing is.
        note: why there is nothing to compare, if so.
    """

    what: str
    part: str
    shape: str
    dtype: str
    implementation: str
    error: float
    tolerance: float
    worst: str = ""
    time: Time | None = None
    problem: str | None = None
    note: str | None = None


def check_kernels(subject: Subject, limits: Limits, peaks: Peaks | None) -> Iterator[Finding]:
    """Check each kernel that a run would use, in its type and in float32.

    Args:
        peaks: of the device, if they are known.
    """
    for dtype in dict.fromkeys((subject.dtype, "float32")):
        for kernels in (expert_kernels, token_kernels):
            for make in kernels(subject, dtype, limits):
                yield from check_kernel(make, dtype == subject.dtype, peaks)


def precision(dtype: str) -> AbstractContextManager[Any]:
    """Products in float32 are exact to float32. By default accelerators round their operands."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def check_kernel(make: Make, timed: bool, peaks: Peaks | None) -> Iterator[Finding]:
    """Check a kernel's result, and its gradients.

    Args:
        timed: it is in the run's type: it has to work, and is timed.
        peaks: see `check_kernels`.
    """
    kernel = make(True)
    exact = kernel.exact()
    try:
        errors = _errors(kernel, exact)
    except InputError as refused:
        if timed:
            raise
        note = f"not on this device: {one_line(refused)}"
        yield _finding(kernel, RESULT, "", 0.0, math.inf, note=note)
        return
    except Exception as failed:  # whatever a compiler or a driver says is a finding
        said = f"it does not run: {one_line(failed)}; {_advice(kernel, exact)}"
        problem: str | None = f"{_named(kernel)}: {said}"
        yield _finding(kernel, RESULT, "", math.inf, 0.0, problem=problem)
        return
    times = _times(make(False), peaks) if timed else {}
    bounds = {name: _bound(kernel, name) for name in errors}
    for part, names in ((RESULT, [RESULT]), (GRADIENTS, [n for n in errors if n != RESULT])):
        worst = max(names, key=lambda name: errors[name] / bounds[name])
        problem = None
        if errors[worst] > bounds[worst]:
            of = part if part == RESULT else f"gradient of {worst}"
            problem = (
                f"{_named(kernel)}: {of}: error {errors[worst]:.2g}; expected at most "
                f"{bounds[worst]:.2g}; {_advice(kernel, exact)}"
            )
        yield _finding(
            kernel, part, worst, errors[worst], bounds[worst], times.get(part), problem=problem
        )


def _finding(
    kernel: Kernel,
    part: str,
    worst: str,
    found: float,
    bound: float,
    time: Time | None = None,
    **said: str | None,
) -> Finding:
    return Finding(
        kernel.name,
        part,
        kernel.shape,
        kernel.dtype,
        kernel.implementation,
        found,
        bound,
        worst,
        time,
        **said,
    )


def _named(kernel: Kernel) -> str:
    return f"{kernel.name} ({kernel.dtype}, {kernel.shape}, by {kernel.implementation})"


def _errors(kernel: Kernel, exact: dict[str, Array64]) -> dict[str, float]:
    """Of the result and of each gradient, by name."""
    with precision(kernel.dtype):
        result = jax.jit(kernel.apply)(kernel.operands, kernel.given)
        found = jax.jit(kernel.gradients())(kernel.operands, kernel.given, kernel.cotangent)
    found = {RESULT: result} | found
    return {
        name: error(kernel.tiled(to_host(array)), kernel.tiled(exact[name]))
        for name, array in found.items()
    }


def _bound(kernel: Kernel, name: str) -> float:
    return tolerance(kernel.narrowest.get(name, kernel.dtype), kernel.terms)


def _advice(kernel: Kernel, exact: dict[str, Array64]) -> str:
    """What to do about a kernel that is wrong."""
    if kernel.implementation == XLA:
        return (
            f"it is plain XLA, of JAX {jax.__version__} on {jax.devices()[0].device_kind}: try "
            "another version of JAX, or of the driver"
        )
    try:
        with portable():
            errors = _errors(kernel, exact)
    except Exception as failed:
        return f"plain XLA does not run either: {one_line(failed)}"
    if all(found <= _bound(kernel, name) for name, found in errors.items()):
        return f"plain XLA is right: {KERNELS}=xla in the environment takes it, at its speed"
    return "plain XLA is wrong, too: try another version of JAX, or of the driver"


def _times(kernel: Kernel, peaks: Peaks | None) -> dict[str, Time]:
    """Of the result, and of the gradients."""
    runs: dict[str, Callable[..., Any]] = {RESULT: kernel.apply, GRADIENTS: kernel.gradients()}
    operands = (kernel.operands, kernel.given)
    found = {}
    for (part, run), operations in zip(runs.items(), kernel.operations, strict=True):
        given = operands if part == RESULT else (*operands, kernel.cotangent)
        given = jax.device_put(given)
        compiled = partial(jax.jit(run).lower(*given).compile(), *given)
        seconds = median_seconds(compiled)
        share = least = None
        if peaks is not None:
            moved = sum(leaf.nbytes for leaf in jax.tree.leaves((given, compiled())))
            share = operations / seconds / peaks.flops
            least = max(operations / peaks.flops, moved / peaks.memory)
        found[part] = Time(seconds, kernel.shape, share, least)
    return found


def median_seconds(run: Callable[[], Any]) -> float:
    """Of a call, on a device that is given the next one before it has done the last."""

    def measure(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    jax.block_until_ready(run())
    first = measure(1)
    calls = max(1, math.ceil(_SHORTEST / first))
    rounds = min(max(_FEWEST, int(_TOGETHER / (first * calls))), _MOST)
    return statistics.median(measure(calls) for _ in range(rounds))
