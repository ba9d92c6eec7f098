"""The operators of a sharpness-aware step over flat buffers, and their backends."""
