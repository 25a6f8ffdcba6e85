"""What of a GPU's memory a plan takes for granted."""

import pytest

from esft_jax.accelerators import GPUS
from esft_jax.errors import InputError
from esft_jax.planning.gpu_memory import fraction_for, granted, memory_fraction

NAMES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_jax_takes_three_quarters_unless_it_is_told_otherwise(monkeypatch) -> None:
    assert memory_fraction() == 0.75
    for name in NAMES:
        with monkeypatch.context() as patch:
            patch.setenv(name, ".9")
            assert memory_fraction() == 0.9


@pytest.mark.parametrize("text", ["most", "0", "-0.5", "1.5", "nan"])
@pytest.mark.parametrize("name", NAMES)
def test_another_share_is_refused_by_the_name_of_the_variable(name, text, monkeypatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(InputError, match=f"^{name}: '{text}'; expected a number above 0"):
        memory_fraction()


def test_two_shares_are_refused_as_jax_does(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "0.9")
    with pytest.raises(InputError, match=f"{NAMES[1]} is set, too"):
        memory_fraction()


@pytest.mark.parametrize("name", GPUS)
def test_what_is_granted_is_less_than_there_is(name) -> None:
    gpu = GPUS[name]
    assert granted(gpu, 0.75) == int(0.75 * gpu.memory)
    assert granted(gpu, 0.99) <= granted(gpu, 1.0) == gpu.memory - 2**30
    for needed in (gpu.memory // 2, granted(gpu, 0.8), granted(gpu, 0.9) + 1):
        fraction = fraction_for(gpu, needed)
        assert granted(gpu, fraction - 0.01) < needed <= granted(gpu, fraction)
    assert fraction_for(gpu, gpu.memory - 2**29) is None
