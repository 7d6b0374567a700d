"""What IPython, and so a notebook, shows of the specification's values: the tables of `refmamba.teach.tables`.

Registered by name when refmamba is imported there. The specification knows nothing of how it is shown, and nothing is loaded
before something is.
"""

import sys
from typing import Any

SHOWN = {
    "refmamba.spec.codes": ("Codes", "FixedPoint"), "refmamba.spec.config": ("MambaConfig",),
    "refmamba.spec.scheme": ("Scheme",), "refmamba.spec.trace": ("Step", "Trace"),
}  # fmt: skip


def as_html(value: Any) -> str:
    """For the formatter of text/html."""
    from refmamba.teach.tables import table_of

    return table_of(value).html()


def as_text(value: Any, printer: Any, cycle: bool) -> None:
    """For the formatter of text/plain."""
    from refmamba.teach.tables import table_of

    printer.text(str(table_of(value)))


def register() -> None:
    """Tell the running IPython; nothing where there is none."""
    shell = sys.modules["IPython"].get_ipython()
    if shell is None:
        return
    for kind, show in (("text/html", as_html), ("text/plain", as_text)):
        for module, names in SHOWN.items():
            for name in names:
                shell.display_formatter.formatters[kind].for_type_by_name(module, name, show)
