"""`portable-amp check` and `portable-amp fix`: hard-coded devices in anyone's code.

Knows nothing of the runtime above it, and reads code with Python's own ast: a fix replaces a few
characters, and all others stay as they were.
"""
