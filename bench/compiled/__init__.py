"""The project's compiled kernels on the emulator (`bench.ptx`): no GPU, no interpreter."""
