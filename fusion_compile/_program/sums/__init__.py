"""In which order a compiled program adds."""
