"""What sharpness-aware training buys on real data, each method with a radius chosen alike: docs/results.md."""
