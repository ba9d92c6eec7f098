"""What the package promises, tried at length: each check runs by itself for minutes to an hour, and leaves a record."""
