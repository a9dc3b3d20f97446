"""Sphinx configuration: ``python -m sphinx -W -b html docs build/docs``."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from docs import pages

project = "distill-prune"
release = metadata.version("distill-prune")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_extra_path = ["_extra"]
exclude_patterns = ["_extra"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def _fill(app: object, name: str, source: list[str]) -> None:
    source[0] = pages.filled(source[0])


def setup(app: object) -> None:
    """Write the pages that are made from the code, and fill the places that they fill in others."""
    pages.write()
    app.connect("source-read", _fill)  # type: ignore[attr-defined]
