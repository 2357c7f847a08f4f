"""Whether a device computes what it should: module by module, against float64 on the CPU.

`calls` notes what each module is given and returns, `replay` runs one alone, `rounding` and `judge`
say how far it may be off, `walk` goes through a model, `report` tells.

And where two runs first differ: `follow` tells `trace` what torch does, `pending` and `fingerprint`
keep it, `tracefile` writes and reads it; `match` aligns two, `compare` judges, `difference` tells.
`program` is the command line.
"""
