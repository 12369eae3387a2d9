"""The import layers of the package, read from its source: what each part may know."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from sys import stdlib_module_names

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "cdm_lightning"
NAME = PACKAGE.name
VERBS = ("cache_text", "evaluate", "export", "extract_lora", "plan", "pretrain", "sample", "train")  # what a user types
ROOMS = (  # from the ground up: each may import those before it
    "errors",
    "kinds",
    "files",
    "ends",
    "core",
    "terminal",
    "config",
    "lora",
    "objectives",
    "backbones",
    "data",
    "metrics",
    "distributed",
    "checkpoint",
    "training",
    "evaluation",
    "run",
    "exporting",
    "module",
    "planning",
    "callbacks",
    "pretraining",
    *VERBS,
)
HYDRA = {"train.py", "pretrain.py", "cache_text.py", "distributed/launch.py"}
FAMILY_BLIND = tuple(
    f"{room}/" for room in ROOMS if (PACKAGE / room).is_dir() and room not in ("backbones", "pretraining")
)
MOST_LINES, LONGEST_FUNCTION, TOP_LEVEL_FILES = 300, 50, 14
TYPE_CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
LIBRARY_EDGE = ("backbones/", "pretraining/")


@cache
def sources() -> dict[str, ast.Module]:
    """Each module's path inside the package and its syntax tree."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it but the bodies of `if TYPE_CHECKING:`, which are read by type checkers alone."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_CHECKING else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from executed(child)


def imports(tree: ast.Module, path: str) -> Iterator[str]:
    """Dotted names of all that a module imports when it runs, at whatever depth; `from a import b` counts as a.b."""
    package = [NAME, *Path(path).parts[:-1]]
    for node in executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def own(name: str) -> bool:
    return name.split(".")[0] == NAME


def is_under(name: str, module: str) -> bool:
    """Whether the dotted name is this module of the package or lies in it."""
    return f"{name}.".startswith(f"{NAME}.{module}.")


def violations(rule) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in sources().items()
        for name in imports(tree, path)
        if not rule(path, name)
    ]


def has_class_with_base(tree: ast.Module, base: str) -> bool:
    """Whether a class of the module derives from this name directly."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return any(isinstance(name, ast.Name) and name.id == base for node in classes for name in node.bases)


@cache
def modules_with(folder: str, base: str) -> frozenset[str]:
    """The modules of a folder that define a class derived from `base`."""
    trees = {path: tree for path, tree in sources().items() if path.startswith(f"{folder}/")}
    return frozenset(Path(path).stem for path, tree in trees.items() if has_class_with_base(tree, base))


ABSTRACT_BACKBONES = frozenset({"pipeline_settings", "diffusers_pipeline"})  # what the families of diffusers share


def families() -> frozenset[str]:
    """The modules that implement a model family."""
    bases = ("Backbone", "PipelineSettings", "PipelineBackbone")
    return frozenset().union(*(modules_with("backbones", base) for base in bases)) - ABSTRACT_BACKBONES


def core_rule(path: str, name: str) -> bool:
    if not path.startswith("core/"):
        return True
    root = name.split(".")[0]
    if own(name):
        return is_under(name, "core") or is_under(name, "kinds")  # the kinds of options: annotations alone
    return root in ("torch", "annotated_types") or root in stdlib_module_names


def config_rule(path: str, name: str) -> bool:
    return path in HYDRA or path.startswith("config/") or name.split(".")[0] not in {"hydra", "omegaconf"}


def library_rule(path: str, name: str) -> bool:
    return path.startswith(LIBRARY_EDGE) or name.split(".")[0] not in {"diffusers", "transformers"}


def family_rule(path: str, name: str) -> bool:
    """No family knows another, and what trains them knows none: only the base class."""
    if path.startswith("backbones/"):
        others = families() - {Path(path).stem}
    elif path.startswith(FAMILY_BLIND) or path == "module.py":
        others = families()
    else:
        return True
    return not any(is_under(name, f"backbones.{family}") for family in others)


def peft_rule(path: str, name: str) -> bool:
    return path.startswith(("lora/", *LIBRARY_EDGE)) or name.split(".")[0] != "peft"


def callback_rule(path: str, name: str) -> bool:
    """Callbacks do not know each other; an abstract base class may be shared."""
    if not path.startswith("callbacks/") or not is_under(name, "callbacks"):
        return True
    return any(is_under(name, f"callbacks.{base}") for base in modules_with("callbacks", "ABC"))


def room_of(module: str) -> str:
    """The room of a path inside the package, or of a dotted name of it; "" for the package itself."""
    parts = module.removesuffix(".py").split("/") if "/" in module or module.endswith(".py") else module.split(".")[1:]
    return parts[0] if parts else ""


def direction_rule(path: str, name: str) -> bool:
    """A room imports only rooms below it."""
    room, other = room_of(path), room_of(name)
    if not own(name) or room == other or other not in ROOMS or room not in ROOMS:
        return True
    return ROOMS.index(other) < ROOMS.index(room) and other not in VERBS


RULES = [core_rule, config_rule, library_rule, peft_rule, family_rule, callback_rule, direction_rule]


def test_every_room_has_its_place():
    found = {room_of(path) for path in sources()} - {"__init__"}
    assert found == set(ROOMS)
    files = [path for path in sources() if "/" not in path]
    assert len(files) <= TOP_LEVEL_FILES, files


def modules_imported_by(path: str) -> set[str]:
    """The paths of the modules of this package that a module imports when it runs."""
    found = set()
    for name in imports(sources()[path], path):
        parts = name.split(".")[1:] if own(name) else []
        lengths = [n for n in (len(parts), len(parts) - 1) if n > 0]
        candidates = ["/".join(parts[:n]) + end for n in lengths for end in (".py", "/__init__.py")]
        found |= set([path for path in candidates if path in sources()][:1])
    return found - {path}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Those that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    return sorted(one for one in graph if one in reached(one))


def test_no_module_imports_itself_on_a_detour():
    assert circles({path: modules_imported_by(path) for path in sources()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The name and the number of lines of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def test_files_and_functions_stay_short():
    lengths = {path: len((PACKAGE / path).read_text().splitlines()) for path in sources()}
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}
    long = {(path, *function) for path, tree in sources().items() for function in functions(tree)}
    assert {entry for entry in long if entry[2] > LONGEST_FUNCTION} == set()


ROLES = ("fake_score", "discriminator", "critic")
MOVED_OPTIONS = ("config/__init__.py", "run/same.py")  # name the options of older versions
GENERIC = tuple(room for room in ROOMS if room not in ("objectives",))


def role_names(tree: ast.Module) -> list[str]:
    """Names of an objective's roles among the identifiers and the texts of a module; docstrings are left out."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        text = node.value if is_text else getattr(node, "id", getattr(node, "attr", getattr(node, "arg", None)))
        if isinstance(text, str) and any(role in text for role in ROLES):
            found.append(text)
    return found


