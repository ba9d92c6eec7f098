"""What a user meets on the command line: reports of what sharpness-aware training is for, and what it costs."""
