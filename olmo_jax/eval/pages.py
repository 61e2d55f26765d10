"""Pages of one file that ask the network for nothing, in the report's look."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from olmo_jax.files import write_bytes, write_error

_REPORT = Path(__file__).parent.parent / "report"


def render(template: str, **values) -> str:
    """A template of this folder as HTML; `style` is the report's, `script` shows plots' values."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, _REPORT]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (_REPORT / "plots.js").read_text()
    return templates.get_template(template).render(
        style=Markup((_REPORT / "style.css").read_text()),
        script=Markup(script),
        # The only script that a browser may run in the page, should an escape ever be forgotten.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises UserError."""
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise write_error(path, error) from None
