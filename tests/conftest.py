"""Which cases of long tests the fast run takes."""

import os
from collections import defaultdict


def pytest_collection_modifyitems(config, items):
    """In Triton's interpreter a test marked `interpreted(n)` keeps n of its Triton cases, evenly spread; `-m ''` runs them all."""
    if os.environ.get("TRITON_INTERPRET") != "1" or config.option.markexpr != "not slow":
        return
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("interpreted") and "triton" in item.callspec.id:
            cases[item.parent.nodeid, item.originalname].append(item)
    dropped = []
    for group in cases.values():
        keep = group[0].get_closest_marker("interpreted").args[0]
        kept = {i * len(group) // keep + len(group) // (2 * keep) for i in range(keep)}
        dropped += [item for i, item in enumerate(group) if i not in kept]
    config.hook.pytest_deselected(items=dropped)
    gone = set(map(id, dropped))
    items[:] = [item for item in items if id(item) not in gone]
