"""altair, imported without the 38 parsers that one of its libraries would build for seconds.

jsonschema builds them if the package rfc3987_syntax is installed, which Jupyter brings along. They
check the form of addresses, and charts have none.
"""

import sys

_PARSERS = "rfc3987_syntax"
_is_hidden = _PARSERS not in sys.modules
if _is_hidden:
    # None makes an import of the package raise ImportError, which jsonschema expects.
    sys.modules[_PARSERS] = None  # type: ignore[assignment]
try:
    import altair as altair
finally:
    if _is_hidden:
        del sys.modules[_PARSERS]
