"""Pages of one file that ask the network for nothing, in the report's look.

Every room may import this file; it reads report/'s style and script, and no code of it.
"""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

_REPORT = Path(__file__).parent / "report"


def render(template: Path, script_file: str = "plots.js", **values) -> str:
    """A template as HTML; `style` is the report's, `script` one of its (plots.js shows values)."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _REPORT]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (_REPORT / script_file).read_text()
    return templates.get_template(template.name).render(
        style=Markup((_REPORT / "style.css").read_text()),
        script=Markup(script),
        # The only script that a browser may run in the page, should an escape ever be forgotten.
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
