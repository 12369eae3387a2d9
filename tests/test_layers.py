"""The import layers of the package, read from its source: what each part may know."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from sys import stdlib_module_names

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "cdm_lightning"
NAME = PACKAGE.name
ENTRY_POINTS = {"train.py", "pretrain.py", "cache_text.py", "config.py", "launch.py"}
FAMILY_BLIND = (
    "checkpoint/",
    "core/",
    "data/",
    "lora/",
    "metrics/",
    "planning/",
    "networks.py",
    "optim.py",
    "parallel.py",
    "ranks.py",
    "sharding.py",
    "launch.py",
    "resolution.py",
    "module.py",
    "evaluation.py",
)
TYPE_CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
LIBRARY_EDGE = ("backbones/", "pretraining/", "export.py", "sample.py")


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
    return is_under(name, "core") if own(name) else root == "torch" or root in stdlib_module_names


def config_rule(path: str, name: str) -> bool:
    return path in ENTRY_POINTS or name.split(".")[0] not in {"hydra", "omegaconf"}


def library_rule(path: str, name: str) -> bool:
    return path.startswith(LIBRARY_EDGE) or name.split(".")[0] not in {"diffusers", "transformers"}


def family_rule(path: str, name: str) -> bool:
    """No family knows another, and what trains them knows none: only the base class."""
    if path.startswith("backbones/"):
        others = families() - {Path(path).stem}
    elif path.startswith(FAMILY_BLIND):
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


def upward_rule(path: str, name: str) -> bool:
    """The lower layers do not import the module, callbacks or entry points that are built from them."""
    lower = path.startswith(("checkpoint/", "core/", "backbones/", "data/", "metrics/"))
    higher = (
        "module",
        "callbacks",
        "train",
        "pretrain",
        "pretraining",
        "planning",
        "plan",
        "cache_text",
        "export",
        "sample",
        "config",
        "networks",
        "optim",
        "resolution",
    )
    return not lower or not any(is_under(name, part) for part in higher)


RULES = [core_rule, config_rule, library_rule, peft_rule, family_rule, callback_rule, upward_rule]


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
        (callback_rule, "callbacks/ema.py", "from . import other"),
        (upward_rule, "metrics/energy.py", "from cdm_lightning.module import CDMModule"),
        (upward_rule, "checkpoint/callback.py", "from cdm_lightning.networks import Networks"),
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
