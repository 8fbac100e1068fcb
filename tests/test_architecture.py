"""Imports run one way (the project's design): esft -> esft_kernels, and in esft no stage imports a later one."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each module may import those before it.
STAGES = """errors arguments files device config loss moe plain layout interface families conversion stored parameters
checkpoint routers balance score select slots pretrained swap adapter switch data merge evaluate optim report train
commands __main__""".split()
KERNELS = (
    "activation routing pools tiles mainloop gate up_gemm grouped_gemm grad_gemm grouped_wgrad bias_grad bias_dot "
    "combine reference cpu cpu_packed triton_backend expert_mlp opaque"
).split()


def imported(path: Path, package: str) -> set[str]:
    """Modules of ``package`` that a file imports, by their names within it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
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


@pytest.mark.parametrize(("package", "order"), [("esft", STAGES), ("esft_kernels", KERNELS)])
def test_no_module_imports_a_later_one(package: str, order: list[str]):
    files = {path.stem: path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}
    assert set(files) == set(order)
    for place, module in enumerate(order):
        later = imported(files[module], package) & set(order[place:])
        assert not later, f"{package}/{module}.py imports {later}"


def test_the_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (ROOT / "esft_kernels").glob("*.py"):
        assert top_level(path) <= allowed, path


@pytest.mark.parametrize("package", ["esft", "esft_kernels"])
def test_the_packages_import_nothing_that_stands_around_them(package: str):
    around = {"benchmarks", "tests", "tools", "examples"} | ({"esft"} if package == "esft_kernels" else set())
    for path in (ROOT / package).glob("*.py"):
        assert not top_level(path) & around, path


def test_no_file_is_longer_than_500_lines():
    for folder in ("esft", "esft_kernels", "benchmarks", "tools", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
