"""The mutations of tests/mutations.py, which takes too long to run with the tests, still fit the code."""

import pytest

from tests.mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_a_mutation_changes_stands_exactly_once(name):
    mutation = MUTATIONS[name]
    assert (ROOT / "attacks" / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert (ROOT / "tests" / "attacks" / mutation.tests.split()[0]).is_file()
