"""Account: which base URL, region and workspace the user's variables and the file of a service's own client name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zimage.errors import Failure, os_reason
from zimage.files import read_file
from zimage.outside import outside_text, shown

if TYPE_CHECKING:
    from zimage.provider import ConfigFile, Provider

MAX_CONFIG_BYTES = 64 * 1024
# The official client's pattern: it becomes a label of a host name.
WORKSPACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
WORKSPACE_MARK = "{workspace_id}"  # in a base URL, as the official client fills it in


class Said(NamedTuple):
    """A value, and the place that gives it."""

    value: str
    source: str


class Account:
    """What the user's settings say of an account, in the order of the official client: variables, then its file.

    Raises, also where a property is read:
        Failure: invalid_account, missing_package.
    """

    def __init__(self, provider: Provider, env: Mapping[str, str]) -> None:
        self._provider = provider
        self._env = env
        self._config = config_of(provider.config_file, env)

    def _variable(self, name: str | None) -> Said | None:
        return Said(self._env[name], name) if name and self._env.get(name) else None

    def _option(self, name: str) -> Said | None:
        file = self._provider.config_file
        return Said(self._config[name], f"{name} in {shown_place(file, self._env)}") if name in self._config else None

    @cached_property
    def region(self) -> Said | None:
        """The provider's name of the region that is set, where the endpoint's host does not say more."""
        said = [found for name in self._provider.region_variables if (found := self._variable(name))]
        said = [Said(self._known(region), region.source) for region in said or filter(None, [self._option("region")])]
        _check_alike(said)
        return said[0] if said else None

    def _known(self, region: Said) -> str:
        try:
            return self._provider.region_named(region.value)
        except ValueError as error:
            raise Failure("invalid_account", f"{region.source}: {error}", hint=ASK_FOR_REGION) from None

    @cached_property
    def workspace(self) -> Said | None:
        """The workspace that calls name in a header, and by their host unless a base URL is set."""
        said = self._variable(self._provider.workspace_variable) or self._option("workspace")
        _check_alike([found for found in (said, self._host_workspace) if found])
        return _checked_workspace(said)

    @property
    def _host_workspace(self) -> Said | None:
        """The workspace of the official client's older part: in hosts outside the default region, and in no header."""
        return _checked_workspace(self._variable(self._provider.workspace_id_variable))

    @property
    def root(self) -> Said | None:
        """The API root, or another form of base URL, that all of it leads to; None where nothing is set."""
        variables = map(self._variable, self._provider.base_url_variables)
        base_url = next(filter(None, variables), None) or self._option("base_url")
        named = self.workspace or self._host_workspace
        if base_url and WORKSPACE_MARK in base_url.value:
            if not named:
                what = f"{base_url.source}: holds {WORKSPACE_MARK}, and no workspace is set"
                raise Failure("invalid_account", what, hint=f"set {self._provider.workspace_variable}")
            return base_url._replace(value=base_url.value.replace(WORKSPACE_MARK, named.value))
        if base_url:
            return base_url
        provider, region = self._provider, self.region
        name = region.value if region else provider.default_region
        host = self.workspace or (named if name != provider.default_region else None)
        if host:
            sources = " and ".join(said.source for said in (host, region) if said)
            return Said(provider.workspace_root(host.value, name), sources)
        return Said(provider.roots[name], region.source) if region else None


ASK_FOR_REGION = "tell the user: a key of a region that has the model is needed, and that region's name in its place"


def _check_alike(said: list[Said]) -> None:
    """Where two places say different things, nobody knows which is meant: the key could go to a wrong host."""
    if len({found.value for found in said}) > 1:
        what = " and ".join(f"{source} is {shown(value)}" for value, source in said)
        raise Failure("invalid_account", f"{what}: they mean the same, and must not differ")


def _checked_workspace(said: Said | None) -> Said | None:
    if said and not WORKSPACE_ID.fullmatch(said.value):
        rule = "must be a workspace id: letters, digits, _ and -, at most 64"
        raise Failure("invalid_account", f"{said.source}: {rule}")
    return said


def below_home(relative: str, env: Mapping[str, str]) -> Path:
    """A place below the home folder; the empty device where no home folder is known."""
    try:
        return Path(env.get("HOME") or Path.home()) / relative
    except RuntimeError:
        return Path(os.devnull)


def path_of(name: str, env: Mapping[str, str]) -> Path:
    """The path in a variable, whose ~ is the home folder."""
    return below_home(name[2:], env) if name.startswith("~/") else Path(name)


def shown_place(file: ConfigFile | None, env: Mapping[str, str]) -> str:
    """What users call the file, empty where there is none."""
    if file is None:
        return ""
    return f"the file that {file.variable} names" if file.variable in env else f"~/{file.path}"


def config_of(file: ConfigFile | None, env: Mapping[str, str]) -> Mapping[str, str]:
    """The texts of a TOML file that are not empty; none where there is no file, as the official client has it.

    Raises:
        Failure: invalid_account where it cannot be read, missing_package where Python lacks a reader.
    """
    if file is None:
        return {}
    path = path_of(env[file.variable], env) if file.variable in env else below_home(file.path, env)
    place = shown_place(file, env)
    try:
        if not os.path.isfile(path):  # nor where a folder above it cannot be looked into
            return {}
        values = _toml_of(read_file(path, MAX_CONFIG_BYTES).decode(), place)
    except RecursionError:
        raise Failure("invalid_account", f"{place} is nested too deeply") from None
    except (OSError, ValueError) as error:  # a broken file is a ValueError too
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else os_reason(error)
        raise Failure("invalid_account", f"{place} cannot be read: {outside_text(reason, 200)}") from None
    texts = {name: value for name in file.options if isinstance(value := values.get(name, ""), str)}
    if strange := [name for name in file.options if name not in texts]:
        raise Failure("invalid_account", f"{strange[0]} in {place}: must be a text")
    return {name: text for name, text in texts.items() if text}


def _toml_of(text: str, place: str) -> Mapping[str, object]:
    reader = next((name for name in ("tomllib", "tomli") if importlib.util.find_spec(name)), None)
    if reader is None:
        what = f"{place} is there, and Python before 3.11 needs the package tomli to read it"
        hint = "take Python 3.11 or newer, or add the package: pip install 'tomli>=2,<3'"
        raise Failure("missing_package", what, hint=hint)
    values: Mapping[str, object] = importlib.import_module(reader).loads(text)
    return values
