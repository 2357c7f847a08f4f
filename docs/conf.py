"""Sphinx reads this: pages in MyST, the reference from docstrings, no network."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT / "src"), str(ROOT / "examples")]

from portable_amp import __version__  # noqa: E402

project = "portable-amp"
author = "The portable-amp developers"
project_copyright = "The portable-amp developers, MIT licence"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "pages"]
exclude_patterns = ["_build", "explanation/evidence"]
default_role = "code"
source_suffix = {".md": "markdown"}
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"portable-amp {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# The contract of a class is its docstring, which tells the arguments of __init__ too.
autoclass_content = "class"

nitpick_ignore_regex = [
    # torch's and Python's own names: their inventories are on the network, which stays unasked.
    ("py:.*", r"(torch|optim|os|collections|types|numbers)\..*"),
    ("py:class", r"(Any|Callable|Iterable|Mapping|Sequence|Path|PathLike|Literal|Enum|T)"),
    ("py:class", r"(Tensor|Optimizer|Module|GradScaler|autocast|ContextDecorator)"),
    # Internal: what a public attribute holds or a method returns, and type variables.
    ("py:class", r"portable_amp\.(autocast|backends|context|memory)\.(\w*Autocast|Backend|T)"),
    # Python's own exceptions, in `Raises:`.
    ("py:exc", r"(Exception|ValueError|KeyError|RuntimeError|TypeError)"),
]
