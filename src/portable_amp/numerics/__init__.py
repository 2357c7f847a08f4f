"""Whether a device computes what it should: module by module, against float64 on the CPU.

`calls` notes what each module is given and returns, `replay` runs one alone, `rounding` and `judge`
say how far it may be off, `walk` goes through a model, `report` tells.
"""
