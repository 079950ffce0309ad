"""What buildah is told of registries."""

import tomllib

import pytest

from recess.errors import MissingTool
from recess.images import registry, tools
from recess.images.registry import registries_conf

HOSTS = """# unqualified-search-registries = ["example.org"]
[[registry]]
prefix = "docker.io"
location = "mirror.example.org"
"""


def told(hosts, *texts):
    return tomllib.loads(registries_conf(hosts, *texts))


def test_a_bare_name_is_docker_hubs_unless_the_host_says_otherwise():
    assert told("", "FROM debian:12") == {"unqualified-search-registries": ["docker.io"]}
    assert told('unqualified-search-registries = ["quay.io"]\n', "")["unqualified-search-registries"] == ["quay.io"]


def test_registries_of_this_host_need_no_tls_and_the_hosts_mirrors_stay():
    text = (
        "FROM localhost:5000/a AS x\nCOPY --from=127.0.0.1:5001/b:1 / /\nFROM notlocalhost:1/c\nFROM my.localhost/d\n"
    )
    found = told(HOSTS, text, "BASE=127.0.0.1:5002/e")
    assert found["unqualified-search-registries"] == ["docker.io"]
    assert found["registry"][0] == {"prefix": "docker.io", "location": "mirror.example.org"}
    assert [(one["location"], one["insecure"]) for one in found["registry"][1:]] == [
        ("127.0.0.1:5001", True), ("127.0.0.1:5002", True), ("localhost:5000", True),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["buildah", "skopeo"])
def test_a_tool_that_is_missing_is_told_with_what_brings_it(monkeypatch, name):
    monkeypatch.setattr(tools.shutil, "which", lambda *_a, **_k: None)
    with pytest.raises(MissingTool) as caught:
        tools.find_tool(name)
    assert f"apt-get install {name}" in caught.value.hint
    assert "tools/setup.sh" in caught.value.hint


def test_what_a_dockerfile_may_mean_by_an_image():
    text = """
# FROM nothing
ARG BASE=base
ARG QUOTED="team/tool:2" OTHER
FROM --platform=linux/amd64 $BASE AS one
  from python:3.12
RUN echo FROM inside
FROM one
COPY --from=127.0.0.1:5000/lib:1 /a /b
COPY --from=one /a /c
FROM UPPER/Case
"""
    assert registry.bases(text, ["WORD=clay", "BASE=mine:3", "EMPTY="]) == [
        "python:3.12", "one", "127.0.0.1:5000/lib:1", "base", "team/tool:2", "clay", "mine:3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lent"),
    [
        ("base", "localhost/base:latest"), ("team/tool:2", "localhost/team/tool:2"),
        ("127.0.0.1:5000/lib:1", "127.0.0.1:5000/lib:1"), ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
        ("localhost/x", "localhost/x:latest"),
    ],
)  # fmt: skip
def test_what_buildah_calls_an_image_of_ours(name, lent):
    assert registry.lent_name(name) == lent
