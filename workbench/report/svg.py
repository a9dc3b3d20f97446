"""A matplotlib figure into SVG that follows the reader's colour scheme.

Matplotlib lays the figure out in the light palette; afterwards each colour of the palette becomes a CSS
variable with that colour as its fallback, fonts are left to the page, identifiers get the figure's name as a
prefix, and namespaces and metadata go: the same records give the same bytes, and a figure refers to nothing.
"""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# name: (on white, on near-black). The first eight tell stages apart and stay apart for colour-blind readers.
PALETTE = {
    "series-0": ("#1f5fa8", "#7db0ee"),
    "series-1": ("#bf4408", "#f98f57"),
    "series-2": ("#0d7268", "#4ecfb6"),
    "series-3": ("#7b3ba6", "#c798f3"),
    "series-4": ("#8a6208", "#e2ba54"),
    "series-5": ("#ad2569", "#f180b3"),
    "series-6": ("#3f7a12", "#9fd152"),
    "series-7": ("#4a5868", "#aab8cc"),
    "ink": ("#1b1f24", "#e7eaee"),
    "muted": ("#5a6370", "#a2abb7"),
    "grid": ("#dde1e7", "#353c46"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_VARIABLE = {light: f"var(--{name}, {light})" for name, light in LIGHT.items()}
_STYLE: Any = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": LIGHT["muted"],
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "ytick.left": False,
    "lines.linewidth": 1.8,
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def drawn(name: str, title: str, inches: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """A figure with one pair of axes, drawn and made ready to be inlined."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, title)


def standalone(svg: str) -> str:
    """An inlined figure as a separate file, with both palettes."""
    scheme = "".join(f"--{name}:{dark};" for name, (_, dark) in PALETTE.items())
    style = f"<style>svg{{font-family:sans-serif}}@media(prefers-color-scheme:dark){{svg{{{scheme}}}}}</style>"
    head, body = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body}\n'


def _inline(svg: bytes, prefix: str, title: str) -> str:
    """Matplotlib's SVG rewritten; see the module's docstring."""
    root = ET.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            element.set(key, _attribute(key, value, prefix))
        element.tail = None
    box = root.get("viewBox", "0 0 400 230")
    root.attrib.clear()
    for key, value in (("viewBox", box), ("role", "img"), ("aria-label", title)):
        root.set(key, value)
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return value.replace("#", f"#{prefix}-", 1)
    if key == "style":
        parts = [part.strip() for part in value.split(";")]
        value = ";".join(part for part in parts if part and not part.startswith("font-family"))
        for light, variable in _VARIABLE.items():
            value = value.replace(light, variable)
        return value
    return value.replace("url(#", f"url(#{prefix}-")
