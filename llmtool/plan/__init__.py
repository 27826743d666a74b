"""The best parallel deployment of a model, found without a device: space, bounds, search, report, calibration."""
