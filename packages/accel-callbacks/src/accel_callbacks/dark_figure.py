"""Turns a figure of matplotlib to light lines on a dark ground, for pages and slides that are dark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUND, TEXT = "#1f2129", "#dcdfe4"

_LIGHTER = {
    "#0072B2": "#4FA3E0",
    "#D55E00": "#F0803C",
    "#009E73": "#2BC79B",
    "#000000": "#FFFFFF",
    "gray": "#A0A4AB",
}
"""The colours of Okabe and Ito that are too dark there, and what stands for them."""


def darken(figure: Figure) -> None:
    """Change the colours of a finished figure. The style of matplotlib, which is global, stays as it is."""
    from matplotlib import rcParams
    from matplotlib.text import Text

    # What stands beside the data in a colour of its own, such as the name of a box, keeps it.
    plain = rcParams["text.color"]
    notes = {note for axes in figure.axes for note in axes.texts if note.get_color() != plain}
    figure.set_facecolor(GROUND)
    for axes in figure.axes:
        axes.set_facecolor(GROUND)
        axes.tick_params(which="both", colors=TEXT)
        for spine in axes.spines.values():
            spine.set_edgecolor(TEXT)
        for line in axes.lines:
            line.set_color(_lighter(line.get_color()))
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set_facecolor(GROUND)
            for line in legend.get_lines():
                line.set_color(_lighter(line.get_color()))
    # Titles, labels, numbers and what legends say. The match is asked for by its class.
    for text in figure.findobj(Text):
        if text not in notes:
            text.set_color(TEXT)  # type: ignore[attr-defined]


def _lighter(color: Any) -> Any:
    return _LIGHTER.get(color, color) if isinstance(color, str) else color
