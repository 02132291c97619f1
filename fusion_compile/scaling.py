"""``python -m fusion_compile.scaling``: what a step costs on 8 to 1,024 GPUs, with the assumptions that say so."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusion_compile._scaling.command import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what travels, what Newton-Schulz costs and what a GPU holds, for each number of GPUs.

    Args:
        arguments: The words of the command; by default those of the process. ``--model dit-xl``, ``--gpus 8 64``,
            ``--bandwidth 50`` (GB/s), ``--tflops 350``, ``--batch 32``; ``--help`` lists them.

    Returns:
        The exit status: 0, or 2 after one sentence on standard error.

    Example:
        >>> from fusion_compile.scaling import main
        >>> main(["--model", "no-such-model"])  # says so on standard error
        2
    """
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
