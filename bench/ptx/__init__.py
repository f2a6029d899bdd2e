"""An emulator of PTX in numpy: compiled kernels run on CPU tensors. See README.md here."""
