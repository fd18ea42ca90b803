"""What a run will need, before it runs: memory by part, start-up peak, file size, time. The package is not called `plan`, which would
hide the function `loratory.plan`."""
