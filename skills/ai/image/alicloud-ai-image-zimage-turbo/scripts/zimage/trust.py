"""Trust: where a request goes, and whether the key may go there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from zimage.account import Account, Said
from zimage.contract import EXIT_KEY
from zimage.endpoint import (
    IN_PROCESS,
    UNKNOWN_REGION,
    Endpoint,
    _is_loopback_netloc,
    host_in,
    is_host_name,
    is_loopback_host,
    is_loopback_url,
    origin_of,
    split_netloc,
)
from zimage.errors import Failure, Problem
from zimage.keys import NO_KEY, find_key, find_login
from zimage.outside import outside_text, shown

if TYPE_CHECKING:
    from zimage.keys import Key
    from zimage.provider import Provider


_BASE_URL = re.compile(r"(?P<scheme>https?)://(?P<netloc>[^/]*)(?P<path>(?:/[A-Za-z0-9._~-]+)*)/?")


def trusted_hosts(flags: Sequence[str], env: Mapping[str, str]) -> tuple[frozenset[str], list[Problem]]:
    """The exact host names that the user trusts with the key, by --trust-host or ZIMAGE_TRUSTED_HOSTS."""
    named = [("--trust-host", name) for name in flags]
    named += [
        ("ZIMAGE_TRUSTED_HOSTS", name) for name in re.split(r"[,\s]+", env.get("ZIMAGE_TRUSTED_HOSTS", "")) if name
    ]
    hosts, problems = set(), []
    for source, name in named:
        if is_host_name(name.lower()):
            hosts.add(name.lower())
        else:
            problems.append(
                Problem("usage", f"{source}: must be a bare host name such as proxy.example.com, got {shown(name)}")
            )
    return frozenset(hosts), problems


def parse_base_url(text: str, source: str, provider: Provider) -> Endpoint:
    """The endpoint that a base URL means: the whole endpoint, the API root or the bare host.

    Raises:
        Failure: invalid_base_url. The URL itself is not repeated: it may hold a password.
    """

    def refuse(what: str, hint: str | None = None) -> NoReturn:
        raise Failure("invalid_base_url", f"{source}: {what}", hint=hint)

    if re.search(r"[^!-~]", text):
        refuse("has blanks, control characters or characters beyond ASCII in it")
    for sign, name in (
        ("@", "user info"),
        ("\\", "a backslash"),
        ("?", "a query"),
        ("#", "a fragment"),
        ("%", "percent-encoding"),
    ):
        if sign in text:
            refuse(f"has {name} in it, which a base URL must not have")
    scheme, separator, rest = text.partition("://")
    if not separator:
        bare_host = text.partition("/")[0]
        scheme, rest = ("http" if _is_loopback_netloc(bare_host) else "https"), text
    match = _BASE_URL.fullmatch(f"{scheme.lower()}://{rest}")
    if not match or {".", ".."} & set(match["path"].split("/")):
        refuse("is not a URL of the form https://host[:port]/path")
    try:
        host, port = split_netloc(match["netloc"])
    except ValueError as error:
        refuse(str(error))
    if why := provider.unfit(host):
        refuse(f"{host} {why}", "ask the user for the address of a server of theirs, or take another --provider")
    netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    root = provider.root_of(match["path"])
    if root is None:
        forms = " or ".join(f"{match['scheme']}://{netloc}{form}" for form in (provider.likely_root(match["path"]), ""))
        refuse(f"its path {outside_text(match['path'], 100)} is not one of this provider's", f"use {forms}")
    root = f"{match['scheme']}://{netloc}{root}"
    return Endpoint(root, root + provider.generate_path, host, provider.region_of(host) or "")


def check_trust(endpoint: Endpoint, source: str, provider: Provider, trusted: frozenset[str]) -> None:
    """Let the key go only to its owner, to loopback, or to a host that the user trusts by name.

    Where calls may go without a key any host may be asked: `key_for` decides whether the key goes along.

    Raises:
        Failure: host_not_trusted.
    """
    if endpoint.is_loopback or provider.key_places is None or provider.key_places.optional:
        return
    if not provider.owns(endpoint.host) and endpoint.host not in trusted:
        raise foreign(endpoint.host, source, provider)
    if endpoint.root.startswith("http://"):
        raise Failure("invalid_base_url", f"{source}: http would send the key in the clear; only loopback may use it")


def foreign(host: str, source: str, provider: Provider, hint: str | None = None) -> Failure:
    """That a host is not the key owner's, which is told before whatever else is wrong with its URL."""
    what = f"{source}: {host} is not a host of {provider.name}, so the key is not sent there"
    return Failure("host_not_trusted", what, hint=hint)


