"""The program that a GPU would run, written, counted and compiled on a machine without one."""
