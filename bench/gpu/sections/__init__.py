"""The sections: each yields its figures, see :class:`gpu.plan.Section`."""
