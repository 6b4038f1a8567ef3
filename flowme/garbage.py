"""Python's garbage collector, kept from what is known to be in use."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_AT_FIRST = gc.get_freeze_count()  # some hundred since Python 3.12


@contextmanager
def set_aside() -> Iterator[None]:
    """Leaves objects that are there already out of collections. Writing a program JAX makes so many
    that the collector goes over all of memory again and again, all modules included: half of the
    time it took. Dead cycles that are there already wait until the end."""
    if gc.get_freeze_count() > _AT_FIRST:  # by somebody who knows why
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
