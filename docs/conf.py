"""Sphinx configuration."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "noisekit"
author = "the noisekit authors"
copyright = "2026, the noisekit authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "noisekit"
html_static_path = ["_static"]
exclude_patterns = ["_build", "**/sg_execution_times.rst", "sg_execution_times.rst"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_use_rtype = False

# The analyses are the gallery: shown as pages, run by `noisekit analyse`.
sphinx_gallery_conf = {
    "examples_dirs": ["../analyses"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"$^",
    "plot_gallery": "False",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
}

# Types of third parties have no inventory here, since the build reads no network.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|np|numpy|pd|pandas|pyarrow|scipy|matplotlib|pydantic|nn|collections"
        r"|pathlib)\..*",
    ),
    (
        r"py:.*",
        r"(Tensor|DataFrame|Figure|Path|Callable|Iterable|Mapping|ProcessGroup)",
    ),
    # Bounds of annotated arguments, and their hints for messages.
    (r"py:.*", r"annotated_types\..*|types\.Annotated|noisekit\.core\.arguments\.Hint"),
    (r"py:.*", r"(ge|gt|le|lt|purpose|advice)=.*"),
    # What results and probes are made of, without a page of its own.
    (
        r"py:.*",
        r"noisekit\.probes\.(capture\.(step_weights|replicas|step_record|recorder|hooks"
        r"|example_weights|tokens)|context)\.\w+",
    ),
    (r"py:class", r"EmpiricalRisk|BaseModel"),
    # Types of arguments that a reader meets as probes and batches.
    (r"py:class", r"noisekit\.policies\.(readings\.ReadingSource|accumulation\.Batch)"),
    (r"py:mod", r"noisekit\.core\.settings"),
    (r"py:.*", r"noisekit\.auditing\.known_defects\.\w+"),
    # The sections of a recipe: the starter recipe says what they hold.
    (r"py:.*", r"noisekit\.train\.[\w.]+\.(\w+Spec|\w+Section|Fault)"),
]
