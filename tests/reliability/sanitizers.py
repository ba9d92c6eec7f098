"""The native code, built with gcc's sanitizers: nothing out of bounds or undefined in the operators' tests, no race.

python -m tests.reliability.sanitizers [--only address thread]   `make sanitizers`

Each has a copy of the checkout of its own, in build/sanitizers, where it is built and run. The CUDA backend's source is
among what is looked at, as the tests run it on CPU tensors.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .records import recorded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitizers"
OPERATORS = [
    "against_reference",
    "buffers",
    "cuda_history",
    "cuda_rules",
    "directions",
    "golden",
    "history",
    "layouts",
    "master_weights",
    "native",
    "native_arguments",
    "no_gradient",
    "numbers",
    "remembered",
    "rounding",
    "skips",
    "state_from_outside",
]
"""The tests that run native kernels with all that comes with a call."""


class Sanitizer(NamedTuple):
    """What a build is compiled with, and what runs on it."""

    flags: str
    runtime: str
    """The library that a Python without it has to load first."""
    options: dict[str, str]
    """Its environment; {tree} is the copy, where `found` looks for reports: tests go elsewhere."""
    commands: list[list[str]]


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1",
        "libasan.so",
        # Python and torch let go of nothing as they end; what grows is load.py's to find.
        {
            "ASAN_OPTIONS": "detect_leaks=0:log_path={tree}/report",
            "UBSAN_OPTIONS": "print_stacktrace=1:log_path={tree}/report",
        },
        [
            [
                *("pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.reliability.native_only"),
                *(f"tests/test_{name}.py" for name in OPERATORS),
            ],
            ["tests.reliability.arguments", "--sequences", "5000"],
        ],
    ),
    "thread": Sanitizer(
        "-fsanitize=thread -g1",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
        [["tests.reliability.many_threads"]],
    ),
}


def copied(name):
    """Copy the checkout as it is, without what git ignores; return the copy."""
    tree = FOLDER / name
    shutil.rmtree(tree, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in (file for file in files if (ROOT / file).is_file()):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    return tree


def library(name):
    """Return where gcc has a library of its own."""
    named = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return named.stdout.strip()


def fork_join(tree):
    """Compile what tells ThreadSanitizer of libgomp's threads; return the library."""
    built = tree / "fork_join.so"
    source = tree / "tests" / "reliability" / "fork_join.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(source), "-o", str(built), "-ldl"], check=True)
    return str(built)


def compiler(tree, flags):
    """Make a compiler with these flags, not slowed by a sanitizer itself; torch takes CXX for one word."""
    script = tree / "c++"
    script.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec c++ {flags} "$@"\n')
    script.chmod(0o755)
    return str(script)


def run(name):
    """Build and run under a sanitizer; return how many tests passed. Anything that is found ends it."""
    sanitizer, tree = SANITIZERS[name], copied(name)
    # Beside the sanitizer's own what throws in C++: it is to find that when it begins.
    preloaded = [library(sanitizer.runtime), library("libstdc++.so.6")]
    preloaded += [fork_join(tree)] if name == "thread" else []
    environment = {
        **os.environ,
        **{option: value.format(tree=tree) for option, value in sanitizer.options.items()},
        "CXX": compiler(tree, sanitizer.flags),
        "BSAM_FUSED_BUILD": "cpu",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # what a sanitizer slows is not waited for at full speed
        "BSAM_FUSED_CACHE": str(tree / "cache"),
    }
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=environment, check=True)
    environment["LD_PRELOAD"] = " ".join(preloaded)
    passed = 0
    for command in sanitizer.commands:
        command = [sys.executable, "-m", *command]
        done = subprocess.run(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, check=False)
        found = "".join(path.read_text(errors="replace") for path in tree.glob("report.*"))
        print(done.stdout, found, flush=True)
        if done.returncode or found:
            raise SystemExit(f"sanitizers: {name}: {' '.join(command)} ended with status {done.returncode}")
        passed += sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
    return {"flags": sanitizer.flags, "tests passed": passed}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.sanitizers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SANITIZERS), default=list(SANITIZERS))
    options = parser.parse_args()
    for name in options.only:
        with recorded(f"{name} sanitizer") as record:
            record.figures = run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
