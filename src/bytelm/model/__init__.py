"""Networks: functions of tensors, independent of files, devices and logging."""
