"""Training, evaluation and reports. The parts are imported by name, when they are needed."""
