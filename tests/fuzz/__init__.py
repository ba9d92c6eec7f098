"""A stateful fuzzer: random models, calls and faults beside an independent model of what must happen."""
