"""Where things are. Defaults hang on the workspace; a path that a person types is relative to where they stand."""

import os
from pathlib import Path


def workspace() -> Path:
    """The folder that holds ``training_data/`` and ``weight/``.

    ``$ETUDE_HOME`` if it is set, else the checkout that this package runs from, else the working directory.
    """
    if home := os.environ.get("ETUDE_HOME"):
        return Path(home).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "train").is_dir():
        return checkout
    return Path.cwd()


def training_data(relative: str) -> str:
    """A path under the workspace's ``training_data/``."""
    return str(workspace() / "training_data" / relative)


def weight(relative: str) -> str:
    """A path under the workspace's ``weight/``."""
    return str(workspace() / "weight" / relative)


def typed(path: str | Path) -> str:
    """``path`` as a person standing in the working directory would type it: the shorter of its two forms."""
    path = str(path)
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive on Windows
        return path
    return relative if len(relative) < len(path) else path
