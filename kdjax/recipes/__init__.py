"""Whole procedures over the training loop."""
