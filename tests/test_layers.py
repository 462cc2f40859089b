"""The shape of the source tree: who may import whom, file sizes, no shared mutable state, no dangerous calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "minisgl"
TESTS = Path(__file__).parent
MODULES = {
    ".".join(("minisgl", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

LAYERS = (
    {"errors"},
    {"config"},
    {"core"},
    {"gpu", "text", "formats"},
    {"distributed"},
    {"build"},
    {"engine"},
    {"llm", "server"},
    {"chat"},
    {"cli", "bench"},
    {"__main__"},
)
"""The rings, innermost first; a module imports from its own ring and from inner ones."""
SIDEWAYS = {("cli", "bench"), ("bench", "cli")}
"""`cli` starts a benchmark, whose flags are made by `cli`."""

DECISIONS = ("types", "plan", "request_state", "policy", "scheduler", "engine", "pages", "radix_cache")
"""What is decided: these files of `core` know no torch."""
TORCHLESS = (
    *(f"minisgl.{part}" for part in ("text", "server", "config", "cli")),
    *(f"minisgl.core.{m}" for m in DECISIONS),
)

ENGINE_PROCESS = "minisgl.server.engine_process"
"""The one module of the server that has the engine; nothing imports it."""

MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
READ_ONLY = ("Final", "Mapping", "tuple", "Sequence", "frozenset")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), filename=module)


def runs_later(node: ast.AST) -> bool:
    """Whether a statement's body does not run when its module is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def imports(node: ast.AST, *, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """Names imported under `node`, with their lines; `runtime_only` skips functions and `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import at line {child.lineno}"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield (full if full in MODULES else str(child.module)), child.lineno
        elif not (runtime_only and runs_later(child)):
            yield from imports(child, runtime_only=runtime_only)


def package(module: str) -> str:
    """The part of `minisgl` that a module belongs to; "" for `minisgl` itself."""
    return module.removeprefix("minisgl").lstrip(".").partition(".")[0]


def layer(part: str) -> int:
    ranks = [rank for rank, parts in enumerate(LAYERS) if part in parts]
    assert ranks, f"minisgl.{part} is in no layer: add it to LAYERS"
    return ranks[0]


def reached(module: str) -> set[str]:
    """Everything that importing `module` imports, as far as the source tree shows it."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            parents = name.split(".")
            todo += [".".join(parents[:n]) for n in range(1, len(parents))]
            todo += [imported for imported, _ in imports(tree(name), runtime_only=True)]
    return seen


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "minisgl"])
def test_module_imports_only_from_its_package_and_lower_layers(module: str) -> None:
    part = package(module)
    for name, line in imports(tree(module)):
        other = package(name) if name.split(".")[0] == "minisgl" else ""
        if other in ("", part) or (part, other) in SIDEWAYS:
            continue
        assert layer(other) < layer(part), f"{module}:{line} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if under(m, TORCHLESS)])
def test_module_loads_without_torch(module: str) -> None:
    found = {name for name in reached(module) if name.split(".")[0] in ("torch", "triton")}
    assert not found or module == ENGINE_PROCESS


@pytest.mark.parametrize("module", [m for m in MODULES if under(m, ("minisgl.server", "minisgl.text"))])
def test_server_and_text_never_import_torch_or_the_gpu(module: str) -> None:
    banned = ("torch", "minisgl.gpu", "minisgl.distributed")
    assert not [(name, line) for name, line in imports(tree(module)) if under(name, (*banned, ENGINE_PROCESS))]


@pytest.mark.parametrize("path", [*MODULES.values(), *sorted(TESTS.rglob("*.py"))], ids=lambda p: p.name)
def test_no_file_is_over_650_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 650


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in MUTABLE_CALLS
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


@pytest.mark.parametrize("module", list(MODULES))
def test_no_mutable_state_at_module_level(module: str) -> None:
    for node in tree(module).body:
        if isinstance(node, ast.AnnAssign) and is_mutable(node.value):
            read_only = any(word in ast.unparse(node.annotation) for word in READ_ONLY)
            assert read_only or ast.unparse(node.target).isupper(), f"{module}:{node.lineno}"
        elif isinstance(node, ast.Assign) and is_mutable(node.value):
            names = [ast.unparse(target) for target in node.targets]
            assert all(name.isupper() or name == "__all__" for name in names), f"{module}:{node.lineno}"
    assert not [node.lineno for node in ast.walk(tree(module)) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("module", [m for m in MODULES if package(m) not in ("config", "bench")])
def test_environment_is_read_in_config_alone(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("os.environ", "os.getenv", "os.environb"), f"{module}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", list(MODULES))
def test_no_call_that_runs_what_it_reads(module: str) -> None:
    assert not [name for name, _ in imports(tree(module)) if name.split(".")[0] in ("pickle", "marshal", "shelve")]
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Call):
            continue
        assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "os.system"), f"{module}:{node.lineno}"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                assert ast.unparse(keyword.value) == "False", f"{module}:{node.lineno} {keyword.arg}"


def test_the_checks_see_what_they_forbid() -> None:
    bad = ast.parse(
        "import torch\nfrom minisgl.gpu import x\nif TYPE_CHECKING:\n    import a\ndef f():\n    import b\n"
    )
    assert [name for name, _ in imports(bad)] == ["torch", "minisgl.gpu", "a", "b"]
    assert [name for name, _ in imports(bad, runtime_only=True)] == ["torch", "minisgl.gpu"]
    values = [node.value for node in ast.parse("[]\n{}\ndict()\ncollections.deque()\n()\n'a'\n{x for x in y}").body]  # type: ignore[attr-defined]
    assert [is_mutable(value) for value in values] == [True, True, True, True, False, False, True]
    assert {"minisgl.core.types", "minisgl.errors", "msgspec"} <= reached("minisgl.server.ipc")
