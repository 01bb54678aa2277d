"""A comparison of methods: its results, its statistics for people, its report."""
