"""In-guest SDK of Recess: an agent is an ordinary Python loop; standard library only, Python 3.9 or later.

It knows the session protocol (docs/internals/agent-protocol.md) and nothing of the host package: no database, no
machine, no credentials. Everything durable goes through the session socket, and the host stamps it.
"""

from recess_agent.app import Agent, agent
from recess_agent.blobs import Attachment, Blob
from recess_agent.cancelling import TurnCancelled
from recess_agent.cut_replies import CutReply, Repair
from recess_agent.openai import ModelError, openai_chat
from recess_agent.session import Session, Turn
from recess_agent.stream import Reply, ToolCall
from recess_agent.tools import Call, Tool, tool
from recess_agent.upcasting import NewerEntry
from recess_agent.waiting import Report
from recess_agent.wire import SessionClosed, SessionError

__all__ = [
    "Agent",
    "Attachment",
    "Blob",
    "Call",
    "CutReply",
    "ModelError",
    "NewerEntry",
    "Repair",
    "Reply",
    "Report",
    "Session",
    "SessionClosed",
    "SessionError",
    "Tool",
    "ToolCall",
    "Turn",
    "TurnCancelled",
    "agent",
    "openai_chat",
    "tool",
]
