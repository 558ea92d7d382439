"""The lab of the suites: what a case is, how a burst is timed, rounds of pairs and what follows from them, rows."""
