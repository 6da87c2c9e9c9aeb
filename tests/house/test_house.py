"""The house keeps its shape: read from the syntax trees of the package, not by running it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

import pytest

import jacfunc

ROOT = Path(jacfunc.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


@cache
def parsed(folder: str) -> dict[Path, ast.Module]:
    """The syntax trees of a folder beside the package."""
    paths = sorted((ROOT.parent / folder).rglob("*.py"))
    return {path: ast.parse(path.read_text()) for path in paths}


GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
FLOORS = {
    room: int(row.group(1))
    for row in re.finditer(r"^\| (\d+) \| ([^|]+) \|", GUIDE.read_text(), re.MULTILINE)
    for room in re.findall(r"`(\w+)`", row.group(2))
}
"""On which floor a package is, or a file beside the packages: the guide's table."""

ROOF = {"__init__", "__main__", "testing"}
"""Files that may import from every floor."""

MOST_FILES, MOST_ROOMS, MOST_FLOORS, LONGEST_FACE = 12, 10, 10, 48
LONGEST_FILE, LONGEST_FUNCTION = 250, 45

EVERY_MODULE = pytest.mark.parametrize("name", FILES)
INNER_MODULES = pytest.mark.parametrize("name", [name for name in FILES if name != "jacfunc"])
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("*/__init__.py"))]
EVERY_PACKAGE = pytest.mark.parametrize("package", PACKAGES)


def home_of(module: str) -> str:
    """The package that a module lies in, or the file beside the packages that it is."""
    return module.split(".")[1] if "." in module else "__init__"


def is_face(module: str) -> bool:
    """Is it the ``__init__`` of a package, or a file beside the packages?"""
    return module.count(".") <= 1


@cache
def imported(tree: ast.AST) -> tuple[tuple[str, str], ...]:
    """Every ``(module, name)`` that a syntax tree imports."""
    return tuple(pair for node in ast.walk(tree) for pair in imported_by(node))


