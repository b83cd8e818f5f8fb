"""The arrows between the parts of the package, the core on its own, the public names, and the docstrings' examples."""

import ast
import doctest
import importlib
import pathlib
import subprocess
import sys

import pytest

import mlora_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mlora_jax"
SOURCES = sorted((*PACKAGE.rglob("*.py"), *(ROOT / "experiments").glob("*.py"), *(ROOT / "configs").glob("*.py")))

# What every part may import besides itself: the arrows of the design.
BELOW_TRAINING = {"core", "disk", "config_type", "adapters", "trials", "config", "models", "data", "parallel"}
BELOW_EVALUATE = BELOW_TRAINING | {"training", "kv_cache"}
BELOW_RUN = BELOW_EVALUATE | {"evaluate", "interop", "report", "compilation_cache"}
MAY_IMPORT = {
    "core": set(),
    "disk": set(),
    "adapters": {"core"},
    "config_type": set(),
    "trials": {"core", "config_type"},
    "config": {"core", "config_type", "trials"},
    "models": {"core", "disk"},
    "compilation_cache": {"disk"},
    "data": {"core", "disk", "models"},
    "parallel": {"core", "disk"},
    "training": BELOW_TRAINING,
    "kv_cache": BELOW_TRAINING | {"training"},
    "evaluate": BELOW_EVALUATE,
    "interop": BELOW_EVALUATE | {"evaluate"},
    "report": {"core", "disk", "config_type", "trials", "config", "training.curve_records"},
    "run": BELOW_RUN,
    "compile_report": BELOW_EVALUATE | {"evaluate"},
    "cost": BELOW_RUN | {"compile_report", "run"},
    "study": BELOW_RUN | {"run"},
    "cli": BELOW_RUN | {"compile_report", "cost", "run", "study"},
    "experiments": {"cli"},
    "configs": set(),
}
STANDARD_OR = {"core": {"jax", "numpy"}, "configs": {"ml_collections"}}
DOCTESTED = (
    *("adapters", "compile_report", "config", "core", "data", "evaluate", "interop", "kv_cache", "models", "parallel"),
    *("report", "training", "trials"),
)


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: pathlib.Path, text: str | None = None) -> set[str]:
    """Dotted names of every module that a file imports anywhere, also inside functions and by importlib."""
    found = set()
    for node in ast.walk(ast.parse(text if text is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                found.add(argument.value)
    return found


def part_of(name: str) -> str:
    """The part that a dotted module name belongs to; "" for other people's packages."""
    first, *rest = name.split(".")
    if first in ("experiments", "configs"):
        return first
    return ".".join(rest) if first == "mlora_jax" else ""


def broken_arrows(path: pathlib.Path, text: str | None = None) -> list[str]:
    own = part_of(module_name(path)).split(".")[0]
    wrong = []
    for name in imported(path, text):
        target = part_of(name)
        if target and target.split(".")[0] != own:
            allowed = MAY_IMPORT[own]
            if not any(target == part or target.startswith(f"{part}.") for part in allowed):
                wrong.append(name)
        elif name == "mlora_jax" or (name.startswith("mlora_jax") and not target):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=module_name)
def test_no_import_points_back(path):
    assert not broken_arrows(path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("core/product.py", "import mlora_jax.adapters"),
        ("core/product.py", "from mlora_jax import adapt"),
        ("core/product.py", "from ..adapters import split"),
        ("core/product.py", "def f():\n    from mlora_jax.models import Decoder"),
        ("models/decoder.py", "from mlora_jax.adapters import adapt"),
        ("models/decoder.py", "import importlib\nimportlib.import_module('mlora_jax.data')"),
        ("data/tasks.py", "from mlora_jax.training.step import train_step"),
        ("training/loop.py", "from mlora_jax.evaluate import rank_curve"),
        ("evaluate/curve.py", "from mlora_jax.run.train import train"),
        ("report/rows.py", "from mlora_jax.training.step import train_step"),
        ("report/rows.py", "from mlora_jax.evaluate import rank_curve"),
        ("config/keys.py", "from mlora_jax.adapters import adapt"),
        ("run/train.py", "import mlora_jax.cli.run"),
        ("training/loop.py", "import mlora_jax"),
    ],
)
def test_an_arrow_that_points_back_is_seen(file, text):
    assert broken_arrows(PACKAGE / file, text)


