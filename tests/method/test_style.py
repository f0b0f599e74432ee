"""Imports go one way, and nothing unsafe is called."""

import ast
import re
import sys
from pathlib import Path

from commands import ROOT

# Which of our own modules a part may import: srreal <- data <- scripts; kernels, srreal <- model <-
# scripts.
MAY_IMPORT = {
    "errors.py": set(),
    "machine.py": set(),
    "mentions.py": set(),
    "python_version.py": set(),
    "flags.py": {"errors", "python_version"},
    "pictures.py": {"errors"},
    "srreal.py": {"latex", "official"},
    "official.py": set(),
    "latex.py": set(),
    "kernels/": {"kernels"},
    "data/__main__.py": {"errors", "flags", "srreal", "data", "model", "training"},
    "data/coldstart.py": {"errors", "flags", "pictures", "srreal", "data", "model"},
    "data/depth.py": {"errors", "flags", "pictures", "srreal", "data"},
    "data/": {
        "errors",
        "flags",
        "latex",
        "machine",
        "mentions",
        "pictures",
        "python_version",
        "srreal",
        "data",
    },
    "model/tiny.py": {"errors", "flags", "srreal", "model"},
    "model/prompt_embeds.py": {"errors", "flags", "srreal", "model", "ask"},
    "model/": {"errors", "mentions", "pictures", "srreal", "kernels", "model"},
    "plan.py": {"errors", "flags", "model"},
    "training/": {
        "errors",
        "flags",
        "machine",
        "pictures",
        "srreal",
        "data",
        "model",
        "plan",
        "training",
    },
    "train_sft.py": {"errors", "flags", "srreal", "model", "training"},
    "train_rl.py": {"errors", "flags", "srreal", "model", "kernels", "training"},
    "eval_table.py": {"srreal"},
    "eval.py": {
        "errors",
        "flags",
        "mentions",
        "pictures",
        "srreal",
        "data",
        "model",
        "training",
        "eval_table",
    },
    "ask.py": {"errors", "flags", "pictures", "srreal", "data", "model", "training"},
    "report.py": {"errors", "flags", "python_version", "reporting"},
    "reporting/": {"errors", "mentions", "pictures", "srreal", "data", "eval_table", "reporting"},
}
OWN = {
    "errors",
    "flags",
    "machine",
    "mentions",
    "pictures",
    "python_version",
    "srreal",
    "latex",
    "official",
    "kernels",
    "data",
    "model",
    "plan",
    "training",
    "train_sft",
    "train_rl",
    "eval_table",
    "eval",
    "ask",
    "report",
    "reporting",
}


def sources() -> list[Path]:
    found = list(ROOT.glob("*.py"))
    for folder in ("data", "kernels", "model", "reporting", "training"):
        found += (ROOT / folder).rglob("*.py")
    return sorted(path for path in found if path.stat().st_size)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, imported name) of every import statement of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def test_import_direction():
    for path in sources():
        allowed = next((v for k, v in MAY_IMPORT.items() if name(path).startswith(k)), None)
        if allowed is None:
            continue
        used = {module.split(".")[0] for module, _ in imports(path)} & OWN
        assert used <= allowed, f"{name(path)} imports {used - allowed}"


def test_srreal_and_data_know_no_torch_and_model_knows_three_names_of_srreal():
    for path in sources():
        modules = {module.split(".")[0] for module, _ in imports(path)}
        runs_models = name(path) in ("data/coldstart.py", "data/depth.py")
        if name(path) in ("srreal.py", "latex.py", "official.py", "pictures.py") or (
            name(path).startswith("data/") and not runs_models
        ):
            assert not modules & {"torch", "transformers", "triton"}, name(path)
        # A script whose --path is a name of PATHS.
        if name(path).startswith("model/") and name(path) != "model/prompt_embeds.py":
            names = {what for module, what in imports(path) if module == "srreal" and what}
            names |= set(re.findall(r"\bsrreal\.(\w+)\(", path.read_text()))
            assert names <= {"Example", "prompt", "target"}, (
                f"{name(path)} takes {names} from srreal"
            )


def test_nothing_unsafe():
    for path in sources():
        modules = {module.split(".")[0] for module, _ in imports(path)}
        banned = {"pickle", "flash_attn", "vllm", "ray", "deepspeed", "accelerate", "trl"}
        if name(path) == "data/sets/embodiedscan.py":
            banned.remove("pickle")  # its Unpickler knows builtins and numpy arrays only
        assert not modules & banned, name(path)
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id in ("eval", "exec") for f in calls), name(
            path
        )
    assert sys.version_info >= (3, 11)
