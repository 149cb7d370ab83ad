"""Notebooks run as they are committed, show what they would show again, and hold no logic of their own."""

import ast
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="notebooks need the extra: pip install dms_lab[notebooks]")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"


def _load_tool():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load_tool()
NAMES = tool.names()


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def code(notebook):
    return "\n".join(re.sub(r"^%", "# %", cell.source) for cell in notebook.cells if cell.cell_type == "code")


def shown(notebook):
    """What each cell shows, pictures as their kind alone: their bytes depend on fonts and versions."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            kinds = {kind: "picture" if kind.startswith("image/") else text for kind, text in data.items()}
            if set(kinds) & {"text/html", "text/markdown", "image/png"}:
                kinds.pop("text/plain", None)  # addresses of objects
            found.append((number, output.output_type, kinds))
    return found


def test_every_notebook_is_a_pair():
    assert {"accuracy_vs_memory", "method_in_pictures", "what_is_kept"} <= set(NAMES)
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_halves_of_a_pair_have_the_same_cells(name):
    assert cells(committed(name)) == cells(tool.read(name))
    again = jupytext.reads(jupytext.writes(committed(name), fmt="py:percent"), fmt="py:percent")
    assert cells(again) == cells(tool.read(name))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_free_of_errors_and_of_this_machine(name):
    notebook = committed(name)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    text = json.dumps([{k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} for o in outputs])
    for place in (ROOT, Path.home(), tempfile.gettempdir()):
        assert f"{place}/" not in text
    assert not re.search(r"/(home|root|usr|tmp|var|Users)/|site-packages|0x[0-9a-f]{6,}", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_says_nothing_of_when_and_where_it_ran(name):
    notebook = committed(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 600_000
    assert dict(notebook.metadata) == tool.KERNEL
    assert not any(cell.metadata for cell in notebook.cells)
    assert [cell.id for cell in notebook.cells] == [cell.id for cell in tool.read(name).cells]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing_and_explains_what_it_draws(name):
    notebook = tool.read(name)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [node for node in ast.walk(ast.parse(code(notebook))) if isinstance(node, kinds)]
    assert max(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code") <= 30
    drawing = [i for i, cell in enumerate(notebook.cells) if "plt.show()" in cell.source or "_figure(" in cell.source]
    for index in drawing:
        around = notebook.cells[max(0, index - 2) : index + 2]
        assert any(cell.cell_type == "markdown" for cell in around), notebook.cells[index].source


@pytest.fixture
def copy(tmp_path):
    """The notebooks and what they read, somewhere else."""
    for name in ("notebooks", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".venv", "*.ipynb", "*.png"))
    return tmp_path / "notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_elsewhere_and_shows_again_what_is_committed(name, copy):
    assert shown(tool.execute(name, copy)) == shown(committed(name)), "run `make notebooks` and look at the difference"


@pytest.mark.slow
def test_what_is_kept_runs_on_a_checkpoint(copy):
    import torch
    from test_retrofit import decide
    from transformers import AutoModelForCausalLM

    from dms_lab.attachment import retrofit
    from dms_lab.checkpoint import fingerprint, save_checkpoint
    from dms_lab.models import EMBEDDED
    from dms_lab.policies.dms import DmsConfig

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    base = fingerprint(model)
    folder = copy / "cr4"
    about = {"cr": 4.0, "seed": 0}
    save_checkpoint(folder, decide(retrofit(model, DmsConfig(window=8))), "adapter", "embedded", base, about)
    source = copy / "what_is_kept.py"
    assert source.read_text().count("checkpoint = None") == 1
    source.write_text(source.read_text().replace("checkpoint = None", 'checkpoint = "cr4"'))
    assert "layer 3, head 1" in str(shown(tool.execute("what_is_kept", copy)))
