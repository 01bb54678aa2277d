"""Where examples come from, in which order, and how they are varied."""
