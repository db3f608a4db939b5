"""Run every notebook of ``docs/notebooks`` anew and keep what it prints: ``python tools/notebooks.py [NAME ...]``."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def main(names: list[str]) -> None:
    """Run those named, or all; the first that fails stops, and its file stays as it was."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # of libraries, about their own progress bars in notebooks
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        print(path.stem, flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this run: they would change the file each time
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
