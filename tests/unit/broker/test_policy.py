import ipaddress

import pytest

from recess.broker.policy import build_policy, decide_address, decide_target, parse_route
from recess.broker.rules import parse_host, parse_rule
from recess.errors import BadInput


def target(rules: list[str], host: str, port: int = 443) -> bool:
    return decide_target(build_policy(rules), parse_host(host), port).allowed


def leads(rules: list[str], host: str, address: str, port: int = 443) -> bool:
    return decide_address(build_policy(rules), host, ipaddress.ip_address(address), port).allowed


@pytest.mark.parametrize(
    ("rules", "host", "port", "allowed"),
    [
        ([], "example.org", 443, False),
        (["example.org"], "example.org", 443, True),
        (["example.org"], "EXAMPLE.org.", 80, True),
        (["example.org"], "example.org", 22, False),
        (["example.org:22"], "example.org", 22, True),
        (["example.org:22"], "example.org", 443, False),
        (["example.org:*"], "example.org", 5432, True),
        (["example.org"], "www.example.org", 443, False),
        (["*.example.org"], "a.b.example.org", 443, True),
        (["*.example.org"], "example.org", 443, False),
        (["*.example.org"], "badexample.org", 443, False),
        (["*"], "anything.test", 443, True),
        (["*"], "93.184.216.34", 443, False),
        (["93.184.216.0/24"], "93.184.216.34", 443, True),
        (["93.184.216.34"], "93.184.216.35", 443, False),
        (["0.0.0.0/0"], "93.184.216.34", 443, True),
        (["0.0.0.0/0"], "127.0.0.1", 443, False),
        (["0.0.0.0/0"], "169.254.169.254", 80, False),
        (["169.254.169.254"], "169.254.169.254", 80, True),
        (["127.0.0.1:8000"], "127.0.0.1", 8000, True),
        (["127.0.0.1:8000"], "::ffff:127.0.0.1", 8000, True),
        (["::/0"], "::1", 443, False),
        (["[::1]:80"], "::1", 80, True),
        (["2a00::/16"], "2a00:1450::1", 443, True),
        (["[2a00::]/16:8443"], "2a00:1450::1", 443, False),
        (["[2a00::]/16:8443"], "2a00:1450::1", 8443, True),
    ],
)
def test_target(rules: list[str], host: str, port: int, allowed: bool) -> None:
    assert target(rules, host, port) is allowed


@pytest.mark.parametrize(
    ("rules", "host", "address", "allowed"),
    [
        (["a.test"], "a.test", "93.184.216.34", True),
        (["a.test"], "a.test", "127.0.0.1", False),
        (["a.test"], "a.test", "10.1.2.3", False),
        (["a.test"], "a.test", "169.254.169.254", False),
        (["a.test"], "a.test", "fd00::1", False),
        (["a.test", "10.0.0.0/8"], "a.test", "10.1.2.3", True),
        (["a.test", "0.0.0.0/0"], "a.test", "10.1.2.3", False),
        (["a.test", "127.0.0.1"], "a.test", "127.0.0.1", True),
        (["localhost"], "localhost", "127.0.0.1", True),
        (["localhost"], "localhost", "::1", True),
        (["localhost"], "localhost", "10.0.0.1", False),
        (["*"], "localhost", "127.0.0.1", False),
        (["localhost:80"], "localhost", "127.0.0.1", False),
    ],
)
def test_address(rules: list[str], host: str, address: str, allowed: bool) -> None:
    assert leads(rules, host, address) is allowed


@pytest.mark.parametrize(
    "text",
    ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "1.2.3.999", "a..b", "-a", "", "a b", "a/b", "a@b", "é.org"],
)
def test_host_that_a_resolver_could_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_host(text)


@pytest.mark.parametrize("text", ["", "http://a.org", "a.org:0", "a.org:70000", "*.127.0.0.1", "a.org/24", "**.org"])
def test_bad_rule(text: str) -> None:
    with pytest.raises(BadInput):
        parse_rule(text)


@pytest.mark.parametrize(
    "url", ["", "ftp://a.org", "https://", "https://u:p@a.org", "https://a.org?x=1", "https://a.org:x", "http://127.1/"]
)
def test_bad_route(url: str) -> None:
    with pytest.raises(BadInput):
        parse_route("llm", url)


def test_route_takes_the_secret_of_its_name() -> None:
    route = parse_route("llm", "https://api.test/v1/")
    assert (route.secret, route.upstream) == ("llm", "https://api.test/v1")


def test_a_policy_is_bounded() -> None:
    with pytest.raises(BadInput):
        build_policy(["a.org"] * 1001)
