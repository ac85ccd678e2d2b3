"""The house rules: import direction, packaging list, light imports, provenance of the docs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "transforms": "resplice",
    "passes": "resplice.passes",
    "kernels": "resplice.kernels",
    "backends": "resplice.backends",
}
MAY_IMPORT = {
    "transforms": set(),
    "kernels": {"transforms"},
    "passes": {"transforms", "kernels"},
    "backends": {"transforms", "kernels"},
}
HEAVY = ("triton", "onnx", "onnxruntime", "onnxscript", "coremltools", "transformers", "diffusers",
         "matplotlib", "jinja2")  # fmt: skip


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _owner(module: str) -> str | None:
    for folder in ("passes", "kernels", "backends"):
        if module == FOLDERS[folder] or module.startswith(FOLDERS[folder] + "."):
            return folder
    return "transforms" if module.split(".")[0] == "resplice" else None


def _module_imports(tree: ast.Module) -> list[str]:
    """Modules imported when the file is imported: not those inside functions."""
    found, stack = [], list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" for a in node.names] + [str(node.module)]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            inner = [] if typing_only else ast.iter_child_nodes(node)
            stack += [child for child in inner if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_only_go_downwards(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in _sources(folder)
        for module in _module_imports(ast.parse(path.read_text(encoding="utf-8")))
        if _owner(module) not in ({folder, None} | MAY_IMPORT[folder])
    ]
    assert wrong == []


def test_every_folder_with_code_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    found = set()
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
        for path in _sources(folder):
            assert (path.parent / "__init__.py").exists(), path
    assert found == set(settings["packages"])
    assert settings["package-dir"] == {name: folder for folder, name in FOLDERS.items()}


def test_only_the_agreed_folders_hold_code() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top <= {*FOLDERS, "tests", "examples"}


def test_importing_resplice_loads_no_heavy_package() -> None:
    code = (
        "import sys, resplice, resplice.passes.quest, resplice.kernels, resplice.cli.app\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_generic_folder_names_are_not_importable() -> None:
    code = (
        "import importlib.util as u\n"
        "print([n for n in ('passes', 'backends', 'transforms') if u.find_spec(n)])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_root_package_refuses_its_folder_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import transforms"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "import this package as `resplice`" in result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_public_function_says_what_it_does(folder: str) -> None:
    bare = []
    for path in _sources(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            )
            if public and not ast.get_docstring(node):  # type: ignore[arg-type]
                bare.append(f"{path.name}:{node.lineno} {node.name}")  # type: ignore[attr-defined]
    assert bare == []


def test_no_telemetry_and_no_network() -> None:
    words = ("requests", "urllib.request", "http.client", "socket", "httpx")
    wrong = [
        f"{path.name}: {module}"
        for folder in FOLDERS
        for path in _sources(folder)
        for module in _module_imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.startswith(words)
    ]
    assert wrong == []
