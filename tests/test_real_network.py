"""The network once more, with what stands in it out there: nginx, squid, tinyproxy and microsocks (Debian packages).

`make check-all` installs them where it may. Each test starts its own on ports of its own, as a process that it ends.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from conftest import TEST_KEY, Result, Shell, cannot
from fault_server import GENERATE, PICTURE, FaultServer, good
from middlemen import free_port
from mock_server import MockServer

pytestmark = pytest.mark.heavy

HOST, STORAGE = "dashscope.aliyuncs.com", "dashscope-result-bj.oss-cn-beijing.aliyuncs.com"
NCSA = ("/usr/lib/squid/basic_ncsa_auth", "/usr/lib64/squid/basic_ncsa_auth")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
SECRET = "hunter2"


def program(name: str) -> str:
    return shutil.which(name, path=SBIN) or cannot(f"run {name}: it is a Debian package")


def names_library() -> str:
    """What lets a program resolve names by a file of its own (Debian: libnss-wrapper)."""
    found = [*Path("/usr/lib").glob("*/libnss_wrapper.so"), *Path("/usr/lib64").glob("libnss_wrapper.so")]
    return str(found[0]) if found else cannot("give programs names of their own: libnss-wrapper is a Debian package")


Start = Callable[..., None]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program that stays in the foreground, and waits until its port answers."""
    running: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "log"

    def started(port: int, *command: str, **env: str) -> None:
        with log.open("ab") as output:
            running.append(
                subprocess.Popen(
                    command, env=os.environ | env, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path
                )
            )
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                assert running[-1].poll() is None and time.monotonic() < end, log.read_text(errors="replace")
                time.sleep(0.05)

    yield started
    for process in running:
        process.send_signal(signal.SIGTERM)  # nginx and squid end what they have started
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: what it has started, too
            process.wait(10)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """The vendor's hosts, on this machine."""
    path = tmp_path / "hosts"
    path.write_text(f"127.0.0.1 {HOST}\n127.0.0.1 {STORAGE}\n127.0.0.1 gpu.lan\n")
    return path


