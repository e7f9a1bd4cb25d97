"""The documentation site, built by `make docs`.

The source folder is the root of the repository: pages link to each other, to images and to source files by relative
paths, which GitHub and the site resolve alike. README.md is the landing page.
"""

import os
from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "pyinvolution"
author = "The pyinvolution authors"
version = release = version_of("pyinvolution")
root_doc = "README"
language = "en"

# The navigation: captions and pages, in the order in which a new user needs them.
NAVIGATION = {
    "Guides": [
        "docs/first-steps",
        "docs/doctor",
        "docs/operator",
        "docs/kernels",
        "docs/training",
        "docs/cpp",
        "docs/onnx",
        "docs/openvino",
        "docs/platforms",
        "docs/migration",
        "docs/family",
        "docs/frameworks",
        "docs/accuracy",
        "docs/when-not-to-use",
        "docs/faq",
    ],
    "Measurements and design": ["benchmarks/README", "cpp/cpu/README", "cuda/README"],
    "Reference": [
        "docs/reference/python",
        "docs/reference/compat",
        "docs/reference/models",
        "docs/reference/training",
        "docs/reference/cpp",
    ],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/**", "benchmarks/README.md", "cpp/cpu/README.md", "cuda/README.md"]
exclude_patterns = [".*", "build", "data", "dist", "runs", "python", "tests"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# A name between single backticks in a docstring is a link where the reference has it, and code where it has not.
default_role = "py:obj"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

# Nothing is loaded from other hosts: the theme uses the fonts of the reader's system, and formulas are MathML.
html_theme = "furo"
html_title = f"pyinvolution {version}"
html_static_path = ["site"]
html_css_files = ["width.css"]
html_extra_path = ["site/index.html"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
if repository := os.environ.get("DOCS_REPOSITORY"):
    html_theme_options |= {"source_repository": repository, "source_branch": "main", "source_directory": ""}


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the navigation to the landing page, where GitHub would show it as code."""
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(["\n```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```\n"])


def mathml(translator: Any, node: nodes.Element) -> None:
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
