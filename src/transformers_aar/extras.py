"""Packages that only some jobs need, which the extras of the installation bring."""

from importlib.util import find_spec


def require_package(name: str, extra: str) -> None:
    """
    Raises:
        ValueError: where the package is missing, with the extra that installs it; meant to come before any work.
    """
    if find_spec(name) is None:
        raise ValueError(f"{name} is missing: in the clone, pip install -c constraints.txt '.[{extra}]' installs it.")
