"""Where the state of every parameter is, and who asks for it."""
