"""What templates say of a verdict, and the files of `golden/` that keep how all of it reads."""

import pathlib

from jaxmed.report import rendering

FOLDER = pathlib.Path(__file__).parent / "golden"


def tell(template, macro, *verdict, page=False):
    """What a macro says, in plain text or in a page."""
    environment = rendering._PAGES if page else rendering._TEXTS
    return str(getattr(environment.get_template(template).module, macro)(*verdict))


def check_golden(name, lines):
    """Compares what is said with the file; where a sentence was changed on purpose, remove the file
    and run the test twice."""
    path, text = FOLDER / f"{name}.txt", "\n".join(lines) + "\n"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        raise AssertionError(f"{path} was not there, and was written: read it")
    assert text == path.read_text(encoding="utf-8")
