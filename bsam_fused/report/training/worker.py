"""A process that trains: reads runs from its standard input and writes rows to its output, a line of JSON each.

It ends as soon as its input does: whoever asked is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from dataclasses import asdict
from typing import Any

import torch

from bsam_fused.report.training.runs import Run, train


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what else is printed is no answer
    torch.set_num_threads(1)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    while True:
        print(json.dumps(_answer(asked.get())), file=answers, flush=True)


def _read(asked: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _answer(line: str) -> dict[str, Any]:
    try:
        return asdict(train(Run(**json.loads(line))))
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main()
