"""The protocol of pushes, explored: real control on both sides, all between them modelled."""
