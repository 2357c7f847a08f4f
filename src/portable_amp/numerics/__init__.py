"""Whether a device computes what it should: module by module, against float64 on the CPU.

`calls` notes what each module is given and returns, `replay` runs one alone, `rounding` and `judge`
say how far it may be off, `walk` goes through a model, `report` tells.

Where it overflows: `watch` sees each operation and knows its module; `origins` and `nonfinite` look
for who makes what is not finite, `half` and `headroom` measure how far a model is from that.
"""
