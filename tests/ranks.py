"""Two processes on gloo, or four, started once, in which tests run their checks."""

import datetime
import importlib
import multiprocessing.connection
import os
import queue
import sys
import tempfile
import threading
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _end_with_pytest():
    """Were it killed, nobody would give orders any more: the other ends of the queues are open here, too."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _serve(rank, count, store, orders, reports):
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while True:
        module, name, args = orders.get()
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(module), name)(*args)
            dist.barrier()
            reports.put((rank, ""))
        except BaseException:
            reports.put((rank, traceback.format_exc()))


def on_two_ranks(check):
    """Make a test that runs ``check`` on two ranks, with the test's parameters as arguments."""
    return _on("pair", check)


def on_four_ranks(check):
    """Likewise on four."""
    return _on("quartet", check)


def _on(fixture, check):
    name = f"on_a_rank_{check.__name__}"
    setattr(sys.modules[check.__module__], name, check)
    parameters = check.__code__.co_varnames[: check.__code__.co_argcount]

    def test(request):
        ranks = request.getfixturevalue(fixture)
        ranks.run(check.__module__, name, [request.getfixturevalue(parameter) for parameter in parameters])

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return pytest.mark.usefixtures(*parameters)(test) if parameters else test


class Ranks:
    """Some ranks; started anew after a check that failed, whose collectives may be out of step."""

    def __init__(self, count):
        self._count = count
        self._processes = []

    def start(self):
        context = mp.get_context("spawn")
        self._reports = context.Queue()
        self._orders = [context.Queue() for _ in range(self._count)]
        store = os.path.join(tempfile.mkdtemp(), "store")
        self._processes = [
            context.Process(target=_serve, args=(rank, self._count, store, orders, self._reports), daemon=True)
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def run(self, module, name, args=(), timeout=60):
        """Run a function on all ranks; fail with what any of them raised."""
        if not self._processes:
            self.start()
        for orders in self._orders:
            orders.put((module, name, args))
        failures = {}
        try:
            for _ in range(self._count):
                rank, failure = self._reports.get(timeout=timeout)
                if failure:
                    failures[rank] = failure
                    timeout = 5  # the others wait for this one
        except queue.Empty:
            failures["missing"] = f"no answer within {timeout} s"
        if failures:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items()))
