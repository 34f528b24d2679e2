"""The house rules that a reader relies on: imports run one way and in no circle, and a file's name is its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("modeling", "poly_encoders", "training")  # imports run in this order, and never back


def _files() -> dict[str, Path]:
    """Source files by module name; the folders at the top are one package."""
    found = {}
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if any((ROOT / room / part).is_symlink() for part in parts[1:2]):
                continue  # the links in poly_encoders/ to the folders beside it
            parts = parts if room == "poly_encoders" else ("poly_encoders", *parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


FILES = _files()


def _imports(module: str) -> set[str]:
    """Modules of ours that one imports, anywhere in it: inside functions, and for type checking only, as well."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return {name for name in found if name in FILES and name != module}


IMPORTS = {module: _imports(module) for module in FILES}


def _room(module: str) -> int:
    return ROOMS.index(FILES[module].relative_to(ROOT).parts[0])


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_never_run_back(module):
    assert not [name for name in IMPORTS[module] if _room(name) > _room(module)]


def test_imports_make_no_circle():
    # A package's __init__ gathers what is in it: whoever needs one of its modules imports that.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(IMPORTS[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_no_two_files_have_one_name():
    names = [file.name for file in FILES.values() if file.name not in ("__init__.py", "__main__.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_files_are_short_enough_to_read(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_modeling_is_flat():
    """transformers copies it flat beside a saved model's weights."""
    assert not [path for path in (ROOT / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]
