"""What `bsam-fused` does, a module a command; `report` is a package of its own."""
