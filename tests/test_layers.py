"""A module imports from its own layer or from a lower one: the order of the layers stays."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first. A module that is not named belongs to its folder.
LAYERS = (
    ("engine/errors.py", "engine/tokenizer.py", "engine/phrases.py", "engine/jsonl.py",
     "engine/doctor.py", "engine/kernels.py"),
    ("moe.py", "tasks.py"),
    ("engine/devices.py", "engine/checkpoint.py", "engine/optim.py", "engine/sampling.py"),
    ("grpo.py",),
    ("engine/evaluate.py", "engine/folder.py", "engine/look.py", "engine/watch.py"),
    ("r1mini.py",),
    ("tools/",),
    ("studies/",),
    ("workshop/", "tests/", "test_r1mini.py"),
)
FOLDERS = ("engine", "tools", "studies", "workshop", "tests")
FILES = sorted(str(path.relative_to(ROOT)) for path in (
    *ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))))
# What starts the program, and what calls a study by its name (it imports none by a statement).
STARTS = {("r1mini.py", "tools/cli.py")}


def layer_of(name):
    """The number of a file's layer; None if it has none."""
    for number, names in enumerate(LAYERS):
        if name in names or any(x.endswith("/") and name.startswith(x) for x in names):
            return number
    return None


def statements(name):
    """All import statements of a file, inside functions too, as (module, is it the last lines')."""
    tree = ast.parse((ROOT / name).read_text("utf-8"))
    last = {id(inner) for node in tree.body if isinstance(node, ast.If)
            and "__main__" in ast.dump(node.test) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            yield module, id(node) in last


def own_files(name):
    """(file of this project that is imported, whether by the last lines) of a file."""
    for module, last in statements(name):
        path = module.replace(".", "/") + ".py"
        if (ROOT / path).exists():
            yield path, last


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__init__.py")])
def test_layers_imports_go_down(name):
    """No module imports from a higher layer than its own, but for the start of the program."""
    mine = layer_of(name)
    assert mine is not None, f"{name} is in no layer: put it into LAYERS"
    for other, last in own_files(name):
        if last and (name, other) in STARTS:
            continue
        assert layer_of(other) <= mine, f"{name} imports {other}, which is in a higher layer"


def test_layers_only_devices_names_torch_distributed():
    """What several processes do is engine/devices.py's alone."""
    naming = {name for name in FILES for module, _ in statements(name)
              if module.startswith("torch.distributed")}
    assert {name for name in naming if layer_of(name) < len(LAYERS) - 1} == {"engine/devices.py"}


def reached(name):
    """All modules, of others too, that are imported when a file is."""
    modules = {module for module, _ in statements(name)}
    for other, last in own_files(name):
        modules |= set() if last else reached(other)
    return modules


@pytest.mark.parametrize("name", ["tasks.py", "engine/tokenizer.py", "engine/jsonl.py"])
def test_layers_texts_need_no_torch(name):
    """Problems, the tokenizer and files of problems are read without torch."""
    assert not {module for module in reached(name) if module.partition(".")[0] == "torch"}


def test_layers_lesson_needs_run_time_packages_only():
    """The four lesson files and the engine import torch, tiktoken, numpy, tqdm and nothing else."""
    import sys
    allowed = {"torch", "tiktoken", "numpy", "tqdm", *sys.stdlib_module_names,
               *(Path(name).stem for name in FILES if "/" not in name), "engine", "tools"}
    for name in FILES:
        if layer_of(name) is not None and layer_of(name) <= layer_of("r1mini.py"):
            assert {module.partition(".")[0] for module, _ in statements(name)} <= allowed, name


# What every study or command has.
COMMON = {"main", "measure", "page", "numbers", "against", "picture"}


@pytest.mark.parametrize("folder", ["tools", "studies", "workshop"])
def test_layers_names_of_one_file_are_private(folder):
    """A function whose name has no "_" in front is used in another file too, or is one that every
    study or command has. So a public name says where it lives. A file that is a lesson of its own
    (workshop/zero.py, the exercises) has plain names."""
    texts = {name: (ROOT / name).read_text("utf-8") for name in FILES
             if layer_of(name) is not None and "test" not in name
             and not name.startswith(("workshop/zero", "workshop/exercises", "workshop/solutions"))}
    for name in texts:
        if not name.startswith(folder):
            continue
        others = " ".join(text for other, text in texts.items() if other != name)
        words = {Path(name).stem, *re.findall(r"\w+", others)}
        for node in ast.parse(texts[name]).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.name in COMMON | words, f"{name}: {node.name} is used there alone"


def test_layers_of_the_page_are_these():
    """docs/files.md names every module of the engine and of the tools, in its layer."""
    number, named = 0, {}
    for line in (ROOT / "docs/files.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].isdigit():
            number = int(cells[1])
        folder = ""
        for name in re.findall(r"`([\w/]+\.py)`", cells[2] if len(cells) == 5 else ""):
            folder = name.rpartition("/")[0] or folder
            named[f"{folder}/{Path(name).name}".lstrip("/")] = number
    everything = {name: layer_of(name) + 1 for name in FILES if not name.endswith("__init__.py")
                  and not name.startswith("tests/")}
    assert named == {name: layer for name, layer in everything.items()
                     if name in named or name.startswith(("engine/", "tools/")) or "/" not in name}
