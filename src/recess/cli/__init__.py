"""The command line: Docker's verbs on microVMs. A client of the local server; the only room that prints.

Result on stdout, progress on stderr; `--json` gives one envelope, errors too. One thin file a verb.
"""
