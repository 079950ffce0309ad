"""The inbox of a session: whatever comes in which order, no message is lost, none is begun twice, a stop stops one turn."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recess.contextlog.contract import Entry
from recess.sessions.facts import TurnFacts
from recess.sessions.inbox import Inbox, arrive, begun, ended, restored

EVENTS = st.lists(
    st.one_of(
        st.sampled_from(["queue", "steer", "interrupt"]).map(lambda mode: ("user", {"mode": mode})),
        st.just(("user", {})),
        st.just(("answer", {})),
        st.sampled_from([{}, {"turn": 1}, {"turn": 2}, {"reason": "enough"}]).map(lambda body: ("cancel", body)),
        st.just(("start", {})),
        st.sampled_from([0, 3, 1000]).map(lambda shown: ("end", {"shown": shown})),
        st.just(("restart", {})),
    ),
    max_size=40,
)


def entry(position, kind, body):
    return Entry("s", position, kind, body, 0, "", "", 0, "", 0.0, 1)


@settings(max_examples=500, deadline=None)
@given(EVENTS)
def test_every_message_is_begun_once_or_seen_by_the_turn_at_work(events):
    inbox, facts, position, turns, steered, users = Inbox(), TurnFacts(), 0, [], [], []
    for kind, body in events:
        position += 1
        if kind == "start":
            if facts.open or not inbox.queue:
                continue
            facts = TurnFacts(turn=facts.turn + 1, inbox=inbox.queue[0], started=position, open=True)
            turns.append(inbox.queue[0])
            inbox = begun(inbox)
        elif kind == "end":
            if facts.open:
                steered += [one for one in inbox.steers if one <= body["shown"]]
                inbox = ended(inbox, shown=body["shown"])
                facts = TurnFacts(turn=facts.turn, inbox=facts.inbox)
                assert not inbox.cancel, "a stop stops one turn"
        elif kind == "restart":  # put away and taken up; only what a freeze allows: no stop pending
            if not inbox.cancel and not inbox.steers:
                assert restored(inbox.seen, [*inbox.queue, *turns], facts).queue == inbox.queue
        else:
            arrived = entry(position, kind, body)
            inbox = arrive(inbox, arrived, facts)
            assert arrive(inbox, arrived, facts) == inbox, "what was seen changes nothing"
            users += [position] if kind == "user" else []
        assert list(inbox.queue) == sorted(set(inbox.queue))
        assert not inbox.cancel or facts.open or inbox.queue, "a stop that nothing can obey would stay for ever"
    assert turns == sorted(set(turns))
    assert sorted({*turns, *steered, *inbox.queue, *inbox.steers}) == users


def test_a_late_stop_stops_nothing_else():
    at_work = TurnFacts(turn=3, inbox=10, started=11, open=True)
    assert arrive(Inbox(seen=11), entry(12, "cancel", {"turn": 2}), at_work).cancel == 0
    assert arrive(Inbox(seen=11), entry(12, "cancel", {"turn": 3}), at_work).cancel == 12
    assert arrive(Inbox(seen=8), entry(9, "cancel", {}), at_work).cancel == 0  # it came before the turn's message
    assert arrive(Inbox(seen=11), entry(12, "cancel", {}), TurnFacts(turn=3)).cancel == 0  # nothing waits either
