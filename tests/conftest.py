"""Test session: eight CPU devices, a compilation cache, and the reference's golden data."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Set up JAX through the environment: nothing has imported it yet, and subprocesses inherit."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    # Tests use what they bring along, never the network.
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def esft_reference() -> Path:
    """A checkout of the ESFT reference (golden data): the folder in ESFT_REFERENCE."""
    folder = os.environ.get("ESFT_REFERENCE")
    if not folder:
        pytest.skip("golden data: set ESFT_REFERENCE to a checkout of github.com/deepseek-ai/ESFT")
    return Path(folder)
