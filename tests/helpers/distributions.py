"""Installed packages, as folders on the path: their metadata is what entry points are read from."""

from pathlib import Path


def write_metadata(site: Path, name: str, entry_points: str) -> None:
    """Describe a package ``name`` 1.0 in the folder ``site``, with the text of its ``entry_points.txt``."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
