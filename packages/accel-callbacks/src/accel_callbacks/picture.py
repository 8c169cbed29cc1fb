"""A figure that no window shows, and the picture that is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accel_core import ConfigurationError
from accel_core.extending import check_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def create_figure(caller: str, size: tuple[float, float]) -> Figure:
    """Return an empty figure that no window shows.

    Args:
        caller: the function that needs it, for errors.
        size: width and height in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            f"{caller} needs the package 'matplotlib', which is not installed. Install it with: "
            'pip install "accel-callbacks[matplotlib]"'
        ) from None
    # pyplot would choose a backend, and keep the figure until it is closed.
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Figure, path: str | Path | None) -> None:
    """Save `figure` as `path` if one is given, and make its folder."""
    if path is not None:
        path = check_path("path", path, "Pass the name of a picture, such as 'history.png'.")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
