"""What compiled kernels are made of: disassembly, the flow through it, instructions per element."""
