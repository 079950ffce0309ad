"""Frameworks whose memory is the context log: their own code runs in the agent's process, a crash and a fork are survived."""

from recess.testing.session_world import machine_of, texts, world

OPENAI = """
from agents import Agent, Model, ModelResponse, RunConfig, Runner, Usage, set_tracing_disabled
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from recess_agent import agent
from recess_agent.memory_openai_agents import LogMemory

set_tracing_disabled(True)

class Echo(Model):
    async def get_response(self, system_instructions, input, *args, **kwargs):
        seen = "|".join(one["content"] for one in input if one.get("role") == "user")
        text = ResponseOutputText(text=seen, type="output_text", annotations=[])
        said = ResponseOutputMessage(id="m", content=[text], role="assistant", status="completed", type="message")
        return ModelResponse(output=[said], usage=Usage(), response_id=None)

    def stream_response(self, *args, **kwargs):
        raise AssertionError("not streamed here")

@agent(idle="30s")
async def me(s):
    helper = Agent(name="helper", model=Echo())
    async for turn in s:
        memory = LogMemory(s)
        if turn.text == "pop":
            popped = await memory.pop_item()
            await s.say(f"{popped['role']} {len(await memory.get_items())} {len(await memory.get_items(limit=1))}")
        elif turn.text == "clear":
            await memory.clear_session()
            await s.say(str(await memory.get_items()))
        else:
            done = await Runner.run(helper, turn.text, session=memory)
            await s.say(done.final_output)
"""

PYDANTIC = """
from pydantic_ai import Agent
from pydantic_ai.messages import ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import FunctionModel
from recess_agent import agent
from recess_agent.memory_pydantic_ai import LogHistory

def echo(messages, info):
    asked = [p.content for m in messages for p in m.parts if isinstance(p, UserPromptPart)]
    return ModelResponse(parts=[TextPart("|".join(asked))])

@agent(idle="30s")
async def me(s):
    helper = Agent(FunctionModel(echo))
    async for turn in s:
        history = LogHistory(s)
        done = await helper.run(turn.text, message_history=history.messages())
        await history.add(done.new_messages())
        await s.say(done.output)
"""

LANGGRAPH = """
import asyncio, operator
from typing import Annotated, TypedDict
from langgraph.graph import END, START, StateGraph
from recess_agent import agent
from recess_agent.memory_langgraph import LogSaver

class State(TypedDict):
    said: Annotated[list, operator.add]

@agent(idle="30s")
async def me(s):
    saver = None
    async for turn in s:
        saver = saver or LogSaver(s)
        builder = StateGraph(State)
        builder.add_node("echo", lambda state: {"said": [f"heard {state['said'][-1]}"]})
        builder.add_edge(START, "echo")
        builder.add_edge("echo", END)
        graph = builder.compile(checkpointer=saver)
        config = {"configurable": {"thread_id": "t"}}
        if turn.text == "history":
            await s.say(str(len([one async for one in graph.aget_state_history(config)])))
        elif turn.text == "sync":
            done = await asyncio.to_thread(graph.invoke, {"said": ["sync"]}, config)
            await s.say("|".join(done["said"]))
        elif turn.text == "blocked":
            saver.loop_answers_s = 0.2
            try:
                graph.invoke({"said": ["x"]}, config)
            except RuntimeError as error:
                await s.say(str(error))
            saver.loop_answers_s = 10.0
        elif turn.text == "forget":
            await saver.adelete_thread("t")
            await s.say(str(await saver.aget_tuple(config)))
        else:
            done = await graph.ainvoke({"said": [turn.text]}, config)
            await s.say("|".join(done["said"]))
"""

CLAUDE = """
from claude_agent_sdk.testing import run_session_store_conformance
from recess_agent import agent
from recess_agent.memory_claude import LogStore

@agent(idle="30s")
async def me(s):
    made = 0
    async for turn in s:
        if turn.text == "conformance":
            def fresh():
                global made
                me.count = getattr(me, "count", 0) + 1
                return LogStore(s, f"c{me.count}")
            await run_session_store_conformance(fresh, skip_optional=frozenset({"list_session_summaries"}))
            await s.say(f"{me.count > 5}")
            continue
        store, key = LogStore(s), {"project_key": "p", "session_id": "1"}
        line = {"type": "user", "uuid": turn.text, "message": turn.text}
        await store.append(key, [line, {"type": "title", "title": "x"}])
        await store.append(key, [line])
        await s.say(",".join(one.get("uuid", "-") for one in await store.load(key)))
"""


async def talk(w, session, *words):
    """Say words, a turn each; return all that was said."""
    for word in words:
        done = len(await w.entries(session, "turn.end"))
        await w.sessions.send(session, word)
        end = await w.until(session, "turn.end", count=done + 1, timeout_s=60)
        assert end.body["status"] == "done", await w.describe(session)
    return texts(await w.entries(session))


async def lose_the_process(w, session):
    """End the machine with everything in its memory: what is known afterwards is known from the log."""
    await w.machines.kill(await machine_of(w, session), why="the power went")


async def test_openai_agents():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": OPENAI})
        s = (await w.sessions.start("me")).id
        assert await talk(w, s, "one", "two") == ["one", "one|two"]
        await lose_the_process(w, s)
        assert (await talk(w, s, "three"))[-1] == "one|two|three"
        child = (await w.sessions.fork(s)).id
        assert (await talk(w, child, "there"))[-1] == "one|two|three|there"
        assert (await talk(w, s, "pop"))[-1] == "assistant 5 1"
        assert (await talk(w, s, "clear", "four"))[-2:] == ["[]", "four"]


async def test_pydantic_ai():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": PYDANTIC})
        s = (await w.sessions.start("me")).id
        assert await talk(w, s, "one", "two") == ["one", "one|two"]
        await lose_the_process(w, s)
        assert (await talk(w, s, "three"))[-1] == "one|two|three"


async def test_langgraph():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": LANGGRAPH})
        s = (await w.sessions.start("me")).id
        assert (await talk(w, s, "one"))[-1] == "one|heard one"
        await lose_the_process(w, s)
        assert (await talk(w, s, "two"))[-1] == "one|heard one|two|heard two"
        assert (await talk(w, s, "sync"))[-1] == "one|heard one|two|heard two|sync|heard sync"
        assert int((await talk(w, s, "history"))[-1]) == 9
        assert "use ainvoke" in (await talk(w, s, "blocked"))[-1]
        assert (await talk(w, s, "forget"))[-1] == "None"
        await lose_the_process(w, s)
        assert (await talk(w, s, "new"))[-1] == "new|heard new"


async def test_claude_agent_sdk():
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("me", {"agent.py": CLAUDE})
        s = (await w.sessions.start("me")).id
        assert await talk(w, s, "conformance", "a", "b") == ["True", "a,-", "a,-,b,-"]
        await lose_the_process(w, s)
        assert (await talk(w, s, "c"))[-1] == "a,-,b,-,c,-"
