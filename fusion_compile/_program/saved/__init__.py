"""Compiled programs on disk: a second process begins where the first one's compiler ended."""
