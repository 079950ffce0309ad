"""Room `demo`: the main job as a story that is checked, told through the HTTP API like any client would.

It starts a real server over a home of its own, plays the outside world (a model provider, payments, a git server) on
loopback, and lets a real agent work in real machines. It must never import the rooms it checks: what it claims about
them it sees from outside, in the API's answers, in /proc and inside the machines.
"""

from recess.demo.report import Report, Step
from recess.demo.run import StoryOptions, tell_story

__all__ = ["Report", "Step", "StoryOptions", "tell_story"]
