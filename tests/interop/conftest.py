"""The checkpoint and the adapter that are written in every format."""

import pytest

from tests.interop.models import random_adapter, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapted(base):
    """(adapted model, random adapter)."""
    return random_adapter(base)
