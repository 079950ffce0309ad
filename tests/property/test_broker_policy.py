"""Whatever a guest writes, the broker's reading of it is bounded, typed, and never wider than the policy."""

import ipaddress

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from recess.broker.policy import build_policy, decide_address, decide_target
from recess.broker.rules import parse_host
from recess.broker.targets import Keys, guest_headers, read_target, upstream_headers
from recess.errors import RecessError

POLICY = build_policy(["*.ok.test", "93.184.0.0/16", "*"], {"llm": "https://api.test/v1"})
WIDE = build_policy(["*:*", "0.0.0.0/0:*", "[::]/0:*"])
TOKENS = st.sampled_from(
    ["/route/", "llm", "..", "%2e", "%2E%2e", "/", "\\", "?", "#", "http://", "a.test", ":80", "@", "[::1]", ";"]
)


@given(
    st.one_of(st.text(max_size=200), st.lists(TOKENS, max_size=12).map("".join)), st.sampled_from(["GET", "CONNECT"])
)
@example("/route/llm/%2e%2e/x", "GET")
def test_any_target_is_read_or_refused(text: str, method: str) -> None:
    try:
        target = read_target(POLICY, method, text)
    except RecessError:
        return
    assert 1 <= target.port <= 65535
    if target.verb == "route":
        assert (str(target.host), target.port) == ("api.test", 443)
        assert target.path.startswith("/v1")
        assert "/.." not in target.path.partition("?")[0]


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(1, 65535))
def test_the_widest_rules_reach_only_the_public_internet(address, port: int) -> None:
    """`*` and 0.0.0.0/0 never reach what Python's own tables call loopback, private, link-local or multicast."""
    host = parse_host(f"[{address}]" if address.version == 6 else str(address))
    mapped = getattr(address, "ipv4_mapped", None) or address
    narrow = (
        mapped.is_private or mapped.is_loopback or mapped.is_link_local or mapped.is_multicast or mapped.is_reserved
    )
    if narrow and not mapped.is_global:
        assert not decide_target(WIDE, host, port).allowed
        assert not decide_address(WIDE, "name.test", ipaddress.ip_address(mapped), port).allowed


@given(st.text(alphabet="0123456789abcdefx.:[]%", max_size=40))
def test_a_name_never_looks_like_a_number(text: str) -> None:
    try:
        host = parse_host(text)
    except RecessError:
        return
    if isinstance(host, str):
        last = host.split(".")[-1]
        assert not last.isdigit()
        assert not last.startswith("0x")


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [b"connection", b"content-length", b"transfer-encoding", b"host", b"x-a", b"authorization", b"te"]
        ),
        st.sampled_from([b"close", b"x-a", b"chunked", b"3", b"content-length", b"a"]),
    ),
    max_size=8,
)


@given(HEADERS)
def test_one_framing_and_one_host_go_upstream(headers) -> None:
    """For every header list that h11 takes from a guest, what goes on has one Host and at most one framing."""
    target = read_target(POLICY, "POST", "/route/llm/x")
    try:
        h11.Request(method="POST", target="/", headers=[(b"host", b"p"), *headers])
    except h11.LocalProtocolError:
        return
    sent = upstream_headers([(b"host", b"p"), *headers], target, Keys("sk-1"))
    names = [name.lower() for name, _ in sent]
    assert names.count(b"host") == 1
    assert names.count(b"authorization") == 1
    assert len({b"content-length", b"transfer-encoding"} & set(names)) <= 1
    assert b"te" not in names
    assert b"transfer-encoding" not in [name.lower() for name, _ in guest_headers(headers)]
