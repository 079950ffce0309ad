"""`python3 -m recess_agent run agent.py`: load the user's file, connect to the session, run the loop."""

from __future__ import annotations

import sys

from recess_agent.runner import main

sys.exit(main(sys.argv[1:]))
