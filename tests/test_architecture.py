"""The cut of the code base: who may import whom, what a package holds, and what never appears anywhere."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"bayesnet": ROOT / "bayesnet", "bayesnet_cli": ROOT / "cli", "bayesnet.configs": ROOT / "configs"}
MAX_LINES = 400

# From top to bottom. A module imports only from lines below its own; a package is one entry, free within itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("bayesnet_cli",),
    ("bayesnet",),  # the public names, resolved on first use
    ("bayesnet.estimator",),
    ("bayesnet.fitted_classifier",),
    ("bayesnet.workflows",),
    ("bayesnet.battery",),
    ("bayesnet.settings", "bayesnet.report", "bayesnet.benchmark", "bayesnet.exporting", "bayesnet.testing"),
    ("bayesnet.training",),
    ("bayesnet.batches", "bayesnet.profiling"),
    ("bayesnet.progress", "bayesnet.predictive", "bayesnet.ood"),
    ("bayesnet.engine", "bayesnet.optim"),
    ("bayesnet.step",),
    ("bayesnet.inference", "bayesnet.bsam"),
    ("bayesnet.model", "bayesnet.elbo"),
    ("bayesnet.data", "bayesnet.backbones", "bayesnet.calibration", "bayesnet.plots"),
    ("bayesnet.metrics", "bayesnet.convergence"),
    ("bayesnet.rundir", "bayesnet.checkpoint", "bayesnet.weights"),
    ("bayesnet.locking", "bayesnet.download"),
    ("bayesnet.storage",),
    ("bayesnet.strict_json",),
    ("bayesnet.config", "bayesnet.configs"),
    ("bayesnet.registry",),
    ("bayesnet.types", "bayesnet.errors", "bayesnet.wording"),
)

# Packages that only these modules (and what is below them in their package) may import.
DOORS: dict[str, tuple[str, ...]] = {
    "click": ("bayesnet_cli",),
    "rich": ("bayesnet_cli",),
    "pyro": ("bayesnet.model", "bayesnet.elbo", "bayesnet.inference", "bayesnet.testing", "bayesnet.battery"),
    "matplotlib": ("bayesnet.plots",),
    "PIL": ("bayesnet.data.images",),
    "safetensors": ("bayesnet.checkpoint", "bayesnet.weights"),
    "scipy.io": ("bayesnet.data.archives",),
    "sklearn": ("bayesnet.data.digits", "bayesnet.data.unfamiliar", "bayesnet.fitted_classifier"),
    "torchvision": ("bayesnet.backbones",),
    "timm": ("bayesnet.backbones",),
    "huggingface_hub": ("bayesnet.backbones",),
    "onnx": ("bayesnet.exporting",),
    "onnxruntime": ("bayesnet.exporting",),
    "onnxscript": ("bayesnet.exporting",),
    "torch.optim": (
        "bayesnet.optim",
        "bayesnet.engine",
        "bayesnet.step",
        "bayesnet.bsam",
        "bayesnet.inference.nuts_sampler",
        "bayesnet.battery",
    ),
    "urllib.request": ("bayesnet.download",),
}

# Ways to run what a file says. The functions are named as they are called; a method such as `model.eval()` is none.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "marshal", "shelve", "yaml", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "torch.hub.load", "pyro.get_param_store().load"}
FORBIDDEN_KEYWORDS = {"allow_pickle"}
# The one door for what others made may do what nobody else may.
ALLOWED_DANGERS = {"bayesnet/weights.py": {"pickle", "torch.load"}, "tests/test_docs.py": {"exec"}}

# Options that a recipe names only where it turns them on.
OFF_BY_DEFAULT = {
    "accumulation",
    "learn_prior",
    "prior_scale_floor",
    "balanced",
    "beta2",
    "clip_norm",
    "damping",
    "label_smoothing",
    "mixup",
    "patience",
    "peak_fraction",
    "rho",
    "sam_rho",
    "step_epochs",
    "step_factor",
    "temperature",
    "twin",
}

HEAVY = ("torch", "pyro", "torchvision", "arviz", "sklearn", "matplotlib", "scipy", "numpy", "PIL", "safetensors")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def modules() -> dict[str, Path]:
    """Return every module of the wheel by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def python_files() -> list[Path]:
    return sorted(
        path for name in ("bayesnet", "cli", "configs", "benchmarks", "tests") for path in (ROOT / name).rglob("*.py")
    )


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of all that a module imports, wherever in it; types alone count too."""
    path, known = modules()[name], modules()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import name` means the module of that name where there is one.
                yield (full if (full := f"{base}.{alias.name}") in known else base), node.lineno


def entry(name: str) -> str:
    """Return the entry of LAYERS that a module belongs to: the longest that fits; "bayesnet" itself fits no other."""
    entries = [each for layer in LAYERS for each in layer if name == each or name.startswith(f"{each}.")]
    best = max(entries, key=len, default="")
    if not best or (best == "bayesnet" and name != "bayesnet"):
        raise AssertionError(f"{name} has no place in LAYERS")
    return best


def height(name: str) -> int:
    return next(-index for index, layer in enumerate(LAYERS) if entry(name) in layer)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("bayesnet", "bayesnet_cli")


def violations(name: str) -> list[str]:
    """Return what a module imports from its own layer or a higher one."""
    return [
        f"{name}, line {line}: imports {target}"
        for target, line in imports(name)
        if is_ours(target) and entry(target) != entry(name) and height(target) >= height(name)
    ]


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    assert {entry(name) for name in modules()} == {each for layer in LAYERS for each in layer}


def test_imports_go_downward_only() -> None:
    assert [line for name in modules() for line in violations(name)] == []


@pytest.mark.parametrize(
    ("name", "planted", "caught"),
    [
        ("bayesnet.errors", "from bayesnet.registry import Registry", True),
        ("bayesnet.data.folder", "from bayesnet import workflows", True),
        ("bayesnet.data.folder", "def f():\n    import bayesnet.plots", True),
        ("bayesnet.optim", "from .engine import Engine", True),
        ("bayesnet.inference", "from bayesnet import __version__", True),
        ("bayesnet.data.folder", "from .images import read_image", False),
        ("bayesnet.workflows", "from bayesnet import metrics", False),
    ],
)
def test_the_contract_catches_a_planted_import(
    monkeypatch: pytest.MonkeyPatch, name: str, planted: str, caught: bool
) -> None:
    monkeypatch.setattr(f"{__name__}.parsed", lambda path: ast.parse(planted))
    assert bool(violations(name)) == caught


def test_outside_packages_come_in_by_their_doors() -> None:
    strangers = [
        f"{name}, line {line}: imports {target}"
        for name in modules()
        for target, line in imports(name)
        for package, doors in DOORS.items()
        if f"{target}.".startswith(f"{package}.") and not any(f"{name}.".startswith(f"{door}.") for door in doors)
    ]
    assert strangers == []


def test_the_conformance_suite_is_for_tests_alone() -> None:
    users = {name for name in modules() for target, _ in imports(name) if target == "bayesnet.testing"}
    assert all(name.startswith("bayesnet.battery.") for name in users)


def test_the_library_does_not_print() -> None:
    printing = [
        f"{name}, line {node.lineno}"
        for name, path in modules().items()
        if not name.startswith("bayesnet_cli")
        for node in ast.walk(parsed(path))
        if ast.unparse(node) in ("print", "sys.stdout", "sys.stderr", "sys.argv") and isinstance(node, ast.expr)
    ]
    assert printing == []


def dangers(tree: ast.Module) -> list[str]:
    """Return the imports, calls and keywords in a file that could run what a data file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.ImportFrom):
                found += [call for alias in node.names if (call := f"{node.module}.{alias.name}") in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            found += [call for call in [ast.unparse(node.func)] if call in FORBIDDEN_CALLS]
            found += [keyword.arg for keyword in node.keywords if keyword.arg in FORBIDDEN_KEYWORDS]
    return found


def test_nothing_runs_what_a_file_says() -> None:
    found = {str(path.relative_to(ROOT)): set(dangers(parsed(path))) for path in python_files()}
    assert {path: names for path, names in found.items() if names} == ALLOWED_DANGERS


def test_the_door_calls_the_loader_of_torch_once_and_restricted() -> None:
    calls = [
        ast.unparse(node)
        for node in ast.walk(parsed(ROOT / "bayesnet" / "weights.py"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert len(calls) == 1
    assert calls[0].startswith("torch.load(")
    assert "weights_only=True" in calls[0]


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from yaml import safe_load",
        "torch.load(p, weights_only=True)",
        "from torch import load",
        "eval(s)",
        "np.load(p, allow_pickle=False)",
    ],
)
def test_the_search_for_dangers_finds_planted_ones(planted: str) -> None:
    assert dangers(ast.parse(planted))


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert len(lengths) > 50


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, object] = tomllib.load(file)["tool"]["setuptools"]
    return settings


def test_the_wheel_holds_every_package() -> None:
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert packages == set(project()["packages"])  # type: ignore[call-overload]


def test_the_wheel_holds_every_recipe() -> None:
    patterns = project()["package-data"]["bayesnet.configs"]  # type: ignore[index]
    recipes = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.toml")]
    assert recipes
    assert [path for path in recipes if not any(fnmatch(str(path), pattern) for pattern in patterns)] == []


def run_python(code: str) -> list[str]:
    """Return the words that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    return done.stdout.split()


def test_help_and_import_load_nothing_heavy() -> None:
    code = f"""
import sys
import bayesnet
from click.testing import CliRunner
from bayesnet_cli.main import cli
for name in [None, *cli.commands]:
    result = CliRunner().invoke(cli, [*([] if name is None else [name]), "--help"], prog_name="bayesnet")
    assert result.exit_code == 0, result.output
    assert (name or "bayesnet") in result.output
print(*[name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code) == []


def test_a_heavy_import_would_be_noticed() -> None:
    assert run_python(f"import sys, numpy\nprint(*[name for name in {HEAVY} if name in sys.modules])") == ["numpy"]


def recipe_names() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.toml")
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_complete(name: str, tmp_path: Path) -> None:
    from bayesnet.config import to_mapping
    from bayesnet.settings import Settings, read_config, resolve_settings

    data_set, _, family = name.partition("/")
    mapping = read_config(name)
    spec = f"{data_set}:{tmp_path}" if data_set == "folder" else data_set
    settings = resolve_settings(config=name, data=spec)
    assert mapping.keys() == {field.name for field in dataclasses.fields(Settings)} - {"engine", "head"}
    assert settings.inference.family == family
    for section in ("inference", "optimizer", "training", "predict"):
        keys = to_mapping(getattr(settings, section)).keys()
        assert mapping[section].keys() | OFF_BY_DEFAULT >= keys, section
        assert mapping[section].keys() <= keys, section
    # Without --config, the data set and the family find it.
    assert resolve_settings(data=spec, family=family) == settings


def test_every_family_has_recipes_and_a_row_in_the_readme() -> None:
    from bayesnet.data import DATASETS
    from bayesnet.inference import FAMILIES

    every_data_set = {f"{data_set}/{family}" for data_set in DATASETS for family in ("deterministic", "mean_field")}
    every_family = {f"digits/{family}" for family in FAMILIES}
    assert every_data_set | every_family <= set(recipe_names())
    rows = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert set(FAMILIES) <= rows
