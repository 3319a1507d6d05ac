"""One pool of four processes for all tests here."""

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool():
    pool = Pool(4)
    yield pool
    pool.close()
