"""Libraries that only some rewards need."""

from __future__ import annotations

from importlib.util import find_spec


def check_installed(reward: str, extra: str, *libraries: str) -> None:
    """Raises ImportError, which says what to install, where one of the libraries is missing."""
    for library in libraries:
        if find_spec(library) is None:
            raise ImportError(f"the {reward} reward needs {library}: pip install '{extra}'", name=library)
