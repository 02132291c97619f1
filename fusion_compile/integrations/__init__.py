"""Callbacks and adapters for other people's trainers, one module for each library.

Import the module of your library: ``from fusion_compile.integrations.lightning import ScheduleFreeCallback``. The
library is imported there and nowhere else, so the package needs none of them.
"""
