"""Other machines, without owning them: a catalogue, and fakes that run your loop on each."""

from portable_amp.testing.dtypes import LayerDtype, dtype_flow
from portable_amp.testing.machines import MACHINES, Machine, machine
from portable_amp.testing.play import Call, Played, Quirks, play

__all__ = [
    "MACHINES",
    "Call",
    "LayerDtype",
    "Machine",
    "Played",
    "Quirks",
    "dtype_flow",
    "machine",
    "play",
]
