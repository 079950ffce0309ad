"""Adapters against the real packages: `make test-adapters` installs them beside the others; where they are not, nothing of
this folder is collected."""

from importlib.util import find_spec

PACKAGES = (
    "agents",
    "claude_agent_sdk",
    "langgraph",
    "pydantic_ai",
    "e2b",
    "e2b_code_interpreter",
    "openai",
    "anthropic",
)
collect_ignore_glob = [] if all(find_spec(name) for name in PACKAGES) else ["test_*.py"]
