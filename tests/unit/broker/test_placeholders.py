"""Which secret may go where, and what a request looks like once it is filled in."""

import base64
import ipaddress

import pytest

from recess.broker.placeholders import (
    bound_to,
    fill_headers,
    fill_path,
    parse_binding,
    parse_bindings,
    placeholder_of,
    uses,
)
from recess.errors import BadInput

TOKEN = parse_binding("TOKEN@api.test,*.cdn.test:8443,127.0.0.1:9000")


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("api.test", 443, True), ("api.test", 80, False), ("x.api.test", 443, False), ("a.cdn.test", 8443, True),
        ("cdn.test", 8443, False), ("a.cdn.test", 443, False), ("evil-cdn.test", 8443, False),
        (ipaddress.ip_address("127.0.0.1"), 9000, True), (ipaddress.ip_address("127.0.0.2"), 9000, False),
    ],
)  # fmt: skip
def test_a_secret_goes_where_it_is_bound_and_nowhere_else(host, port, allowed):
    assert bound_to([TOKEN], host, port) == ((TOKEN,) if allowed else ())


@pytest.mark.parametrize(
    "text",
    [
        "TOKEN", "@api.test", "TOKEN@", "TOKEN@a.test,,b.test", "1TOKEN@a.test", "TO-KEN@a.test", "TOKEN@*", "TOKEN@*:443",
        "TOKEN@a.test:0", "TOKEN@a.test:*", "TOKEN@10.0.0.0/8", "TOKEN@a.test:443:443", "TOKEN@https://a.test",
        "TOKEN@" + ",".join(f"h{n}.test" for n in range(33)),
    ],
)  # fmt: skip
def test_what_is_no_binding(text):
    with pytest.raises(BadInput):
        parse_binding(text)


def test_bindings_are_bounded_and_a_name_is_bound_once():
    with pytest.raises(BadInput, match="twice"):
        parse_bindings(["A@x.test", "A@y.test"])
    with pytest.raises(BadInput, match="at most 64"):
        parse_bindings([f"A{n}@x.test" for n in range(65)])


def test_filled_in_where_clients_put_keys():
    values = {placeholder_of("TOKEN"): "s3cret"}
    basic = base64.b64encode(b"x-access-token:recess-secret-TOKEN")
    sent = fill_headers(
        [
            (b"Host", b"recess-secret-TOKEN"), (b"Authorization", b"Bearer recess-secret-TOKEN"),
            (b"x-api-key", b"recess-secret-TOKEN"), (b"authorization", b"Basic " + basic),
            (b"Authorization", b"Basic not-base64!"), (b"x", b"recess-secret-OTHER"),
        ],
        values,
    )  # fmt: skip
    assert sent == [
        (b"Host", b"recess-secret-TOKEN"), (b"Authorization", b"Bearer s3cret"), (b"x-api-key", b"s3cret"),
        (b"authorization", b"Basic " + base64.b64encode(b"x-access-token:s3cret")),
        (b"Authorization", b"Basic not-base64!"), (b"x", b"recess-secret-OTHER"),
    ]  # fmt: skip


def test_a_query_is_encoded_and_a_path_is_left_alone():
    values = {placeholder_of("K"): "a&b=c d"}
    assert fill_path("/recess-secret-K?key=recess-secret-K&x=1", values) == "/recess-secret-K?key=a%26b%3Dc%20d&x=1"


def test_names_that_begin_alike_and_values_that_look_like_placeholders():
    values = {placeholder_of("A"): "recess-secret-AB", placeholder_of("AB"): "two"}
    assert fill_headers([(b"x", b"recess-secret-AB recess-secret-A")], values) == [(b"x", b"two recess-secret-AB")]


def test_only_secrets_that_a_request_names_are_used():
    a, b = parse_bindings(["A@x.test", "B@x.test"])
    assert uses([(b"x", b"recess-secret-B")], "/", [a, b]) == (b,)
    assert uses([], "/?k=recess-secret-A", [a, b]) == (a,)
    assert uses([(b"x", b"y")], "/recess-secret-A", [a, b]) == ()
