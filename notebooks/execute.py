"""Runs the notebooks of this folder and writes their outputs: python notebooks/execute.py [name ...]

A notebook is a pair: `X.py` (py:percent) is what people edit and review, `X.ipynb` the same cells with their outputs.
Nothing in it depends on the time or on this machine's Python, so a run that changes nothing leaves no difference.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def names() -> list[str]:
    """The notebooks of this folder."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.name != Path(__file__).name)


def read(name: str, folder: Path = FOLDER) -> nbformat.NotebookNode:
    """The cells of `X.py` as a notebook without outputs; ids are numbers, the same in every run."""
    notebook = jupytext.read(folder / f"{name}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict(KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
    return notebook


def execute(name: str, folder: Path = FOLDER, timeout_seconds: int = 120) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel in `folder`; raises `CellExecutionError` where a cell fails."""
    notebook = read(name, folder)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=timeout_seconds, kernel_name="python3", resources=resources, record_timing=False
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(KERNEL)  # not the version of this Python
    return notebook


def main() -> None:
    """Executes the named notebooks, or all."""
    for name in sys.argv[1:] or names():
        nbformat.write(execute(name), FOLDER / f"{name}.ipynb")
        print(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