def test_only_objectives_name_their_roles():
    found = {path: role_names(tree) for path, tree in sources().items() if room_of(path) in GENERIC}
    assert {path: names for path, names in found.items() if names and path not in MOVED_OPTIONS} == {}
    assert role_names(ast.parse("networks.fake_score"))
    assert role_names(ast.parse("f(critic=1)"))
    assert role_names(ast.parse('networks["fake_score"]'))
    assert not role_names(ast.parse('def f():\n    """The fake_score."""'))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_import_crosses_a_layer(rule):
    assert violations(rule) == []


@pytest.mark.parametrize(
    ("rule", "path", "line"),
    [
        (core_rule, "core/flow.py", "import numpy"),
        (core_rule, "core/flow.py", "from cdm_lightning.backbones.base import Backbone"),
        (core_rule, "core/flow.py", "from ..errors import UserError"),
        (config_rule, "module.py", "def f():\n    from omegaconf import DictConfig"),
        (library_rule, "module.py", "import diffusers.models"),
        (peft_rule, "module.py", "from peft import LoraConfig"),
        (family_rule, "backbones/toy2d.py", "from cdm_lightning.backbones import sd3"),
        (family_rule, "module.py", "from cdm_lightning.backbones.toy2d import Toy2DBackbone"),
        (callback_rule, "callbacks/progress.py", "from . import other"),
        (direction_rule, "metrics/energy.py", "from cdm_lightning.module import CDMModule"),
        (direction_rule, "checkpoint/callback.py", "from cdm_lightning.training.networks import Networks"),
        (direction_rule, "distributed/launch.py", "from cdm_lightning.train import train"),
    ],
)
def test_each_rule_can_fail(rule, path, line):
    assert not all(rule(path, name) for name in imports(ast.parse(line), path))


def test_imports_for_type_checkers_do_not_count_and_all_others_do():
    tree = ast.parse(
        "import a\n"
        "if TYPE_CHECKING:\n    import unseen\n    if True:\n        import unseen\nelse:\n    import b\n"
        "if not TYPE_CHECKING:\n    import c\n"
        "def f():\n    import d\n    if flag:\n        from e import g\n"
    )
    assert list(imports(tree, "module.py")) == ["a", "b", "c", "d", "e.g"]


# ---- names of families


@cache
def family_names() -> frozenset[str]:
    """The `title`s of the families and the names of their classes, from their source."""
    names = set()
    for family in families():
        for node in ast.walk(sources()[f"backbones/{family}.py"]):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Backbone"):
                names.add(node.name)
                names |= {
                    item.value.value
                    for item in node.body
                    if isinstance(item, ast.Assign) and [target.id for target in item.targets] == ["title"]
                }
    return frozenset(names)


def told_names(tree: ast.Module) -> list[str]:
    """Names of families among a module's texts, whole and in whatever case; docstrings are sentences, and so none is."""
    known = {name.lower() for name in family_names()}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if text.strip().lower() in known]


def test_nothing_but_a_family_tells_families_apart_by_name():
    found = {path: told_names(tree) for path, tree in sources().items() if not path.startswith("backbones/")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        'if backbone.title == "SD3": pass',
        'wide = title in ("FLUX", other)',
        'tokens = {"Z-Image": 1}[title]',
        'fingerprint.startswith("qwen-image")',
        'type(backbone).__name__ == "SanaBackbone"',
        'match title:\n    case "LongCat": pass',
    ],
)
def test_a_name_of_a_family_is_seen(line):
    assert told_names(ast.parse(line))
    assert not told_names(ast.parse(f"def f():\n    {chr(34) * 3}What SD3 does.{chr(34) * 3}"))


def test_the_families_are_found():
    assert families() == {"sd3", "toy2d", "longcat", "flux", "qwen_image", "sana", "z_image"}
    assert {"SD3", "FLUX", "Z-Image", "Qwen-Image", "SANA", "LongCat", "Toy2DBackbone"} <= family_names()


def test_there_is_no_drawer_for_odd_things():
    names = {part for path in sources() for part in Path(path).with_suffix("").parts}
    assert not names & {"util", "utils", "helpers", "misc", "common"}
