"""Models: pure functions of tensors, with no configuration files, devices or logging."""
