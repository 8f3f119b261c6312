"""What every page shares: where it is written, and its figures as files.

A page carries its figures, has no scripts, and escapes all text. Templates extend `page.html.j2`.
"""

import base64
import io
import json
import pathlib

from matplotlib.figure import Figure

from jaxmed.files import atomic
from jaxmed.report import rendering


def write(folder: pathlib.Path, template: str, *, run: dict, **content) -> pathlib.Path:
    """Renders a template, and writes `report.html` into the folder.

    Args:
        folder: of the run.
        template: its name.
        run: the content of `run.json`, which the page shows at its end.
        content: what else the template names.

    Returns:
        The path of `report.html`.
    """
    settings = json.dumps(run, indent=2, ensure_ascii=False)
    page = rendering.render(template, run=run, settings=settings, **content)
    path = folder / "report.html"
    atomic.replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def save(figure: Figure, folder: pathlib.Path, name: str) -> str:
    """Writes `figures/name.png`, and returns it as a data URI."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200)
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    atomic.replace_file(path, lambda temporary: temporary.write_bytes(picture.getvalue()))
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def model_name(model: str) -> str:
    """A hub id as it is, a folder by its last name."""
    return model if model.count("/") == 1 else pathlib.PurePath(model).name