LEAVE_OUT = "leave base_url out: no request needs it; and tell the user that the request names a host of somebody else"


def requested_endpoint(text: str, provider: Provider, trusted: frozenset[str]) -> Endpoint:
    """The endpoint that a request names. Its file may be a stranger's: no advice leads to making that URL work.

    Raises:
        Failure: host_not_trusted, invalid_base_url.
    """
    try:
        endpoint = parse_base_url(text, "base_url", provider)
        check_trust(endpoint, "base_url", provider, trusted)
        return endpoint
    except Failure as failure:
        places = provider.key_places
        strange = [] if places is None or places.optional else strange_hosts(text, provider, trusted)
        if not strange:
            raise failure.but(hint=LEAVE_OUT.partition(";")[0]) from None
        raise foreign(strange[0], "base_url", provider, LEAVE_OUT) from None


def strange_hosts(text: str, provider: Provider, trusted: frozenset[str]) -> list[str]:
    """The hosts that a text which may be no URL could be read to name, without those that may have the key.

    Programs disagree on what `https://a.example\\@b.example` leads to: each part that looks like a host is one.
    """
    authority = re.split("[/?#]", re.sub("^[^/]*://|^/+", "", text), maxsplit=1)[0]
    parts = [re.sub(":[0-9]*$", "", part).strip("[] ").lower() for part in re.split(r"[@\\]", authority)]
    hosts = [part for part in parts if ("." in part or part is parts[-1]) and is_host_name(part)]
    return [host for host in hosts if not (provider.owns(host) or host in trusted or is_loopback_host(host))]


def key_for(provider: Provider, endpoint: Endpoint, trusted: frozenset[str], env: Mapping[str, str]) -> Key:
    """The key that calls to an endpoint carry; an empty one where they carry none.

    Raises:
        Failure: key_missing, key_malformed.
    """
    places, login = provider.key_places, provider.login_variables()
    if places is not None and not places.optional:
        return find_key(places, env)
    entitled = may_have_optional_key(endpoint, provider, trusted, env)
    try:
        key = (find_login(login, places, env) if login else None) or (find_key(places, env) if places else NO_KEY)
    except Failure as failure:
        if entitled and failure.code != "key_missing":
            raise
        return NO_KEY
    if entitled or not key.value:
        return key
    how = f"--trust-host {endpoint.host}" if endpoint.root.startswith("https://") else "https, or a tunnel to loopback"
    only = f"only if that host needs it and the user says that it is theirs: {how}"
    return NO_KEY._replace(warning=f"the {key.noun} of {key.source} is not sent to {endpoint.host}; {only}")


def may_have_optional_key(
    endpoint: Endpoint, provider: Provider, trusted: frozenset[str], env: Mapping[str, str]
) -> bool:
    """Whether a host is loopback, or over https the one that the user's environment names, or trusted by name."""
    named = endpoint.host in trusted or Own(None, trusted, env).names(endpoint.root, provider)
    return endpoint.is_loopback or (named and endpoint.root.startswith("https://"))


