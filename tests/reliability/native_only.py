"""A plugin for pytest: of tests with a backend, those of native code alone."""

NATIVE = {"cpp", "cuda-on-host"}


def pytest_collection_modifyitems(config, items):
    """Leave out the others."""
    backends = {item: getattr(item, "callspec", None) and item.callspec.params.get("backend") for item in items}
    left_out = [item for item, backend in backends.items() if isinstance(backend, str) and backend not in NATIVE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in {*left_out}]
