"""How precision is lowered: schemes, calibration, outlier handling, sensitivity."""
