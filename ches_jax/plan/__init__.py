"""Before a run: does it fit on those devices, and how long would it take? Compiled for them without having any."""