def imported_by(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Every ``(module, name)`` that one statement imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, ""
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            yield node.module or "", alias.name


@cache
def imported_names(module: str) -> set[str]:
    """Names that a module imports, under whatever name it uses them."""
    return {name for _, name in imported(TREES[module])}


@cache
def own_imports(name: str) -> set[str]:
    """The modules of jacfunc that a module imports; a name that a face hands on is of the face."""
    found = set()
    for module, attribute in imported(TREES[name]):
        if module == "jacfunc" or module.startswith("jacfunc."):
            deeper = f"{module}.{attribute}"
            is_room = deeper in FILES and attribute not in imported_names(module)
            found.add(deeper if is_room else module)
    return found - {name}


def dotted(node: ast.AST) -> str:
    """``torch.func.jvp`` from its syntax, or nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


@cache
def mentions(tree: ast.AST) -> set[str]:
    """Dotted names that are used or imported, aliases of ``import … as`` resolved."""
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = set(aliases.values())
    for node in ast.walk(tree):
        first, dot, rest = dotted(node).partition(".")
        if first:
            found.add(aliases.get(first, first) + dot + rest)
    return found


def users_of(*prefixes: str) -> set[str]:
    def uses(tree: ast.AST) -> bool:
        return any(
            name == prefix or name.startswith(f"{prefix}.")
            for name in mentions(tree)
            for prefix in prefixes
        )

    return {name for name, tree in TREES.items() if uses(tree)}


# --- imports ---


@INNER_MODULES
def test_imports_go_down(name: str) -> None:
    home = home_of(name)
    if home in ROOF:
        return
    for other in own_imports(name):
        below = home_of(other)
        # files on the ground may import each other; no circle, as the next test holds
        is_near = below == home or FLOORS[below] == FLOORS[home] == 0
        assert is_near or FLOORS[below] < FLOORS[home], f"{name} reaches up to {other}"


@INNER_MODULES
def test_packages_are_entered_by_their_faces(name: str) -> None:
    for other in own_imports(name):
        is_inside = home_of(other) == home_of(name) and not is_face(name)
        is_own_face = other.startswith(f"{name}.")
        assert is_face(other) or is_inside or is_own_face, f"{name} goes past the face of {other}"


def handed_on(package: str) -> set[str]:
    """Names that the face of a package imports from its rooms."""
    tree = TREES[f"jacfunc.{package}"]
    inside = f"jacfunc.{package}."
    return {name for module, name in imported(tree) if name and module.startswith(inside)}


@pytest.mark.parametrize("package", [name for name in PACKAGES if name.startswith("_")])
def test_faces_hand_on_what_others_use(package: str) -> None:
    used = {
        attribute
        for name, tree in TREES.items()
        for module, attribute in imported(tree)
        if module == f"jacfunc.{package}" and home_of(name) != package
    }
    for tree in parsed("benchmarks").values():
        used |= {name for module, name in imported(tree) if module == f"jacfunc.{package}"}
    assert handed_on(package) <= used


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in own_imports(name):
                visit(other, (*trail, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_benchmarks_enter_packages_by_their_faces() -> None:
    benchmarks = GUIDE.parent / "benchmarks"
    for path in benchmarks.rglob("*.py"):
        for module, _ in imported(ast.parse(path.read_text())):
            if module.split(".")[0] == "jacfunc":
                assert is_face(module), f"{path.name} goes past the face of {module}"


def test_the_guide_names_every_package_and_no_other() -> None:
    there = {home_of(name) for name in FILES} - ROOF
    assert set(FLOORS) == there
    assert len({FLOORS[package] for package in PACKAGES}) <= MOST_FLOORS


def test_there_are_few_files_beside_the_packages() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES


def test_the_walks_through_the_house_name_files_that_exist() -> None:
    text = (GUIDE.parent / "docs" / "architecture.md").read_text()
    files = re.findall(r"`(\w+/\w+\.py)`", text)
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []


@EVERY_PACKAGE
def test_packages_are_small(package: str) -> None:
    rooms = [path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
    assert len(rooms) <= MOST_ROOMS
    assert len((ROOT / package / "__init__.py").read_text().splitlines()) <= LONGEST_FACE


EXTRAS = {"compare": {"rich", "matplotlib"}, "operators": {"scipy"}}
"""What the extras `bench` and `scipy` bring to a package; all else does without it."""

EXTRA = set().union(*EXTRAS.values())


@EVERY_MODULE
def test_no_imports_inside_functions(name: str) -> None:
    allowed = EXTRAS.get(home_of(name), set())
    for function in functions(TREES[name]):
        hidden = {module.split(".")[0] for module, _ in imported(function)} - allowed
        assert not hidden, f"{name}, {function.name}: {hidden}"


@EVERY_MODULE
def test_the_extra_is_imported_inside_functions_alone(name: str) -> None:
    """Types apart: these are read by nobody who runs it."""
    runs = [node for node in TREES[name].body if not _is_for_types(node)]
    inside = {id(node) for function in functions(TREES[name]) for node in ast.walk(function)}
    for node in (node for top in runs for node in ast.walk(top) if id(node) not in inside):
        assert not {module.split(".")[0] for module, _ in imported_by(node)} & EXTRA


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"


def test_optree_lives_in_one_room() -> None:
    assert users_of("optree") == {"jacfunc._trees.tree"}


def test_torchs_pytree_lives_in_the_same_room() -> None:
    assert users_of("torch.utils._pytree") <= {"jacfunc._trees.tree"}


DERIVATIVES = (
    "torch.autograd.grad",
    "torch.autograd.backward",
    "torch.autograd.functional",
    "torch.func.jvp",
    "torch.func.vjp",
    "torch.func.grad",
    "torch.func.jacrev",
    "torch.func.jacfwd",
    "torch.func.hessian",
    "torch.func.linearize",
)


JUDGES = {"jacfunc.compare._reference"}
"""What jacfunc is compared with must not be jacfunc's: the reference, and torch's own recipe."""


WATCHERS = {"jacfunc._faults.callers"}
"""These name derivatives that a function takes itself, to know them when they see them."""


def test_torchs_derivatives_are_driven_from_two_rooms() -> None:
    assert users_of(*DERIVATIVES) - JUDGES - WATCHERS <= {
        "jacfunc._linear_map.inside",
        "jacfunc._linear_map.push",
    }
    assert users_of("torch.func.jvp") == {"jacfunc._linear_map.push"}
    assert users_of("torch.func.vjp") == {"jacfunc._linear_map.inside"}


def test_functorchs_private_parts_are_touched_in_one_package() -> None:
    private = (
        "torch._C._functorch",
        "torch._functorch",
        "functorch",
        "torch._dynamo",
        "torch.autograd.forward_ad",
    )
    assert {name.split(".")[1] for name in users_of(*private)} == {"_torch"}


# --- public names ---

PUBLIC = pytest.mark.parametrize("name", jacfunc.__all__)


def test_all_is_what_is_public() -> None:
    public = {
        name
        for name, value in vars(jacfunc).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(jacfunc.__all__) == public
    assert list(jacfunc.__all__) == sorted(jacfunc.__all__)


def test_the_front_door_holds_names_alone() -> None:
    allowed = ast.ImportFrom | ast.Assign | ast.Expr
    assert all(isinstance(node, allowed) for node in TREES["jacfunc"].body)


@PUBLIC
def test_public_names_have_an_example(name: str) -> None:
    doc = inspect.getdoc(getattr(jacfunc, name)) or ""
    first = doc.split("\n")[0]
    assert first.endswith((".", "):", ").")), f"the first line is a sentence: {first!r}"
    assert "Example:" in doc
    assert ">>> " in doc.split("Example:")[1], "the example runs as a doctest"


# Strategy is a protocol: nobody constructs it
@pytest.mark.parametrize("name", sorted(set(jacfunc.__all__) - {"Strategy"}))
def test_docstrings_name_every_argument(name: str) -> None:
    thing = getattr(jacfunc, name)
    doc = inspect.getdoc(thing) or ""
    for parameter in inspect.signature(thing).parameters:
        assert f"    {parameter}: " in doc or f"*{parameter}" in doc or parameter == "primals"


@EVERY_MODULE
def test_modules_say_what_they_are_for(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@EVERY_MODULE
def test_classes_say_what_they_are(name: str) -> None:
    """One sentence each, which a stranger to the file understands; helpers may go without."""
    classes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ClassDef)]
    public = [node for node in TREES[name].body if node in classes and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_two_classes_have_one_name() -> None:
    names = [
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    ]
    assert sorted(names) == sorted(set(names))


@EVERY_MODULE
def test_private_names_stay_in_their_module(name: str) -> None:
    """One room does not reach into the drawers of another."""
    for module, attribute in imported(TREES[name]):
        if module.startswith("jacfunc") and attribute.startswith("_"):
            assert f"{module}.{attribute}" in FILES, f"{name} imports {module}.{attribute}"


# --- what stands there for nobody ---

OTHERS_CALL = {"_repr_html_", "_should_skip_dynamo", "setup_context", "to_scipy"}
"""Methods for notebooks, torch and users."""

TESTS_ASK = {"bytes_in_use", "bytes_waiting"}
"""What is counted from outside, and by nobody inside."""


@cache
def words_of(tree: ast.AST) -> set[str]:
    """Names that a file reads, attributes among them, and words that it has as texts."""
    reads = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Load)]
    names = {node.id for node in reads if isinstance(node, ast.Name)}
    attributes = {node.attr for node in reads if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return names | attributes | {text for text in texts if str(text).isidentifier()}


def defined(body: list[ast.stmt], is_public: bool = False) -> Iterator[str]:
    """Functions, classes and methods; but for methods of public classes, and what is registered."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            is_registered = any(
                isinstance(each, ast.Call) and dotted(each.func) in {"rule", "opening"}
                for each in node.decorator_list
            )
            if not (is_public or is_registered or node.name.startswith("__")):
                yield node.name
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, is_public or node.name in EXPORTED)


