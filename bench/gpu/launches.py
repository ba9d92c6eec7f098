"""Counts the launches of a case's implementations, for bench.gpu.measure: in a process that times nothing.

python -m bench.gpu.launches CASE IMPLEMENTATION... ; JSON on the last line.
"""

from __future__ import annotations

import json
import sys

from bench import steps
from bench.gpu.cases import CASES
from bench.gpu.device import current

if __name__ == "__main__":
    name, *who = sys.argv[1:]
    device = current()
    print(json.dumps(steps.launches(device.case(CASES[name]), device.make_clock(), who)))
