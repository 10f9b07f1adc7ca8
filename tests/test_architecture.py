"""The walls of the house (docs/architecture.md): who may import whom, sizes, and what is never used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FILES = sorted((SRC / "tempflow").rglob("*.py"))
MAX_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_CHAIN = 5
"""Files, one importing the next, inside `train/`."""

ROOMS: dict[str, set[str]] = {
    "core": set(),
    "names": set(),
    "strict": {"names"},
    "folder": set(),
    "request": set(),
    "grid": set(),
    "devices": set(),
    "media": set(),
    "shapes": set(),
    "data": {"core", "shapes", "request", "media"},
    "models": {"core", "names", "registry", "request", "media", "devices", "grid"},
    "registry": set(),
    "rewards": {"core", "shapes", "registry", "media", "strict", "names", "request", "devices"},
    "serve": {"core", "rewards", "media", "names"},
    "algorithms": {"core", "perception", "names", "registry"},
    "perception": {"models"},
    "latent_reward": {"core", "models", "names", "request", "media"},
    "config": {"strict", "algorithms", "data", "rewards", "names", "media", "grid"},
    "recipes": {"algorithms", "config"},
    "cost": {"config", "core", "algorithms", "models"},
    "measure": {"config", "core", "cost", "data", "rewards", "train", "media", "models", "request"},
    "evaluate": {
        "core",
        "data",
        "models",
        "rewards",
        "config",
        "perception",
        "stats",
        "folder",
        "request",
        "media",
        "strict",
        "grid",
    },
    "stats": set(),
    "report": {"stats", "folder"},
    "export": {"config", "models", "train", "folder", "grid"},
    "doctor": {"config", "data", "models", "rewards", "train", "core", "shapes", "media", "request", "folder"},
    "stages": {"config", "models", "rewards", "train", "folder", "algorithms", "grid"},
    "train": {
        "core",
        "data",
        "models",
        "rewards",
        "algorithms",
        "config",
        "evaluate",
        "perception",
        "latent_reward",
        "strict",
        "folder",
        "request",
        "media",
        "grid",
    },
    "cli": {
        "registry",
        "request",
        "media",
        "names",
        "strict",
        "folder",
        "algorithms",
        "data",
        "models",
        "rewards",
        "config",
        "recipes",
        "cost",
        "measure",
        "evaluate",
        "train",
        "stages",
        "report",
        "export",
        "doctor",
        "serve",
        "grid",
    },
}
"""Each room and the rooms it may import: core ← models, rewards ← algorithms ← evaluate ← train ← cli."""


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(body: list[ast.stmt], lazy: bool) -> Iterator[ast.stmt]:
    """Every statement that runs at import, or that a type checker reads; with `lazy`, what runs later too."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), lazy)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, lazy)


