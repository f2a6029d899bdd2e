"""The project's compiled kernels on the emulator (`bench.ptx`): without a GPU, and without the interpreter."""
