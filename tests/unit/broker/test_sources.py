"""Secrets kept elsewhere: a file, the environment, a keyring, a Vault (its real client against its wire on loopback)."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import keyring
import keyring.backend
import pytest

from recess.broker import SecretStore
from recess.errors import BadInput, NotFound, RecessError, Refused, Unavailable


@pytest.fixture
def store(tmp_path):
    return SecretStore(tmp_path / "secrets")


@pytest.mark.parametrize(
    "text", ["", "file", "file:", "file:rel", "mail:x", "keyring:x", "vault:secret#f", "vault:secret/x", "env:A\nB"]
)
def test_what_is_no_source(store, text):
    with pytest.raises(BadInput):
        store.put_source("A", text)
    assert store.names() == []


def test_a_file_and_the_environment(store, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("sk-file\n")
    store.put_source("A", f"file:{tmp_path}/key")
    monkeypatch.setenv("SOME_KEY", "sk-env")
    store.put_source("B", "env:SOME_KEY")
    assert [store.get(n).reveal() for n in "AB"] == ["sk-file", "sk-env"]
    assert store.describe() == [{"name": "A", "kept": f"file:{tmp_path}/key"}, {"name": "B", "kept": "env:SOME_KEY"}]
    with pytest.raises(NotFound):
        store.put_source("C", "env:NO_SUCH_VARIABLE_HERE")


def test_a_value_replaces_a_source_and_the_other_way(store, tmp_path):
    (tmp_path / "key").write_text("elsewhere")
    store.put("A", "here")
    store.put_source("A", f"file:{tmp_path}/key")
    assert (store.get("A").reveal(), store.names()) == ("elsewhere", ["A"])
    store.put("A", "here again")
    assert (store.get("A").reveal(), store.describe()) == ("here again", [{"name": "A", "kept": "here"}])
    assert store.remove("A")
    assert (store.get("A"), store.remove("A")) == (None, False)


def test_what_is_gone_is_said_and_a_source_open_to_others_is_refused(store, tmp_path):
    (tmp_path / "key").write_text("v")
    store.put_source("A", f"file:{tmp_path}/key")
    (tmp_path / "key").unlink()
    with pytest.raises(NotFound):
        store.get("A")
    (tmp_path / "secrets" / "A.from").chmod(0o644)
    with pytest.raises(Refused):
        store.get("A")


class _Ring(keyring.backend.KeyringBackend):
    priority = 1

    def __init__(self):
        self.held = {("recess", "llm"): "sk-ring"}

    def get_password(self, service, username):
        if service == "locked":
            raise RuntimeError("sk-ring must not be quoted")
        return self.held.get((service, username))

    def set_password(self, service, username, password):
        raise NotImplementedError

    def delete_password(self, service, username):
        raise NotImplementedError


def test_a_keyring(store):
    before = keyring.get_keyring()
    keyring.set_keyring(_Ring())
    try:
        store.put_source("A", "keyring:recess/llm")
        assert store.get("A").reveal() == "sk-ring"
        with pytest.raises(NotFound):
            store.put_source("B", "keyring:recess/other")
        with pytest.raises(Unavailable) as caught:
            store.put_source("B", "keyring:locked/x")
        assert "sk-ring" not in caught.value.message
    finally:
        keyring.set_keyring(before)


class _Vault(BaseHTTPRequestHandler):
    """Reading of KV version 2, as Vault's HTTP API describes it."""

    def do_GET(self):
        good = self.headers.get("X-Vault-Token") == "t0ken" and self.path == "/v1/kv/data/team/llm"
        inner = {"data": {"key": "sk-vault"}, "metadata": {"version": 3, "destroyed": False, "deletion_time": ""}}
        body = json.dumps({"data": inner} if good else {"errors": ["permission denied"]}).encode()
        self.send_response(200 if good else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_vault(store, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Vault)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("VAULT_TOKEN", "t0ken")
    try:
        store.put_source("A", "vault:kv/team/llm#key")
        assert store.get("A").reveal() == "sk-vault"
        for wrong in ("vault:kv/team/llm#other", "vault:kv/team/none#key"):
            with pytest.raises(RecessError) as caught:
                store.put_source("B", wrong)
            assert "sk-vault" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()
