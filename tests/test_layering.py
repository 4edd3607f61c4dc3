"""Imports run one way, and `import adaptive` brings torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"megatron", "deepspeed", "triton", "flash_attn", "tensorboard", "transformers"}

# A package may import those that stand after it, and itself.
ORDER = [
    "launch",
    "adaptive.hub",
    "adaptive.models",
    "adaptive.blocks",
    "adaptive.routing",
    "parallel",
]


def level(module: str) -> int:
    """Position in ORDER; ops stand beside routing, and adaptive's own files above models."""
    if module.startswith("adaptive.ops"):
        return ORDER.index("adaptive.routing")
    for index, package in enumerate(ORDER):
        if module == package or module.startswith(package + "."):
            return index
    return ORDER.index("adaptive.models")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, runs when the file is imported) of every import statement in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(scope)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", id(node) not in inner))
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["adaptive", "parallel", "launch"])
def test_imports_run_one_way(package: str) -> None:
    for path in sources(package):
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for module, _ in imports(path):
            if module.split(".")[0] in ("adaptive", "parallel", "launch"):
                assert level(module) >= level(here), f"{here} imports {module}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        path.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in path:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            component = path[path.index(node) :]
            del path[path.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "d"}}
    assert circles(graph) == [["b", "c"]]


def test_imports_run_in_no_circle() -> None:
    """Also not those inside functions and under TYPE_CHECKING."""
    modules = {
        module_name(path): path
        for top in ("adaptive", "parallel", "launch")
        for path in sources(top)
    }
    graph = {}
    for here, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    # The module of that name, or else a name of the package's own.
                    inner = f"{node.module}.{alias.name}"
                    names.add(inner if inner in modules else str(node.module))
        graph[here] = names & modules.keys() - {here}
    assert circles(graph) == []


def test_megatron_has_one_door_and_deepspeed_lives_in_launch() -> None:
    for package in ("adaptive", "parallel", "launch"):
        for path in sources(package):
            where = path.relative_to(ROOT).as_posix()
            for module, at_import in imports(path):
                name = module.split(".")[0]
                if name == "megatron":
                    assert where == "parallel/megatron.py", f"{where} imports {module}"
                if name == "deepspeed":
                    assert package == "launch", f"{where} imports {module}"
                if name in HEAVY and package == "adaptive" and at_import:
                    allowed = "hub/" if name == "transformers" else "kernels"
                    assert allowed in where, f"{where} imports {module} when it is imported"


def test_adaptive_imports_with_torch_alone() -> None:
    code = (
        "import sys, adaptive, adaptive.models\n"
        "from adaptive.models import Decoder\n"
        "import adaptive.flops, adaptive.growth\n"
        "for name in adaptive.__all__: getattr(adaptive, name)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_files_have_one_subject() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager"}
    for package in ("adaptive", "parallel", "launch", "tests", "benchmarks"):
        for path in sources(package):
            assert path.stem not in vague, path
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def test_programs_lie_directly_in_launch_and_nothing_else_does() -> None:
    files = sorted((ROOT / "launch").glob("*.py"))
    assert len(files) <= 20, [path.stem for path in files]
