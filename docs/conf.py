"""The site: ``python -m sphinx -W --keep-going -c docs . docs/build``, offline, from the repository's root.
Why with Sphinx is in CONTRIBUTING.md.

The repository itself is the source: pages are Markdown that reads well where its files are looked at, links
are those between files, results and ARCHITECTURE.md are pages too, and other files are copied.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(DOCS / "_ext")]

import adamw_triton  # noqa: E402

project = "adamw_triton"
author = "the authors of adamw_triton"
version = release = adamw_triton.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_line"]
source_suffix = {".md": "markdown"}
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "bench/README.md",
    "bench/*/README.md",
    "bench/results/**.md",
    "examples/monitoring/README.md",
    *(f"{name}.md" for name in ("ARCHITECTURE", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
]
exclude_patterns = ["docs/build"]
suppress_warnings = ["toc.not_included"]  # a suite's results are reached from the bench's page

# Links to a heading are as GitHub makes them; a link that leads nowhere is a warning, and so an error.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "attrs_block"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False  # a constant is shown as what it is
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Their own modules do not need these libraries to be read.
autodoc_mock_imports = [name for name in ("lightning", "prometheus_client") if find_spec(name) is None]

html_theme = "furo"
html_title = f"adamw_triton {version}"
python_maximum_signature_line_length = 88

html_show_copyright = False
html_copy_source = False
html_show_search_summary = False  # it would fetch pages, which a browser does not do without a server
html_show_sourcelink = False
html_extra_path = ["extra"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#7a3e00", "color-brand-content": "#7a3e00"},
    "dark_css_variables": {"color-brand-primary": "#ffb066", "color-brand-content": "#ffb066"},
}
