"""A figure as SVG that takes its colors from a page, light or dark, or brings its own.

Matplotlib draws each color as one that stands for a name; only then these become CSS variables.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree as ET

from autochunk.errors import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

# What each color is for: as matplotlib is given it, and in a light and a dark page. The hues are of
# Okabe and Ito's set (2008, "Color Universal Design"), darker or lighter for contrast.
_COLORS = {
    "ink": ("#010101", "#1c2024", "#e8eaed"),
    "soft": ("#020202", "#5c6670", "#a4adb8"),
    "rule": ("#030303", "#dfe3e8", "#343b44"),
    "path": ("#040404", "#9ec5e8", "#2f5e86"),
    "pick": ("#050505", "#c2410c", "#ff9d66"),
    "xla": ("#060606", "#0a66b0", "#6cb6ff"),
    "rows": ("#070707", "#00775a", "#3fc79e"),
    "fused": ("#080808", "#9a3b80", "#e79bcd"),
    "peer": ("#090909", "#8a6100", "#e3b341"),
    "paper": ("#0a0a0a", "#ffffff", "#14181d"),
}
_FONTS = "'DejaVu Sans', Verdana, system-ui, sans-serif"  # the first as matplotlib measured them
_NAMES = {drawn: name for name, (drawn, *_) in _COLORS.items()}


def ink(name: str) -> str:
    """What matplotlib is told to draw for the color of this name."""
    return _COLORS[name][0]


_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "autochunk",  # equal figures, equal bytes
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9,
    "text.color": ink("ink"),
    "axes.labelcolor": ink("soft"),
    "axes.edgecolor": ink("soft"),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": ink("soft"),
    "ytick.color": ink("soft"),
    "legend.frameon": False,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Our own settings of matplotlib, while a figure is drawn and written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError.missing("matplotlib") from error
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # whoever looks has other fonts
        yield


def color_css(scheme: Literal["light", "dark"]) -> str:
    """The colors as CSS variables, for "light" or "dark"."""
    place = {"light": 1, "dark": 2}[scheme]
    return "".join(f"--{name}:{shades[place]};" for name, shades in _COLORS.items())


def _svg(figure: Figure) -> ET.Element:
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(text.getvalue())  # noqa: S314 - matplotlib wrote it just now
    for element in root.iter():
        element.tail = None
        if element.text and not element.text.strip():
            element.text = None
        for name, value in element.attrib.items():
            element.set(name, _shortened(re.sub("#[0-9a-f]{6}", _variable, value)))
    return root


def printable(text: str) -> str:
    """A text without what has no place in XML."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _shortened(value: str) -> str:
    """An attribute without fonts, which are the page's, nor less than a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"font-family: [^;]*; ", "", value))


def _variable(found: re.Match[str]) -> str:
    name = _NAMES.get(found[0])
    return f"var(--{name})" if name else found[0]


def for_a_page(figure: Figure, prefix: str, label: str) -> str:
    """An ``<svg>`` element without a size of its own, and with ids that no other figure has."""
    root = _svg(figure)
    for name in ("width", "height"):
        del root.attrib[name]
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        own = element.get("id", "")
        if own in used or own == "budget" or own.startswith("ring-"):
            element.set("id", prefix + own)
        else:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            if "#" in value:
                element.set(name, value.replace("#", f"#{prefix}"))
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _references(element: ET.Element) -> Iterator[str]:
    for value in element.attrib.values():
        yield from re.findall(r"#([\w.-]+)", value)


def alone(figure: Figure, title: str) -> str:
    """A file of its own, with the colors of both schemes, a background, and a name."""
    root = _svg(figure)
    style, name = ET.Element(f"{{{_SVG}}}style"), ET.Element(f"{{{_SVG}}}title")
    dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {color_css('dark')} }} }}"
    page = f"background: var(--paper); font-family: {_FONTS}"
    style.text = f"svg {{ {color_css('light')} {page} }} {dark}"
    name.text = printable(title)
    root.insert(0, style)
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode") + "\n"