def choose_endpoint(
    provider: Provider,
    *,
    flag: str | None,
    request_url: str | None,
    request_source: str = "base_url",
    region: str | None,
    env: Mapping[str, str],
    trusted: frozenset[str],
) -> Endpoint:
    """The endpoint by precedence: flag, request, region, variables and files of the user, the default region.

    Raises:
        Failure: invalid_base_url, host_not_trusted, region_mismatch; as `Account`.
    """
    given_urls = [("--base-url", flag), (request_source, request_url)]
    if provider.in_process:
        for source, text in given_urls:
            if text not in (None, IN_PROCESS):
                what = f"{provider.name} works in this process and is called at no URL"
                raise Failure("invalid_base_url", f"{source}: {what}", hint="leave it out")
        return Endpoint("", IN_PROCESS, "", provider.default_region, source="--provider")
    account = Account(provider, env)
    given = [Said(text, source) for source, text in given_urls if text is not None]
    given += [Said(provider.roots[region], "--region")] if region else []
    text, source = given[0] if given else account.root or Said(provider.roots[provider.default_region], "default")
    if not text and source in ("--region", "default"):
        variables = " or ".join(provider.base_url_variables)
        hint = f"set {variables}, or give --base-url http://127.0.0.1:{provider.usual_port}{provider.default_root}"
        raise Failure("invalid_base_url", f"no server is named for {provider.name}: {hint}", hint=hint)
    if source == "base_url":
        endpoint = requested_endpoint(text, provider, trusted)
    else:
        try:
            endpoint = parse_base_url(text, source, provider)
        except Failure as failure:
            raise failure if given else failure.but(hint=_past_settings(failure, text, provider)) from None
        check_trust(endpoint, source, provider, trusted)
    if region and endpoint.region and endpoint.region != region:
        raise Failure(
            "region_mismatch",
            f"--region {region} contradicts {source}, whose host {endpoint.host} is {endpoint.region}",
        )
    if not region and not endpoint.region and account.region:
        region = account.region.value
    only = provider.default_region if len(provider.roots) == 1 else UNKNOWN_REGION
    endpoint = endpoint._replace(region=endpoint.region or region or only, source=source)
    warnings = (_not_the_services(endpoint, provider), _not_as_set(endpoint, account) if source == "--region" else "")
    return endpoint._replace(warnings=tuple(filter(None, warnings)))


def _past_settings(failure: Failure, text: str, provider: Provider) -> str:
    """The advice for a base URL that is set for other programs too, and unfit here.

    Another region is not named, nor any where the URL leads elsewhere than to the service: its key stays with it.
    """
    host = host_in(text)
    region = provider.region_of(host) if provider.owns(host) else None
    if region not in provider.roots:
        return failure.fault.hint
    return f"{failure.fault.hint}; where other programs need it as it is: --region {region} goes before it"


def _not_the_services(endpoint: Endpoint, provider: Provider) -> str:
    """What is to be told of a server that is not the service's own, or of one without the model."""
    if provider.asks_own_servers():
        if endpoint.source != "base_url" or endpoint.is_loopback:
            return ""
        what = f"the request's base_url leads to {endpoint.host}"
        return f"{what}: its prompt goes there, and no option or variable of yours names that server"
    if not provider.owns(endpoint.host):
        what = f"{endpoint.source} leads to {endpoint.host}, which is no host of {provider.name}"
        return f"{what}: who answers there, and what a picture costs there, is not known"
    if endpoint.region in provider.roots:
        return ""
    regions = " and ".join(provider.roots)
    return f"{endpoint.source} leads to {endpoint.host}: the model is known to be offered in {regions} only"


def _not_as_set(endpoint: Endpoint, account: Account) -> str:
    """That a flag leads elsewhere than the settings of the user; also where they can be read no further."""
    said = None
    with contextlib.suppress(Failure):
        said = account.root
    host = host_in(said.value) if said else endpoint.host
    if said is None or host == endpoint.host:
        return ""
    return f"--region leads to {endpoint.host}, and the key with it; {said.source} leads to {host or 'another place'}"


class Own(NamedTuple):
    """What the user's own settings name: flags and environment. No file is among them, whoever has written it."""

    base_url: str | None  # --base-url
    trusted: frozenset[str]
    env: Mapping[str, str]

    def names(self, url: str, provider: Provider) -> bool:
        """Whether scheme, host and port of a URL are those of a base URL of the user."""
        origins = set()
        for text in (self.base_url, *map(self.env.get, provider.base_url_variables)):
            with contextlib.suppress(Failure):
                origins.add(origin_of(parse_base_url(text, "", provider).root) if text else "")
        return origin_of(url) in origins - {""}


