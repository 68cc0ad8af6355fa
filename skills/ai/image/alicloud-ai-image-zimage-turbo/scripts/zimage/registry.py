"""Registry: the providers that there are, a file each in providers/, loaded when they are named."""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zimage.contract import SCRIPTS
from zimage.errors import Failure
from zimage.outside import outside_text, shown

if TYPE_CHECKING:
    from zimage.provider import Provider

DEFAULT_PROVIDER = "dashscope"
PROVIDER_NAME = "[a-z][a-z0-9_]*"
PROVIDERS = SCRIPTS / "providers"
_loaded: dict[str, type[Provider]] = {}

# Bound to the folder, or to its place in the archive: any other package of that name would win by its __init__.py.
_package = types.ModuleType("providers")
_package.__path__ = [str(PROVIDERS)]
sys.modules["providers"] = _package


def provider_files() -> list[str]:
    if SCRIPTS.is_file():
        import zipfile

        with zipfile.ZipFile(SCRIPTS) as archive:
            return [name.removeprefix("providers/") for name in archive.namelist() if name.startswith("providers/")]
    return os.listdir(PROVIDERS) if PROVIDERS.is_dir() else []


def provider_names() -> list[str]:
    """Every provider that there is, the default one first: a file each in providers/."""
    names = {name[:-3] for name in provider_files() if re.fullmatch(rf"{PROVIDER_NAME}\.py", name)}
    return [DEFAULT_PROVIDER, *sorted(names - {DEFAULT_PROVIDER})]


def provider_class(name: str) -> type[Provider]:
    """The provider of that name, its file loaded where that has not been done.

    Raises:
        Failure: usage, naming those that exist.
    """
    if name in _loaded:
        return _loaded[name]
    if name not in provider_names():
        raise Failure("usage", f"--provider: must be one of {', '.join(provider_names())}, got {shown(name)}")
    try:
        loaded: type[Provider] = importlib.import_module(f"providers.{name}").PROVIDER
        if loaded.name != name:
            raise AttributeError(f"its PROVIDER is named {loaded.name}")
    except (Exception, SystemExit) as error:  # one that ends the process is no provider
        reason = f"{type(error).__name__}: {outside_text(error, 200)}"
        raise Failure("usage", f"--provider: providers/{name}.py cannot be loaded: {reason}") from None
    _loaded[name] = loaded
    return loaded


def provider_named(name: str, settings: Mapping[str, Any] | None = None) -> Provider:
    """The provider of that name, set up. Raises as `provider_class`."""
    return provider_class(name)(settings)
