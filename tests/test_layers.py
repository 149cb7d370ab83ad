"""A room imports only from its own layer or lower ones; the top level holds what it should."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    {
        "eviction",
        "distillation",
        "accounting",
        "pareto",
        "config",
        "typed_config",
        "generation_config",
        "evaluation_config",
        "sweep_config",
    },
    {"attention", "cache"},
    {"policies"},
    {
        "sharding",
        "structure",
        "lora",
        "attention_function",
        "attachment",
        "calibration",
        "checkpoint",
        "tiny",
        "chains",
        "admission",
        "decode_step",
        "generation",
        "sampling",
        "models",
    },
    {"training", "evaluation", "results", "plots", "tracking", "terminal", "threads", "answers"}
    | {"sweeping", "comparison", "published", "economics", "html_report", "inspection"},
    {"multirun", "train", "evaluate", "demo", "pretrain", "preview", "generate", "harness", "sweep", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "dms_lab" else [f"dms_lab.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("dms_lab."))


def test_imports_point_downwards():
    wrong, seen = [], 0
    for file in (ROOT / "dms_lab").rglob("*.py"):
        room = file.relative_to(ROOT / "dms_lab").parts[0].removesuffix(".py")
        if file.name == "__main__.py":  # the command of a package, as `python -m dms_lab.pareto`
            room = "__main__"
        if room == "__init__":
            continue
        for imported in imports(file):
            seen += 1
            if LEVEL[imported] > LEVEL[room]:
                wrong.append(f"{file.name} imports {imported}")
    assert not wrong
    assert seen > 50


def test_the_top_level_holds_what_it_should():
    shown = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    made = {"runs", "outputs", "multirun", "wandb", "dist"}
    wanted = {"conf", "dms_lab", "experiments", "notebooks", "tests", "pyproject.toml", "Makefile"}
    assert shown - made <= wanted | {"README.md", "LICENSE"}
