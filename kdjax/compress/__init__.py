"""Smaller than the student: models cut, factorised, thinned out and quantised."""
