"""Provider: how one service is asked and understood."""

from __future__ import annotations

import datetime as dt
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from zimage.calls import Generated, HttpAnswer, HttpCall, LocalCall, Submitted, Working
from zimage.contract import LONG_PROMPT, MAX_ANSWER_BYTES, POLL_PAUSES
from zimage.errors import Failure
from zimage.outside import shown
from zimage.quota import Quota
from zimage.settings import Setting

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.keys import KeyPlaces
    from zimage.request import ImageRequest


class Price(NamedTuple):
    """US$ for one picture, and what the number rests on. `estimate` is None where a picture may cost something."""

    estimate: float | None
    basis: str
    price_list_date: str

    @property
    def counted(self) -> float:
        """US$ to sum up: what is not known cannot be counted."""
        return self.estimate or 0.0


class ConfigFile(NamedTuple):
    """The TOML file of a service's own client, with texts at its top: key, base URL, workspace, region."""

    variable: str  # names another file; set to nothing, there is none
    path: str  # below the home folder
    options: tuple[str, ...] = ("api_key", "base_url", "workspace", "region")


class RateLimit(NamedTuple):
    """What an account may send: so many requests in so many seconds."""

    requests: float
    seconds: float

    @property
    def per_minute(self) -> float:
        return self.requests * 60 / self.seconds


