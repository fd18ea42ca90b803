"""The demo: three real tasks, adapted and measured in minutes, with a report. `loratory demo` runs it."""