def imports(path: Path, lazy: bool) -> set[str]:
    """Dotted names that the file imports; `from a import b` gives a.b where that is a module of ours, else a."""
    found: set[str] = set()
    for node in statements(tree_of(path).body, lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = names & MODULES.keys()
            found |= inside | ({node.module} if len(inside) < len(names) else set())
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 30 and {"tempflow", "tempflow.core.rollout", "tempflow.train.experience"} <= MODULES.keys()
    assert "tempflow.core.forest" in imports(MODULES["tempflow.core.rollout"], lazy=False)
    assert "tempflow.core.plan" in imports(MODULES["tempflow.evaluate.suite"], lazy=False)
    late, early = ({n.split(".")[0] for n in imports(MODULES["tempflow.models.sd3"], lazy)} for lazy in (True, False))
    assert "diffusers" in late - early


def test_core_imports_torch_numpy_the_standard_library_and_core() -> None:
    seen = [(m, name) for m, path in MODULES.items() if room_of(m) == "core" for name in imports(path, lazy=True)]
    own = {"torch", "numpy", *sys.stdlib_module_names}
    assert [(m, n) for m, n in seen if n.split(".")[0] not in own and not n.startswith("tempflow.core")] == []


def test_rooms_are_the_known_ones() -> None:
    """A new room must say here what it may import."""
    assert {room_of(m) for m in MODULES} - {""} <= ROOMS.keys()


def test_imports_go_one_way() -> None:
    wrong = dict[str, list[str]]()
    for module, path in MODULES.items():
        room = room_of(module)
        if room:
            used = {room_of(name) for name in imports(path, lazy=True) if name.split(".")[0] == "tempflow"}
            wrong |= {module: sorted(used - ROOMS[room] - {room})} if used - ROOMS[room] - {room} else {}
    assert wrong == {}


def test_the_rooms_themselves_form_no_circle() -> None:
    assert not circles(ROOMS)


def test_no_import_circles() -> None:
    graph = {m: imports(path, lazy=False) & MODULES.keys() - {m} for m, path in MODULES.items()}
    assert not circles(graph)
    assert circles({**graph, "tempflow.core.schedule": {"tempflow.core.rollout"}})  # the search finds one if there is


def test_no_circle_hides_in_functions_of_the_training_room() -> None:
    """Imports that are put off, into a function, are read too."""
    assert not circles(training_graph())


def test_chains_of_imports_in_the_training_room_are_short() -> None:
    graph = training_graph()

    @cache
    def files(module: str) -> int:
        return 1 + max(map(files, graph[module]), default=0)

    longest = max(graph, key=files)
    assert files(longest) <= MAX_CHAIN, f"{longest}: a chain of {files(longest)} files"


def training_graph() -> dict[str, set[str]]:
    room = {m: path for m, path in MODULES.items() if room_of(m) == "train" and m != "tempflow.train"}
    return {m: imports(path, lazy=True) & room.keys() - {m} for m, path in room.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left after taking away, again and again, whatever imports nothing that is left."""
    left = {node: set(targets) for node, targets in graph.items()}
    while free := {node for node, targets in left.items() if not targets & left.keys()}:
        left = {node: targets for node, targets in left.items() if node not in free}
    return sorted(left)


def test_files_and_functions_stay_small() -> None:
    lines = {m: len(path.read_text().splitlines()) for m, path in MODULES.items()}
    assert {m: n for m, n in lines.items() if n > MAX_LINES} == {}
    bodies = {f"{m}.{node.name}": body_lines(node) for m, path in MODULES.items() for node in functions(path)}
    assert len(bodies) > 100 and {name: n for name, n in bodies.items() if n > MAX_FUNCTION_LINES} == {}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without its docstring."""
    doc = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)


FAMILIES = re.compile(
    r"(?<![a-z])(sd_?(xl|3\d*|1_?5|21)|stable_?diffusion\w*|flux\d?|qwen(?![\w./-]*vl\b)\w*|wan\d*|ltx\w*|z_?image|sana|hunyuan\w*"
    r"|cogview\d?|lumina\d?)(?![a-z])"
)
"""Model families, as code would name them. A vision-language model, which judges, is none."""

MAY_NAME = {"models", "recipes", "shapes"}


def families_in(tree: ast.AST) -> set[str]:
    """Identifiers and texts that name a model family; docstrings, and texts that stand by themselves, may."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    said: list[str] = []
    for node in ast.walk(tree):
        said += [getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field)]
        said += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            said.append(node.value)
    snake = (re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name or "").lower() for name in said)
    return {name for name in snake if FAMILIES.search(name)}


def test_no_family_is_named_outside_its_rooms() -> None:
    seen = {m: families_in(tree_of(path)) for m, path in MODULES.items() if room_of(m) not in MAY_NAME}
    assert len(seen) > 100 and {m: sorted(names) for m, names in seen.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tempflow.models.sd3 import SD3",
        "pipe: StableDiffusion3Pipeline",
        "def flux(steps): pass",
        "x = {'FluxTransformer2DModel': 1}",
        "f(qwen_image=True)",
        "kind == 'wan'",
        "SD3Transformer2DModel()",
    ],
)
def test_a_family_that_is_named_is_found(line: str) -> None:
    assert families_in(ast.parse(line))
    assert not families_in(ast.parse(f'"""As {line!r} has it."""\nwanted = influx = swan = 1'))


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(tree: ast.AST) -> list[str]:
    """Ways to run what a file or a hub says."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in UNSAFE_MODULES else []
            found += ["torch.load"] if node.module == "torch" and "load" in {a.name for a in node.names} else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += ["torch.load"] if (node.value.id, node.attr) == ("torch", "load") else []
        elif isinstance(node, ast.Call):
            found += [node.func.id] if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec") else []
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                found += [keyword.arg] if keyword.arg in ("trust_remote_code", "allow_pickle") and not off else []
    return found


def test_nothing_unsafe_is_used() -> None:
    assert {m: found for m, path in MODULES.items() if (found := unsafe(tree_of(path)))} == {}


def test_the_converter_alone_opens_pickles_and_only_tensors_in_them() -> None:
    """What is published as a pickle is converted once, by a script that the package never imports."""
    root = SRC.parent
    tools = [path for folder in ("scripts", "benchmarks") for path in sorted((root / folder).rglob("*.py"))]
    found = {path.name: unsafe(tree_of(path)) for path in tools}
    assert {name: ways for name, ways in found.items() if ways} == {"convert_weights.py": ["torch.load"]}
    calls = [n for n in ast.walk(tree_of(root / "scripts" / "convert_weights.py")) if isinstance(n, ast.Call)]
    opened = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.load"]
    assert len(opened) == 1 and "weights_only=True" in opened[0]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "from torch import load",
        "pipe(trust_remote_code=True)",
        "pipe(trust_remote_code=flag)",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
    ],
)
def test_what_is_unsafe_is_recognised(line: str) -> None:
    assert len(unsafe(ast.parse(line))) == 1


IMPORTS = """
import sys
import tempflow
heavy = {"torch", "diffusers", "transformers", "peft", "cv2", "matplotlib"} & sys.modules.keys()
assert not heavy, f"import tempflow imports {heavy}"
import tempflow.core.rollout, tempflow.core.credit, tempflow.core.weight, tempflow.core.objective.ratio
rooms = {m for m in sys.modules if m.startswith("tempflow.") and not m.startswith(("tempflow.core", "tempflow.train"))}
assert not rooms, f"core imports {rooms}"
import tempflow.train.trainer
heavy = {"diffusers", "transformers", "peft", "cv2", "matplotlib"} & sys.modules.keys()
assert not heavy, f"the training loop imports {heavy} before it needs them"
"""


def test_imports_are_light() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
