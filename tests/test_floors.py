"""The house of DESIGN.md §1: a file imports lower floors only, scripts import no script, and what needs no torch loads none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up. Files of one floor may use each other as long as no circle comes of it; corpus and model may not.
FLOORS = [
    ["paths", "errors", "cli", "terminal", "runlog", "files", "lock"],
    ["corpus", "model"],
    ["device", "memory", "parallel", "tokenizer", "chat", "weights", "losses"],
    ["llama"],
    ["data", "generation", "export"],
    ["evaluation"],
    ["training"],
    ["benchmark", "doctor"],
]
SCRIPT_FOLDERS = ["train", "tool", "inference"]
# Loaded where they are used, so that --help answers at once and a broken one hurts only those who need it.
LAZY = {"transformers", "tokenizers", "safetensors", "lxml", "tqdm", "jsonargparse", "yaml", "matplotlib", "wandb", "trackio"}
HEAVY = LAZY | {"torch", "numpy"}
GROUND_FLOOR = [f"etude.{part}" for part in FLOORS[0]]
WITHOUT_TORCH = ["etude", *GROUND_FLOOR, "etude.model.config", "etude.training.config", "etude.doctor.config"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PACKAGE = {module_of(path): path for path in sorted((ROOT / "etude").rglob("*.py"))}
SCRIPTS = sorted(path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).rglob("*.py"))
CORPUS = [name for name in PACKAGE if name.startswith("etude.corpus")]


def imports(path: Path, top_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, module) of each import; ``from etude import cli`` is etude.cli. What only type checkers see is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the module's whole name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in PACKAGE else node.module) for name in whole]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += list(ast.iter_child_nodes(node))
    return found


def floor_of(module: str) -> int:
    part = module.split(".")[1]
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def test_every_part_of_the_package_has_a_floor():
    parts = {name.split(".")[1] for name in PACKAGE if "." in name}
    assert parts == {part for floor in FLOORS for part in floor}


@pytest.mark.parametrize("module", [name for name in PACKAGE if name != "etude"])
def test_no_file_imports_upward(module):
    for line, name in imports(PACKAGE[module]):
        if name.split(".")[0] in SCRIPT_FOLDERS or name == "etude":
            raise AssertionError(f"{PACKAGE[module]}:{line}: imports {name}")
        if name.startswith("etude."):
            assert floor_of(name) <= floor_of(module), f"{PACKAGE[module]}:{line}: {module} imports {name}, from above"
            apart = {module.split(".")[1], name.split(".")[1]}
            assert apart != {"corpus", "model"}, f"{PACKAGE[module]}:{line}: corpus and model know nothing of each other"


def test_no_circle():
    modules = {module: path for module, path in PACKAGE.items() if module != "etude"}
    needs = {module: {name for _, name in imports(path) if name in PACKAGE} for module, path in modules.items()}
    while ready := [module for module, others in needs.items() if not others]:
        for module in ready:
            del needs[module]
        for others in needs.values():
            others.difference_update(ready)
    assert needs == {}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_imports_the_package_and_no_script(path):
    own = {script.stem for script in SCRIPTS} | set(SCRIPT_FOLDERS)
    allowed = HEAVY | set(sys.stdlib_module_names) | {"etude"}
    for line, name in imports(path):
        assert name.split(".")[0] not in own and name.split(".")[0] in allowed, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", [*PACKAGE.values(), *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    is_script = path in SCRIPTS
    module = "" if is_script else module_of(path)
    banned = HEAVY if is_script or module in WITHOUT_TORCH or module in CORPUS else LAZY
    for line, name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in banned, f"{path}:{line}: import {name} inside the function that needs it"


def test_what_needs_no_torch_loads_none():
    """In a process of its own: what imports alone pull in, whoever imports it."""
    modules = [*WITHOUT_TORCH, *CORPUS]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    found = {HEAVY!r} & set(sys.modules)
    assert not found, (module, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr


def test_sub_packages_hold_no_code():
    for module, path in PACKAGE.items():
        if path.name == "__init__.py" and module != "etude":
            assert path.read_text(encoding="utf-8").strip() == "", f"{path}: importing a part must not load its neighbours"
