"""Sources of training and test audio."""
