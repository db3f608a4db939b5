"""pyarrow in a command that has no use for pandas, whose import takes longer than many a command computes.

At the first array that pyarrow makes it imports pandas, to know a ``Series`` when it meets one, and remembers whether
there is one. The command line lets it find none (``leave_pandas_out``); what asks for pandas by name (``to_pandas``)
makes pyarrow look again. The library never does this: pyarrow is its user's there.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _NoPandas(MetaPathFinder):
    """Finds that there is no pandas."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def leave_pandas_out() -> None:
    """Has pyarrow take pandas for absent, unless it is there already; for the command line alone."""
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    # not None in sys.modules: what Cython compiles of an import takes that for the module
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(finder)


def take_pandas_in() -> None:
    """Has pyarrow look for pandas again: from here on it is as it would have been without ``leave_pandas_out``."""
    import pyarrow as pa

    pa.table({}).to_pandas()


def python_rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or batch that others have written, as Python values.

    Without pandas pyarrow refuses times that are no whole microsecond.
    """
    if "[ns" in str(table.schema):
        take_pandas_in()
    return table.to_pylist()
