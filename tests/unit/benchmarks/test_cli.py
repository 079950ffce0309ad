"""The table of `make bench-cli`, and that what is not here is named."""

import http.server
import threading

from benchmarks.cli import answers, host_cpu_s, markdown, podman, repeat
from benchmarks.figures import Figure


def test_the_table_says_what_was_met_and_what_was_not_measured():
    figures = [
        Figure("recess ps", "ms", (100.0, 300.0, 150.0), (50.0,), 200),
        Figure("recess --help", "ms", (130.0,), (), 120),
        Figure("cp", "MB/s", (80.0,)),
    ]
    text = markdown(figures, ["podman: not installed"])
    assert "| recess ps | 3 | 150 | 300 | ms | 50 | 3.00 | 200, met |" in text
    assert "| recess --help | 1 | 130 | 130 | ms | - | - | 120, NOT met |" in text
    assert "| cp | 1 | 80 | 80 | MB/s | - | - | - |" in text
    assert text.endswith("- not measured: podman: not installed\n")


def test_a_missing_peer_is_said_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.cli.shutil.which", lambda _name: None)
    assert "apt-get install podman" in podman(tmp_path)


def test_each_repetition_is_measured():
    done = []
    wall, cpu = repeat(3, lambda: done.append(1))
    assert (len(done), len(wall), len(cpu)) == (3, 3, 3)
    assert all(one >= 0 for one in (*wall, *cpu))
    assert host_cpu_s() > 0


def test_a_port_is_asked_until_it_answers():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answers(server.server_address)
        thread.join()
