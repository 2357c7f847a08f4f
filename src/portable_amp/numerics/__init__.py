"""Whether a device computes what it should, and where it does not: four rooms.

Replay, module by module against float64 on the CPU: `calls` notes what each module is given and
returns, `replay` runs one alone, `rounding`, `judge` and `verdict` say how far it may be off and
why it is, `walk` goes through a model, `verify` begins it, `report` tells. `islands` are modules
that stay in fp32, and `proof` is what `tuned` asks. `operations` and `certificate` are the same for
single operations: `portable-amp doctor --thorough`.

Where it overflows: `watch` sees each operation and knows its module; `origins` and `nonfinite` look
for who makes what is not finite, `half` and `headroom` measure how far a model is from that.

And where two runs first differ: `follow` tells `trace` what torch does, `pending` and `fingerprint`
keep it, `tracefile` writes and reads it; `match` aligns two, `compare` judges, `difference` tells.
`program` is the command line.
"""
