"""Transforms: functions that change a model as a whole, before adapters are attached to it."""