class Provider:
    """One way to the model: its key places, hosts, prices, limits, one call and what its answer means.

    A provider never sleeps, retries, opens files or reads the environment: it only builds and reads. What it cannot
    do is said by the class attributes. references/providers.md tells how to add one.
    """

    name: ClassVar[str]
    key_places: ClassVar[KeyPlaces | None] = None  # None: there is no key
    user_variable: ClassVar[str | None] = None  # with the next: a login for basic authentication, of server or proxy
    password_variable: ClassVar[str | None] = None
    roots: ClassVar[dict[str, str]]  # region -> API root; empty text where only the user can name one
    region_aliases: ClassVar[dict[str, str]] = {}
    other_regions: ClassVar[tuple[str, ...]] = ()  # of the service, without the model
    default_region: ClassVar[str]
    base_url_variables: ClassVar[tuple[str, ...]] = ()
    region_variables: ClassVar[tuple[str, ...]] = ()  # of one meaning
    workspace_variable: ClassVar[str | None] = None  # for a header, and for the host where no base URL is set
    workspace_id_variable: ClassVar[str | None] = None  # for the host alone, outside the default region
    config_file: ClassVar[ConfigFile | None] = None
    default_root: ClassVar[str] = ""  # path of the API root
    usual_port: ClassVar[str] = "PORT"  # of a server on this machine
    generate_path: ClassVar[str] = ""  # below the root
    in_process: ClassVar[bool] = False  # there is no endpoint: calls are LocalCalls
    requests_per_minute: ClassVar[float] = 0.0  # the account's published limit; 0 where there is none
    calls_at_once: int | None = None  # calls, and tasks, that are out; more than that wait for each other
    max_answer_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    https_links_under: ClassVar[str | None] = None  # http links below this domain work over https too
    links_to_itself: ClassVar[bool] = False  # a link may lead to the server that is asked, and name only its path
    links_elsewhere: ClassVar[bool] = False  # pictures lie on hosts that nobody can name before they are paid for
    billable: ClassVar[bool] = True  # a picture can cost money or quota
    costs_quota: ClassVar[bool] = False  # and no money: its price is 0
    quota: Quota = Quota()  # what the service has told last
    takes_seed: bool = True
    names_tasks: ClassVar[bool] = False  # by `named`, before the call leaves: its lost answer can be looked up
    sizes_are_ratios: ClassVar[bool] = False  # of a size only the ratio can be asked for
    long_prompt: ClassVar[int] = LONG_PROMPT  # characters; longer ones may be cut
    own_settings: ClassVar[tuple[Setting, ...]] = ()

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = {setting.name: setting.default for setting in self.own_settings} | dict(settings or {})

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings that have a value, as JSON."""
        return {name: value for name, value in self.settings.items() if value is not None}

    @property
    def shaping_settings(self) -> dict[str, Any]:
        """Those of them that make another picture."""
        shaping = {setting.name for setting in self.own_settings if setting.shapes_picture}
        return {name: value for name, value in self.known_settings.items() if name in shaping}

    @classmethod
    def asks_own_servers(cls) -> bool:
        """Whether there is no service behind it, only servers that users name: several may work at one batch."""
        return not cls.in_process and not cls.roots[cls.default_region]

    @classmethod
    def key_hint(cls) -> str:
        """Where users keep the key, in words."""
        places, login = cls.key_places, cls.login_variables()
        ways = [places.variable] if places else []
        ways += [f"{places.ini_option} in ~/{places.ini_file}"] if places and places.ini_file else []
        return ", or ".join([*ways, *([" and ".join(login)] if login else [])]) or "none"

    @classmethod
    def login_variables(cls) -> tuple[str, str] | None:
        """The variables of user and password; None where there is no login."""
        return (cls.user_variable, cls.password_variable) if cls.user_variable and cls.password_variable else None

    def root_of(self, path: str) -> str | None:
        """The path of the API root that a base URL's path means; None where it means none."""
        if path in ("", self.default_root):
            return self.default_root
        root = path.removesuffix(self.generate_path)
        return root if root.endswith(self.default_root) else None

    @classmethod
    def region_named(cls, text: str) -> str:
        """The provider's own name of the region that a user names.

        Raises:
            ValueError: with a sentence.
        """
        name = text.lower()
        region = cls.region_aliases.get(name, name)
        if region in cls.roots:
            return region
        known = ", ".join([*cls.roots, *cls.region_aliases])
        if region in cls.other_regions:
            raise ValueError(f"the model is not offered in {region}; it is in {' and '.join(cls.roots)}")
        raise ValueError(f"must be one of {known}, got {shown(text)}")

    def workspace_root(self, workspace: str, region: str) -> str:
        """The API root of a workspace of its own."""
        raise NotImplementedError

    def likely_root(self, path: str) -> str:
        """The path that is advised where a base URL's path means no root."""
        return self.default_root

    def region_of(self, host: str) -> str | None:
        """The region that a host belongs to; None where the host does not tell."""
        return None

    def unfit(self, host: str) -> str:
        """Why a host is none that this provider can ask, as the end of a sentence; empty where nothing is known."""
        return ""

    def owns(self, host: str) -> bool:
        """Whether the host belongs to the owner of the key."""
        return False

    def introduction(self, endpoint: Endpoint, key: str) -> Generator[HttpCall, HttpAnswer | None, None]:
        """Free questions by which a server says what it is, asked once before the first paid call.

        Each is answered, or with None where no answer came in time. What is learnt stays with the provider.
        """
        yield from ()

    @property
    def draws_with(self) -> str:
        """The model that the server has told of itself, where it is one; empty where that is not known."""
        return ""

    def unused(self) -> tuple[str, ...]:
        """What of seed, steps and guidance the picture will not be made with, as far as is known."""
        return ()

    def notes(self, request: ImageRequest) -> tuple[str, ...]:
        """What the user is to know of how this server takes the request."""
        return ()

    def learns_from(self, failure: Failure) -> bool:
        """Whether a refusal teaches to ask in another way, by `payload`: it is then asked once more, so."""
        return False

    def cannot(self, request: ImageRequest) -> list[str]:
        """What a valid request asks for that this provider cannot do: sentences that begin with the field."""
        return []

    def preflight(self) -> None:
        """What must be there on this machine, found out without loading it.

        Raises:
            Failure: missing_package, missing_weights, too_little_memory.
        """

    def prepare(self) -> None:
        """Look as `preflight` does and load what the call needs, so that nothing breaks after it began.

        Raises:
            Failure: as `preflight`.
        """

    def is_billable_at(self, endpoint: Endpoint) -> bool:
        """`billable`, where it depends on who is asked."""
        return self.billable

    def price(self, request: ImageRequest, region: str) -> Price:
        """What one picture costs."""
        raise NotImplementedError

    def price_at(self, request: ImageRequest, endpoint: Endpoint) -> Price:
        """`price`, where it depends on who is asked."""
        return self.price(request, endpoint.region)

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        """The JSON body that asks for the picture."""
        raise NotImplementedError

    def submit(
        self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None
    ) -> HttpCall | LocalCall:
        """The one call that costs money. An empty key is not sent. A LocalCall's work returns a Generated."""
        raise NotImplementedError

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | Submitted:
        """What the answer to `submit` means.

        Raises:
            Failure: by the provider's error table.
        """
        raise NotImplementedError

    def named(self, payload: dict[str, Any], task_id: str) -> dict[str, Any]:
        """The body that gives its task the name by which it will be asked after: a UUID. For `names_tasks`."""
        raise NotImplementedError

    @classmethod
    def has_tasks(cls) -> bool:
        """Whether pictures may be asked after."""
        return cls.poll is not Provider.poll or cls.look_up is not Provider.look_up

    def look_up(
        self, task_id: str, endpoint: Endpoint, key: str, request: ImageRequest, now: dt.datetime
    ) -> Generator[HttpCall, HttpAnswer, Generated | Working | None]:
        """Free questions after a task, and as their value what the answers mean: by default `poll` alone.

        Raises:
            Failure: as `read_poll`.
        """
        return self.read_poll((yield self.poll(task_id, endpoint, key)), request, now)

    def poll(self, task_id: str, endpoint: Endpoint, key: str) -> HttpCall:
        """A free question after a submitted task."""
        raise NotImplementedError

    def poll_pause(self, asked: int) -> float:
        """Seconds to wait before a task is asked after that has been asked after so many times."""
        return POLL_PAUSES[min(asked, len(POLL_PAUSES) - 1)]

    def read_poll(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | None:
        """What the answer to `poll` means; None where the service still works on the task.

        Raises:
            Failure: a code of TASK_IS_DONE (`settle`) where the task has ended so; not_found where it is not known;
                else by the provider's error table.
        """
        raise NotImplementedError

    def query(
        self, endpoint: Endpoint, key: str, workspace: str | None
    ) -> HttpCall | LocalCall | Generator[HttpCall, HttpAnswer, bool]:
        """A read-only call that costs nothing, to check connection and permission.

        Local work returns what `read_query` would; so does a generator, where one call is not enough.
        """
        raise NotImplementedError

    def read_query(self, answer: HttpAnswer) -> bool:
        """Whether the answer to `query` lists the model.

        Raises:
            Failure: by the provider's error table.
        """
        raise NotImplementedError

    def key_query(self, endpoint: Endpoint, key: str) -> HttpCall | None:
        """A read-only call that costs nothing and needs a good key, where `query` does well with any; None else."""
        return None

    def read_key_query(self, answer: HttpAnswer) -> dict[str, Any]:
        """What the answer to `key_query` tells of the account, as JSON.

        Raises:
            Failure: of exit code 3 where the key is not good; any other leaves that open.
        """
        raise NotImplementedError

    def limits(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall | None:
        """A read-only call that costs nothing, for what the account may send; None where there is none."""
        return None

    def read_limits(self, answer: HttpAnswer, workspace: str | None) -> RateLimit | None:
        """The limit that the answer to `limits` names for the model; None where it names none."""
        raise NotImplementedError


class OpenModel(Provider):
    """The open model on hardware of one's own, without a service around it."""

    SIDE_STEP = 16  # pixels; the model's card and pipeline: both sides are multiples of it
    billable = False

    def cannot(self, request: ImageRequest) -> list[str]:
        sentences = []
        if any(side % self.SIDE_STEP for side in request.width_height):
            step = self.SIDE_STEP
            sentences.append(f"size: {request.size}; {self.name} draws only sides that are multiples of {step}")
        if request.prompt_extend:
            sentences.append(f"prompt_extend: {self.name} does not rewrite prompts; leave it out")
        return sentences

    def price(self, request: ImageRequest, region: str) -> Price:
        return Price(0.0, "own hardware", "none")
