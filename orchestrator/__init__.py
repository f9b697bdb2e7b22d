"""How a run is led: decides; torch-free but for `worker`."""
