"""Large bodies: counted, never whole in memory, and a break-off is noticed."""

import contextlib
import io
import socket
import threading

import pytest

from recess.errors import Corrupt, ServerUnavailable, Unavailable
from recess.sdk.files import download, upload
from recess.sdk.transport import Transport

OK = b"HTTP/1.1 200 OK\r\nContent-Length: "


@contextlib.contextmanager
def answering(answer, *, whole=lambda body: True):
    """A server that takes one request (until its body is `whole`), gives these bytes and hangs up."""
    taken = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    while b"\r\n\r\n" not in taken or not whole(taken.partition(b"\r\n\r\n")[2]):
                        piece = connection.recv(1 << 16)
                        if not piece:
                            break
                        taken.extend(piece)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Transport(url=f"http://127.0.0.1:{listener.getsockname()[1]}", token="secret"), taken
        with contextlib.suppress(OSError):
            socket.create_connection(listener.getsockname(), 1).close()
        thread.join()


def test_a_body_goes_to_a_file():
    seen = []
    with answering(OK + b"10\r\n\r\n0123456789") as (transport, taken):
        target = io.BytesIO()
        assert download(transport, "/v1/x y", target, query={"offset": "5"}, on_bytes=seen.append) == 10
    assert target.getvalue() == b"0123456789"
    assert seen == [10]
    assert taken.startswith(b"GET /v1/x%20y?offset=5 ")
    assert b"Bearer secret" in taken


def test_a_body_that_breaks_off_is_noticed():
    with answering(OK + b"100\r\n\r\n0123456789") as (transport, _):
        target = io.BytesIO()
        with pytest.raises(Unavailable, match="90 bytes are missing"):
            download(transport, "/x", target, query={}, on_bytes=lambda _: None)
    assert target.getvalue() == b"0123456789"  # what came is kept: it goes on from there


def test_an_error_is_typed():
    body = b'{"code": "corrupt", "message": "bad"}'
    head = b"HTTP/1.1 500 X\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering(head + body) as (transport, _), pytest.raises(Corrupt, match="bad"):
        download(transport, "/x", io.BytesIO(), query={}, on_bytes=lambda _: None)


@pytest.mark.parametrize("size", [3 << 20, None])
def test_a_file_is_sent_piece_by_piece(size):
    content = bytes(range(256)) * (3 << 12)
    seen = []

    def whole(body):
        return body.endswith(b"\r\n0\r\n\r\n") if size is None else len(body) == size

    with answering(OK + b"8\r\n\r\n" + b'{"a": 1}', whole=whole) as (transport, taken):
        answer = upload(transport, "/x", io.BytesIO(content), size=size, query={}, on_bytes=seen.append)
    assert answer == {"a": 1}
    assert seen[:3] == [1 << 20, 2 << 20, 3 << 20]
    if size is not None:
        assert bytes(taken).partition(b"\r\n\r\n")[2] == content
    else:
        assert b"chunked" in taken


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ServerUnavailable):
        upload(
            Transport(url=f"http://127.0.0.1:{port}"), "/x", io.BytesIO(b"x"), size=1, query={}, on_bytes=lambda _: None
        )
