"""The parts of a training run: engine, optimizer, schedules, run state and run folder."""
