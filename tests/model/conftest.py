import pytest

from tests.model.parity import LITE, V2, make_pair


@pytest.fixture(scope="session")
def lite(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair") / "lite", **LITE)


@pytest.fixture(scope="session")
def v2(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair") / "v2", **V2)


@pytest.fixture(scope="session", params=["lite", "v2"])
def pair(request):
    return request.getfixturevalue(request.param)
