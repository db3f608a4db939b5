"""Read by pytest before the library is imported: the environment of the tests, and the checker of annotated shapes."""

import gc

import pytest

from tests import shapes

# tracing makes many objects and few cycles: looked for after every 700, these cost a tenth of the tests
gc.set_threshold(50_000, 10, 10)
shapes.install()

SLOW_EXAMPLES = {
    "ches_jax.displacement.diagnose.diagnose",
    "ches_jax.forecast.group_run.groups",
    "ches_jax.forecast.run.forecast",
    "ches_jax.forecast.run.influence",
}
"""Docstrings whose example is a whole run, five CPU seconds and more: the fast tests of the same file make one too."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in SLOW_EXAMPLES:
            item.add_marker(pytest.mark.slow)
