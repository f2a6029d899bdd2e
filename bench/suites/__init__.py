"""Each suite is a module with ``main(argv) -> int`` that leaves a table, a plot and a JSON."""
