"""Recorded steps of the public data2vec 2.0 code, and the comparison of this library with them; see README.md."""
