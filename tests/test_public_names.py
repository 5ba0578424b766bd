"""``import etude`` costs nothing, and the package's public names are where they say."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import etude

ROOT = Path(__file__).resolve().parent.parent


def names_for_editors() -> dict[str, str]:
    """Name → module in the TYPE_CHECKING block, which only editors and type checkers read."""
    tree = ast.parse(Path(etude.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name: statement.module for statement in block.body for alias in statement.names}


def test_importing_etude_imports_nothing_heavy():
    program = (
        "import sys, etude; etude.__version__; dir(etude); print(*{'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("name", etude.__all__)
def test_every_name_resolves(name):
    value = getattr(etude, name)
    assert value.__name__ == name and value.__module__ == etude._MODULE_OF[name]
    assert inspect.getdoc(value), f"{name} needs a docstring"
    assert vars(etude)[name] is value  # the second time without __getattr__


def test_the_three_lists_of_names_agree():
    assert etude.__all__ == list(etude._MODULE_OF)
    assert names_for_editors() == etude._MODULE_OF
    assert set(etude.__all__) <= set(dir(etude)) and "__version__" in dir(etude)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'etude' has no attribute 'lode'"):
        etude.lode  # noqa: B018  the access is what fails
    with pytest.raises(ImportError, match="lode"):
        from etude import lode  # noqa: F401


def test_star_import_gives_the_public_names():
    namespace = {}
    exec("from etude import *", namespace)  # noqa: S102  the only way to test it
    assert set(etude.__all__) <= set(namespace)