EXPORTED = {
    node.value
    for tree in TREES.values()
    for top in tree.body
    if isinstance(top, ast.Assign) and dotted(top.targets[0]) == "__all__"
    for node in ast.walk(top)
    if isinstance(node, ast.Constant)
}


def test_everything_is_used_by_somebody() -> None:
    """By name: what has the name of something that is used passes."""
    trees = [*TREES.values(), *parsed("benchmarks").values()]
    used = EXPORTED | OTHERS_CALL | TESTS_ASK | set().union(*map(words_of, trees))
    idle = {name: [*{*defined(tree.body)} - used] for name, tree in TREES.items()}
    assert {name: names for name, names in idle.items() if names} == {}


# --- sizes ---


Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def lines_of_code(function: Function) -> int:
    """Lines of a function, decorators aside, without its docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


@EVERY_MODULE
def test_files_are_short(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= LONGEST_FILE


@EVERY_MODULE
def test_functions_are_short(name: str) -> None:
    long = {f.name: lines_of_code(f) for f in functions(TREES[name])}
    long = {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}
    assert not long


# --- habits ---


@EVERY_MODULE
def test_no_mutable_state_at_module_level(name: str) -> None:
    """Tables are constants by name and never written to; nothing is declared global."""
    mutable = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    tables = {
        dotted(target)
        for node in TREES[name].body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, mutable)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    } - {"__all__"}
    assert all(table.isupper() for table in tables), tables
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            assert dotted(node.value) not in tables, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            writes = node.func.attr in {"append", "add", "update", "extend", "pop", "setdefault"}
            assert not (writes and dotted(node.func.value) in tables), f"line {node.lineno}"


@EVERY_MODULE
def test_nothing_prints(name: str) -> None:
    calls = (node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call))
    assert not [call.lineno for call in calls if dotted(call.func) == "print"]


def test_no_test_patches_a_name_of_jacfunc() -> None:
    """A limit is an argument, and calls are counted from outside."""
    for path, tree in parsed("tests").items():
        ours = {name for module, name in imported(tree) if module.startswith("jacfunc.")}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and dotted(node.func) in PATCHES:
                target = node.args[0]
                name = target.value if isinstance(target, ast.Constant) else dotted(target)
            elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                name = dotted(node)
            else:
                continue
            assert str(name).split(".")[0] not in {"jacfunc", *ours}, (
                f"{path}, line {node.lineno}: {name}"
            )


PATCHES = {"setattr", "monkeypatch.setattr", "mock.patch", "mock.patch.object", "patch"}
"""What puts something else in the place of a name, which its first argument says."""
