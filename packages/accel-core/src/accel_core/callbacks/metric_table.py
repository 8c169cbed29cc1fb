"""A table of metrics in a notebook, which grows by one row an epoch."""

from __future__ import annotations

import html
import importlib
from collections.abc import Collection, Mapping
from typing import Any

from .metric_names import readable_name, readable_value


class MetricTable:
    """Shows one table in the output of a cell, and replaces it whenever a row is added."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        """The cells of each epoch by column; a row need not have all."""
        self._handle: Any = None

    def add(
        self, epoch: str, metrics: Mapping[str, float], speed: Mapping[str, str], best: Collection[str]
    ) -> None:
        """Add the row of `epoch`, and draw the table."""
        row = {"epoch": epoch}
        row |= {
            readable_name(name): f"{readable_value(value)}{' (best)' if name in best else ''}"
            for name, value in metrics.items()
        }
        row |= {unit or "time": value for unit, value in speed.items()}
        self.rows.append(row)
        # Found in a notebook only, so it is there.
        display = importlib.import_module("IPython.display")
        content = display.HTML(html_table(self.rows))
        if self._handle is None:
            self._handle = display.display(content, display_id=True)
        else:
            self._handle.update(content)


def html_table(rows: list[dict[str, str]]) -> str:
    """Return `rows` as HTML, with a column for each key in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(name, ''))}</td>" for name in columns) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
