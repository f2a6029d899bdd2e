"""The optimizer's state: its formats, the buffers it lies in, and how many bytes go where."""
