"""The teacher: an exponential moving average of a student, sharded or not."""

from d2v_fast.teacher.average import Teacher, decay_at

__all__ = ["Teacher", "decay_at"]
