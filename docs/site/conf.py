"""Sphinx's settings for the documentation site; ``build.py`` beside this file starts it."""

from dnc_dist import __version__

project = "dnc-dist"
author = "The dnc-dist authors"
project_copyright = "The dnc-dist authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
# `#a-heading` of another page is a link like any other, and checked like it.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
# "--set" stays what it is.
smartquotes = False
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# The class says what it is and what it takes; its constructor has nothing to add.
autodoc_class_signature = "mixed"

html_theme = "furo"
html_title = f"dnc-dist {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
# Nothing on a page is asked for elsewhere: system fonts, and no link to a service that builds documentation.
html_theme_options = {"top_of_page_buttons": [], "footer_icons": []}
pygments_style, pygments_dark_style = "tango", "github-dark"
highlight_language = "text"
