"""Where dynaconv keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns $DYNACONV_CACHE, else $XDG_CACHE_HOME/dynaconv, else ~/.cache/dynaconv. Creates nothing."""
    if own := os.environ.get("DYNACONV_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "dynaconv"
