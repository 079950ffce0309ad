"""Answers that are cut, empty or no HTTP at all: the caller always gets a typed error."""

import socket
import threading

import pytest

from recess.errors import NotFound, RecessError, ServerUnavailable
from recess.sdk.exec_stream import ExecStream
from recess.sdk.transport import Transport


@pytest.fixture
def answering():
    """Return a function that starts a server which answers its one connection with these bytes and hangs up."""
    threads, listeners = [], []

    def start(answer: bytes) -> Transport:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            conn, _ = listener.accept()
            with conn:
                head = b""
                while b"\r\n\r\n" not in head and (piece := conn.recv(65536)):
                    head += piece
                conn.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Transport(url=f"http://127.0.0.1:{listener.getsockname()[1]}")

    yield start
    for thread, listener in zip(threads, listeners, strict=True):
        thread.join()
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer", [b"", b"garbage\r\n\r\n", HEAD, HEAD + b'{"a"', CHUNKED + b"5\r\nab", CHUNKED + b"zz\r\n"]
)
def test_a_broken_answer_is_an_unavailable_server(answering, answer):
    with pytest.raises(ServerUnavailable):
        answering(answer).call("GET", "/v1/info")


@pytest.mark.parametrize("answer", [b"", HEAD, CHUNKED, CHUNKED + b"5\r\nab", CHUNKED + b"zz\r\n"])
def test_a_broken_stream_of_progress_is_an_unavailable_server(answering, answer):
    with pytest.raises(ServerUnavailable):
        answering(answer).call_with_progress("POST", "/v1/machines", {}, print)


@pytest.mark.parametrize("cut", [b"", b"zz", b"5\r\nab", b"zz\r\n", b"7\r\ndata: \xc3"])
def test_events_end_where_the_server_went_away(answering, cut):
    event = b"id: 1\nevent: entry\ndata: {}\n\n"
    stream = answering(CHUNKED + b"%x\r\n" % len(event) + event + b"\r\n" + cut).events("/v1/sessions/s/events")
    assert list(stream) == [("entry", "1", {})]


def test_a_problem_is_its_typed_error_even_where_a_stream_was_asked_for(answering):
    body = b'{"code": "not_found", "message": "no such session: s"}'
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with pytest.raises(NotFound, match="no such session"):
        next(answering(answer).events("/v1/sessions/s/events"))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_attaching_to_what_is_no_websocket(answering, answer):
    with pytest.raises(RecessError):
        ExecStream(answering(answer), "m", {"argv": ["x"]})
