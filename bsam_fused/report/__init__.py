"""What a user meets on the command line: reports of what sharpness-aware steps cost."""
