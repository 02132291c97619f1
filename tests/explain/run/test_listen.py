"""Torch's messages are recorded, and its loggers stay as they were."""

from __future__ import annotations

import logging

from fusion_compile.explain._run.listen import listening


def test_others_who_listen_hear_what_they_would_hear_anyway() -> None:
    heard: list[logging.LogRecord] = []

    class Other(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    with listening():
        pass
    logger = logging.getLogger("torch._inductor.cudagraph_utils.__cudagraphs")
    logger.addHandler(other := Other())
    try:
        with listening() as ours:
            logger.debug("of no interest")
            logger.warning("skipping cudagraphs due to the test")
    finally:
        logger.removeHandler(other)
    assert [record.getMessage() for record in heard] == ["skipping cudagraphs due to the test"]
    assert ours.cuda_graphs == ["of no interest", "skipping cudagraphs due to the test"]
