"""Tools: schemas from annotations, effect classes, calls."""

import ast
from pathlib import Path
from typing import Literal

import pytest
import recess_agent
from recess_agent import Call, tool
from recess_agent.tools import as_tool, render


def test_schema():
    @tool
    def find(path: str, depth: int = 3, kinds: list[str] | None = None, how: Literal["a", "b"] = "a") -> str:
        """Find things."""
        return path

    assert find.schema() == {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find things.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "depth": {"type": "integer", "default": 3},
                    "kinds": {"type": "array", "items": {"type": "string"}},
                    "how": {"type": "string", "enum": ["a", "b"], "default": "a"},
                },
                "additionalProperties": False,
                "required": ["path"],
            },
        },
    }
    assert find("x") == "x"  # still a function


async def test_call_is_injected_and_hidden():
    @tool(effect="once", verify=lambda call: {"found": call.key})
    async def charge(cents: int, *, call) -> dict:
        return {"cents": cents, "key": call.key}

    call = Call("c1", "charge", {"cents": 5}, "k", 1)
    assert "call" not in charge.parameters["properties"]
    assert await charge.run(call) == {"cents": 5, "key": "k"}
    assert await charge.check(call) == {"found": "k"}
    with pytest.raises(LookupError):
        await as_tool(lambda: None).check(call)


def test_mistakes_are_told_at_once():
    def nothing():
        pass

    with pytest.raises(TypeError, match="effect"):
        tool(effect="maybe")(nothing)
    with pytest.raises(TypeError, match="verify"):
        tool(verify=nothing)(nothing)
    with pytest.raises(TypeError, match="same name"):
        recess_agent.agent(tools=[tool(nothing), nothing])(nothing)


def test_render():
    assert [render(v) for v in ("a", None, {"b": "ü"}, {1, 2}.__class__)] == ["a", "", '{"b": "ü"}', "<class 'set'>"]


def test_only_the_standard_library_and_python_3_9():
    """But for the memories of frameworks, each of which needs its own; nothing else imports these."""
    import sys

    theirs = {"memory_langgraph.py": {"langgraph"}, "memory_pydantic_ai.py": {"pydantic_ai"}}
    for path in Path(recess_agent.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                allowed = top == "recess_agent" or top in sys.stdlib_module_names or top in theirs.get(path.name, ())
                assert allowed, f"{path.name} imports {name}"
                assert not name.startswith("recess_agent.memory_"), f"{path.name} imports {name}"
