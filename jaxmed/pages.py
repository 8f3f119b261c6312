"""What every report shares: its page, its figures as files, and how numbers are shown.

A page carries its figures, has no scripts, and escapes all text. Templates extend `page.html.j2`.
"""

import base64
import io
import json
import math
import pathlib

import jinja2
from matplotlib import figure

from jaxmed import results as results_lib


def write(folder: pathlib.Path, template: str, *, run: dict, **content) -> pathlib.Path:
    """Renders a template beside this file, and writes `report.html` into the folder.

    Args:
        folder: of the run.
        template: its name.
        run: the content of `run.json`, which the page shows at its end.
        content: what the template names.

    Returns:
        The path of `report.html`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    settings = json.dumps(run, indent=2, ensure_ascii=False)
    page = environment.get_template(template).render(settings=settings, **content)
    path = folder / "report.html"
    results_lib.replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def save(drawing: figure.Figure, folder: pathlib.Path, name: str) -> str:
    """Writes `figures/name.png`, and returns it as a data URI."""
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=200)
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def model_name(model: str) -> str:
    """A hub id as it is, a folder by its last name."""
    return model if model.count("/") == 1 else pathlib.PurePath(model).name


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals; a small one is not shown as 0, which it is not."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:.{decimals}f}" if round(value, decimals) or not value else f"{value:.1g}"
    return shown.replace("-", "−")


def decimals(value: float) -> int:
    """How many decimals show three digits of a value."""
    if not value or not math.isfinite(value):
        return 2
    return max(0, 2 - math.floor(math.log10(abs(value))))


def number(value: float) -> str:
    """A number with three digits."""
    return fixed(value, decimals(value))


def interval(low: float | None, high: float | None, decimals: int) -> str:
    """An interval in brackets, with so many decimals."""
    if low is None or math.isnan(low):
        return "–"
    return f"[{fixed(low, decimals)}, {fixed(high, decimals)}]"


def percent(fraction: float | None) -> str:
    """A fraction in whole per cent."""
    if fraction is None or math.isnan(fraction):
        return "–"
    return f"{round(100 * fraction)}%".replace("-", "−")
