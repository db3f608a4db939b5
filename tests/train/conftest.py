"""Peace from the warnings of libraries that are compared against."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for module in ("torch", "transformers", "huggingface_hub"):
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{module}")
