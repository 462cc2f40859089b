"""The notebook of a Python file with `# %%` cells. `python tests/helpers/notebook.py` writes that of the tour."""

import json
import re
from pathlib import Path
from typing import Any

TOUR = Path(__file__).parents[2] / "examples" / "tour.py"


def cells_of(text: str) -> list[tuple[str, str]]:
    """Kind ("markdown" or "code") and source of each cell."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.DOTALL | re.MULTILINE)
    uncommented = [
        (mark, re.sub(r"^# ?", "", source, flags=re.MULTILINE) if mark else source) for mark, source in found
    ]
    return [("markdown" if mark else "code", source.strip("\n")) for mark, source in uncommented]


def notebook(text: str) -> dict[str, Any]:
    """In nbformat 4.5, as `json.load` gives it."""
    cells: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells_of(text)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append({**cell, "source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    TOUR.with_suffix(".ipynb").write_text(json.dumps(notebook(TOUR.read_text()), indent=1) + "\n")
