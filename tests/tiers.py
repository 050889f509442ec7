"""Long parametrisations whose values repeat one law: some are tried in every run, the others in the tier `slow`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], always: Callable[[Any], bool]) -> list[Any]:
    """The values as parameters, those that `always` does not take marked `slow`; a tuple is several parameters."""
    found = [(value, always(value)) for value in values]
    assert any(kept for _, kept in found) and not all(kept for _, kept in found)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if kept else pytest.mark.slow
        )
        for value, kept in found
    ]