@pytest.fixture
def authority(shell: Shell, tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    shell.env["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
    return made


@pytest.fixture
def vendor(shell: Shell, authority: trustme.CA) -> Iterator[FaultServer]:
    """The vendor, for whom a proxy leads to it by name."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST, STORAGE).configure_cert(context)
    with FaultServer(context) as server:
        server.play(GENERATE, good(f"https://{STORAGE}:{server.port}{PICTURE}"))
        shell.env |= {
            "DASHSCOPE_API_KEY": TEST_KEY,
            "DASHSCOPE_BASE_URL": f"https://{HOST}:{server.port}/api/v1",
        }
        yield server


def make(shell: Shell, *arguments: str) -> Result:
    result = shell.run("--prompt", "a fox", "--print-response", "--timeout", "30", "--max-retries", "0", *arguments)
    kept = "".join(path.read_text() for path in shell.evidence_files())
    assert SECRET not in result.stdout + result.stderr + kept
    return result


def refused(result: Result, *words: str) -> None:
    assert (result.code, result.error["code"], result.error["billed"]) == (6, "unreachable", "no"), result.stdout
    for word in words:
        assert word in result.error["message"] + result.error["hint"], result.stdout


# Proxies --------------------------------------------------------------------------------------------------------------


def squid(start: Start, folder: Path, names: Path, password: str = SECRET, more: str = "") -> int:
    port, user = free_port(), pwd.getpwuid(os.getuid()).pw_name
    program_of_passwords = next((path for path in NCSA if Path(path).exists()), "") or cannot("ask squid for passwords")
    crypted = subprocess.run(
        ["openssl", "passwd", "-apr1", password], capture_output=True, check=True, text=True
    ).stdout
    (folder / "passwords").write_text(f"me:{crypted}")
    (folder / "squid.conf").write_text(
        f"""http_port 127.0.0.1:{port}
auth_param basic program {program_of_passwords} {folder}/passwords
acl known proxy_auth REQUIRED
{more}
http_access allow known
http_access deny all
hosts_file {names}
pid_filename {folder}/squid.pid
access_log none
cache_log {folder}/squid.log
cache deny all
coredump_dir {folder}
shutdown_lifetime 0 seconds
cache_effective_user {"proxy" if user == "root" else user}
"""
    )
    for place in (folder, *folder.parents):
        if str(place).startswith("/tmp/") and user == "root":  # squid gives its rights up, and must come in here
            place.chmod(0o755)
    for name in ("squid.log", "squid.pid", "passwords"):
        (folder / name).touch()
        (folder / name).chmod(0o666)
    start(port, program("squid"), "-N", "-f", str(folder / "squid.conf"))
    return port


def test_squid_with_a_password(shell: Shell, vendor: FaultServer, start: Start, names: Path, tmp_path: Path) -> None:
    port = squid(start, tmp_path, names, more="acl lan dstdomain gpu.lan\nhttp_access deny lan")
    place = f"127.0.0.1:{port}"
    shell.env["HTTPS_PROXY"] = f"http://{place}"
    refused(make(shell), f"the proxy {place} (HTTPS_PROXY)", "407", "USER:PASSWORD")
    shell.env["HTTPS_PROXY"] = f"http://me:not-{SECRET}@{place}"
    refused(make(shell), f"the proxy {place} (HTTPS_PROXY)", "another user name and password")
    assert not vendor.connections
    shell.env["HTTPS_PROXY"] = f"http://me:{SECRET}@{place}"
    assert make(shell).code == 0
    assert len(vendor.posts) == 1
    assert shell.run("--check").code == 2  # this server knows of no models
    vendor.close()
    refused(make(shell), f"the proxy {place} (HTTPS_PROXY)", "503", "NO_PROXY")


def test_squid_before_a_server_in_the_house(shell: Shell, start: Start, names: Path, tmp_path: Path) -> None:
    port = squid(start, tmp_path, names, more="acl shut dstdomain shut.lan\nhttp_access deny shut")
    shell.env["HTTP_PROXY"] = f"http://me:{SECRET}@127.0.0.1:{port}"
    with MockServer(rpm=0) as mock:
        lan = mock.openai_url.replace("127.0.0.1", "gpu.lan")
        assert make(shell, "--provider", "openai", "--base-url", lan).code == 0
    named = f"the proxy 127.0.0.1:{port} (HTTP_PROXY)"
    refused(make(shell, "--provider", "openai", "--base-url", lan), named, "NO_PROXY", "gpu.lan")  # ERR_CONNECT_FAIL
    shut = make(shell, "--provider", "openai", "--base-url", "http://shut.lan:8000/v1")
    refused(shut, named, "403", "NO_PROXY")
    shell.env["HTTP_PROXY"] = f"http://127.0.0.1:{port}"
    refused(make(shell, "--provider", "openai", "--base-url", lan), named, "407", "USER:PASSWORD")


def test_tinyproxy(shell: Shell, vendor: FaultServer, start: Start, names: Path, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "filter").write_text("shut\\.lan\n")
    (tmp_path / "tinyproxy.conf").write_text(
        f"Port {port}\nListen 127.0.0.1\nTimeout 30\nMaxClients 20\nBasicAuth me {SECRET}\n"
        f'Filter "{tmp_path}/filter"\nLogFile "{tmp_path}/tiny.log"\n'
    )
    library = names_library()
    start(
        port,
        *(program("tinyproxy"), "-d", "-c", str(tmp_path / "tinyproxy.conf")),
        LD_PRELOAD=library,
        NSS_WRAPPER_HOSTS=str(names),
    )
    proxy = f"http://me:{SECRET}@127.0.0.1:{port}"
    shell.env |= {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy}
    assert make(shell).code == 0
    with MockServer(rpm=0) as mock:
        assert (
            make(shell, "--provider", "openai", "--base-url", mock.openai_url.replace("127.0.0.1", "gpu.lan")).code == 0
        )
    shut = make(shell, "--provider", "openai", "--base-url", "http://shut.lan:8000/v1")
    refused(shut, f"the proxy 127.0.0.1:{port} (HTTP_PROXY)", "403", "NO_PROXY")
    shell.env["HTTPS_PROXY"] = f"http://127.0.0.1:{port}"
    refused(make(shell), "407", "USER:PASSWORD")


@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
def test_microsocks(shell: Shell, vendor: FaultServer, start: Start, names: Path, variable: str) -> None:
    port = free_port()
    command = [program("microsocks"), "-i", "127.0.0.1", "-p", str(port), "-u", "me", "-P", SECRET]
    start(port, *command, LD_PRELOAD=names_library(), NSS_WRAPPER_HOSTS=str(names))
    shell.env[variable] = f"socks5h://me:{SECRET}@127.0.0.1:{port}"
    assert make(shell).code == 0
    assert len(vendor.posts) == len(vendor.downloads) == 1
    shell.env[variable] = f"socks5h://127.0.0.1:{port}"
    refused(make(shell), f"the proxy 127.0.0.1:{port} ({variable})", "user name")
    vendor.close()
    shell.env[variable] = f"socks5h://me:{SECRET}@127.0.0.1:{port}"
    refused(make(shell), "does not reach it", "NO_PROXY")


# nginx ----------------------------------------------------------------------------------------------------------------

NGINX = """daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;
    location / {{ proxy_pass http://127.0.0.1:{behind}; proxy_set_header Host 127.0.0.1:{behind}; }}
    location /small/ {{ client_max_body_size 10; proxy_pass http://127.0.0.1:{behind}/; }}
    location /dead/ {{ proxy_pass http://127.0.0.1:{dead}/; }}
    location /moved/ {{ return 301 https://{host}/api/v1/; }}
    location /login/ {{ return 302 /sign-in?next=%2F; }}
    location /closed/ {{ deny all; }}
    location /page/ {{ default_type text/html; return 200 "<html><title>Welcome to nginx!</title></html>"; }}
  }}
}}
"""


@pytest.fixture
def nginx(
    shell: Shell, service: FaultServer, authority: trustme.CA, start: Start, tmp_path: Path
) -> Callable[[str], str]:
    """A gateway with TLS before the service; gives the base URL below a path of it."""
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        NGINX.format(folder=tmp_path, port=port, behind=service.port, dead=free_port(), host=HOST)
    )
    start(port, program("nginx"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr")
    return lambda path: f"https://localhost:{port}{path}/api/v1"


def test_a_picture_through_nginx_with_tls(shell: Shell, service: FaultServer, nginx: Callable[[str], str]) -> None:
    assert make(shell, "--base-url", nginx("")).code == 0
    assert len(service.posts) == 1


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/small", 8, ("413", "text/html", "Request Entity Too Large")),
        ("/dead", 7, ("502", "text/html", "Bad Gateway", "nginx")),
        ("/moved", 7, ("301", f"https://{HOST}/api/v1/", "check the base URL")),
        ("/login", 7, ("302", "/sign-in?next=%2F", "check the base URL")),
        ("/closed", 3, ("403", "text/html", "Forbidden")),
        ("/page", 8, ("200", "text/html", "Welcome to nginx!", "no API")),
    ],
)
def test_nginx_is_shown_with_its_words(
    shell: Shell, service: FaultServer, nginx: Callable[[str], str], path: str, code: int, words: tuple[str, ...]
) -> None:
    result = make(shell, "--base-url", nginx(path))
    assert result.code == code, result.stdout
    for word in words:
        assert word in result.error["message"] + result.error["hint"]
    assert not service.posts


def test_http_to_nginx_where_it_speaks_tls(shell: Shell, nginx: Callable[[str], str]) -> None:
    result = make(shell, "--base-url", nginx("").replace("https:", "http:"))
    assert result.code == 2
    assert "plain HTTP request was sent to HTTPS port" in result.error["message"]
    assert nginx("") in result.error["hint"]


def test_an_authority_that_only_nginx_knows(shell: Shell, nginx: Callable[[str], str]) -> None:
    del shell.env["SSL_CERT_FILE"]
    refused(make(shell, "--base-url", nginx("")), "not known here", "SSL_CERT_FILE")