@pytest.mark.parametrize("part", STANDARD_OR)
def test_core_and_configs_import_next_to_nothing(part):
    folder = PACKAGE / "core" if part == "core" else ROOT / "configs"
    names = {name for path in folder.glob("*.py") for name in imported(path)}
    outside = {name.split(".")[0] for name in names if part_of(name).split(".")[0] != part}
    assert outside <= STANDARD_OR[part] | set(sys.stdlib_module_names)


def test_every_folder_of_the_package_is_a_package():
    # setuptools leaves a folder without __init__.py out of the wheel.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder.name for folder in folders if not (folder / "__init__.py").is_file()]


# The convention of TensorFlow Datasets: the class of a data set is called Builder, and its module names it.
SHARED_CLASS_NAMES = {"Builder"}


def classes_of(sources) -> dict[str, list[str]]:
    """Name of a class -> the modules that define one of that name, at the top level or inside something."""
    found: dict[str, list[str]] = {}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module_name(path))
    return found


def test_no_two_classes_have_one_name():
    found = classes_of(PACKAGE.rglob("*.py"))
    assert len(found) > 80 and len(found["Builder"]) > 1
    assert not {name: where for name, where in found.items() if len(where) > 1 and name not in SHARED_CLASS_NAMES}


CORE_ALONE = """
import importlib, sys

# Top-level names of jax, numpy and what those two need themselves; no other package can be found.
ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "mlora_jax"} | set(sys.stdlib_module_names)

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        return self.finder.find_spec(name, path, target) if top in ALLOWED or top.startswith("_") else None

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import mlora_jax.core as core
import jax.numpy as jnp
from mlora_jax import RankHierarchy, aurac, fold, p_scaled_product, squeeze, truncate

assert RankHierarchy((1, 2)).matryoshka().tolist() == [2.0, 1.0]
for name in core.__all__:
    getattr(core, name)
for name in ("flax", "optax", "ml_collections"):
    assert name not in sys.modules
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
try:
    from mlora_jax import adapt
except ModuleNotFoundError as error:
    assert error.name == "flax", error
else:
    raise AssertionError("adapt needs flax")
print("alone")
"""


def test_the_public_names_resolve():
    assert mlora_jax.__all__ == sorted(set(mlora_jax.__all__)) and len(mlora_jax.__all__) <= 18
    for name in mlora_jax.__all__:
        assert callable(getattr(mlora_jax, name)), name
        assert name in dir(mlora_jax)
    with pytest.raises(AttributeError, match="module 'mlora_jax' has no attribute 'adopt'"):
        _ = mlora_jax.adopt


@pytest.mark.parametrize("part", ["core", "data", "evaluate", "interop", "models", "report"])
def test_the_names_of_every_part_resolve(part):
    module = importlib.import_module(f"mlora_jax.{part}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = module.nothing_of_this_name


def test_the_core_with_jax_and_numpy_alone():
    """In a process of its own, in which no other package can be found."""
    finished = subprocess.run(
        [sys.executable, "-c", CORE_ALONE], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
    )
    assert finished.returncode == 0 and finished.stdout.strip() == "alone", finished.stderr


def doctested_modules() -> list[str]:
    parser, found = doctest.DocTestParser(), []
    for path in SOURCES:
        name = module_name(path)
        if path.is_relative_to(PACKAGE) and name.partition(".")[2].split(".")[0] in DOCTESTED:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            texts = (ast.get_docstring(n) for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
            examples = [example for text in texts if text for example in parser.get_examples(text)]
            if not all(doctest.SKIP in example.options for example in examples):
                found.append(name)
    return found


@pytest.mark.parametrize("name", doctested_modules())
def test_the_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_the_core_has_examples():
    with_examples = set(doctested_modules())
    assert {f"mlora_jax.core.{part}" for part in ("hierarchy", "product", "policies", "aurac")} < with_examples
