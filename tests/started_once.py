"""What the server of the tests' processes imports last: see several_processes.py.

A capture looks at everything that the collector tracks; what libraries made is put aside, as in conftest.py.
"""

from __future__ import annotations

import gc

from fusion_compile import _tracked

gc.collect()
gc.freeze()
_tracked.walks_frozen = False
