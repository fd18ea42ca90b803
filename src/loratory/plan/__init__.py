"""What a run will need, before it runs: memory by part, start-up peak, file size, time. `loratory.plan` itself is the function."""
