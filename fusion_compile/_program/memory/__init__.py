"""How much memory a step's program holds while it runs, and what to do about it."""
