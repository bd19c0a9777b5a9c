"""A report as one HTML file: a template, a style and a few lines of script, filled in by Jinja.

The file asks nobody for anything: its policy forbids every request, and every script but the one
that was put in here. What bundles say (of devices, plans, failures) is text that Jinja escapes,
wherever the template shows it; the policy would stop what might slip through.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

from autochunk.errors import ReportError
from autochunk.functions import is_function
from autochunk.report.drawing import curve_svg
from autochunk.report.scales import bytes_text, seconds_text, timed
from autochunk.report.svg import color_css
from autochunk.report.tables import SCATTERED, faster_text, memory_text, notes_text, within_text

USUAL_FIGURES = 300
"""So many curves a page has unless told: they take a second for twenty, and 15 kB each."""


def report_html(record: dict[str, Any], figures: int = USUAL_FIGURES) -> str:
    """A report's page.

    Args:
      record: a ``report_record``, and ``changes``, None or a ``comparison``.
      figures: so many curves are drawn at most, of what was measured last; tables have all.

    Raises:
      ReportError: the extra ``report`` is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError.missing("jinja2") from error
    script, style = _part("script.js"), _part("style.css")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "bytes": bytes_text,
        "seconds": seconds_text,
        "faster": faster_text,
        "memory": memory_text,
        "notes": notes_text,
        "within": within_text,
    }
    environment.tests["timed"] = timed
    return environment.from_string(_part("report.html.jinja")).render(
        record=record,
        devices=_with_figures(record["devices"], figures),
        undrawn=max(0, workload_count(record) - figures),
        figures=figures,
        script=Markup(script),  # noqa: S704 - our own file
        style=Markup(style + _schemes()),  # noqa: S704 - our own file
        policy=f"'sha256-{_sha256(script)}'",
        Markup=Markup,
        renamed=_renamed,
        scattered=SCATTERED,
    )


def _renamed(changes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Devices that stand beside another one, then and now."""
    pairs = dict.fromkeys((one["device_then"], one["device"]) for one in changes)
    return [(then, now) for then, now in pairs if then not in (None, now)]


def workload_count(record: dict[str, Any]) -> int:
    """How many workloads a report has on all its devices."""
    return sum(len(device["workloads"]) for device in record["devices"])


def _with_figures(devices: Sequence[dict[str, Any]], figures: int) -> list[dict[str, Any]]:
    """Devices' records with the last workloads' figures, words, and what moves their marks."""
    places = [(i, j) for i, one in enumerate(devices) for j in range(len(one["workloads"]))]
    places.sort(key=lambda at: devices[at[0]]["workloads"][at[1]]["created"], reverse=True)
    drawn = set(places[:figures])
    return [
        {
            **device,
            "workloads": [
                _with_figure(row, f"w{i}-{j}", drawn=(i, j) in drawn)
                for j, row in enumerate(device["workloads"])
            ],
        }
        for i, device in enumerate(devices)
    ]


def _with_figure(row: dict[str, Any], name: str, *, drawn: bool) -> dict[str, Any]:
    curve = row["curve"]
    row = {**row, "name": name, "svg": "", "order": best_first(curve)}
    if not drawn or not timed(curve):
        return row
    svg, *axis = curve_svg(curve, f"{name}-", figure_label(row))
    moves = {
        "picks": curve["picks"],
        "chosen": curve["chosen"],
        "plans": [_plan_words(plan) for plan in curve["plans"]],
        **dict(zip(("least", "greatest", "width"), axis, strict=True)),
    }
    return {**row, "svg": svg, "moves": moves}


def best_first(curve: dict[str, Any]) -> list[int]:
    """The places of the plans: the choice, the others by their times, those without."""

    def rank(place: int) -> tuple[bool, float]:
        seconds = curve["plans"][place]["seconds"]
        return place != curve["chosen"], math.inf if seconds is None else seconds

    return sorted(range(len(curve["plans"])), key=rank)


def figure_label(row: dict[str, Any]) -> str:
    """What a workload's figure shows, for those who do not see it."""
    curve = row["curve"]
    text = f"Time against working memory of {len(timed(curve))} plans, both on axes of logarithms."
    if curve["chosen"] is None:
        return f"{text} None was chosen."
    plan = curve["plans"][curve["chosen"]]
    text += f" Chosen is {_plan_words(plan)}"
    if row["speedup_vs_dense"]:
        whole = "the whole call" if is_function(row["workload"]) else "dense attention"
        text += f", {faster_text(row['speedup_vs_dense'])} as fast as {whole}"
    return f"{text}. The table of plans below has all figures."


def _plan_words(plan: dict[str, Any]) -> str:
    if plan["seconds"] is None:
        return str(plan["plan"])
    memory = bytes_text(plan["temp_bytes"] or 0)
    return f"{plan['plan']}: {seconds_text(plan['seconds'])}, {memory}"


def _schemes() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {color_css('dark')} }} }}"
    # Paper is white, whatever the screen is.
    paper = f"@media print {{ :root {{ {color_css('light')} }} }}"
    return f"\n:root {{ {color_css('light')} }}\n{dark}\n{paper}\n"


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
