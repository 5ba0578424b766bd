"""The mutations fit the code: each old text stands once in its file, each test that they name exists. (Running them takes long.)"""

import re

from conftest import ROOT
from mutations import MUTATIONS


def test_no_mutation_is_stale():
    stale = [m.name for m in MUTATIONS if (ROOT / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    assert not stale


def test_the_tests_that_mutations_and_the_document_name_exist():
    defined = {
        (path.name, name)
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    named = {tuple(test.split("[")[0].split("::")[:2]) for m in MUTATIONS for test in m.tests if "::" in test}
    assert not named - defined
    document = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert not set(re.findall(r"`(test_\w+)`", document)) - {name for _, name in defined}
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/\w+\.py)`", document))
