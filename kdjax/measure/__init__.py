"""Models as they are deployed, measured: each in a process of its own, in turns, on the same cores."""
