"""Grouped matrix products against a dense one of equal FLOPs, and against torch.

    python benchmarks/grouped_matmul.py

For the layers in `SHAPES`: the products (`forward`), the gradient by the rows (`dX`), by all
matrices (`dW`), and by the matrices of the tuned experts alone, which are a bank of their own (`dW
tuned`; a tenth of the experts, those with the most rows). Group sizes are those of a router whose
preferences among experts are log-normal. All contenders multiply the same arrays.

`dense` multiplies as many rows with one matrix, once with JAX and once with torch; ratios are to
the faster of the two. Contenders take turns; medians are reported. Prints Markdown, writes JSON.
Elsewhere than on a CPU, torch is left out.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measuring import alternate, available_bytes, machine, pin, print_table, write_report

from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.moe.grouped_matmul import grouped_matmul

OURS = "esft_jax"  # with the name of an implementation behind it where one was asked for
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative to the largest value of a result


@dataclass(frozen=True)
class Shape:
    """A layer of E experts of D x F, K of them per token, and how many tokens to take."""

    experts: int
    width: int
    expert_width: int
    top_k: int
    tokens: int


SHAPES = {
    "DeepSeek-V2-Lite": Shape(64, 2048, 1408, 6, 1024),
    "fine-grained": Shape(128, 2048, 512, 8, 1024),
    "coarse": Shape(8, 4096, 14336, 2, 256),
    "train_step.py": Shape(64, 512, 256, 6, 2048),
}
OPERATIONS = ("forward", "dX", "dW", "dW tuned")


@dataclass(frozen=True)
class Problem:
    """One layer's arrays: N rows sorted by group, tuned groups first.

    Attributes:
        x: `[N, D]`.
        grad: gradient of the products, `[N, F]`.
        bank: `[E, D, F]`; the first `tuned` matrices are the tuned experts'.
        sizes: rows of each group.
    """

    x: jax.Array
    grad: jax.Array
    bank: jax.Array
    sizes: np.ndarray
    tuned: int

    @property
    def tuned_rows(self) -> int:
        """Rows of the tuned groups, which are the first ones."""
        return int(self.sizes[: self.tuned].sum())

    def flops(self, operation: str) -> int:
        """Multiplications and additions that an operation cannot do without."""
        rows = self.tuned_rows if operation == "dW tuned" else len(self.x)
        return 2 * rows * self.bank.shape[1] * self.bank.shape[2]


def draw(shape: Shape, dtype: str) -> Problem:
    """Random arrays, and group sizes as a router makes them."""
    random = np.random.default_rng(0)
    # The K largest of popularity plus Gumbel noise: a draw without replacement.
    popularity = random.normal(scale=0.5, size=shape.experts)
    noise = random.gumbel(size=(shape.tokens, shape.experts))
    chosen = np.argsort(-(popularity + noise), axis=1)[:, : shape.top_k]
    sizes = np.sort(np.bincount(chosen.reshape(-1), minlength=shape.experts))[::-1]
    keys = jax.random.split(jax.random.key(0), 3)
    rows = shape.tokens * shape.top_k
    x, grad, bank = (
        jax.jit(jax.random.normal, static_argnums=(1, 2))(key, size, dtype)
        for key, size in zip(
            keys,
            (
                (rows, shape.width),
                (rows, shape.expert_width),
                (shape.experts, shape.width, shape.expert_width),
            ),
            strict=True,
        )
    )
    return Problem(x, grad, bank, sizes.astype(np.int32), max(1, round(shape.experts * 0.1)))


def needed_bytes(shape: Shape, dtype: str) -> int:
    """The bank, its parts as two banks, three results of its size, and the rows."""
    bank = shape.experts * shape.width * shape.expert_width
    rows = shape.tokens * shape.top_k * (shape.width + shape.expert_width)
    return jnp.dtype(dtype).itemsize * (5 * bank + 4 * rows)


def jax_contenders(
    problem: Problem, implementations: Sequence[str | None]
) -> dict[str, dict[str, Callable[[], Any]]]:
    """By operation and name. Each call waits for its result."""
    x, grad, bank, tuned = problem.x, problem.grad, problem.bank, problem.tuned
    sizes, matrix, rows = jnp.asarray(problem.sizes), bank[0], problem.tuned_rows
    banks = bank[:tuned], bank[tuned:]

    def ready(function: Callable, *arguments: Any) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    # XLA leaves out products that are not asked for.
    def pull(function: Callable, at: Any, grad: jax.Array) -> Any:
        return jax.vjp(function, at)[1](grad)[0]

    found: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {"dense, JAX": ready(lambda x, w: x @ w, x, matrix)},
        "dX": {"dense, JAX": ready(lambda g, w: g @ w.T, grad, matrix)},
        "dW": {"dense, JAX": ready(lambda x, g: x.T @ g, x, grad)},
        "dW tuned": {"dense, JAX": ready(lambda x, g: x.T @ g, x[:rows], grad[:rows])},
    }
    for implementation in implementations:
        name = OURS if implementation is None else f"{OURS} {implementation}"

        def product(
            x: jax.Array,
            tuned: jax.Array,
            frozen: jax.Array,
            sizes: jax.Array,
            implementation: Any = implementation,
        ) -> jax.Array:
            return grouped_matmul(x, (tuned, frozen), sizes, implementation=implementation)

        found["forward"][name] = ready(product, x, *banks, sizes)
        found["dX"][name] = ready(
            lambda x, t, f, s, g, product=product: pull(lambda x: product(x, t, f, s), x, g),
            *(x, *banks, sizes, grad),
        )
        found["dW"][name] = ready(
            lambda x, w, s, g, implementation=implementation: pull(
                lambda w: grouped_matmul(x, (w,), s, implementation=implementation), w, g
            ),
            *(x, bank, sizes, grad),
        )
        found["dW tuned"][name] = ready(
            lambda x, t, f, s, g, product=product: pull(lambda t: product(x, t, f, s), t, g),
            *(x, *banks, sizes, grad),
        )
    return found


def torch_contenders(problem: Problem) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """A loop of matrix products, torch's own grouped product, and the dense one."""
    x, grad, bank = (torch.from_dlpack(a) for a in (problem.x, problem.grad, problem.bank))
    ends = np.cumsum(problem.sizes).tolist()
    offsets = torch.tensor(ends, dtype=torch.int32)
    groups = [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]
    matrices, tuned, rows = bank.unbind(), problem.tuned, problem.tuned_rows

    def product(rows: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        out = rows.new_empty(len(rows), matrices[0].shape[1])
        for matrix, group in zip(matrices, groups, strict=True):
            torch.mm(rows[group], matrix, out=out[group])
        return out

    def weight_gradient(count: int) -> torch.Tensor:
        out = x.new_empty(count, *bank.shape[1:])
        for total, group in zip(out.unbind(), groups, strict=False):
            torch.mm(x[group].T, grad[group], out=total)
        return out

    grouped = torch.nn.functional.grouped_mm
    return {
        "forward": {
            "dense, torch": lambda: x @ matrices[0],
            "torch loop": lambda: product(x, matrices),
            "torch grouped_mm": lambda: grouped(x, bank, offs=offsets),
        },
        "dX": {
            "dense, torch": lambda: grad @ matrices[0].T,
            "torch loop": lambda: product(grad, [matrix.T for matrix in matrices]),
            "torch grouped_mm": lambda: grouped(grad, bank.transpose(1, 2), offs=offsets),
        },
        "dW": {
            "dense, torch": lambda: x.T @ grad,
            "torch loop": lambda: weight_gradient(len(bank)),
            "torch grouped_mm": lambda: grouped(x.T, grad, offs=offsets),
        },
        "dW tuned": {
            "dense, torch": lambda: x[:rows].T @ grad[:rows],
            "torch loop": lambda: weight_gradient(tuned),
            "torch grouped_mm": lambda: grouped(x[:rows].T, grad[:rows], offs=offsets[:tuned]),
        },
    }


def check(contenders: dict[str, Callable[[], Any]], tolerance: float) -> None:
    """Raise if contenders other than the dense ones do not agree."""
    first = None
    for name, run in contenders.items():
        if name.startswith("dense"):
            continue
        result = np.asarray(jnp.from_dlpack(run()), np.float32)
        first = result if first is None else first
        error = np.abs(result - first).max() / np.abs(first).max()
        if not error < tolerance:
            raise SystemExit(f"{name} differs from the others by {error:.1e} of the largest value")


def measure(
    shape: Shape, dtype: str, implementations: Sequence[str | None], rounds: int
) -> dict[str, Any]:
    """Seconds and GFLOP/s of every contender, by operation."""
    problem = draw(shape, dtype)
    contenders = jax_contenders(problem, implementations)
    if jax.default_backend() == "cpu":
        for operation, others in torch_contenders(problem).items():
            contenders[operation] |= others
    found: dict[str, Any] = {}
    for operation, runs in contenders.items():
        check(runs, TOLERANCE[dtype])
        seconds = alternate(runs, rounds)
        flops = problem.flops(operation)
        found[operation] = {
            name: {"seconds": s, "gflops": flops / s / 1e9} for name, s in seconds.items()
        }
    return found


def table_rows(shape: str, operations: dict[str, Any]) -> list[list[str]]:
    """GFLOP/s, and ratios to the faster dense product and to the best torch version."""
    rows = []
    for operation, figures in operations.items():
        rates = {name: values["gflops"] for name, values in figures.items()}
        dense = max(rate for name, rate in rates.items() if name.startswith("dense"))
        rivals = [rate for name, rate in rates.items() if name.startswith("torch")]
        for name, rate in rates.items():
            ours = name.startswith(OURS) and rivals
            ratio = f"{rate / max(rivals):.2f}" if ours else ""
            rows.append([shape, operation, name, f"{rate:.0f}", f"{rate / dense:.2f}", ratio])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="tokens of every shape, instead of its own")
    parser.add_argument("--implementations", nargs="+", help="default: what the package chooses")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("build/grouped_matmul.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    torch.set_num_threads(args.threads)
    before, results, rows = machine(args.threads), {}, []
    for name in args.shapes:
        shape = SHAPES[name]
        if args.tokens:
            shape = Shape(**asdict(shape) | {"tokens": args.tokens})
        needed = needed_bytes(shape, args.dtype)
        if jax.default_backend() == "cpu" and needed > available_bytes():
            print(f"{name}: left out; it needs {needed / 2**30:.1f} GiB of memory")
            continue
        operations = measure(shape, args.dtype, args.implementations or [None], args.rounds)
        results[name] = {"shape": asdict(shape), "operations": operations}
        rows += table_rows(name, operations)
    print_table(["layer", "operation", "contender"], ["GFLOP/s", "of dense", "of torch"], rows)
    report = {"before": before, "after": machine(args.threads), "dtype": args.dtype}
    write_report(args.output, report | {"layers": results})


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
