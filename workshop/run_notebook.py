"""Runs the notebook r1mini.ipynb, and keeps in it what its cells print and draw.

    python workshop/run_notebook.py
"""
import base64
import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent / "r1mini.ipynb"


def _run_cell(source, names):
    """Runs the code of one cell. names: what the cells before it have defined, which it
    changes. Returns its outputs, as a notebook keeps them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": text.splitlines(keepends=True)})
    return outputs + _drawn_figures()


def _drawn_figures():
    """The figures that matplotlib has open, as outputs. Closes them."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    plt, outputs = importlib.import_module("matplotlib.pyplot"), []
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", dpi=60)
        outputs.append({"output_type": "display_data", "metadata": {},
                        "data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}})
    plt.close("all")
    return outputs


def _code_cells(notebook):
    """The cells with code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def write_notebook():
    """Runs all cells in order, and writes the notebook with their outputs."""
    os.environ["MPLBACKEND"] = "Agg"  # draws into files
    notebook, names = json.loads(NOTEBOOK.read_text("utf-8")), {}
    with contextlib.chdir(NOTEBOOK.parent):
        for number, cell in enumerate(_code_cells(notebook), 1):
            print(f"notebook, cell {number}", flush=True)
            cell["outputs"] = _run_cell("".join(cell["source"]), names)
            cell["execution_count"] = number
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    write_notebook()
