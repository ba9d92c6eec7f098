"""No warning of the C++ files: -Wall -Wextra -Wconversion of the compiler, and clang-tidy's: `make tidy`.

What is for CUDA is looked at with the headers that stand in for it, tests/shim; the kernels themselves are nvcc's.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bsam_fused.extension import compiling, places

from .records import recorded

ROOT = Path(__file__).parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
SHIM = ["-DBSAM_FUSED_CUDA=1", f"-I{ROOT / 'tests' / 'shim'}"]
TIDY = str(Path(sys.executable).with_name("clang-tidy"))


def warned(source, folder):
    """Return what the compiler and clang-tidy say of a file; "" where it is nothing."""
    compiled = folder / "compiled.o"
    command = compiling.cxx_command(source, compiled, None)
    # Without OpenMP, whose headers are gcc's own.
    flags = [
        word
        for word in command[len(compiling.compiler()) : -4]
        if word != "-fopenmp" and not word.startswith("-ffile-prefix-map")
    ]
    tidy = [TIDY, "--quiet", f"--config-file={ROOT / '.clang-tidy'}", str(source), "--", *flags, *SHIM]
    said = [
        subprocess.run(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for each in ([*command, *SHIM, *WARNINGS], tidy)
    ]
    return "".join(f"{it.stdout}{it.args[0]} ended with {it.returncode}" for it in said if it.returncode)


def version(command):
    """Return the lines that a program says of itself."""
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()


def find():
    """Return what looked at how many files; ends where there is a warning."""
    with TemporaryDirectory() as name:
        for source in (path for path in compiling.sources(with_cuda=True) if path.suffix == ".cpp"):
            if words := warned(source, Path(name)):
                raise SystemExit(words)
            print(f"{source.name}: no warning", flush=True)
    files = len([*places.sources_folder().glob("*.cpp")])
    tidy = next(line.strip() for line in version([TIDY]) if "version" in line)
    return {"files": files, "compiler": version(compiling.compiler())[0], "tidy": f"clang-tidy, {tidy}"}


def main():
    argparse.ArgumentParser(prog="python -m tests.reliability.warnings", description=__doc__).parse_args()
    with recorded("warnings") as record:
        record.figures = find()
    return 0


if __name__ == "__main__":
    sys.exit(main())
