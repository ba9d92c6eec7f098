"""Build, tests, sanitizer and benchmarks on a machine with an NVIDIA GPU: `make gpu`."""
