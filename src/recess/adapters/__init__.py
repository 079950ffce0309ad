"""Other houses' shapes over ours, each thin: an agent moves here by an import. Their words stay in this room.

`e2b`: a machine with the shape of E2B's SDK. `openai_agents`, `claude_agent`, `langgraph`, `pydantic_ai`: a session's
context log as the memory of those frameworks; they need the framework, and run in a machine's agent or outside. This
room knows the SDKs (`recess.sdk`, `recess_agent`) and nothing else of the house.
"""
