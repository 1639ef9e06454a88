"""The profilers of the backends, one file each: a stage that is opened with its library's profiler on."""
