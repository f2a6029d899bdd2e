"""One step: what it is given, its launches, its numbers, and that it is written whole."""
