"""In which C++ files the kernels of a CPU's program are compiled."""