def recorded_endpoint(url: str, provider: Provider, own: Own) -> Endpoint:
    """The endpoint that an evidence file names: it may be a stranger's, who must not steer key and calls.

    Raises:
        Failure: invalid_base_url, host_not_trusted unless the host is the provider's own, or the user's settings name
            it with its port.
    """
    try:
        endpoint = parse_base_url(url, "endpoint", provider)
    except Failure:
        raise unnamed(url, provider) from None
    is_trusted = provider.owns(endpoint.host) or endpoint.host in own.trusted
    if not (is_trusted and endpoint.root.startswith("https://")) and not own.names(endpoint.root, provider):
        raise unnamed(endpoint.root, provider)
    check_trust(endpoint, "endpoint", provider, own.trusted)
    return endpoint


def unnamed(url: str, provider: Provider) -> Failure:
    """That an evidence file leads to a place that no setting of the user names."""
    variable = "".join(f" or {name}" for name in provider.base_url_variables[:1])
    return Failure(
        "host_not_trusted",
        f"the evidence leads to {outside_text(origin_of(url), 200) or 'no plain host'}, which only its file names",
        hint=f"ask the user whether that server is theirs; if it is, they name it by --base-url{variable}",
    )


def naming_flags(endpoint: Endpoint, provider: Provider, own: Own) -> list[str]:
    """The flags without which a later command on the evidence would not be let go where the user has sent this one.

    Also where a variable names it: the command may be run from elsewhere.
    """
    flags = ["--trust-host", endpoint.host] if endpoint.host in own.trusted else []
    is_known = provider.in_process or provider.owns(endpoint.host)
    return flags if is_known else [*flags, "--base-url", endpoint.root]


class Home(NamedTuple):
    """Where a picture may be fetched from beside the open internet."""

    loopback: bool = False  # anywhere on this machine
    origin: str = ""  # there, even where it is not public
    key: str = ""  # for that origin alone, where it asks for one: the paid call has carried it there

    def __repr__(self) -> str:
        return f"Home(loopback={self.loopback}, origin={self.origin!r})"

    def holds(self, link: str) -> bool:
        return (self.loopback and is_loopback_url(link)) or (self.origin != "" and origin_of(link) == self.origin)


def home_of(endpoint: str, provider: Provider) -> Home:
    """Of an answer from an endpoint that the user has chosen: it may lead to itself, on loopback to its neighbours."""
    return Home(is_loopback_url(endpoint), origin_of(endpoint) if provider.links_to_itself else "")


def home_of_record(link: str, endpoint: str, provider: Provider, own: Own) -> Home:
    """Of a link that stands in a file, as its endpoint does: only a place that the user's own settings name."""
    is_own = home_of(endpoint, provider).holds(link) and own.names(link, provider)
    return Home(False, origin_of(link) if is_own else "")


@contextlib.contextmanager
def telling_of_withheld(key: Key) -> Iterator[None]:
    """A service that misses a key which was kept from it is not refusing the key."""
    try:
        yield
    except Failure as failure:
        if key.warning and failure.fault.exit_code == EXIT_KEY:
            raise failure.but(hint=key.warning) from None
        raise


@contextlib.contextmanager
def telling_of_refused(key: Key, endpoint: Endpoint, provider: Provider) -> Iterator[None]:
    """Say of a key that the service refuses which one it was, where others lie, and what may fit.

    Another region is only named where the user has named none: else the key would be led away from their host.
    """
    try:
        yield
    except Failure as failure:
        if failure.fault.exit_code != EXIT_KEY:
            raise
        if not key.value and (login := provider.login_variables()):
            raise failure.but(hint=f"tell the user: this server asks who it is; {_ways_in(provider, login)}") from None
        if not key.source:
            raise
        hint = failure.fault.hint
        if failure.code == "key_rejected":
            others = [region for region in provider.roots if region != endpoint.region]
            if endpoint.source == "default" and others:
                hint += f"; --check --region {others[0]} tries that one, free"
            elif endpoint.source:
                hint += f"; {endpoint.source} leads to {endpoint.host}: it must be a {key.noun} of that server"
            hint = "; ".join([hint, *key.others()])
        message = f"{failure.message}; the {key.noun} is that of {key.source}"
        raise failure.but(message=message, hint=hint) from None


def _ways_in(provider: Provider, login: tuple[str, str]) -> str:
    """The variables by which a server that asks for a key or a login gets one."""
    key = f", or {provider.key_places.variable} for a key" if provider.key_places else ""
    return f"they set {' and '.join(login)} for a login{key}"
