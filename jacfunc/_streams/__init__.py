"""The door to Jacobians that are never whole: a module's, block by block."""

from jacfunc._streams.stream import stream_jacobian
