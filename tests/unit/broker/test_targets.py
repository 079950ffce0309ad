import pytest

from recess.broker.policy import build_policy, parse_route
from recess.broker.targets import Keys, Target, guest_headers, read_target, upstream_headers
from recess.errors import BadInput, NotFound

POLICY = build_policy([], {"llm": "https://api.test/v1", "root": "http://localhost:9000"})


@pytest.mark.parametrize(
    ("method", "text", "verb", "host", "port", "path"),
    [
        ("CONNECT", "a.test:443", "connect", "a.test", 443, ""),
        ("CONNECT", "[2a00::1]:443", "connect", "2a00::1", 443, ""),
        ("GET", "http://A.test", "http", "a.test", 80, "/"),
        ("GET", "http://a.test:81/x?y=1", "http", "a.test", 81, "/x?y=1"),
        ("POST", "/route/llm/chat/completions?s=1", "route", "api.test", 443, "/v1/chat/completions?s=1"),
        ("GET", "/route/llm", "route", "api.test", 443, "/v1"),
        ("GET", "/route/root", "route", "localhost", 9000, "/"),
        ("GET", "/route/root?a=b", "route", "localhost", 9000, "/?a=b"),
    ],
)
def test_read(method: str, text: str, verb: str, host: str, port: int, path: str) -> None:
    read = read_target(POLICY, method, text)
    assert (read.verb, str(read.host), read.port, read.path) == (verb, host, port, path)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("CONNECT", "a.test"), ("CONNECT", "a.test:0"), ("CONNECT", "http://a.test:80"), ("CONNECT", "u@a.test:443"),
        ("GET", "https://a.test/"), ("GET", "http://u:p@a.test/"), ("GET", "ftp://a.test/"), ("GET", "/"), ("GET", "*"),
        ("GET", "/route/"), ("GET", "/route/llm/../admin"), ("GET", "/route/llm/%2e%2e/admin"),
        ("GET", "/route/llm/%252e%252e/admin"), ("GET", "/route/llm/x\\..\\admin"), ("GET", "http://a.test:99999/"),
        ("GET", "http://127.1/"), ("GET", "http://[::1/"),
    ],
)  # fmt: skip
def test_bad(method: str, text: str) -> None:
    with pytest.raises(BadInput):
        read_target(POLICY, method, text)


def test_unknown_route_names_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        read_target(POLICY, "GET", "/route/other/x")
    assert "llm, root" in caught.value.hint


def test_upstream_headers_lose_the_hop_and_gain_the_secret() -> None:
    target = Target("route", "api.test", 443, "/v1", tls=True, route=parse_route("llm", "https://api.test/v1"))
    sent = upstream_headers(
        [
            (b"host", b"127.0.0.1:3128"), (b"authorization", b"Bearer placeholder"), (b"connection", b"x-drop, close"),
            (b"x-drop", b"1"), (b"proxy-authorization", b"p"), (b"accept", b"*/*"), (b"content-length", b"3"),
        ],
        target,
        Keys("sk-1"),
    )  # fmt: skip
    assert sent == [
        (b"Host", b"api.test"), (b"accept", b"*/*"), (b"content-length", b"3"),
        (b"Authorization", b"Bearer sk-1"), (b"Connection", b"close"),
    ]  # fmt: skip


def test_two_framings_become_one() -> None:
    sent = upstream_headers(
        [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")], Target("http", "a.test", 80), Keys()
    )
    assert (b"Transfer-Encoding", b"chunked") in sent
    assert not [name for name, _ in sent if name.lower() == b"content-length"]


def test_without_a_secret_the_guests_own_header_passes() -> None:
    target = Target("route", "api.test", 443, route=parse_route("llm", "https://api.test"))
    assert (b"authorization", b"mine") in upstream_headers([(b"authorization", b"mine")], target, Keys())


def test_guest_headers_keep_the_length() -> None:
    kept = guest_headers(
        [(b"connection", b"content-length, x-a"), (b"content-length", b"5"), (b"x-a", b"1"), (b"keep-alive", b"1")]
    )
    assert kept == [(b"content-length", b"5")]
