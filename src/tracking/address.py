"""The address of a tracking server or database, as it may be shown."""

import re


def without_secrets(uri: str) -> str:
    """The address with user, password and the values of its query masked."""
    masked = re.sub(r"//[^/?#]*@", "//***@", uri)
    return re.sub(r"([?&][^=&#]+=)[^&#]*", r"\1***", masked)
