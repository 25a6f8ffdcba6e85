import numpy as np
import pytest

from tests.checkpoint.checkpoints import save, torch_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A transformers model and the folder it was saved to; read only."""
    model = torch_model()
    return model, save(model, tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 12))
