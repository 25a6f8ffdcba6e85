"""What does not fit into memory is one line."""

import jax
import numpy as np
import pytest

from esft_jax import cli, memory
from esft_jax.errors import InputError


def too_large_for_numpy(argv: object) -> None:
    np.ones(2**60, np.uint8)


def too_large_for_jax(argv: object) -> None:
    jax.block_until_ready(jax.numpy.ones(2**50, np.uint8))


def too_large_for_a_program(argv: object) -> None:
    outer = jax.jit(lambda x: jax.numpy.sort(jax.numpy.outer(x, x), axis=0))
    jax.block_until_ready(outer(jax.numpy.ones(2**24)))


@pytest.mark.parametrize("body", [too_large_for_numpy, too_large_for_jax, too_large_for_a_program])
def test_memory_that_is_not_there_is_one_line(body, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(body)([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ") and "train.micro_batches" in line
    assert any(unit in line for unit in ("bytes", "EiB", "PiB"))


def test_other_errors_keep_their_traceback() -> None:
    for error in (ValueError("RESOURCE_EXHAUSTED"), jax.errors.JaxRuntimeError("INTERNAL: x")):
        assert memory.out_of_memory(error) is None


def test_what_surely_does_not_fit_is_refused(monkeypatch) -> None:
    available = memory.local_memory()
    assert available is not None and 2**26 < available < 2**50
    memory.check_fits(available, "it takes")
    with pytest.raises(InputError, match=r"it takes: 3,000.0 GB per device, of [\d,.]+ GB; "):
        memory.check_fits(3 * 10**12, "it takes")
