"""The ground: command line, errors, files, units. It imports nothing else of this project."""
