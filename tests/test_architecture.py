"""Imports run one way (docs/architecture.md): esft -> esft_kernels; in both, from a folder to those before it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules and folders of a package; each may import those before it.
ESFT = (
    "errors transformers_internals short_attention parallel text memory bounds storage signals selection data "
    "experts moe scoring checkpoint swapping adapters runs evaluation reporting optimizer planning training cli "
    "__main__"
).split()
KERNELS = "activation routing formats pools backend triton_ops backends autograd_op compiled_op adamw".split()
MOST_LINES = {"esft": 300, "esft_kernels": 300, "benchmarks": 500, "tools": 500, "tests": 500, "examples": 500}
MOST_FILES = 12


def imported(path: Path, package: str) -> set[str]:
    """Modules and folders of ``package`` that a file imports, by their names right within it."""
    names, here = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module or "")))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {parts[1] for name in names if (parts := name.split("."))[0] == package and len(parts) > 1}


def top_level(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize(("package", "order"), [("esft", ESFT), ("esft_kernels", KERNELS)])
def test_nothing_imports_what_comes_later(package: str, order: list[str]):
    folder = ROOT / package
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(order)
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room != "__init__":
            later = imported(path, package) & set(order[order.index(room) + 1 :])
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


@pytest.mark.parametrize("folder", sorted(p.parent for p in (ROOT / "esft").rglob("__init__.py")), ids=lambda p: p.name)
def test_within_a_folder_imports_have_no_circle(folder: Path):
    package = ".".join(folder.relative_to(ROOT).parts)
    left = {
        path.stem: {
            name.removeprefix(f"{package}.").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (name := node.module or "").startswith(f"{package}.")
        }
        for path in folder.glob("*.py")
    }
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"{package}: {sorted(left)} import one another"


def test_the_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "esft_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "esft_kernels").rglob("*.py"):
        assert top_level(path) <= allowed, path


@pytest.mark.parametrize("package", ["esft", "esft_kernels"])
def test_the_packages_import_nothing_that_stands_around_them(package: str):
    around = {"benchmarks", "tests", "tools", "examples"} | ({"esft"} if package == "esft_kernels" else set())
    for path in (ROOT / package).rglob("*.py"):
        assert not top_level(path) & around, path


@pytest.mark.parametrize("folder", MOST_LINES)
def test_no_file_is_too_long_to_read(folder: str):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES[folder], path


def test_no_folder_of_the_method_is_too_full_to_find_a_file_in():
    for folder in {path.parent for package in ("esft", "esft_kernels") for path in (ROOT / package).rglob("*.py")}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= MOST_FILES, folder


def test_the_drawn_tree_names_every_file():
    drawn = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "esft").rglob("*.py"):
        if path.stem not in ("__init__", "__main__", "moe"):
            assert f" {path.name}" in drawn, path


def test_one_attribute_stands_on_a_foreign_model():
    for path in (ROOT / "esft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("esft_"):
                assert node.attr == "esft_layout", f"{path}: {node.attr}"  # of an experts module, not of a model
