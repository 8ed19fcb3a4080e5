"""The paper's tables and figures, rendered from run folders and nothing else."""

from __future__ import annotations

from pathlib import Path

from agr_jax.files import write_atomically
from agr_jax.report import comparison, figures, page, tables
from agr_jax.report.run_records import RunRecord, read_runs

__all__ = ["write_report"]
_TITLE = "AGR: the paper's tables and figures"


def write_report(root: Path, out: Path) -> list[Path]:
    """Renders all tables and figures from the runs in a folder.

    Writes `report.md`, `report.html` (one file that needs nothing else) and each figure as SVG and
    PNG. A missing, foreign or damaged run folder is named in the report, which renders the rest.

    Args:
        root: the folder that holds the run folders.
        out: where to write; made if missing.

    Returns:
        The files that were written.

    Raises:
        RunFolderError: if there is no such folder.
    """
    runs, problems = read_runs(root)
    sections = [page.Section("Runs", tuple(tables.overview(runs, problems)))]
    for name, title in tables.TITLES.items():
        sections.append(page.Section(title, tuple(tables.paper_table(name, runs))))
    pictures: list[page.Picture] = []
    for name, title in figures.TITLES.items():
        block = _drawn(name, runs)
        if isinstance(block, page.Picture):
            pictures.append(block)
        sections.append(page.Section(title, (block,)))
    compared: list[str | page.Table | page.Picture] = list(comparison.comparison(runs))
    mechanism: list[str | page.Table | page.Picture] = list(comparison.mechanism(runs))
    for name, blocks in (("tradeoff", compared), ("layers", mechanism)):
        picture = _drawn(name, runs)
        if isinstance(picture, page.Picture):
            pictures.append(picture)
            blocks.append(picture)
    sections.append(page.Section("AGR-small: paired comparison", tuple(compared)))
    sections.append(page.Section("AGR-small: mechanism", tuple(mechanism)))
    out.mkdir(parents=True, exist_ok=True)
    written = {
        out / "report.md": page.markdown(_TITLE, sections).encode(),
        out / "report.html": page.as_html(_TITLE, sections).encode(),
    }
    for picture in pictures:
        written[out / f"{picture.name}.svg"] = picture.svg
        written[out / f"{picture.name}.png"] = picture.png
    for path, content in written.items():
        write_atomically(path, content)
    return list(written)


def _drawn(name: str, runs: list[RunRecord]) -> str | page.Picture:
    try:
        picture = figures.draw(name, runs)
    except ImportError:
        return "Not drawn: matplotlib is missing: `pip install matplotlib`."
    sweep = f"`python launch.py --job=sweep --config=configs/paper/{name}.py:small`"
    return picture or f"Not run: {sweep} makes what this figure shows."
